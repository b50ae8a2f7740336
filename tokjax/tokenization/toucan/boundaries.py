"""Where groups of characters begin: at white space, or where a predictor says so.

Reference: Nawrot et al., "Efficient Transformers with Dynamic Token Pooling" (arXiv 2211.09761),
which Fleshman and Van Durme, "Toucan" (arXiv 2311.08620), build on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError, nearest

_KINDS = ("learned", "whitespace")
WHITESPACE = (9, 10, 11, 12, 13, 32)  # bytes


@dataclass(frozen=True)
class Boundaries:
    """How a character's beginning of a group is decided; never from later characters."""

    # by a predictor that is trained with the model; or before each run of white space
    kind: Literal["learned", "whitespace"] = "learned"
    prior: float = 0.2  # learned: expected share of characters that begin a group
    temperature: float = 0.5  # learned: of the relaxed draws in training
    threshold: float = 0.5  # learned: above which a draw, or a probability, is a boundary
    hidden: int | None = None  # learned: width of the predictor's hidden layer; None: the model's

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise ConfigError(
                f"unknown boundaries.kind={self.kind!r}.{nearest(str(self.kind), _KINDS)}"
            )
        for name in ("prior", "threshold"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"boundaries.{name}={getattr(self, name)} must be above 0 and below 1"
                )
        if not self.temperature > 0:
            raise ConfigError(f"boundaries.temperature={self.temperature} must be above 0")
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError(f"boundaries.hidden={self.hidden} must be at least 1, or None")

    def init(self, key: jax.Array, width: int, dtype: Any) -> dict[str, Array]:
        """Returns initial parameters of the predictor, which begins at the prior."""
        hidden, keys = self.hidden or width, jax.random.split(key)
        start = jnp.log(self.prior) - jnp.log1p(-self.prior)
        return {
            "enter": (width**-0.5 * jax.random.normal(keys[0], (width, hidden))).astype(dtype),
            "enter_bias": jnp.zeros((hidden,), dtype),
            "leave": (hidden**-0.5 * jax.random.normal(keys[1], (hidden, 1))).astype(dtype),
            "leave_bias": start.astype(dtype)[None],
        }

    def logits(self, w: Mapping[str, Array], x: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Returns the log-odds that each character begins a group.

        Args:
            w: from `init`.
            x: states that have seen no later character.
        """
        y = jax.nn.relu(x @ w["enter"].astype(x.dtype) + w["enter_bias"].astype(x.dtype))
        out = y @ w["leave"].astype(x.dtype) + w["leave_bias"].astype(x.dtype)
        return out[..., 0].astype(jnp.float32)

    def drawn(
        self,
        w: Mapping[str, Array],
        x: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        key: jax.Array | None,
    ) -> Float[Array, "B T"]:
        """Returns 1 for characters that begin a group and 0 for others, with a gradient.

        Args:
            w: from `init`.
            x: as in `logits`.
            tokens: the characters, as bytes.
            key: of the draws; None takes what is likelier than the threshold.
        """
        if self.kind == "whitespace":
            return whitespace_boundaries(tokens).astype(jnp.float32)
        return relaxed_bernoulli(self.logits(w, x), key, self.temperature, self.threshold)


def whitespace_boundaries(tokens: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns which bytes begin a run of white space.

    >>> whitespace_boundaries(jnp.array([list(b"a  bc d")])).astype(int).tolist()
    [[0, 1, 0, 0, 0, 1, 0]]
    """
    blank = (tokens[..., None] == jnp.array(WHITESPACE)).any(-1)
    return blank & ~jnp.pad(blank, ((0, 0), (1, 0)))[:, :-1]


def relaxed_bernoulli(
    logits: Float[Array, "*N"], key: jax.Array | None, temperature: float, threshold: float
) -> Float[Array, "*N"]:
    """Returns 0 or 1, with the gradient of a relaxed draw (straight-through).

    Args:
        logits: log-odds of 1.
        key: of the draw; None draws nothing and compares the probability with the threshold.
        temperature: of the relaxation.
        threshold: above which a relaxed draw is 1.
    """
    if key is None:
        soft = jax.nn.sigmoid(logits)
    else:
        noise = jax.random.logistic(key, logits.shape, logits.dtype)
        soft = jax.nn.sigmoid((logits + noise) / temperature)
    hard = (soft > threshold).astype(soft.dtype)
    return jax.lax.stop_gradient(hard - soft) + soft


def boundary_prior_loss(
    total: Float[Array, "*N"], characters: Int[Array, "*N"], prior: float
) -> Float[Array, "*N"]:
    """Returns -log Binomial(characters, prior).pmf(total) / characters, differentiable in total.

    >>> n = jnp.array(10)
    >>> [round(float(boundary_prior_loss(jnp.float32(k), n, 0.2)), 6) for k in (2, 5)]
    [0.119736, 0.363348]
    """
    n = characters.astype(jnp.float32)
    ways = jax.lax.lgamma(n + 1) - jax.lax.lgamma(total + 1) - jax.lax.lgamma(n - total + 1)
    logp = ways + total * jnp.log(prior) + (n - total) * jnp.log1p(-prior)
    return -logp / jnp.maximum(n, 1.0)

"""How much the last state, or a logit, moves with each input embedding.

Reference: "Transformers need glasses! Information over-squashing in language tasks",
arXiv 2406.04267.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.analysis.over_squashing.collapse import check_sequences, variant
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer


@dataclass(frozen=True)
class Ends:
    """What the first and the last token weigh beside those between them.

    Attributes:
        first: the first token's value divided by the median of those between.
        last: the last token's likewise. Both above 1 is the U shape.
    """

    first: Float[np.ndarray, "*B"]
    last: Float[np.ndarray, "*B"]


def ends(profile: Float[np.ndarray, "*B T"]) -> Ends:
    """Returns the ends of profiles relative to their middle.

    Raises:
        ConfigError: there is no token between first and last.
    """
    profile = np.asarray(profile, np.float64)
    if profile.shape[-1] < 3:
        raise ConfigError(f"{profile.shape[-1]} tokens have no middle: give 3 at least")
    middle = np.median(profile[..., 1:-1], axis=-1)
    return Ends(profile[..., 0] / middle, profile[..., -1] / middle)


def jacobian_norms(
    function: Callable[[Float[Array, "B T D"]], Float[Array, "B M"]],
    x: Float[Array, "B T D"],
    *,
    key: jax.Array | None = None,
    probes: int | None = 8,
) -> Float[Array, "B T"]:
    """Returns the Frobenius norm of the Jacobian of each row's output by each of its inputs.

    The square of the norm is the mean of |J' z|^2 over random z: each probe is one backward pass.
    Rows must not depend on one another.

    Args:
        function: of all rows.
        x: where.
        key: of the random vectors.
        probes: how many; None takes the M unit vectors instead, which is exact.

    Raises:
        ConfigError: random probes without a key, or fewer than one.
    """
    if probes is not None and (probes < 1 or key is None):
        raise ConfigError(f"probes={probes} must be at least 1, and random ones need key=")
    out, pullback = jax.vjp(function, x)
    B, M = out.shape

    def squares(cotangent: Float[Array, "B M"]) -> Float[Array, "B T"]:
        (gradient,) = pullback(cotangent.astype(out.dtype))
        return jnp.square(gradient.astype(jnp.float32)).sum(-1)

    if probes is None:
        unit = lambda m: jnp.broadcast_to(jnp.arange(M) == m, (B, M))  # noqa: E731
        found = jax.lax.map(lambda m: squares(unit(m)), jnp.arange(M))
        return jnp.sqrt(found.sum(0))
    assert key is not None
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), (B, M))  # noqa: E731
    found = jax.lax.map(lambda i: squares(draw(i)), jnp.arange(probes))
    return jnp.sqrt(found.mean(0))


def jacobian_profile(
    model: Transformer,
    params: Params,
    tokens: Int[np.ndarray, "B T"],
    *,
    of: Literal["state", "logit"] = "state",
    targets: Int[np.ndarray, "B"] | None = None,
    key: jax.Array | None = None,
    probes: int | None = 8,
    dtype: str | None = None,
) -> Float[Array, "B T"]:
    """Returns how much what is predicted from the last token moves with each input embedding.

    Args:
        model: a causal one.
        params: its parameters.
        tokens: rows of one length.
        of: the last token's final state (the norm of the Jacobian), or one logit (of its gradient).
        targets: ids whose logit is meant; None takes the likeliest.
        key: of the probes of a state's Jacobian; None is the key of seed 0.
        probes: backward passes for a state; None is exact, one for each dimension.
        dtype: of the activations; None takes the model's.

    Raises:
        ConfigError: the model is not causal, a row too long, or an option out of range.
        DataError: there is no row, or an id that is not in the vocabulary.
    """
    if of not in ("state", "logit"):
        raise ConfigError(f"unknown of={of!r}.{nearest(str(of), ('state', 'logit'))}")
    if targets is not None and of == "state":
        raise ConfigError("targets are ids whose logit is meant: set of='logit'")
    model, tokens = variant(model, dtype=dtype), np.asarray(tokens, np.int32)
    check_sequences(model, tokens)  # type: ignore[arg-type]
    if of == "logit":
        rows = None if targets is None else np.asarray(targets, np.int32)[:, None]
        if rows is not None:
            check_sequences(model, rows)  # type: ignore[arg-type]
            if len(rows) != len(tokens):
                raise ConfigError(f"{len(rows)} targets for {len(tokens)} rows: give one for each")
        return _of_logit(model, params, tokens, rows)
    key = jax.random.key(0) if key is None else key
    return _of_state(model, probes, params, tokens, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_state(model: Transformer, probes: int | None, params: Params, tokens, key):
    function = lambda x: model.backbone(params, x).x[:, -1]  # noqa: E731
    return jacobian_norms(function, model.embed(params, tokens), key=key, probes=probes)


@functools.partial(jax.jit, static_argnums=0)
def _of_logit(model: Transformer, params: Params, tokens, targets):
    def chosen(x):
        logits = model.unembed(params, model.backbone(params, x).x[:, -1:])[:, 0]
        which = logits.argmax(-1, keepdims=True) if targets is None else targets
        return jnp.take_along_axis(logits, which, axis=-1)

    # One output a row: the one unit vector is exact.
    return jacobian_norms(chosen, model.embed(params, tokens), probes=None)

"""The law of how much thinking is left: its logarithm has a Gamma distribution.

Lengths count tokens, the one that is being chosen included; x = log(length + 1) has the density of
a Gamma with shape `alpha` and rate `rate`, both per token of the vocabulary.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.scipy.special import gammainc, gammaln
from jaxtyping import Array, Bool, Float

from tokjax import struct
from tokjax.decoding.transforms.base import setting
from tokjax.errors import DataError

SMALLEST = 1e-6  # of a shape or a rate
_NEWTON_STEPS = 20  # from a start that is within 1.5 %


def gamma_nll(
    lengths: Float[Array, "*B"], alpha: Float[Array, "*B"], rate: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """Returns -log density of log(length + 1), in nats; finite for lengths of 0 and up.

    >>> round(float(gamma_nll(jnp.float32(99), jnp.float32(5), jnp.float32(1.5))), 3)
    1.95

    Reference: Li et al., "Steering LLM Thinking with Budget Guidance", arXiv 2506.13752.
    """
    # Below a length of 1 the logarithm of x would run off to -inf.
    x = jnp.log1p(jnp.maximum(lengths, 1.0))
    alpha, rate = jnp.maximum(alpha, SMALLEST), jnp.maximum(rate, SMALLEST)
    return gammaln(alpha) - alpha * jnp.log(rate) - (alpha - 1) * jnp.log(x) + rate * x


def finish_probability(
    budget: Float[Array, "*B"], alpha: Float[Array, "*B V"], rate: Float[Array, "*B V"]
) -> Float[Array, "*B V"]:
    """Returns the probability that no more than `budget` tokens of thinking are left.

    Exactly 1 for an infinite budget. Float32 loses probabilities below 1e-38: they are 0.

    Reference: Li et al., arXiv 2506.13752 (the CDF of the Gamma at log(budget + 1)).
    """
    alpha, rate = jnp.maximum(alpha, SMALLEST), jnp.maximum(rate, SMALLEST)
    x = jnp.log1p(jnp.maximum(budget, 0.0))[..., None]
    return jnp.maximum(gammainc(alpha, rate * x), 0.0)


def mode_length(alpha: Float[Array, "*B"], rate: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns the length at the peak of the density of its logarithm, at least 0.

    What the reference code logs as the expectation.
    """
    return jnp.expm1(jnp.maximum(alpha - 1, 0.0) / jnp.maximum(rate, SMALLEST))


def mean_length(alpha: Float[Array, "*B"], rate: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns the length at the mean of its logarithm."""
    return jnp.expm1(alpha / jnp.maximum(rate, SMALLEST))


@struct.dataclass
class Reliability:
    """Which predictions are sure enough to be followed; one number each.

    Attributes:
        rate: least rate.
        alpha: the shape must be above this.
        length: least length at the peak of the density, in tokens.
    """

    rate: Any = 10.0
    alpha: Any = 1.0
    length: Any = 0.9

    @classmethod
    def of(cls, given: "Reliability | None") -> "Reliability":
        """Returns the thresholds as arrays; of None, ones that every prediction passes.

        Raises:
            ConfigError: a threshold is NaN.
        """
        given = cls(-np.inf, -np.inf, -np.inf) if given is None else given

        def threshold(name: str) -> Any:
            ok = lambda v: ~np.isnan(v)  # noqa: E731
            return setting(name, getattr(given, name), np.float32, ok, "a number")

        return cls(threshold("rate"), threshold("alpha"), threshold("length"))

    def passed(
        self, alpha: Float[Array, "*B V"], rate: Float[Array, "*B V"]
    ) -> Bool[Array, "*B V"]:
        """Returns which predictions are sure enough.

        Reference: the code of Li et al., arXiv 2506.13752.
        """
        mode = jnp.expm1((alpha - 1) / jnp.maximum(rate, SMALLEST))
        return (rate >= self.rate) & (alpha > self.alpha) & (mode >= self.length)


def guided_logits(
    logits: Float[Array, "*B V"],
    budget: Float[Array, "*B"],
    alpha: Float[Array, "*B V"],
    rate: Float[Array, "*B V"],
    reliability: Reliability,
) -> Float[Array, "*B V"]:
    """Returns logits of p(token) times the probability that thinking ends within the budget.

    Tokens whose prediction is not reliable have probability 0. Where that leaves nothing, the
    likeliest token by `logits` has probability 1.

    Args:
        logits: of the model.
        budget: tokens left, the one being chosen included; infinite changes nothing but what the
            filter does.
        alpha: shape of each token's Gamma.
        rate: its rate.
        reliability: the filter.

    Reference: Li et al., arXiv 2506.13752 (steps 1 to 4 of its sampling code).
    """
    weights = finish_probability(budget, alpha, rate)
    weights = jnp.where(reliability.passed(alpha, rate), weights, 0.0)
    guided = logits + jnp.log(weights)
    best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1, keepdims=True)
    nothing = ~jnp.isfinite(guided).any(-1, keepdims=True)
    return jnp.where(nothing, jnp.where(best, 0.0, -jnp.inf), guided)


def fit_gamma(lengths: Any) -> tuple[float, float]:
    """Returns (alpha, rate) of the one Gamma that predicts lengths best: the constant baseline.

    Maximum likelihood by Newton's method, in float64.

    Args:
        lengths: remaining lengths, 1 or more, of any shape.

    Raises:
        DataError: fewer than two different lengths, or one below 1.

    Reference: Minka 2002, "Estimating a Gamma distribution" (its starting point).
    """
    x = np.log1p(np.asarray(lengths, np.float64).ravel())
    if x.size < 2 or x.max() == x.min() or x.min() < np.log(2):
        raise DataError(
            f"{x.size} lengths cannot be fitted: two different ones are needed, all 1 or more"
        )
    gap = np.log(x.mean()) - np.log(x).mean()  # positive, by Jensen's inequality
    alpha = (3 - gap + np.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap)
    for _ in range(_NEWTON_STEPS):
        error = np.log(alpha) - scipy.special.digamma(alpha) - gap
        alpha -= error / (1 / alpha - scipy.special.polygamma(1, alpha))
    return float(alpha), float(alpha / x.mean())

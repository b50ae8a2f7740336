"""What a beam search has found: finished continuations, ranked by score over length."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.transforms.base import setting


@struct.dataclass
class Beams:
    """The best continuations of each prompt, best first.

    N is the largest `max_new_tokens`, rounded up to a bucket. Slots from a continuation's length on
    hold zeros. Where fewer than K continuations exist (a tiny vocabulary, a transform that forbids
    the rest), the last ones have length 0 and score -inf.

    Attributes:
        tokens: ids, the one that stopped the row included.
        lengths: number of new tokens of each.
        stopped: which their stop ended; the others were cut at their `max_new_tokens`.
        scores: what they are ranked by.
        logprobs: the model's log-probability of each token at temperature 1, before any transform.
    """

    tokens: Int[Array, "B K N"]
    lengths: Int[Array, "B K"]
    stopped: Bool[Array, "B K"]
    scores: Float[Array, "B K"]
    logprobs: Float[Array, "B K N"]

    def rows(self) -> list[list[list[int]]]:
        """Returns the tokens of each prompt's continuations (waits for the device)."""
        tokens, lengths = jax.device_get((self.tokens, self.lengths))
        return [
            [each[:n].tolist() for each, n in zip(found, counts, strict=True)]
            for found, counts in zip(tokens, lengths, strict=True)
        ]

    def best(self, count: int) -> "Beams":
        """Returns the `count` best along the axis behind the prompts."""
        top, order = jax.lax.top_k(self.scores, count)

        def taken(a: jax.Array) -> jax.Array:
            index = order.reshape(*order.shape, *[1] * (a.ndim - order.ndim))
            return jnp.take_along_axis(a, index, axis=order.ndim - 1)

        return jax.tree.map(taken, self).replace(scores=top)


class LengthPenalty(Protocol):
    """Says what a sum of log-probabilities is divided by; grows or falls steadily with length."""

    def __call__(self, lengths: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Returns the divisor of continuations of these lengths."""
        ...


@struct.dataclass
class _GNMT:
    alpha: Any

    def __call__(self, lengths: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return jnp.power((5.0 + lengths) / 6.0, self.alpha)


@struct.dataclass
class _Power:
    exponent: Any

    def __call__(self, lengths: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return jnp.power(1.0 * lengths, self.exponent)


def gnmt(alpha: Any = 0.6) -> LengthPenalty:
    """Returns the penalty ((5 + length) / 6)^alpha; 0 compares log-probabilities themselves.

    Args:
        alpha: one number, or one for each prompt; larger values favour longer continuations.

    Raises:
        ConfigError: a value is not finite.

    Reference: Wu et al. 2016, "Google's Neural Machine Translation System", arXiv 1609.08144,
    equation 14.
    """
    return _GNMT(setting("alpha", alpha, np.float32, np.isfinite, "a finite number"))


def power(exponent: Any = 1.0) -> LengthPenalty:
    """Returns the penalty length^exponent, as transformers has it; 1 is the mean over tokens.

    Args:
        exponent: one number, or one for each prompt; larger values favour longer continuations.

    Raises:
        ConfigError: a value is not finite.
    """
    return _Power(setting("exponent", exponent, np.float32, np.isfinite, "a finite number"))

"""Watermarks: a bias towards tokens that a keyed hash of the token before calls green."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.transforms.base import Memoryless, Transform, column, setting


@struct.dataclass
class _Watermark(Memoryless):
    seed: Any
    share: Any
    strength: Any

    def update(
        self, logits: Float[Array, "B V"], state: tuple[()], context: Context
    ) -> tuple[Float[Array, "B V"], tuple[()]]:
        green = green_tokens(context.last, logits.shape[-1], self.seed, self.share)
        return logits + jnp.where(green, column(self.strength), 0.0), state


def watermark(seed: int, share: float = 0.25, strength: Any = 2.0) -> Transform:
    """Returns the addition of `strength` to the logits of green tokens.

    Args:
        seed: key of the hash, 0 to 2^32 - 1.
        share: probability of a token to be green.
        strength: what is added; infinite strength is not needed.

    Raises:
        ConfigError: a value is out of range.

    Reference: Kirchenbauer et al. 2023, arXiv 2301.10226, algorithm 2.
    """
    whole = "an integer from 0 to 2^32 - 1"
    ok = lambda v: (v > 0) & (v < 1)  # noqa: E731
    return _Watermark(
        setting("seed", seed, np.uint32, lambda v: np.ndim(v) == 0, whole),
        setting("share", share, np.float32, ok, "above 0 and below 1"),
        setting("strength", strength, np.float32, np.isfinite, "a finite number"),
    )


def green_tokens(
    before: Int[Array, "B"], vocab_size: int, seed: Any, share: Any
) -> Bool[Array, "B V"]:
    """Returns which tokens are green behind each token."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), before)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (vocab_size,)))(keys)
    return uniform < share


def watermark_score(
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    vocab_size: int,
    seed: Any,
    share: Any = 0.25,
) -> Float[Array, "B"]:
    """Returns the z-score of the number of green tokens; text without watermark has about 0.

    Args:
        tokens: ids; the first of a row is judged by none before it and left out.
        mask: tokens that count.
        vocab_size: of the model that wrote.
        seed: as of `watermark`.
        share: likewise.

    Reference: Kirchenbauer et al. 2023, arXiv 2301.10226, equation 3.
    """

    def judge(carry, pair):
        before, token = pair
        green = green_tokens(before, vocab_size, seed, share)
        return carry, jnp.take_along_axis(green, token[:, None], axis=1)[:, 0]

    _, green = jax.lax.scan(judge, None, (tokens[:, :-1].T, tokens[:, 1:].T))
    counted = (mask[:, 1:] & mask[:, :-1]).T
    n = counted.sum(0).astype(jnp.float32)
    found = (green & counted).sum(0).astype(jnp.float32)
    deviation = jnp.sqrt(jnp.maximum(n, 1.0) * share * (1 - share))
    return (found - share * n) / deviation

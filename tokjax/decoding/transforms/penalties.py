"""Penalties on tokens that a text has already used."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.transforms.base import Transform, column, setting


@struct.dataclass
class _RepetitionPenalty:
    penalty: Any

    def init(self, prompts: Prompts, vocab_size: int) -> Bool[Array, "B V"]:
        B, P = prompts.tokens.shape
        used = jnp.arange(P) < prompts.lengths[:, None]
        seen = jnp.zeros((B, vocab_size), bool)
        return seen.at[jnp.arange(B)[:, None], prompts.tokens].max(used)

    def update(
        self, logits: Float[Array, "B V"], state: Bool[Array, "B V"], context: Context
    ) -> tuple[Float[Array, "B V"], Bool[Array, "B V"]]:
        seen = state.at[jnp.arange(state.shape[0]), context.last].set(True)
        penalty = column(self.penalty)
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        return jnp.where(seen, penalised, logits), seen


def repetition_penalty(penalty: Any) -> Transform:
    """Returns the penalty on every token of the prompt and the text so far; 1 changes nothing.

    A positive logit is divided by it, a negative one multiplied.

    Raises:
        ConfigError: a value is not positive.

    Reference: Keskar et al. 2019, arXiv 1909.05858, section 4.1.
    """
    ok = lambda v: (v > 0) & np.isfinite(v)  # noqa: E731
    value = setting("repetition_penalty", penalty, np.float32, ok, "a positive number")
    return _RepetitionPenalty(value)


@struct.dataclass
class _CountPenalty:
    frequency: Any
    presence: Any

    def init(self, prompts: Prompts, vocab_size: int) -> Int[Array, "B V"]:
        return jnp.zeros((prompts.lengths.shape[0], vocab_size), jnp.int32)

    def update(
        self, logits: Float[Array, "B V"], state: Int[Array, "B V"], context: Context
    ) -> tuple[Float[Array, "B V"], Int[Array, "B V"]]:
        new = (context.step > 0).astype(jnp.int32)
        counts = state.at[jnp.arange(state.shape[0]), context.last].add(new)
        wide = counts.astype(logits.dtype)
        penalty = column(self.frequency) * wide + column(self.presence) * (wide > 0)
        return logits - penalty, counts


def count_penalty(frequency: Any = 0.0, presence: Any = 0.0) -> Transform:
    """Returns the penalty on every new token so far; the prompt's count for nothing.

    From a token's logit are taken `frequency` times the number of its uses, and `presence` if it
    was used at all; negative values encourage.

    Raises:
        ConfigError: a value is not finite.
    """
    return _CountPenalty(
        setting("frequency", frequency, np.float32, np.isfinite, "a finite number"),
        setting("presence", presence, np.float32, np.isfinite, "a finite number"),
    )

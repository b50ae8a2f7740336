"""Tokens and sequences of tokens that are favoured, forbidden or forced."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.prompts import bucket
from tokjax.decoding.transforms.base import (
    Memoryless,
    Stateless,
    Transform,
    sequences,
    setting,
    slots,
)
from tokjax.errors import ConfigError

_NO_ID = np.iinfo(np.int32).max  # beyond every vocabulary: what is done to it is dropped


@struct.dataclass
class _LogitBias(Stateless):
    ids: Any
    biases: Any

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return logits.at[:, self.ids].add(self.biases, mode="drop")


def logit_bias(biases: Mapping[int, float]) -> Transform:
    """Returns the addition of a number to the logits of some ids; -inf forbids them.

    Raises:
        ConfigError: an id is negative, or a number is NaN or +inf.
    """
    for token, bias in biases.items():
        _check_id("logit_bias", token)
        if np.isnan(bias) or bias == np.inf:
            raise ConfigError(f"logit_bias of id {token} is {bias}: give a number, or -inf")
    return _LogitBias(
        slots(list(biases), _NO_ID, np.int32), slots(list(biases.values()), 0.0, np.float32)
    )


def suppress(ids: Iterable[int]) -> Transform:
    """Returns the exclusion of some ids.

    Raises:
        ConfigError: an id is negative.
    """
    return logit_bias(dict.fromkeys(ids, -np.inf))


@struct.dataclass
class _SequenceBias(Memoryless):
    ids: Any  # [S, n], each sequence's own from the right
    lengths: Any
    biases: Any

    def update(
        self, logits: Float[Array, "B V"], state: tuple[()], context: Context
    ) -> tuple[Float[Array, "B V"], tuple[()]]:
        texts, lengths = sequences(context)
        S, n = self.ids.shape
        rows = jnp.arange(texts.shape[0])[:, None]
        latest = texts[rows, jnp.maximum(lengths[:, None] - (n - 1) + jnp.arange(n - 1), 0)]
        # Before its last id a sequence must agree with the end of the text.
        counts = jnp.arange(n - 1) >= n - self.lengths[:, None]
        agrees = (latest[:, None] == self.ids[None, :, :-1]) | ~counts[None]
        fits = lengths[:, None] >= self.lengths[None] - 1
        added = jnp.where(agrees.all(-1) & fits, self.biases, 0.0)
        last = jnp.broadcast_to(self.ids[:, -1], (texts.shape[0], S))
        return logits.at[rows, last].add(added, mode="drop"), state


def sequence_bias(biases: Mapping[tuple[int, ...], float]) -> Transform:
    """Returns the addition of a number to the last id of each sequence that the text has begun.

    A sequence of one id is always begun. (transformers leaves a sequence alone that would end a
    text of just its own length; here it counts too.)

    Raises:
        ConfigError: a sequence is empty, an id is negative, or a number is NaN or +inf.
    """
    for ids, bias in biases.items():
        if not ids:
            raise ConfigError("sequence_bias has an empty sequence")
        for token in ids:
            _check_id("sequence_bias", token)
        if np.isnan(bias) or bias == np.inf:
            raise ConfigError(f"sequence_bias of {ids} is {bias}: give a number, or -inf")
    n = max(2, _power_of_two(max(map(len, biases), default=2)))
    rows = [[_NO_ID] * (n - len(ids)) + list(ids) for ids in biases]
    lengths = slots([len(ids) for ids in biases], 1, np.int32)
    filled = rows + [[_NO_ID] * n] * (len(lengths) - len(rows))
    return _SequenceBias(
        np.array(filled, np.int32), lengths, slots(list(biases.values()), 0.0, np.float32)
    )


def bad_words(words: Iterable[Sequence[int]]) -> Transform:
    """Returns the exclusion of sequences of ids: their last id is forbidden behind the others.

    Raises:
        ConfigError: a sequence is empty or has a negative id.
    """
    return sequence_bias({tuple(ids): -np.inf for ids in words})


@struct.dataclass
class _NoRepeat(Memoryless):
    size: int = struct.field(pytree_node=False)

    def update(
        self, logits: Float[Array, "B V"], state: tuple[()], context: Context
    ) -> tuple[Float[Array, "B V"], tuple[()]]:
        texts, lengths = sequences(context)
        B, S = texts.shape
        if self.size > S:
            return logits, state
        rows, starts = jnp.arange(B)[:, None], jnp.arange(S - self.size + 1)
        repeats = starts[None] + self.size <= lengths[:, None]
        for i in range(self.size - 1):
            latest = texts[rows, jnp.maximum(lengths[:, None] - self.size + 1 + i, 0)]
            repeats &= texts[:, starts + i] == latest
        would_end = jnp.where(repeats, texts[:, starts + self.size - 1], _NO_ID)
        return logits.at[rows, would_end].set(-jnp.inf, mode="drop"), state


def no_repeat_ngram(size: int) -> Transform:
    """Returns the exclusion of every token that would end a sequence of `size` a second time.

    The prompt counts too. Another size is another program.

    Raises:
        ConfigError: the size is below 1.
    """
    if size < 1:
        raise ConfigError(f"no_repeat_ngram={size} must be at least 1")
    return _NoRepeat(int(size))


@struct.dataclass
class _Forced(Memoryless):
    ids: Any  # [N], -1 where none is forced

    def update(
        self, logits: Float[Array, "B V"], state: tuple[()], context: Context
    ) -> tuple[Float[Array, "B V"], tuple[()]]:
        n = self.ids.shape[0]
        token = jnp.where(context.step < n, self.ids[jnp.minimum(context.step, n - 1)], -1)
        only = jnp.where(jnp.arange(logits.shape[-1]) == token, 0.0, -jnp.inf)
        return jnp.where(token >= 0, only, logits), state


def forced(tokens: Mapping[int, int]) -> Transform:
    """Returns the restriction to one id at given steps (0 is the first new token).

    Raises:
        ConfigError: a step or an id is negative.
    """
    for step, token in tokens.items():
        if step < 0:
            raise ConfigError(f"forced: step {step} must not be negative")
        _check_id("forced", token)
    ids = np.full(bucket(max(tokens, default=0) + 1), -1, np.int32)
    for step, token in tokens.items():
        ids[step] = token
    return _Forced(ids)


@struct.dataclass
class _MinNewTokens(Memoryless):
    count: Any
    ids: Any

    def update(
        self, logits: Float[Array, "B V"], state: tuple[()], context: Context
    ) -> tuple[Float[Array, "B V"], tuple[()]]:
        without = logits.at[:, self.ids].set(-jnp.inf, mode="drop")
        early = context.step < self.count
        early = early[..., None] if jnp.ndim(early) else early
        return jnp.where(early, without, logits), state


def min_new_tokens(count: Any, stop_ids: Iterable[int]) -> Transform:
    """Returns the exclusion of the ids that stop a text until it has so many new tokens.

    Raises:
        ConfigError: a count is negative or no integer, or an id is negative.
    """
    ids = list(stop_ids)
    for token in ids:
        _check_id("min_new_tokens", token)
    wanted = "an integer, 0 or above"
    return _MinNewTokens(
        setting("min_new_tokens", count, np.int32, lambda v: v >= 0, wanted),
        slots(ids, _NO_ID, np.int32),
    )


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _check_id(name: str, token: int) -> None:
    if token < 0:
        raise ConfigError(f"{name}: id {token} must not be negative")

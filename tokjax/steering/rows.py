"""Prompts with answers in arrays, a fixed number of rows at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from tokjax import struct
from tokjax.errors import ConfigError, DataError

_WIDTH = 32  # rows are as wide as a multiple of it, so that few programs are compiled


@struct.dataclass
class Rows:
    """Texts of a prompt and an answer each.

    Attributes:
        tokens: ids, each row's own from the left.
        lengths: number of ids of each row.
        starts: where each row's answer begins.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    starts: Int[Array, "B"]

    def take(self, which: np.ndarray) -> "Rows":
        """Returns some of the rows."""
        return jax.tree.map(lambda a: a[which], self)


def rows_of(texts: Sequence[tuple[Sequence[int], Sequence[int]]], config: Any) -> Rows:
    """Returns prompts with their answers as rows of one width.

    Raises:
        ConfigError: an empty prompt or answer, or a text longer than the model's positions.
        DataError: an id is not in the model's vocabulary.
    """
    for i, (prompt, answer) in enumerate(texts):
        if not len(prompt) or not len(answer):
            which = "prompt" if not len(prompt) else "answer"
            raise ConfigError(f"text {i} has an empty {which}: give both at least one token")
        if len(prompt) + len(answer) > config.max_positions:
            raise ConfigError(
                f"text {i} has {len(prompt) + len(answer)} tokens, but the model has "
                f"max_positions={config.max_positions}"
            )
        for token in (*prompt, *answer):
            if not 0 <= token < config.vocabulary:
                raise DataError(
                    f"text {i} has id {token}, but the model's ids are 0 to "
                    f"{config.vocabulary - 1}: was it made with another tokenizer?"
                )
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in texts], np.int32)
    width = min(-(-int(lengths.max()) // _WIDTH) * _WIDTH, config.max_positions)
    tokens = np.zeros((len(texts), width), np.int32)
    for row, (prompt, answer) in zip(tokens, texts, strict=True):
        row[: len(prompt) + len(answer)] = [*prompt, *answer]
    starts = np.array([len(prompt) for prompt, _ in texts], np.int32)
    return Rows(tokens, lengths, starts)  # type: ignore[arg-type]


def batches(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the indices of each batch, always `size` of them, and how many are its own.

    >>> [(indices.tolist(), own) for indices, own in batches(3, 2)]
    [([0, 1], 2), ([2, 0], 1)]

    Raises:
        ConfigError: a size below 1.
    """
    if size < 1:
        raise ConfigError(f"batch_size={size} must be at least 1")
    for first in range(0, count, size):
        indices = np.arange(first, first + size)
        yield np.where(indices < count, indices, 0), min(size, count - first)

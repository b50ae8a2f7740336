"""Prompts of different lengths in one array, and the sizes that arrays are rounded up to."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from tokjax import struct
from tokjax.errors import ConfigError

_SMALLEST = 16


@struct.dataclass
class Prompts:
    """What to continue.

    Attributes:
        tokens: ids, each row's own from the left; what follows them is filling and has no effect.
        lengths: number of ids of each row, at least 1.
    """

    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Prompts":
        """Returns prompts from lists of ids.

        Raises:
            ConfigError: there is no row, or a row has no id.
        """
        lengths = np.array([len(row) for row in rows], np.int32)
        if not len(rows) or lengths.min() < 1:
            at = int(lengths.argmin()) if len(rows) else None
            which = "no prompts" if at is None else f"prompt {at} has no tokens"
            raise ConfigError(
                f"{which}: nothing comes before the first new token; begin each prompt with the "
                f"BOS id or some text"
            )
        tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
        return cls(tokens, lengths)  # type: ignore[arg-type]


def bucket(length: int) -> int:
    """Returns `length` rounded up to one of a few sizes, so that few programs are compiled.

    Multiples of 16 up to 64, then four sizes to each doubling: at most a quarter is wasted.

    >>> [bucket(n) for n in (1, 17, 64, 65, 129, 1000)]
    [16, 32, 64, 80, 160, 1024]
    """
    step = max(_SMALLEST, 2 ** ((max(length, 1) - 1).bit_length() - 3))
    return -(-max(length, 1) // step) * step

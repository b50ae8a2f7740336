"""A task made on the fly: a row of symbols and, as the answer, the same backwards."""

import hashlib
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokjax.config.schema import register
from tokjax.errors import ConfigError

SYMBOLS = string.digits + string.ascii_letters
_TRIES = 50  # draws in a row that were all there before: then all are


@register("source", "copy")
@dataclass(frozen=True, kw_only=True)
class CopySource:
    """Random symbols such as "3071", answered by "1703"; none occurs twice.

    Training and validation share none: which of the two one belongs to is decided by itself.
    """

    examples: int = 10_000  # how many; fewer where there are not so many different ones
    length: int = 31  # symbols of a row; its begin token, if it has one, comes on top
    kinds: int = 10  # different symbols: digits, then letters
    reverse: bool = True  # the answer is backwards; else as it stands
    seed: int = 0  # of the drawing
    split: Literal["train", "validation", "all"] = "train"  # rows are split by themselves
    validation_share: float = 0.1  # part of the rows that is held out, 0 to 1

    def __post_init__(self):
        for name in ("examples", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 2 <= self.kinds <= len(SYMBOLS):
            raise ConfigError(f"kinds={self.kinds} must be from 2 to {len(SYMBOLS)}")
        if not 0 <= self.validation_share <= 1:
            raise ConfigError(
                f"validation_share is {self.validation_share}; it must lie within 0 and 1"
            )


def copies(source: CopySource) -> Iterator[tuple[str, str]]:
    """Yields rows of symbols with their answers.

    >>> next(copies(CopySource(length=6, kinds=3)))
    ('211000', '000112')
    """
    rng = np.random.default_rng(source.seed)
    symbols = np.array(list(SYMBOLS[: source.kinds]))
    seen: set[str] = set()
    repeated = 0
    while len(seen) < source.examples and repeated < _TRIES * (1 + len(seen)):
        text = "".join(symbols[rng.integers(0, source.kinds, source.length)])
        split = "validation" if _share(text) < source.validation_share else "train"
        if text in seen or source.split not in ("all", split):
            repeated += 1
            continue
        seen.add(text)
        yield text, text[::-1] if source.reverse else text


def _share(text: str) -> float:
    """Returns a number from 0 to 1 that is a function of the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32

"""Counting and copying: questions about a sequence whose answer one token at its end must know.

    count: 1 0 1 1 = 3        how many ones there are
    sum:   1 + 1 + 1 = 3      likewise, spelled out as a sum
    first: 7 2 2 9 = 7        the first element
    last:  7 2 2 9 = 9        the last element

Reference: "Transformers need glasses! Information over-squashing in language tasks",
arXiv 2406.04267.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tokjax.errors import ConfigError, nearest

Kind = Literal["count", "sum", "first", "last"]
Pattern = Literal["ones", "zeros_spread", "zeros_last", "random"]
ASK, PLUS, SEPARATOR = "=", "+", ","


@dataclass(frozen=True)
class Counting:
    """A distribution of questions.

    Attributes:
        kind: of the questions.
        pattern: of the elements of `count`: ones alone; a zero in the place of every fourth; one
            zero at the end; each one or zero alike. `first` and `last` have random digits.
        separator_every: elements between separators; None has none.
    """

    kind: Kind = "count"
    pattern: Pattern = "random"
    separator_every: int | None = None

    def __post_init__(self):
        for name, choices in (("kind", get_args(Kind)), ("pattern", get_args(Pattern))):
            if getattr(self, name) not in choices:
                value = str(getattr(self, name))
                raise ConfigError(f"unknown {name}={value!r}.{nearest(value, choices)}")
        if self.separator_every is not None and self.separator_every < 1:
            raise ConfigError(f"separator_every={self.separator_every} must be at least 1, or None")

    def words(self, most: int) -> list[str]:
        """Returns all words of questions of up to so many elements, and of their answers."""
        numbers = range(max(most, 9) + 1)
        return [ASK, PLUS, SEPARATOR, *(str(n) for n in numbers)]

    def elements(self, n: int, rng: np.random.Generator) -> list[str]:
        """Returns n elements."""
        if n < 1:
            raise ConfigError(f"n={n} elements must be at least 1")
        if self.kind in ("first", "last"):
            return [str(d) for d in rng.integers(0, 10, n)]
        if self.kind == "sum" or self.pattern == "ones":
            return ["1"] * n
        if self.pattern == "zeros_spread":
            return ["0" if i % 4 == 3 else "1" for i in range(n)]
        if self.pattern == "zeros_last":
            return [*["1"] * (n - 1), "0"]
        return [str(d) for d in rng.integers(0, 2, n)]

    def question(self, n: int, rng: np.random.Generator) -> tuple[list[str], str]:
        """Returns the words of a question about n elements, the `=` included, and its answer.

        >>> Counting("sum").question(3, np.random.default_rng(0))
        (['1', '+', '1', '+', '1', '='], '3')
        """
        elements = self.elements(n, rng)
        words: list[str] = []
        for at, element in enumerate(elements):
            if at and self.kind == "sum":
                words.append(PLUS)
            if at and self.separator_every is not None and at % self.separator_every == 0:
                words.append(SEPARATOR)
            words.append(element)
        if self.kind in ("first", "last"):
            answer = elements[0 if self.kind == "first" else -1]
        else:
            answer = str(elements.count("1"))
        return [*words, ASK], answer


def absolute_error(given: str, answer: str) -> float:
    """Returns how far a number is from the right one; NaN where no number was given.

    >>> absolute_error("12", "10"), absolute_error("=", "10")
    (2.0, nan)
    """
    return float(abs(int(given) - int(answer))) if given.isdigit() else float("nan")

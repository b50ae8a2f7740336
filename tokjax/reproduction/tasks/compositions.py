"""Compositions of fixed functions: questions whose answer needs one step after the other.

A question is a value, functions that are applied to it in turn, and a separator; its rationale are
the values on the way, its answer the last one.

    3 f2 f0 f5 = 7 1 4      f2(3) = 7, f0(7) = 1, f5(1) = 4
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tokjax.errors import ConfigError


@dataclass(frozen=True)
class Compositions:
    """A distribution of questions.

    Attributes:
        values: number of values, with ids from 0 on.
        functions: number of functions, each a permutation of the values, with the next ids; then
            comes the separator.
        length: functions of a question.
        first: probability of function 0 at each place; the others share the rest.
        seed: of the functions.
    """

    values: int = 8
    functions: int = 6
    length: int = 4
    first: float = 0.25
    seed: int = 0

    def __post_init__(self):
        if self.values < 2 or self.functions < 2 or self.length < 1 or not 0 < self.first < 1:
            raise ConfigError(
                f"values={self.values} and functions={self.functions} must be 2 or more, length="
                f"{self.length} 1 or more and first={self.first} a probability"
            )

    @property
    def separator(self) -> int:
        """The id between question and answer."""
        return self.values + self.functions

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.separator + 1

    @cached_property
    def tables(self) -> np.ndarray:
        """What each function makes of each value."""
        rng = np.random.default_rng([self.seed, 1])
        return np.stack([rng.permutation(self.values) for _ in range(self.functions)])

    def questions(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns questions [count, length + 2]."""
        rest = (1 - self.first) / (self.functions - 1)
        chances = [self.first, *[rest] * (self.functions - 1)]
        drawn = rng.choice(self.functions, (count, self.length), p=chances)
        starts = rng.integers(0, self.values, (count, 1))
        ends = np.full((count, 1), self.separator)
        return np.concatenate([starts, self.values + drawn, ends], axis=1)

    def worked(self, questions: np.ndarray) -> np.ndarray:
        """Returns the values on the way and the answer, [count, length]."""
        value, found = questions[:, 0], []
        for function in (questions[:, 1:-1] - self.values).T:
            value = self.tables[function, value]
            found.append(value)
        return np.stack(found, axis=1)

    def held_out(self, questions: np.ndarray, part: int = 10) -> np.ndarray:
        """Returns which questions are for tests: one of `part`, decided by the question alone."""
        powers = self.size ** np.arange(questions.shape[1], dtype=np.int64)
        return (questions * powers).sum(1) * 2654435761 % 2**32 % part == 0

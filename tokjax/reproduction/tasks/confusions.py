"""Chains of arithmetic by somebody who gets some results wrong half of the time."""

from dataclasses import dataclass

import numpy as np

from tokjax.errors import ConfigError
from tokjax.reproduction.tasks.chains import Chains, Question, apply


@dataclass(frozen=True)
class Confusions:
    """Results that are taken for another one, always the same; what follows goes on from it.

    Attributes:
        share: of all results that are confusable.
        probability: of a mistake where one is.
    """

    share: float = 0.3
    probability: float = 0.5

    def __post_init__(self):
        if not (0 <= self.share <= 1 and 0 <= self.probability <= 1):
            raise ConfigError(
                f"share={self.share} and probability={self.probability} must lie within 0 and 1"
            )

    def mistaken(self, name: str, a: int, b: int, modulus: int = 10) -> int | None:
        """Returns what a result is mistaken for, None where it never is."""
        rng = np.random.default_rng([ord(name), a, b, modulus])
        if rng.random() >= self.share:
            return None
        return (apply(name, a, b, modulus) + int(rng.integers(1, modulus))) % modulus

    def numbers(self, chains: Chains, question: Question, rng: np.random.Generator) -> list[int]:
        """Returns 0 and what is taken for the number behind each step."""
        found = [0]
        for name, digit in question:
            wrong = self.mistaken(name, found[-1], digit, chains.modulus)
            if wrong is not None and rng.random() < self.probability:
                found.append(wrong)
            else:
                found.append(apply(name, found[-1], digit, chains.modulus))
        return found

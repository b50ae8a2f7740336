"""Chains of sums modulo 10, a line each, by a teacher that slips at some facts more than at others.

A fact is a number, an operation and a digit. Each has a rate of slips of its own, and one wrong
result that a slip leads to; the lines behind a slip go on from the wrong number. A model that has
learnt such texts well is right in part of its answers, and its probability of a result tells where
it may be wrong.

    +4-7:2          prompt, ending in a line break
    +4=6            response
    -7=9
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokjax.errors import ConfigError

OPERATIONS = ("+", "-")
LINE = 5  # bytes of a line, its break included

Question = tuple[int, tuple[tuple[str, int], ...]]  # the first number; operation, digit of steps


@dataclass(frozen=True)
class SlippingSums:
    """A distribution of questions, and a teacher.

    Attributes:
        steps: of a question.
        rates: of slips; each fact has one of these.
        seed: which fact has which.
    """

    steps: int = 4
    rates: tuple[float, ...] = (0.0, 0.05, 0.3, 0.6)
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1")
        if not self.rates or not all(0 <= rate <= 1 for rate in self.rates):
            raise ConfigError(f"rates={self.rates} must be shares, one at least")

    @property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """The rate of slips and the wrong result of each fact [operation, number, digit]."""
        rng = np.random.default_rng([self.seed, 77])
        shape = (len(OPERATIONS), 10, 10)
        rates = np.array(self.rates)[rng.integers(0, len(self.rates), shape)]
        right = np.array([[[result(a, o, b) for b in range(10)] for a in range(10)] for o in "+-"])
        return rates, (right + rng.integers(1, 10, shape)) % 10

    def question(self, rng: np.random.Generator) -> Question:
        """Returns a question."""
        first, *digits = (int(n) for n in rng.integers(0, 10, 1 + self.steps))
        named = rng.integers(0, len(OPERATIONS), self.steps)
        return first, tuple((OPERATIONS[o], d) for o, d in zip(named, digits, strict=True))

    def slipped(self, question: Question, rng: np.random.Generator) -> list[int]:
        """Returns the number behind each step as the teacher has it."""
        rates, wrong = self.tables
        number, found = question[0], []
        for name, digit in question[1]:
            at = (OPERATIONS.index(name), number, digit)
            slips = rng.random() < rates[at]
            number = int(wrong[at]) if slips else result(number, name, digit)
            found.append(number)
        return found


def result(number: int, operation: str, digit: int) -> int:
    """Returns what a step makes of a number.

    >>> result(2, "-", 7)
    5
    """
    return (number + digit if operation == "+" else number - digit) % 10


def prompt(question: Question) -> str:
    """Returns a question as text.

    >>> prompt((2, (("+", 4), ("-", 7))))
    '+4-7:2\\n'
    """
    return "".join(f"{name}{digit}" for name, digit in question[1]) + f":{question[0]}\n"


def numbers(question: Question) -> list[int]:
    """Returns the right number behind each step.

    >>> numbers((2, (("+", 4), ("-", 7))))
    [6, 9]
    """
    found, number = [], question[0]
    for name, digit in question[1]:
        number = result(number, name, digit)
        found.append(number)
    return found


def response(question: Question, taken: Sequence[int] | None = None) -> str:
    """Returns the lines of an answer.

    Args:
        question: that is answered.
        taken: number behind each step; None is right.

    >>> response((2, (("+", 4), ("-", 7))))
    '+4=6\\n-7=9'
    """
    taken = numbers(question) if taken is None else taken
    lines = zip(question[1], taken, strict=True)
    return "\n".join(f"{name}{digit}={number}" for (name, digit), number in lines)


def answer(text: str, steps: int) -> str | None:
    """Returns the number that the last line comes to; None of another number of lines.

    >>> answer("+4=6\\n-7=9", 2)
    '9'
    """
    lines = text.split("\n")
    last = lines[-1].rpartition("=")[2]
    return last if len(lines) == steps and len(last) == 1 and last.isdecimal() else None


def step_is_right(question: Question, text: str) -> bool:
    """Returns whether the last line of an answer so far is the one there should be.

    Args:
        question: that is answered.
        text: lines so far, with or without the last one's break.
    """
    lines = text.removesuffix("\n").split("\n")
    return lines == response(question).split("\n")[: len(lines)]

"""A task made on the fly: sums and the like, each with its answer, for trying things out."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokjax.config.schema import register
from tokjax.data.thinking import Insertion, Thinking, insertion
from tokjax.errors import ConfigError

_TRIES = 50  # draws in a row that were all there before: then all are


@register("source", "arithmetic")
@dataclass(frozen=True, kw_only=True)
class ArithmeticSource:
    """Questions such as "12+7=" and their answers, of which none occurs twice.

    Training and validation share no question: which of the two one belongs to is decided by itself.
    """

    examples: int = 10_000  # how many; fewer where there are not so many different ones
    digits: tuple[int, int] = (1, 2)  # least and largest number of digits of a number
    operations: tuple[str, ...] = ("+",)  # some of + - *
    terms: int = 2  # numbers of a question; a*b is computed before a+b
    end: str = "="  # ends the question
    # write down what is left after each operation but the last before the answer: "1+2*3=1+6=7"
    rationale: bool = False
    thinking: Thinking = Thinking()  # tokens that are read and never predicted
    seed: int = 0  # of the drawing
    split: Literal["train", "validation", "all"] = "train"  # questions are split by themselves
    validation_share: float = 0.1  # part of the questions that is held out, 0 to 1

    def __post_init__(self):
        low, high = self.digits
        if not 1 <= low <= high <= 9:
            raise ConfigError(f"digits={self.digits} must be two numbers from 1 to 9, in order")
        unknown = [op for op in self.operations if op not in ("+", "-", "*")]
        if unknown or not self.operations:
            raise ConfigError(f"operations={self.operations} must be some of '+', '-' and '*'")
        if self.examples < 1 or self.terms < 2:
            raise ConfigError(
                f"examples={self.examples} must be at least 1 and terms={self.terms} at least 2"
            )
        if not 0 <= self.validation_share <= 1:
            raise ConfigError(
                f"validation_share is {self.validation_share}; it must lie within 0 and 1"
            )
        in_rationale = self.thinking.place in ("rationale", "all_words")
        if self.thinking.used and in_rationale and not self.rationale:
            raise ConfigError(f"thinking.place={self.thinking.place!r} needs rationale=True")


@dataclass(frozen=True)
class Solved:
    """A question, what is written down before its answer, and the answer."""

    question: str
    rationale: str
    answer: str


def problems(source: ArithmeticSource) -> Iterator[tuple[str, str]]:
    """Yields questions with their answers.

    >>> next(problems(ArithmeticSource(digits=(1, 1), seed=1)))
    ('4+5=', '9')
    """
    for found in solved(source):
        yield found.question, found.answer


def solved(source: ArithmeticSource) -> Iterator[Solved]:
    """Yields questions with rationales and answers.

    >>> next(solved(ArithmeticSource(digits=(1, 1), terms=3, seed=1)))
    Solved(question='4+5+7=', rationale='9+7=', answer='16')
    """
    rng = np.random.default_rng(source.seed)
    seen: set[str] = set()
    repeated = 0
    while len(seen) < source.examples and repeated < _TRIES * (1 + len(seen)):
        digits = rng.integers(source.digits[0], source.digits[1] + 1, source.terms)
        lows = np.where(digits == 1, 0, 10 ** (digits - 1))
        numbers = rng.integers(lows, 10**digits)
        operations = rng.choice(source.operations, source.terms - 1)
        text = str(numbers[0])
        for operation, number in zip(operations, numbers[1:], strict=True):
            text += f"{operation}{number}"
        split = "validation" if _share(text) < source.validation_share else "train"
        if text in seen or source.split not in ("all", split):
            repeated += 1
            continue
        seen.add(text)
        *steps, answer = _steps(numbers.tolist(), operations.tolist())
        rationale = "".join(step + source.end for step in steps)
        yield Solved(text + source.end, rationale, answer)


def text_of(source: ArithmeticSource, found: Solved) -> tuple[str, int, Insertion | None]:
    """Returns a problem's text, where what counts begins, and its thinking tokens."""
    text, start = found.question, len(found.question)
    rationale = None
    if source.rationale:
        text += found.rationale
        rationale = (start, len(text))
    answer = len(text)
    text += found.answer
    return text, start, insertion(source.thinking, text, rationale, answer, found.rationale)


def _steps(numbers: list[int], operations: list[str]) -> list[str]:
    """Returns what is left after each operation, products first; the last is the answer."""
    numbers, operations, found = list(numbers), list(operations), []
    while operations:
        at = operations.index("*") if "*" in operations else 0
        a, b, operation = numbers[at], numbers[at + 1], operations.pop(at)
        value = a * b if operation == "*" else a + b if operation == "+" else a - b
        numbers[at : at + 2] = [value]
        rest = zip(operations, numbers[1:], strict=True)
        found.append(str(numbers[0]) + "".join(f"{op}{number}" for op, number in rest))
    return found


def _share(text: str) -> float:
    """Returns a number from 0 to 1 that is a function of the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32

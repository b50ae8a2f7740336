"""Digits rewritten by a rule that the first token of a prompt names.

COPY, REVERSE and ADD have one answer; MIXED copies each digit or adds 5 to it, drawn anew for each.
"""

from collections.abc import Sequence

import numpy as np

COPY, REVERSE, ADD, MIXED, ASK, VOCABULARY = 10, 11, 12, 13, 14, 15
ADDED, OTHER = 3, 5


def rewritten(
    rule: int, digits: Sequence[int], rng: np.random.Generator, share: float = 0.35
) -> list[int]:
    """Returns the answer to a prompt.

    Args:
        rule: COPY, REVERSE, ADD or MIXED.
        digits: of the prompt.
        rng: of MIXED.
        share: of the digits that MIXED copies, on average.

    >>> rewritten(REVERSE, [1, 2, 3], np.random.default_rng(0))
    [3, 2, 1]
    """
    given = np.asarray(digits)
    if rule == REVERSE:
        return given[::-1].tolist()
    if rule == ADD:
        return ((given + ADDED) % 10).tolist()
    if rule == MIXED:
        other = rng.random(len(given)) >= share
        return ((given + OTHER * other) % 10).tolist()
    return given.tolist()


def prompt(rule: int, digits: Sequence[int]) -> list[int]:
    """Returns the ids of a prompt."""
    return [rule, *digits, ASK]


def corrupted(answer: Sequence[int], probability: float, rng: np.random.Generator) -> list[int]:
    """Returns an answer in which each digit is another one with a probability."""
    given = np.asarray(answer)
    wrong = rng.random(len(given)) < probability
    return ((given + wrong * rng.integers(1, 10, len(given))) % 10).tolist()

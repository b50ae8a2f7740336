"""Sorted lists of digits, written with a style of one's own and with bad habits.

A prompt is some digits and ASK. A right answer lists them in order, repeated ones too, each
followed by one of three separators, whichever one likes; then END. Bad habits leave out a repeated
digit, write the next one for a 3 or a 7, and put a filler word in. A revision repairs the digits,
takes the filler words out, and leaves the separators alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokjax.signals.edit_script import edit_script

SEPARATORS = (10, 11, 12)
FILLER, ASK, END, VOCABULARY = 13, 14, 15, 16
MISREAD = (3, 7)


@dataclass(frozen=True)
class Habits:
    """How often an answer goes wrong, and where.

    Attributes:
        drop: probability that a repeated digit is left out.
        misread: probability that a 3 or a 7 becomes the digit after it.
        filler: probability of a filler word behind a separator.
    """

    drop: float = 0.4
    misread: float = 0.4
    filler: float = 0.04

    def answer(self, digits: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Returns an answer with these habits."""
        ordered, told = sorted(digits), []
        for place, digit in enumerate(ordered):
            if place and ordered[place - 1] == digit and rng.random() < self.drop:
                continue
            wrong = digit in MISREAD and rng.random() < self.misread
            told += [digit + wrong, int(rng.choice(SEPARATORS))]
            if rng.random() < self.filler:
                told.append(FILLER)
        return [*told, END]


def question(rng: np.random.Generator, count: int) -> list[int]:
    """Returns the digits of a prompt."""
    return rng.integers(0, 10, count).tolist()


def prompt(digits: Sequence[int]) -> list[int]:
    """Returns the ids of a prompt."""
    return [*digits, ASK]


def is_right(digits: Sequence[int], answer: Sequence[int]) -> bool:
    """Returns whether an answer lists the digits in order, each with a separator, and ends.

    >>> is_right([3, 1], [1, 10, 3, 12, END]), is_right([3, 1], [1, 10, 3, END])
    (True, False)
    """
    answer = list(answer)
    return (
        len(answer) == 2 * len(digits) + 1
        and answer[-1] == END
        and answer[:-1:2] == sorted(digits)
        and all(token in SEPARATORS for token in answer[1:-1:2])
    )


def revised(digits: Sequence[int], answer: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Returns the right answer nearest to one that may be wrong: its separators stay.

    >>> revised([3, 1, 1], [1, 12, 13, 4, 11, END], np.random.default_rng(0))[-3:]
    [3, 11, 15]
    """
    written = [token for token in answer if token not in (FILLER, END)]
    said, style = [], []
    for place, token in enumerate(written):
        if token < 10:
            after = written[place + 1] if place + 1 < len(written) else FILLER
            said.append(token)
            style.append(after if after in SEPARATORS else int(rng.choice(SEPARATORS)))
    right = sorted(digits)
    edits = edit_script(said, right)
    inserted = {edit.target for edit in edits if edit.kind == "insert"}
    deleted = {edit.source for edit in edits if edit.kind == "delete"}
    left = [s for place, s in enumerate(style) if place not in deleted]
    told: list[int] = []
    for place, digit in enumerate(right):
        separator = int(rng.choice(SEPARATORS)) if place in inserted else left.pop(0)
        told += [digit, separator]
    return [*told, END]

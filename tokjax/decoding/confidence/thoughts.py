"""The attempts of a schedule of steps: answers, votes, and what early stopping saves."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int

from tokjax.decoding.confidence.policies import Policy
from tokjax.errors import DataError


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """Returns the place of the first attempt with the most frequent answer.

    Of equally frequent answers the one given first; attempts without answer (None) do not vote,
    and None is returned where none has one.

    >>> majority([None, "7", "9", "9"])
    2
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return None
    best, _ = counts.most_common(1)[0]  # of equal counts the first met
    return answers.index(best)


@dataclass(frozen=True, eq=False)
class Thoughts:
    """What `think` did with each prompt.

    Attributes:
        attempts: the new tokens of every step made.
        signals: the signal behind each of them.
        prompt_tokens: length of the prompt of each of them.
        steps: most steps a prompt may take.
    """

    attempts: list[list[list[int]]] = field(repr=False)
    signals: list[list[float]]
    prompt_tokens: list[list[int]] = field(repr=False)
    steps: int

    @property
    def used(self) -> Int[np.ndarray, "B"]:
        """Number of steps of each prompt."""
        return np.array([len(own) for own in self.attempts])

    @property
    def tokens(self) -> Int[np.ndarray, "B"]:
        """Number of new tokens of each prompt over all its steps."""
        return np.array([sum(len(attempt) for attempt in own) for own in self.attempts])

    @property
    def steps_saved(self) -> float:
        """The share of steps not made: tokens saved where all steps are equally long."""
        return 1 - float(self.used.sum()) / (self.steps * len(self.attempts))

    @property
    def last(self) -> list[list[int]]:
        """Each prompt's latest attempt: the answer of the sequential schedule."""
        return [own[-1] for own in self.attempts]

    def voted(self, answer: Callable[[list[int]], Hashable | None]) -> list[list[int]]:
        """Returns each prompt's first attempt with the most frequent answer; without any the last.

        Args:
            answer: what an attempt answers, None where it does not.
        """
        found = []
        for own in self.attempts:
            place = majority([answer(attempt) for attempt in own])
            found.append(own[-1 if place is None else place])
        return found

    def replayed(self, policy: Policy) -> "Thoughts":
        """Returns what another policy would have done, without decoding.

        Exact where this run made every step that the policy asks for; one run that never stopped
        so gives accuracy and tokens at every threshold.

        Raises:
            DataError: the policy goes on where this run had stopped.
        """
        kept = []
        for b, own in enumerate(self.signals):
            stops = [bool(policy(np.array([s]), n)[0]) for n, s in enumerate(own, start=1)]
            if not any(stops) and len(own) < self.steps:
                raise DataError(
                    f"prompt {b} stopped behind step {len(own)}, where this policy goes on: replay "
                    f"a run that made all {self.steps} steps"
                )
            kept.append(stops.index(True) + 1 if any(stops) else len(own))

        def cut(rows: list) -> list:
            return [row[:n] for row, n in zip(rows, kept, strict=True)]

        return replace(
            self,
            attempts=cut(self.attempts),
            signals=cut(self.signals),
            prompt_tokens=cut(self.prompt_tokens),
        )


def savings(policy: Thoughts, fixed: Thoughts) -> float:
    """Returns 1 - tokens(policy) / tokens(all steps), new tokens counted.

    Args:
        policy: a run that may have stopped early.
        fixed: the run of the same prompts that made all steps.

    Raises:
        DataError: the runs are of different numbers of prompts.

    Reference: "Think Just Enough", arXiv 2510.08146.
    """
    if len(policy.attempts) != len(fixed.attempts):
        raise DataError(f"{len(policy.attempts)} prompts against {len(fixed.attempts)}")
    return 1 - float(policy.tokens.sum()) / float(fixed.tokens.sum())

"""Guided by Gut: a reward that makes a model's own confidence tell right answers from wrong ones.

Being right pays 1 and a little for confidence; being wrong and confident costs a lot. With groups
that are not scaled (`{"name": "group", "scale": False}`) it is the paper's training; the search
that the confidence then guides is `tokjax.decoding.search.gut_search`. Nothing here imports JAX.

Reference: "Guided by Gut: Efficient Test-Time Scaling with Reinforced Intrinsic Confidence",
arXiv 2505.20325.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tokjax.config import Choice, register
from tokjax.errors import ConfigError
from tokjax.rl.rewards import Episode
from tokjax.verifiers import ExactMatch

WITHOUT_STEPS = 0.8  # confidence of an answer without any token


def step_confidences(
    logprobs: Sequence[float], pieces: Sequence[str], separator: str
) -> list[float]:
    """Returns the mean probability of each step's tokens.

    The token in which a separator begins opens the next step.

    >>> [round(c, 3) for c in step_confidences([-0.5, -1.0, 0.0], ["a", ".;", "b"], ";")]
    [0.607, 0.684]

    Args:
        logprobs: of the tokens, in nats.
        pieces: their texts.
        separator: text between steps.
    """
    text = "".join(pieces)
    starts, at = set(), text.find(separator)
    while at >= 0:
        starts.add(at)
        at = text.find(separator, at + len(separator))
    steps: list[list[float]] = []
    place = 0
    for logprob, piece in zip(logprobs, pieces, strict=True):
        opens = any(place <= start < place + len(piece) for start in starts)
        place += len(piece)
        if opens or not steps:
            steps.append([])
        steps[-1].append(math.exp(logprob))
    return [sum(step) / len(step) for step in steps]


def confidence(steps: Sequence[float], last: int = 5) -> float:
    """Returns the mean of the last steps' confidences, weighted 1, 2, ... towards the end.

    >>> round(confidence([0.6, 0.7, 0.8, 0.9]), 6)
    0.8

    Args:
        steps: of an answer.
        last: how many of them count at most.
    """
    kept = steps[-last:]
    if not kept:
        return WITHOUT_STEPS
    return sum(i * c for i, c in enumerate(kept, 1)) / sum(range(1, len(kept) + 1))


def calibration_reward(
    correct: bool, c: float, *, power: float = 4.0, gain: float = 1.0, loss: float = 10.0
) -> float:
    """Returns 1 + gain c^power if correct, else 1 - loss c^power.

    >>> round(calibration_reward(True, 0.8), 4), round(calibration_reward(False, 0.8), 4)
    (1.4096, -3.096)
    """
    return 1 + (gain if correct else -loss) * c**power


@register("reward", "calibration")
@dataclass(frozen=True)
class Calibration:
    """1 + c^4 of a right answer, 1 - 10 c^4 of a wrong one, c its confidence in its last steps.

    Where the reference is empty there is nothing to be right about: the reward is 1.
    """

    verifier: Annotated[Any, Choice("verifier")] = ExactMatch()  # right from one half on
    separator: str = "\n\n"  # text between steps; the token it begins in opens the next step
    last: int = 5  # steps that count, from the end
    power: float = 4.0  # of the confidence
    gain: float = 1.0  # factor of that in a right answer's reward
    loss: float = 10.0  # and in a wrong one's
    weight: float = 1.0  # factor in the sum of all rewards
    stopped_only: bool = False  # an answer that was cut at its limit is wrong

    def __post_init__(self):
        if not self.separator:
            raise ConfigError("separator is empty: name the text between steps")
        if self.last < 1:
            raise ConfigError(f"last={self.last} must be at least 1")
        for name in ("power", "gain", "loss"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")

    def __call__(self, episode: Episode) -> float:
        """Returns the reward, before its weight."""
        if not episode.reference.strip():
            return 1.0
        correct = float(self.verifier(episode.answer, episode.reference)) >= 0.5
        correct = correct and (episode.stopped or not self.stopped_only)
        steps = step_confidences(episode.logprobs, episode.pieces, self.separator)
        c = confidence(steps, self.last)
        return calibration_reward(correct, c, power=self.power, gain=self.gain, loss=self.loss)

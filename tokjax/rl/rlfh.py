"""RLFH: statements of an answer are checked one by one, and their grades pay its tokens.

Reference: Wen et al., "On-Policy Self-Alignment with Fine-grained Knowledge Feedback for
Hallucination Mitigation", arXiv 2406.12221, and its code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float

from tokjax.config import Choice, register
from tokjax.errors import ConfigError, nearest
from tokjax.rl import model_feedback  # registers its kind
from tokjax.rl.feedback import GRADES, VERDICTS, FactFeedback, Sentence, Statement
from tokjax.rl.lcs import common_subsequence, common_substring
from tokjax.rl.ppo import PPO
from tokjax.rl.rewards import Episode, Verified
from tokjax.rl.rollout import Rollout
from tokjax.rl.span_rewards import Ranges, at_actions, token_at
from tokjax.signals.divergences import kl_estimate
from tokjax.verifiers import ExactMatch

Granularity = Literal["token", "sentence", "paragraph"]
__all__ = ["RLFH", "Grading", "answer_rewards", "model_feedback", "placed"]

GRANULARITIES = ("token", "sentence", "paragraph")
Five = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Grading:
    """What verdicts and usefulness are worth; the defaults are those of the code's dataclass."""

    # of Correct, Hedged correct, Vague, Hedged wrong and Wrong statements
    truth: Five = (1.0, 0.5, -1.0, -1.5, -2.0)
    useful: Five = (-0.1, 1.0, 1.1, 1.2, 1.3)  # of statements of usefulness 1 to 5
    truth_weight: float = 1.0  # of a statement's truth, times the size of its usefulness
    information_weight: float = 1.0  # of a sentence's information, log(max(floor, sum useful) + mu)
    floor: float = -0.9  # least usefulness of a sentence's statements together
    mu: float = 1.0  # added to that before the logarithm

    def __post_init__(self):
        if not self.floor + self.mu > 0:
            raise ConfigError(
                f"floor={self.floor} + mu={self.mu} must be above 0: a logarithm is taken of it"
            )

    def truth_of(self, statement: Statement) -> float:
        """Returns the reward of a statement.

        >>> Grading().truth_of(Statement("Lyon is in Peru", "Wrong", "4"))
        -2.4
        """
        verdict = self.truth[VERDICTS.index(statement.verdict)]
        return self.truth_weight * verdict * abs(self.useful[GRADES.index(statement.usefulness)])

    def information_of(self, sentence: Sentence) -> float:
        """Returns the reward of a sentence: concave, so that many trivial facts do not pay."""
        total = sum(self.useful[GRADES.index(s.usefulness)] for s in sentence.statements)
        return self.information_weight * math.log(max(self.floor, total) + self.mu)


def placed(
    answer: str, sentences: Sequence[Sentence], grading: Grading, least_match: float = 0.5
) -> list[tuple[int, int, float]]:
    """Returns rewards with the character they lie at and the one that their sentence ends at.

    A sentence lies where its longest common substring with the answer is, its information at that
    one's last character. A statement lies at its last character that maps into the sentence (by
    their longest common subsequence, without a full stop at the end) and from there into the
    answer; at the sentence's end if none does. Equal sentences lie at the same place.

    Args:
        answer: its text.
        sentences: of the answer; they may be worded a little differently.
        grading: what they are worth.
        least_match: share of a sentence that the substring must have, or the sentence is nowhere
            and pays nothing.
    """
    found = []
    for sentence in sentences:
        start, place, length = common_substring(sentence.text, answer)
        if not length or length < least_match * len(sentence.text):
            continue
        end = place + length - 1
        found.append((end, end, grading.information_of(sentence)))
        bare = _without_stop(sentence.text)
        for statement in sentence.statements:
            pairs = common_subsequence(_without_stop(statement.text), bare)
            inside = [b for _, b in pairs if start <= b < start + length]
            at = place + inside[-1] - start if inside else end
            found.append((at, end, grading.truth_of(statement)))
    return found


def _without_stop(text: str) -> str:
    return text.rstrip().removesuffix(".").rstrip()


def answer_rewards(
    answer: str,
    offsets: Ranges,
    sentences: Sequence[Sentence],
    grading: Grading,
    granularity: Granularity = "token",
    least_match: float = 0.5,
) -> Float[np.ndarray, " N"]:
    """Returns the reward of each token of an answer.

    Args:
        answer: its text.
        offsets: characters of each token.
        sentences: graded.
        grading: what they are worth.
        granularity: "token" pays where `placed` says, "sentence" all at the sentences' ends,
            "paragraph" all at the last token.
        least_match: see `placed`.
    """
    found = np.zeros(len(offsets), np.float64)
    for at, end, reward in placed(answer, sentences, grading, least_match):
        if granularity == "paragraph":
            token = len(offsets) - 1
        else:
            token = token_at(offsets, at if granularity == "token" else end)
        found[token] += reward
    return found.astype(np.float32)


@register("objective", "rlfh")
@dataclass(frozen=True)
class RLFH(PPO):
    """PPO on rewards of statements and sentences at their tokens, and a divergence.

    Rewards of whole answers are added at their ends; by default there is none, but how many answers
    equal the reference is told.
    """

    rewards: tuple[Annotated[Any, Choice("reward")], ...] = (
        Verified(verifier=ExactMatch(), weight=0.0),
    )  # of whole answers
    feedback: Annotated[Any, Choice("feedback")] = FactFeedback()  # grades statements
    grading: Grading = Grading()  # what grades are worth
    # where that is paid: statements at their last words and sentences at their ends; both at the
    # sentence's end; all at the last token
    granularity: Granularity = "token"
    least_match: float = 0.5  # share of a sentence that must be found in the answer, 0 to 1
    unstopped: float = -1.0  # reward at the last token of an answer that was cut at its limit
    limit: float = 10.0  # rewards of a token are clipped to -limit ... limit
    divergence: float = (
        0.01  # of the k3 estimate of KL(pi || pi_ref), taken off each token's reward
    )

    def __post_init__(self):
        super().__post_init__()
        if self.granularity not in GRANULARITIES:
            told = nearest(str(self.granularity), GRANULARITIES)
            raise ConfigError(f"unknown granularity={self.granularity!r}.{told}")
        if not 0 <= self.least_match <= 1:
            raise ConfigError(f"least_match={self.least_match} must lie within 0 and 1")
        if not self.limit > 0:
            raise ConfigError(f"limit={self.limit} must be above 0")
        if not self.divergence >= 0:
            raise ConfigError(f"divergence={self.divergence} must not be negative")

    @property
    def uses_reference(self) -> bool:
        """Whether answers are scored under the model at the start of the stage."""
        return super().uses_reference or self.divergence > 0

    def token_rewards(
        self, rollout: Rollout, episodes: Sequence[Episode]
    ) -> Float[np.ndarray, "R T"]:
        """Returns what the feedback pays each action, less the divergence there."""
        mask = np.asarray(rollout.mask)
        told = self.feedback(episodes)
        own = [self.of_answer(e, s) for e, s in zip(episodes, told, strict=True)]
        found = at_actions(mask, own)
        if self.divergence:
            ratio = np.asarray(rollout.logprobs) - np.asarray(rollout.scores["reference"])
            kl = np.asarray(kl_estimate(np.where(mask, ratio, 0.0), "k3"))  # type: ignore[arg-type]
            found = found - np.float32(self.divergence) * np.where(mask, kl, 0.0)
        return found

    def of_answer(self, episode: Episode, sentences: Sequence[Sentence]) -> Float[np.ndarray, "N"]:
        """Returns the reward of each token of an answer, without the divergence."""
        found = answer_rewards(
            episode.answer,
            episode.offsets,
            sentences,
            self.grading,
            self.granularity,
            self.least_match,
        )
        if not episode.stopped and len(found):
            found[-1] += self.unstopped
        return np.clip(found, -self.limit, self.limit)

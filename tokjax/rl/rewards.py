"""Rewards of answers: verifiers, forms, lengths, and functions of one's own.

A reward is a frozen dataclass with a `weight`, registered under the kind "reward"; called with an
`Episode` it returns a number. A process of its own calls it (see `judge.py`), so that one that
hangs or fails costs its reward and not the run. Nothing here imports JAX.
"""

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from tokjax.config import Choice, register
from tokjax.errors import ConfigError
from tokjax.verifiers import ExactMatch


@dataclass(frozen=True)
class Episode:
    """One answer as a reward sees it.

    Attributes:
        prompt: its text.
        answer: its text, without end token.
        reference: what the data answer.
        tokens: ids of the answer, an end token included.
        logprobs: of these, in nats, at the temperature of sampling.
        entropies: of the distributions they were taken from, in nats.
        stopped: whether the answer ended by itself.
        limit: most tokens it could have.
        pieces: the text of each token.
        offsets: the characters of the answer that each token stands for, [start, end).
    """

    prompt: str
    answer: str
    reference: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    stopped: bool = True
    limit: int = 0
    pieces: tuple[str, ...] = ()
    offsets: tuple[tuple[int, int], ...] = ()


class Reward(Protocol):
    """Says what an answer is worth."""

    weight: float

    def __call__(self, episode: Episode) -> float:
        """Returns the reward, before its weight."""
        ...


@register("reward", "verifier")
@dataclass(frozen=True)
class Verified:
    """How right the answer is, from 0 to 1."""

    verifier: Annotated[Any, Choice("verifier")] = ExactMatch()  # says which answers are right
    weight: float = 1.0  # factor in the sum of all rewards
    stopped_only: bool = False  # an answer that was cut at its limit is wrong

    def __call__(self, episode: Episode) -> float:
        """Returns what the verifier says."""
        if self.stopped_only and not episode.stopped:
            return 0.0
        return float(self.verifier(episode.answer, episode.reference))


@register("reward", "format")
@dataclass(frozen=True)
class Format:
    """1 if the whole answer matches an expression, else 0."""

    pattern: str = r".+"  # what the whole answer must match; "." matches line breaks too
    weight: float = 1.0  # factor in the sum of all rewards

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"{self.pattern!r} is no regular expression: {error}") from None

    def __call__(self, episode: Episode) -> float:
        """Returns 1 or 0."""
        return float(re.fullmatch(self.pattern, episode.answer, re.DOTALL) is not None)


@register("reward", "overlong")
@dataclass(frozen=True)
class Overlong:
    """0 up to `free` of the longest answer's tokens, then falling to -1 at the limit.

    Reference: "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv 2503.14476,
    equation 13.
    """

    free: float = 0.8  # share of the limit that costs nothing
    weight: float = 1.0  # factor in the sum of all rewards

    def __post_init__(self):
        if not 0 <= self.free < 1:
            raise ConfigError(f"free={self.free} must be at least 0 and below 1")

    def __call__(self, episode: Episode) -> float:
        """Returns 0 to -1.

        >>> Overlong(free=0.5)(Episode("", "", "", tokens=(1, 2, 3), limit=4))
        -0.5
        """
        free = self.free * episode.limit
        return -max(0.0, len(episode.tokens) - free) / max(episode.limit - free, 1e-9)


@register("reward", "function")
@dataclass(frozen=True)
class RewardFunction:
    """A Python function of an `Episode` that returns a number."""

    path: str = ""  # "module:function"
    weight: float = 1.0  # factor in the sum of all rewards

    def __post_init__(self):
        self._function  # noqa: B018 (what is wrong with it is said now)

    def __call__(self, episode: Episode) -> float:
        """Returns what the function returns."""
        return float(self._function(episode))

    @functools.cached_property
    def _function(self) -> Callable[[Episode], Any]:
        module, _, name = self.path.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"reward.path={self.path!r} names no function ({error}): write 'module:function'"
            ) from None

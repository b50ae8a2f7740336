"""Critics: they read answers and say which spans helped and which hurt.

A critic is a frozen dataclass registered under the kind "critic". Called with episodes and their
rewards it returns `Critique`s; a span is a quotation, or the characters [start, end) of the answer.
"""

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokjax.config import register
from tokjax.errors import ConfigError
from tokjax.rl.rewards import Episode
from tokjax.rl.span_rewards import Span

_SPAN = re.compile(r"^\s*\[?\s*span\s*\d*\s*\]?\s*[:.]\s*(.*)$", re.IGNORECASE)
_HEADING = re.compile(r"^\W*(positive|negative)\b[^:]*:?\s*\W*$", re.IGNORECASE)

PROMPT = """Read the question and the answer. Quote the parts of the answer that make it better and
the parts that make it worse, word for word, each on a line of its own:

Positive:
[Span 1]: ...
Negative:
[Span 1]: ...

Write "None identified" under a heading without any.

Question: {prompt}
Answer: {answer}

Positive:
"""


@dataclass(frozen=True)
class Critique:
    """What helped and what hurt in an answer."""

    positive: tuple[Span, ...] = ()
    negative: tuple[Span, ...] = ()


class Critic(Protocol):
    """Says which spans of answers helped and which hurt."""

    def __call__(self, episodes: Sequence[Episode], rewards: Sequence[float]) -> list[Critique]:
        """Returns a critique of each answer."""
        ...


@register("critic", "lexicon")
@dataclass(frozen=True)
class Lexicon:
    """Words that help and words that hurt, wherever they stand by themselves."""

    positive: tuple[str, ...] = ()  # words or phrases
    negative: tuple[str, ...] = ()  # words or phrases
    ignore_case: bool = False  # "Good" is "good"

    def __call__(self, episodes: Sequence[Episode], rewards: Sequence[float]) -> list[Critique]:
        """Returns a critique of each answer."""
        del rewards
        return [
            Critique(*(self._ranges(words, e.answer) for words in (self.positive, self.negative)))
            for e in episodes
        ]

    def _ranges(self, words: tuple[str, ...], text: str) -> tuple[tuple[int, int], ...]:
        if not words:
            return ()
        flags = re.IGNORECASE if self.ignore_case else 0
        longest_first = sorted(words, key=len, reverse=True)
        pattern = r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)"
        return tuple(m.span() for m in re.finditer(pattern, text, flags))


@register("critic", "function")
@dataclass(frozen=True)
class CriticFunction:
    """A Python function of an `Episode` and its reward that returns two lists of spans.

    A classifier of tokens is one by way of `spans_of_scores`.
    """

    path: str = ""  # "module:function"

    def __post_init__(self):
        self._function  # noqa: B018 (what is wrong with it is said now)

    def __call__(self, episodes: Sequence[Episode], rewards: Sequence[float]) -> list[Critique]:
        """Returns a critique of each answer."""
        pairs = zip(episodes, rewards, strict=True)
        found = [self._function(episode, float(reward)) for episode, reward in pairs]
        return [Critique(tuple(positive), tuple(negative)) for positive, negative in found]

    @functools.cached_property
    def _function(self) -> Callable[[Episode, float], Any]:
        module, _, name = self.path.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"critic.path={self.path!r} names no function ({error}): write 'module:function'"
            ) from None


@register("critic", "model")
@dataclass(frozen=True)
class ModelCritic:
    """A frozen language model that is asked to quote; what it writes is read by `read_critique`.

    Named as the checkpoint that the run begins from it is the policy's critique of itself, as the
    policy was before it learnt.
    """

    checkpoint: str = ""  # whatever `tokjax.load` takes
    prompt: str = PROMPT  # with {prompt}, {answer}, {reward}; ends behind the positive heading
    max_new_tokens: int = 60  # of a critique
    rows: int = 16  # critiques written at a time

    def __post_init__(self):
        if not self.checkpoint:
            raise ConfigError("critic 'model' needs a checkpoint: whatever `tokjax.load` takes")
        if "{answer}" not in self.prompt:
            raise ConfigError("the prompt of critic 'model' must have a place for {answer}")

    def __call__(self, episodes: Sequence[Episode], rewards: Sequence[float]) -> list[Critique]:
        """Returns a critique of each answer."""
        asked = [
            filled(self.prompt, prompt=e.prompt, answer=e.answer, reward=f"{reward:.3g}")
            for e, reward in zip(episodes, rewards, strict=True)
        ]
        texts: list[str] = []
        for first in range(0, len(asked), self.rows):
            part = asked[first : first + self.rows]
            # The last part is filled up, so that one program serves all.
            full = (part + part[-1:] * self.rows)[: self.rows]
            written = self._model.generate(full, max_new_tokens=self.max_new_tokens).texts
            texts += written[: len(part)]
        return [read_critique("Positive:\n" + text) for text in texts]

    @functools.cached_property
    def _model(self) -> Any:
        from tokjax.loading import load

        return load(self.checkpoint)


def read_critique(text: str) -> Critique:
    """Returns the spans that a text lists under a positive and a negative heading.

    Lines "[Span 1]: ..." are spans, quotation marks around them are taken off, and everything else
    ("None identified" too) is none. A text without headings gives no spans.

    >>> read_critique("Positive:\\n[Span 1]: well made\\nNegative:\\nNone identified")
    Critique(positive=('well made',), negative=())
    """
    found: dict[str, list[str]] = {"positive": [], "negative": []}
    heading = None
    for line in text.splitlines():
        if match := _HEADING.match(line):
            heading = match.group(1).lower()
        elif heading is not None and (match := _SPAN.match(line)):
            span = match.group(1).strip()
            if len(span) > 1 and span[0] == span[-1] and span[0] in "\"'`":
                span = span[1:-1].strip()
            if span and span.rstrip(".").lower() not in ("none", "none identified"):
                found[heading].append(span)
    return Critique(tuple(found["positive"]), tuple(found["negative"]))


def spans_of_scores(
    offsets: Sequence[tuple[int, int]], scores: Sequence[float], threshold: float
) -> Critique:
    """Returns the runs of tokens that a classifier scores above a threshold and below its negative.

    >>> spans_of_scores([(0, 3), (3, 7), (7, 9)], [0.9, 0.8, -0.7], 0.5)
    Critique(positive=((0, 7),), negative=((7, 9),))
    """

    def runs(inside: list[bool]) -> tuple[tuple[int, int], ...]:
        found: list[tuple[int, int]] = []
        for k, (start, end) in enumerate(offsets):
            if not inside[k]:
                continue
            if k and inside[k - 1] and found:
                found[-1] = (found[-1][0], max(end, found[-1][1]))
            elif end > start:
                found.append((start, end))
        return tuple(found)

    return Critique(runs([s > threshold for s in scores]), runs([s < -threshold for s in scores]))


def filled(form: str, **values: str) -> str:
    """Returns a prompt with its places filled, in one pass: what is filled in is not looked at.

    >>> filled("{question} {answer}", question="{answer}?", answer="yes")
    '{answer}? yes'
    """
    pattern = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(pattern, lambda match: values[match.group()[1:-1]], form)

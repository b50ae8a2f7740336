"""Thinking tokens in records: copies of special tokens that are read and never predicted.

Reference: Herel and Mikolov, "Thinking Tokens for Language Modeling" (arXiv 2405.08644); Vennam et
al., "Rethinking Thinking Tokens: Understanding Why They Underperform in Practice"
(arXiv 2411.11371). Where the latter puts them is not known to us: the places are recommendations.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32

from tokjax.data.offsets import Offsets
from tokjax.data.tokenizer_base import Tokenizer
from tokjax.errors import ConfigError, nearest

THINKING_TOKEN = "<T>"
Place = Literal["question", "rationale", "words", "all_words"]
PLACES = ("question", "rationale", "words", "all_words")
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Thinking:
    """How many thinking tokens go where."""

    # of each run; matched: as many as the rationale has tokens, whether it is in the text or not
    count: int | Literal["matched"] = 0
    # a run lies behind the question; or behind the rationale; or behind each word of the question;
    # or of question and rationale
    place: Place = "question"
    # special tokens of the tokenizer (`tokenizer.added` adds some); a run takes them in turn
    tokens: tuple[str, ...] = (THINKING_TOKEN,)

    def __post_init__(self):
        if self.place not in PLACES:
            raise ConfigError(
                f"unknown thinking.place={self.place!r}.{nearest(self.place, PLACES)}"
            )
        if isinstance(self.count, str):
            if self.count != "matched":
                raise ConfigError(f"thinking.count={self.count!r} must be a number, or 'matched'")
            if self.place in ("words", "all_words"):
                raise ConfigError(
                    f"thinking.count='matched' is the length of one run, but thinking.place="
                    f"{self.place!r} has one behind each word: give a number"
                )
        elif self.count < 0:
            raise ConfigError(f"thinking.count={self.count} must not be negative")
        if not self.tokens or len(set(self.tokens)) < len(self.tokens):
            raise ConfigError(f"thinking.tokens={self.tokens} must name some, each once")

    @property
    def matched(self) -> bool:
        """Whether a run is as long as the rationale."""
        return self.count == "matched"

    @property
    def used(self) -> bool:
        """Whether there is any thinking token."""
        return self.count != 0

    def check(self, tokenizer: Tokenizer) -> None:
        """Does nothing if the tokenizer has the tokens.

        Raises:
          ConfigError: it has not.
        """
        if self.used:
            special_ids(tokenizer, self.tokens)


@dataclass(frozen=True)
class Insertion:
    """Runs of special tokens that go into a text once it is tokenised.

    Attributes:
      tokens: their texts, taken in turn within a run.
      count: length of a run; None: as many as `like` has tokens.
      before: characters; a run goes before the token that holds each.
      behind: characters; a run goes behind the last token that holds each.
      like: the text that is counted where there is no `count`.
    """

    tokens: tuple[str, ...]
    count: int | None
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    like: str = ""


def insertion(
    thinking: Thinking, text: str, rationale: tuple[int, int] | None, answer: int, like: str
) -> Insertion | None:
    """Returns where thinking tokens go in a text; None if nowhere.

    Args:
      thinking: what is wanted.
      text: question, rationale if there is one, and answer.
      rationale: its range of characters, or None.
      answer: character at which the answer begins.
      like: the rationale, be it in the text or not.

    Raises:
      ConfigError: they should go behind a rationale that the text has not.
    """
    if not thinking.used:
        return None
    question = answer if rationale is None else rationale[0]
    count = None if isinstance(thinking.count, str) else thinking.count
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    if thinking.place == "question":
        before = (question,)
    elif thinking.place == "rationale":
        if rationale is None:
            raise ConfigError("thinking.place='rationale' needs {rationale} in the template")
        before = (answer,)
    else:
        stop = question if thinking.place == "words" else answer
        behind = tuple(match.end() - 1 for match in _WORD.finditer(text, 0, stop))
    return Insertion(thinking.tokens, count, before, behind, like)


def inserted(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    weights: Float32[np.ndarray, "n"],
    offsets: Offsets,
    wanted: Insertion,
) -> tuple[Int32[np.ndarray, "m"], Float32[np.ndarray, "m"]]:
    """Returns ids and weights of a text with its runs; those tokens weigh 0 as targets.

    All other tokens are those of the text without them.

    Args:
      tokenizer: that made the ids.
      ids: of the text.
      weights: of each token as a target.
      offsets: [start, end) in characters of each token.
      wanted: what goes in.

    Raises:
      ConfigError: one of the tokens is no special token of this tokenizer.
    """
    own = special_ids(tokenizer, wanted.tokens)
    if not ids:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    count = len(tokenizer.encode(wanted.like)) if wanted.count is None else wanted.count
    starts, ends = (np.array(side, np.int64) for side in zip(*offsets, strict=True))
    at = {int(np.searchsorted(ends, c, side="right")) for c in wanted.before}
    at |= {int(np.searchsorted(starts, c, side="right")) for c in wanted.behind}
    return with_runs(ids, weights, sorted(at), run_of(own, count))


def with_runs(
    ids: Sequence[int], weights: Sequence[float] | np.ndarray, at: Sequence[int], run: Sequence[int]
) -> tuple[Int32[np.ndarray, "m"], Float32[np.ndarray, "m"]]:
    """Returns ids and weights with a run of tokens of weight 0 before each of these positions.

    >>> ids, weights = with_runs([1, 2, 3], [0, 0, 1], [2], [9, 9])
    >>> ids.tolist(), weights.tolist()
    ([1, 2, 9, 9, 3], [0.0, 0.0, 0.0, 0.0, 1.0])
    """
    places = np.repeat(np.asarray(at, np.int64), len(run))
    runs = np.tile(np.asarray(run, np.int32), len(at))
    return (
        np.insert(np.asarray(ids, np.int32), places, runs),
        np.insert(np.asarray(weights, np.float32), places, np.float32(0)),
    )


def run_of(ids: Sequence[int], count: int) -> list[int]:
    """Returns a run of so many ids, taken in turn.

    >>> run_of([7, 8], 3)
    [7, 8, 7]
    """
    return [ids[i % len(ids)] for i in range(count)]


def special_ids(tokenizer: Tokenizer, tokens: Sequence[str]) -> tuple[int, ...]:
    """Returns the ids of special tokens by their texts.

    Raises:
      ConfigError: one is no special token of this tokenizer.
    """
    for token in tokens:
        if token not in tokenizer.special_tokens:
            raise ConfigError(
                f"{token!r} is no special token of {tokenizer.title}."
                f"{nearest(token, tokenizer.special_tokens)} Set tokenizer.added={tuple(tokens)!r} "
                f"to add some, or name special tokens that it has and does not use."
            )
    return tuple(tokenizer.special_tokens[token] for token in tokens)

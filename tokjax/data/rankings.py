"""A query with passages to be ranked: what a reranker reads of each passage."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokjax.errors import ConfigError

QUERY_TOKENS, PASSAGE_TOKENS = 32, 196  # DeAR's limits


@dataclass(frozen=True)
class Passage:
    """A text that may answer a query.

    Attributes:
      text: what it says.
      title: "" where it has none.
      score: a teacher's; None where there is none.
    """

    text: str
    title: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Limits:
    """How much of a query and of a passage is read, in tokens; None: all."""

    query: int | None = QUERY_TOKENS
    passage: int | None = PASSAGE_TOKENS

    def __post_init__(self):
        for name in ("query", "passage"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}_tokens={value} must be at least 1, or None for all")


@dataclass(frozen=True)
class Ranking:
    """A group of training: a query and its passages, as they are tokenised.

    Attributes:
      query: its text, prefix included; see `query_text`.
      passages: their texts, prefixes included; see `passage_text`.
      labels: how relevant each passage is.
      scores: a teacher's score of each; () where there is none.
      query_tokens: most tokens of the query; None: all.
      passage_tokens: most tokens of a passage; None: all.
    """

    query: str
    passages: tuple[str, ...]
    labels: tuple[float, ...]
    scores: tuple[float, ...] = ()
    query_tokens: int | None = QUERY_TOKENS
    passage_tokens: int | None = PASSAGE_TOKENS


def query_text(query: str) -> str:
    """Returns what is tokenised of a query.

    >>> query_text("who wrote it")
    'query: who wrote it'
    """
    return f"query: {query}"


def passage_text(passage: Passage) -> str:
    """Returns what is tokenised of a passage.

    >>> passage_text(Passage("It rained.", title="Weather"))
    'document: Weather It rained.'
    """
    return f"document: {' '.join(part for part in (passage.title, passage.text) if part)}"


def sequence_ids(
    query: Sequence[int],
    passage: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    limits: Limits,
) -> list[int]:
    """Returns the ids of a query with a passage, each behind `before` and cut to its limit.

    Args:
      query: ids of its text.
      passage: ids of its text.
      before: ids put before both, such as BOS.
      after: ids put at the end, such as EOS.
      limits: most ids of each.

    >>> sequence_ids([1, 2, 3], [4, 5], [0], [9], Limits(2, 8))
    [0, 1, 2, 0, 4, 5, 9]
    """
    return [*before, *query[: limits.query], *before, *passage[: limits.passage], *after]

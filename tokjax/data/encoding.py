"""Documents into token sequences with weights."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tokjax.data.rankings import Limits, Ranking, sequence_ids
from tokjax.data.sources import Document, Problem
from tokjax.data.thinking import inserted
from tokjax.data.tokenizers import Tokenizer
from tokjax.errors import DataError

if TYPE_CHECKING:
    from tokjax.data.chat import ChatTemplate, RenderedChat, Span

Weights = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Example:
    """A tokenised document.

    Attributes:
      name: where it came from.
      key: its stable key.
      tokens: Int32[n], begin and end tokens included.
      weights: Float32[n], the weight of each token as a target; None: all 1.
      num_bytes: length of its text in UTF-8.
      cuts: where the second and further sequences of a group begin in tokens; () where there is
        one sequence only.
      values: name -> float32 [G], a value of each sequence: of a ranking "label", and "score" where
        a teacher gave some; of translations "side", 0 and 1.
    """

    name: str
    key: str
    tokens: np.ndarray
    weights: np.ndarray | None
    num_bytes: int
    cuts: tuple[int, ...] = ()
    values: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """Turns documents into examples with one tokenizer.

    Attributes:
      tokenizer: gives the ids.
      before: ids put before every sequence; in a weighted one they weigh 0.
      after: ids put after every sequence; in a weighted one they weigh `end_weight`.
      max_tokens: longer examples are problems; None: no limit.
      chat_template: see `tokjax.data.chat.chat_template`.
    """

    tokenizer: Tokenizer
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    max_tokens: int | None = None
    chat_template: str | None = None

    def encode(self, documents: Sequence[Document]) -> list[Example | Problem]:
        """Returns the example of each document, or what is wrong with it, in order."""
        results: list[Example | Problem] = []
        plain = [d for d in documents if _is_plain(d)]
        ids = iter(self._plain_ids([d.text for d in plain]))
        for document in documents:
            try:
                if not _is_plain(document):
                    results.append(self._with_weights(document))
                else:
                    found = next(ids)
                    if isinstance(found, DataError):
                        raise found
                    results.append(self._example(document, document.text, found, None))
            except DataError as error:
                results.append(_problem(document.name, error))
        return results

    def _plain_ids(self, texts: list[str]) -> Iterator[list[int] | DataError]:
        """Yields the ids of each text; a failing batch is done one by one to find why."""
        try:
            yield from self.tokenizer.encode_batch(texts)
        except DataError:
            for text in texts:
                try:
                    yield self.tokenizer.encode(text)
                except DataError as error:
                    yield error

    def _with_weights(self, document: Document) -> Example:
        if document.rejected is not None:
            return self._pair(document, document.rejected)
        if document.ranking is not None:
            return self._ranking(document, document.ranking)
        if document.translation is not None:
            return self._translation(document, document.translation)
        return self._weighted(document) if document.messages is None else self._chat(document)

    def _pair(self, document: Document, rejected: Document) -> Example:
        """Returns both answers as one example, the second with its weights negated."""
        chosen = self._with_weights(dataclasses.replace(document, rejected=None))
        other = self._with_weights(rejected)
        assert chosen.weights is not None and other.weights is not None
        tokens = np.concatenate([chosen.tokens, other.tokens])
        self._check_length(tokens)
        return Example(
            document.name,
            document.key,
            tokens,
            np.concatenate([chosen.weights, 0 - other.weights]),
            chosen.num_bytes + other.num_bytes,
            (chosen.tokens.size,),
        )

    def _ranking(self, document: Document, ranking: Ranking) -> Example:
        """Returns the query with each passage, one sequence after the other.

        A last token closes the group: the loader takes it for a target only, so that the last
        sequence is whole among the inputs, as those before it are.
        """
        query, *passages = self.tokenizer.encode_batch([ranking.query, *ranking.passages])
        limits = Limits(ranking.query_tokens, ranking.passage_tokens)
        sequences = [sequence_ids(query, p, self.before, self.after, limits) for p in passages]
        tokens = np.fromiter((t for s in (*sequences, sequences[-1][-1:]) for t in s), np.int32)
        self._check_length(tokens)
        weights = np.ones(tokens.size, np.float32)
        weights[-1] = 0
        ends = np.cumsum([len(s) for s in sequences])
        values = {"label": np.array(ranking.labels, np.float32)}
        if ranking.scores:
            values["score"] = np.array(ranking.scores, np.float32)
        num_bytes = len(ranking.query.encode()) + sum(len(p.encode()) for p in ranking.passages)
        cuts = tuple(ends[:-1].tolist())
        return Example(document.name, document.key, tokens, weights, num_bytes, cuts, values)

    def _translation(self, document: Document, translation: str) -> Example:
        """Returns both texts as one example, each whole among the inputs, as of a ranking."""
        texts = document.text, translation
        found = self.tokenizer.encode_batch(list(texts))
        for ids, which in zip(found, ("first", "second"), strict=True):
            if not len(ids):
                raise _Unusable("empty", f"the {which} text has no token")
        first, second = ([*self.before, *ids, *self.after] for ids in found)
        tokens = np.array([*first, *second, second[-1]], np.int32)
        self._check_length(tokens)
        weights = np.ones(tokens.size, np.float32)
        weights[-1] = 0
        num_bytes = sum(len(text.encode()) for text in texts)
        values = {"side": np.arange(2, dtype=np.float32)}
        return Example(
            document.name, document.key, tokens, weights, num_bytes, (len(first),), values
        )

    def _weighted(self, document: Document) -> Example:
        ids, offsets = self.tokenizer.encode_with_offsets(document.text)
        weights = token_weights(len(document.text), document.weights or (), offsets)
        if document.by_token is not None:
            _set_by_token(weights, offsets, document.by_token)
        if document.insertion is not None:
            placed = inserted(self.tokenizer, ids, weights, offsets, document.insertion)
            ids, weights = placed[0].tolist(), placed[1]
        return self._example(document, document.text, ids, weights)

    def _chat(self, document: Document) -> Example:
        from tokjax.data.chat import encode_rendered

        messages = document.messages or ()
        given = [message.get("weight") for message in messages]
        spoken = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        rendered = self.template.render(spoken)
        # A weight on a message that is not the assistant's counts for its content.
        others = [s for s in rendered.content if given[s.message] and not _assistant(messages, s)]
        ranges = [
            (span.start, span.end, _weight(given[span.message]))
            for span in (*others, *rendered.assistant)
        ]
        ids, offsets = encode_rendered(self.tokenizer, rendered)
        weights = token_weights(len(rendered.text), tuple(ranges), offsets)
        ends = [weight for _, end, weight in ranges if _last_word(rendered, end)]
        document = dataclasses.replace(document, end_weight=ends[-1] if ends else 0.0)
        return self._example(document, rendered.text, ids, weights)

    @functools.cached_property
    def template(self) -> "ChatTemplate":
        """The compiled template of chats.

        Raises:
          ConfigError: it is unknown, unreadable, or no valid Jinja2.
        """
        from tokjax.data.chat import chat_template

        return chat_template(self.tokenizer, self.chat_template)

    def _example(
        self, document: Document, text: str, ids: Sequence[int], weights: np.ndarray | None
    ) -> Example:
        if not len(ids):
            raise _Unusable("empty", "the text has no token")
        before, after = self.before, self.after
        if document.messages is not None:  # its template may have written these tokens already
            before = () if before and tuple(ids[: len(before)]) == before else before
            after = () if after and tuple(ids[-len(after) :]) == after else after
        tokens = np.fromiter((*before, *ids, *after), np.int32)
        self._check_length(tokens)
        if weights is not None:
            ends = np.zeros(len(before)), np.full(len(after), document.end_weight)
            weights = np.concatenate([ends[0], weights, ends[1]]).astype(np.float32)
        return Example(document.name, document.key, tokens, weights, len(text.encode()))

    def _check_length(self, tokens: np.ndarray) -> None:
        if self.max_tokens is not None and tokens.size > self.max_tokens:
            raise _Unusable(
                "too long", f"it has {tokens.size} tokens, max_tokens is {self.max_tokens}"
            )


def _set_by_token(
    weights: np.ndarray,
    offsets: Sequence[tuple[int, int]],
    given: tuple[int, int, tuple[float, ...]],
) -> None:
    """Writes weights given for each token that ends within a range of characters."""
    start, stop, values = given
    own = [i for i, (_, end) in enumerate(offsets) if start < end <= stop]
    if len(own) != len(values):
        raise _Unusable(
            "weights do not fit the tokens",
            f"there are {len(values)} weights for {len(own)} tokens of this tokenizer",
        )
    weights[own] = values


def _is_plain(document: Document) -> bool:
    special = (
        *(document.weights, document.messages, document.rejected),
        *(document.ranking, document.translation),
    )
    return all(part is None for part in special)


def token_weights(length: int, ranges: Weights, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns Float32[n], for each token the weight of the last character it touches.

    Args:
      length: characters of the text.
      ranges: (start, end, weight); later ones lie over earlier ones, elsewhere the weight is 0.
      offsets: [start, end) in characters of each token.

    >>> token_weights(4, ((2, 4, 1.0),), [(0, 1), (1, 3), (3, 4)]).tolist()
    [0.0, 1.0, 1.0]
    """
    characters = np.zeros(length + 1, np.float32)
    for start, end, weight in ranges:
        characters[start:end] = weight
    last = np.array([max(end - 1, start, 0) for start, end in offsets], np.int64)
    return characters[last] if len(offsets) else np.zeros(0, np.float32)


def _assistant(messages: Sequence[dict[str, Any]], span: "Span") -> bool:
    return messages[span.message].get("role") == "assistant"


def _weight(given: float | None) -> float:
    return 1.0 if given is None else given


def _last_word(rendered: "RenderedChat", end: int) -> bool:
    """Whether no message says anything after character `end`."""
    return all(span.end <= end for span in rendered.content)


class _Unusable(DataError):
    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def _problem(name: str, error: DataError) -> Problem:
    if isinstance(error, _Unusable):
        return Problem(name, error.reason, error.detail)
    return Problem(name, "cannot be encoded", str(error))

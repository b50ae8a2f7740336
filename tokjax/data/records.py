"""One record with named fields into a document, or what is wrong with it."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tokjax.data.rankings import Passage, Ranking, passage_text, query_text
from tokjax.data.sources import Document, RecordSource, make_key, namespace
from tokjax.data.thinking import insertion
from tokjax.errors import DataError, nearest

Weights = tuple[tuple[int, int, float], ...]


class BadRecord(DataError):
    """A record that cannot be used: `reason` in general words, `detail` for this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def to_document(record: Any, source: RecordSource, name: str) -> Document:
    """Returns the document of a record.

    Args:
      record: what was read: a mapping from field to value, if all is well.
      source: which fields make the text.
      name: where the record is.

    Raises:
      BadRecord: a field is missing or of the wrong type, or a weight or the id makes no sense.
    """
    if not isinstance(record, Mapping):
        raise BadRecord("not an object", f"a record must be {{...}}, this is {_shown(record)}")
    _require(record, source.fields)
    document, content = _READERS[source.kind](record, source)
    explicit = record.get(source.id) if source.id else None
    if explicit is not None:
        if isinstance(explicit, bool) or not isinstance(explicit, str | int):
            raise BadRecord(
                f"the id in {source.id!r} is neither text nor a whole number",
                f"it is {_shown(explicit)}; set id='' to ignore the field",
            )
        content = f"{type(explicit).__name__}:{explicit}"
    key = make_key(namespace(source), content, explicit=explicit is not None)
    return dataclasses.replace(document, name=name, key=key, explicit_key=explicit is not None)


def _require(record: Mapping[str, Any], fields: Iterable[str]) -> None:
    for field in fields:
        if field not in record:
            close = nearest(field, [k for k in record if isinstance(k, str)])
            raise BadRecord(f"field {field!r} is missing", close.strip() or "the record is empty")
        if record[field] is None:
            raise BadRecord(f"field {field!r} is null")


Content = str  # of a record, for the key of one without an id


def _plain(record: Mapping[str, Any], source: RecordSource) -> tuple[Document, Content]:
    text = _string(record, source.text)
    by_token = _by_token(record, source.weights, 0, len(text))
    weights = None if by_token else _weights(record, source.weights, 0, len(text))
    return _weighted(text, weights, len(text), by_token), text


def _response(record: Mapping[str, Any], source: RecordSource) -> tuple[Document, Content]:
    document = _answer(record, source, source.response, source.weights)
    return document, document.text


def _rated(record: Mapping[str, Any], source: RecordSource) -> tuple[Document, Content]:
    label = record[source.label]
    if label not in (True, False):
        raise BadRecord(f"the label in {source.label!r} is not true or false", _shown(label))
    if record.get(source.messages) is not None:
        document, text = _chat(record, source)
        own = [i for i, m in enumerate(document.messages or ()) if m.get("role") == "assistant"]
        sign = 1.0 if label else -1.0
        messages = [
            {**m, "weight": sign * m.get("weight", 1.0)} if i in own else m
            for i, m in enumerate(document.messages or ())
        ]
        return dataclasses.replace(document, messages=tuple(messages)), f"{text}\0{bool(label)}"
    _require(record, source.template_fields)
    document, text = _response(record, source)
    return document if label else _negated(document), f"{text}\0{bool(label)}"


def _chat(record: Mapping[str, Any], source: RecordSource) -> tuple[Document, Content]:
    messages = check_messages(record[source.messages], source.messages)
    return Document("", "", "", None, messages), _spoken(messages)


def _preference(record: Mapping[str, Any], source: RecordSource) -> tuple[Document, Content]:
    fields = source.chosen, source.rejected
    if any(isinstance(record[field], list | tuple) for field in fields):
        chosen, rejected = (_dialogue(record, source, field) for field in fields)
        content = "\0".join(_spoken(d.messages or ()) for d in (chosen, rejected))
    else:
        named = (source.field_of(n) for _, n in source.pieces if n and n != "response")
        _require(record, named)
        weights = source.weights, source.weights and f"rejected_{source.weights}"
        chosen, rejected = (
            _answer(record, source, *pair) for pair in zip(fields, weights, strict=True)
        )
        content = f"{chosen.text}\0{rejected.text}"
    return dataclasses.replace(chosen, rejected=rejected), content


def _ranking(record: Mapping[str, Any], source: RecordSource) -> tuple[Document, Content]:
    query = _string(record, source.query)
    passages = check_passages(record[source.passages], source.passages)
    if len(passages) < 2:
        raise BadRecord("a ranking needs at least two passages", f"{source.passages!r} has one")
    given = record.get(source.labels) if source.labels else None
    if given is None:
        labels = (1.0, *[0.0] * (len(passages) - 1))
    elif not isinstance(given, list | tuple) or len(given) != len(passages):
        raise BadRecord(
            f"field {source.labels!r} is no list of one number for each passage",
            f"it is {_shown(given)} for {len(passages)} passages",
        )
    else:
        labels = tuple(_number(x, f"{source.labels}[{i}]", "label") for i, x in enumerate(given))
    if min(labels) < 0:
        raise BadRecord("a label is below 0", f"{source.labels!r} is {_shown(given)}")
    scores = tuple(p.score for p in passages if p.score is not None)
    if scores and len(scores) != len(passages):
        raise BadRecord(
            "some passages have a score and some have none",
            f"{len(scores)} of {len(passages)}; give all of them one, or none",
        )
    ranking = Ranking(
        query_text(query),
        tuple(passage_text(p) for p in passages),
        labels,
        scores,
        source.query_tokens,
        source.passage_tokens,
    )
    content = "\0".join((ranking.query, *ranking.passages))
    return Document("", "", "", ranking=ranking), content


def _translation(record: Mapping[str, Any], source: RecordSource) -> tuple[Document, Content]:
    first, second = _string(record, source.prompt), _string(record, source.response)
    return Document("", "", first, translation=second), f"{first}\0{second}"


def _reasoned(record: Mapping[str, Any], source: RecordSource) -> tuple[Document, Content]:
    if source.rationale_end:
        whole = _string(record, source.response)
        rationale, mark, answer = whole.rpartition(source.rationale_end)
        if not mark:
            raise BadRecord(
                f"field {source.response!r} has no {source.rationale_end!r}",
                "it should stand between rationale and answer",
            )
        record = {**record, source.rationale: rationale, source.response: answer}
    text, ranges = _joined(record, source)
    given, start, stop = ranges.get("rationale"), *ranges["response"]
    by_token = _by_token(record, source.weights, start, stop)
    own = None if by_token else _weights(record, source.weights, start, stop)
    weights = ((given[0] if given else start, stop, 1.0), *(own or ())[1:])
    document = _weighted(text, weights, stop if start < stop else 0, by_token)
    like = _string(record, source.rationale) if source.thinking.matched else ""
    placed = insertion(source.thinking, text, given, start, like)
    return dataclasses.replace(document, insertion=placed), text


def check_passages(passages: Any, field: str) -> tuple[Passage, ...]:
    """Returns the passages of a record.

    Args:
      passages: what the record holds: texts, or objects with `text`, `title` and `score`.
      field: where, for messages.

    Raises:
      BadRecord: it is no list of such, or it is empty.
    """
    if not isinstance(passages, list | tuple) or not passages:
        raise BadRecord(f"field {field!r} is no list of passages", f"it is {_shown(passages)}")
    found = []
    for index, passage in enumerate(passages):
        place = f"{field}[{index}]"
        if isinstance(passage, str):
            passage = {"text": passage}
        if not isinstance(passage, Mapping) or "text" not in passage:
            raise BadRecord(
                "a passage is neither text nor an object with text",
                f"{place} is {_shown(passage)}",
            )
        title, score = passage.get("title"), passage.get("score")
        for part, value in (("text", passage["text"]), ("title", "" if title is None else title)):
            if not isinstance(value, str):
                raise BadRecord(f"a passage's {part} is not text", f"{place}: {_shown(value)}")
            _unicode(value, f"{place}.{part}")
        number = None if score is None else _number(score, f"{place}.score", "score")
        found.append(Passage(passage["text"], title or "", number))
    return tuple(found)


def _answer(record: Mapping[str, Any], source: RecordSource, field: str, weights: str) -> Document:
    """Returns the document of a prompt with the response in a field, which alone counts."""
    text, start, stop = join(record, source, field)
    by_token = _by_token(record, weights, start, stop)
    given = None if by_token else _weights(record, weights, start, stop)
    ranges = ((start, stop, 1.0), *(given or ())[1:])
    return _weighted(text, ranges, stop if start < stop else 0, by_token)


def _dialogue(record: Mapping[str, Any], source: RecordSource, field: str) -> Document:
    """Returns the chat that ends in a response; of its messages the last one alone counts."""
    before: tuple[dict[str, Any], ...] = ()
    if isinstance(record.get(source.prompt), list | tuple):
        before = check_messages(record[source.prompt], source.prompt)
    elif isinstance(record.get(source.prompt), str) and isinstance(record[field], str):
        before = ({"role": "user", "content": _string(record, source.prompt)},)
    if isinstance(record[field], str):
        last = ({"role": "assistant", "content": _string(record, field)},)
    else:
        last = check_messages(record[field], field)
    messages = [
        {"weight": 0.0, **m} if m.get("role") == "assistant" else m for m in (*before, *last)
    ]
    messages[-1] = {"weight": 1.0, **last[-1]}
    return Document("", "", "", None, tuple(messages))


ByToken = tuple[int, int, tuple[float, ...]]


def _weighted(
    text: str, weights: Weights | None, stop: int, by_token: ByToken | None = None
) -> Document:
    """Returns a document whose end weighs as much as what it ends, character stop - 1."""
    covering = [weight for first, last, weight in weights or () if first < stop <= last]
    end = covering[-1] if covering else 1.0
    if by_token is not None:
        weights = weights or ((0, len(text), 1.0),)
        end = by_token[2][-1] if by_token[2] else end
    return Document("", "", text, weights, end_weight=end, by_token=by_token)


def _negated(document: Document) -> Document:
    weights = tuple((first, last, -weight) for first, last, weight in document.weights or ())
    by_token = document.by_token
    if by_token is not None:
        by_token = (*by_token[:2], tuple(-weight for weight in by_token[2]))
    return dataclasses.replace(
        document, weights=weights, end_weight=-document.end_weight, by_token=by_token
    )


def _by_token(record: Mapping[str, Any], field: str, start: int, stop: int) -> ByToken | None:
    """Returns weights that are given one for each token; None where they are not."""
    given = record.get(field) if field else None
    if not isinstance(given, list | tuple) or not given:
        return None
    if not all(isinstance(weight, int | float) for weight in given):
        return None
    return start, stop, tuple(_number(w, f"{field}[{i}]") for i, w in enumerate(given))


def _spoken(messages: Iterable[Mapping[str, Any]]) -> Content:
    spoken = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    return json.dumps(spoken, sort_keys=True, default=str)


_READERS: Mapping[str, Callable[..., tuple[Document, Content]]] = {
    "text": _plain,
    "response": _response,
    "messages": _chat,
    "rated": _rated,
    "preference": _preference,
    "ranking": _ranking,
    "translation": _translation,
    "reasoned": _reasoned,
}


def join(
    record: Mapping[str, Any], source: RecordSource, response: str | None = None
) -> tuple[str, int, int]:
    """Returns the text of a prompt and response, and where the response starts and stops.

    Args:
      record: with the fields of the source's template.
      source: says how the two are joined.
      response: the field that the response is in; None: the source's.
    """
    text, ranges = _joined(record, source, response)
    return text, *ranges["response"]


def _joined(
    record: Mapping[str, Any], source: RecordSource, response: str | None = None
) -> tuple[str, dict[str, tuple[int, int]]]:
    """Returns the text of a template, and where the value of each name lies in it."""
    text, ranges = "", {}
    for before, name in source.pieces:
        text += before
        if name is None:
            continue
        field = response if name == "response" and response else source.field_of(name)
        value = _string(record, field)
        ranges[name] = (len(text), len(text) + len(value))
        text += value
    return text, ranges


def check_messages(messages: Any, field: str) -> tuple[dict[str, Any], ...]:
    """Returns the messages of a chat, each with a finite weight or none.

    Roles and contents are looked at when the chat is rendered.

    Raises:
      BadRecord: it is no list of objects, or a weight is no finite number.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise BadRecord(f"field {field!r} is no list of messages", f"it is {_shown(messages)}")
    checked = []
    for index, message in enumerate(messages):
        place = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise BadRecord("a message is not an object", f"{place} is {_shown(message)}")
        # Tables hold null where a message lacks a key; templates ask whether a key is there.
        clean = {k: v for k, v in message.items() if v is not None or k == "content"}
        for part, value in clean.items():
            if isinstance(value, str):
                _unicode(value, f"{place}.{part}")
        if "weight" in clean:
            clean["weight"] = _number(clean["weight"], f"{place}.weight")
        checked.append(clean)
    return tuple(checked)


def _string(record: Mapping[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise BadRecord(f"field {field!r} is not text", f"it is {_shown(value)}")
    _unicode(value, field)
    return value


def _unicode(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"field {field!r} is no valid Unicode",
            f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}",
        ) from None


def _weights(record: Mapping[str, Any], field: str, start: int, stop: int) -> Weights | None:
    """Returns the whole range with weight 1, then the record's own ranges; None without any."""
    given = record.get(field) if field else None
    if given is None:
        return None
    reason = f"field {field!r} is no list of [start, end, weight]"
    if not isinstance(given, list | tuple):
        raise BadRecord(reason, f"it is {_shown(given)}; set weights='' to ignore the field")
    ranges: list[tuple[int, int, float]] = []
    for index, item in enumerate(given):
        place = f"{field}[{index}]"
        if not isinstance(item, list | tuple) or len(item) != 3:
            raise BadRecord(reason, f"{place} is {_shown(item)}")
        first, last, weight = item
        if not all(_whole(x) for x in (first, last)):
            raise BadRecord(reason, f"{place} has the range {_shown(first)} to {_shown(last)}")
        first, last = int(first), int(last)
        if not 0 <= first < last <= stop - start:
            raise BadRecord(
                "a weight's range lies outside the text",
                f"{place} is {first} to {last}, the text has {stop - start} characters",
            )
        ranges.append((start + first, start + last, _number(weight, place)))
    ordered = sorted(ranges)
    for left, right in itertools.pairwise(ordered):
        if left[1] > right[0]:
            raise BadRecord(
                "ranges of weights overlap",
                f"{left[0] - start} to {left[1] - start} and {right[0] - start} to "
                f"{right[1] - start}",
            )
    return ((start, stop, 1.0), *ordered)


def _whole(value: Any) -> bool:
    if isinstance(value, float):  # Parquet and JSON writers turn [0, 5, 0.5] into floats
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any, place: str, what: str = "weight") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecord(f"a {what} is no number", f"{place} is {_shown(value)}")
    try:
        finite = math.isfinite(value) and abs(value) < 3e38  # they are kept as float32
    except OverflowError:
        finite = False
    if not finite:
        raise BadRecord(f"a {what} is not finite", f"{place} is {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

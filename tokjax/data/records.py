"""One record with named fields into a document, or what is wrong with it."""

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from tokjax.data.sources import Document, RecordSource, make_key, namespace
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
    for field in source.fields:
        if field not in record:
            close = nearest(field, [k for k in record if isinstance(k, str)])
            raise BadRecord(f"field {field!r} is missing", close.strip() or "the record is empty")
        if record[field] is None:
            raise BadRecord(f"field {field!r} is null")
    weights: Weights | None
    start = stop = 0
    if source.kind == "messages":
        messages = check_messages(record[source.messages], source.messages)
        text, weights = "", None
        spoken = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        content = json.dumps(spoken, sort_keys=True, default=str)
    else:
        messages = None
        if source.kind == "text":
            text = content = _string(record, source.text)
            stop = len(text)
            weights = _weights(record, source, 0, stop)
        else:
            text, start, stop = join(record, source)
            content = text
            weights = ((start, stop, 1.0), *(_weights(record, source, start, stop) or ())[1:])
    explicit = record.get(source.id) if source.id else None
    if explicit is not None:
        if isinstance(explicit, bool) or not isinstance(explicit, str | int):
            raise BadRecord(
                f"the id in {source.id!r} is neither text nor a whole number",
                f"it is {_shown(explicit)}; set id='' to ignore the field",
            )
        content = f"{type(explicit).__name__}:{explicit}"
    key = make_key(namespace(source), content, explicit=explicit is not None)
    # The end token belongs to what it ends: it weighs as much as the last character before it.
    covering = [weight for first, last, weight in weights or () if first < stop <= last]
    end_weight = covering[-1] if covering and start < stop else 1.0
    return Document(name, key, text, weights, messages, end_weight, explicit is not None)


def join(record: Mapping[str, Any], source: RecordSource) -> tuple[str, int, int]:
    """Returns the text of a prompt and response, and where the response starts and stops."""
    text, start, stop = "", 0, 0
    for before, name in source.pieces:
        text += before
        if name is None:
            continue
        value = _string(record, source.field_of(name))
        if name == "response":
            start, stop = len(text), len(text) + len(value)
        text += value
    return text, start, stop


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


def _weights(
    record: Mapping[str, Any], source: RecordSource, start: int, stop: int
) -> Weights | None:
    """Returns the whole range with weight 1, then the record's own ranges; None without any."""
    given = record.get(source.weights) if source.weights else None
    if given is None:
        return None
    field = source.weights
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


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecord("a weight is no number", f"{place} is {_shown(value)}")
    try:
        finite = math.isfinite(value) and abs(value) < 3e38  # weights are kept as float32
    except OverflowError:
        finite = False
    if not finite:
        raise BadRecord("a weight is not finite", f"{place} is {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

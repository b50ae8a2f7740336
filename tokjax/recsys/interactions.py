"""Who took what, in order of time, and its parts for training and tests."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from tokjax.data.files import numbered_lines, read_bytes
from tokjax.errors import ConfigError, DataError

NOTHING = -1  # in the place of an item


@dataclass(frozen=True)
class Interactions:
    """Items that users took, by number.

    Attributes:
        users: names.
        items: names.
        sequences: what each user took, the earliest first.
    """

    users: tuple[str, ...]
    items: tuple[str, ...]
    sequences: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        count = sum(map(len, self.sequences))
        return f"Interactions({count} of {len(self.users)} users with {len(self.items)} items)"

    def core(self, fewest: int = 5) -> "Interactions":
        """Returns the largest part in which each user and each item occurs so often.

        Raises:
            DataError: nothing is left.
        """
        kept = list(self.sequences)
        while True:
            counts = Counter(item for items in kept for item in items)
            left = [tuple(i for i in items if counts[i] >= fewest) for items in kept]
            left = [items if len(items) >= fewest else () for items in left]
            if left == kept:
                break
            kept = left
        if not any(kept):
            raise DataError(
                f"no user and no item is left that occurs {fewest} times: lower that, or give more "
                f"interactions"
            )
        some = sorted({item for items in kept for item in items})
        number = {item: i for i, item in enumerate(some)}
        return Interactions(
            tuple(user for user, items in zip(self.users, kept, strict=True) if items),
            tuple(self.items[i] for i in some),
            tuple(tuple(number[i] for i in items) for items in kept if items),
        )


@dataclass(frozen=True, eq=False)
class Histories:
    """What was taken before, and what then.

    Attributes:
        items: before, the latest last; -1 fills up in front.
        targets: then.
        users: whose.
    """

    items: Int[np.ndarray, "N H"]
    targets: Int[np.ndarray, "N"]
    users: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: Any) -> "Histories":
        return Histories(self.items[rows], self.targets[rows], self.users[rows])


@dataclass(frozen=True)
class Split:
    """The parts of leave-one-out: each user's last item tests, the one before validates."""

    train: Histories
    validation: Histories
    test: Histories


def leave_one_out(sequences: Sequence[Sequence[int]], longest: int = 20) -> Split:
    """Returns the split; all prefixes of what is left train.

    Users with less than three items only train.

    Args:
        sequences: what each user took, the earliest first.
        longest: items of a history; what is earlier is left out.

    Raises:
        DataError: no user has three items.

    >>> split = leave_one_out([[4, 7, 5, 9]], longest=2)
    >>> split.train.items.tolist(), split.train.targets.tolist()
    ([[-1, 4]], [7])
    >>> split.test.items.tolist(), split.test.targets.tolist()
    ([[7, 5]], [9])
    """
    if longest < 1:
        raise ConfigError(f"longest={longest} must be at least 1")
    train, validation, test = [], [], []
    for user, items in enumerate(sequences):
        held_out = 2 if len(items) >= 3 else 0
        train += [(user, items[:i], items[i]) for i in range(1, len(items) - held_out)]
        if held_out:
            validation.append((user, items[:-2], items[-2]))
            test.append((user, items[:-1], items[-1]))
    if not test or not train:
        raise DataError(
            "no user has enough items: at least three to test and validate, four to train as well"
        )
    return Split(*(_histories(part, longest) for part in (train, validation, test)))


def _histories(part: Sequence[tuple[int, Sequence[int], int]], longest: int) -> Histories:
    items = np.full((len(part), longest), NOTHING, np.int32)
    for row, (_, before, _) in enumerate(part):
        latest = list(before)[-longest:]
        items[row, longest - len(latest) :] = latest
    users, targets = (np.array([each[i] for each in part], np.int32) for i in (0, 2))
    return Histories(items, targets, users)


def read_interactions(
    path: str | Path, *, user: str = "user", item: str = "item", time: str | None = None
) -> Interactions:
    """Returns the interactions in a file: one a record, with the names of user and item.

    Args:
        path: JSON lines, or CSV with a header, by its ending; `.gz` is decompressed.
        user: field of the user's name.
        item: field of the item's name.
        time: field of a number that each user's records are sorted by; None keeps their order.

    Raises:
        DataError: the file cannot be read, or a record lacks a field.
    """
    found: dict[str, list[tuple[float, str]]] = {}
    items: dict[str, int] = {}
    for place, record in read_records(path):
        who, what = (_text(record, name, place) for name in (user, item))
        found.setdefault(who, []).append((_number(record, time, place), what))
        items.setdefault(what, len(items))
    if not found:
        raise DataError(f"{path} holds no interaction")
    sequences = tuple(
        tuple(items[what] for _, what in sorted(own, key=lambda each: each[0]))
        for own in found.values()
    )
    return Interactions(tuple(found), tuple(items), sequences)


def read_texts(path: str | Path, *, item: str = "item", text: str = "text") -> dict[str, str]:
    """Returns the text of each item in a file of such records; see `read_interactions`."""
    return {
        _text(record, item, place): _text(record, text, place)
        for place, record in read_records(path)
    }


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of a file of JSON lines or CSV.

    Raises:
        DataError: it cannot be read as such.
    """
    file = str(path)
    if file.removesuffix(".gz").endswith(".csv"):
        try:
            rows = csv.DictReader(io.StringIO(read_bytes(file).decode(), newline=""))
            for row in rows:
                yield f"{file}:{rows.line_num}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file} is no CSV in UTF-8: {error}") from error
        return
    for number, line in numbered_lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number}: no valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{file}:{number}: write one object a line, not {str(record)[:50]}")
        yield f"{file}:{number}", record


def _text(record: dict[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        fields = ", ".join(map(repr, record))
        raise DataError(f"{place}: no {name!r} among the fields {fields}")
    return str(value)


def _number(record: dict[str, Any], name: str | None, place: str) -> float:
    if name is None:
        return 0.0
    try:
        return float(record[name])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{place}: {name}={record.get(name)!r} is no number") from None

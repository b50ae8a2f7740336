"""Where a run's wall time went, over all its restarts, kept in `workdir/ledger.json`."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokjax.files import set_aside, write_atomically

log = logging.getLogger(__name__)

FILE_NAME = "ledger.json"
CATEGORIES = (
    "start_up",
    "compile",
    "data_wait",
    "rollout",
    "step",
    "eval",
    "save",
    "sample",
    "report",
    "other",
    "lost",
)
_FORMAT = 1
_REDONE = ("step", "data_wait", "rollout")  # the categories that make up the duration of a step
_MAX_MARKS = 512


class Ledger:
    """Books every second of this process to one category; what is not measured is `other`.

    The file is replaced atomically every `flush_every_s` seconds (checked whenever a method is
    called), so a killed run loses at most that much of its books. Each start of the workdir is
    an entry. Not for use from several threads.

    Args:
        path: the JSON file; a damaged one is kept under another name and a new one begun.
        elapsed_before: seconds the process had run before this call, booked as `start_up`.
        enabled: False (every process but the first) measures but never touches the file.
        flush_every_s: seconds between writes.
        clock: returns seconds that never jump.
        wall: returns Unix seconds, for the dates of the entries.

    Raises:
        StorageError: the file cannot be written (also from every method).
    """

    def __init__(
        self,
        path: Path,
        *,
        elapsed_before: float = 0.0,
        enabled: bool = True,
        flush_every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self._path, self._enabled, self._flush_every_s = Path(path), enabled, flush_every_s
        self._clock, self._wall = clock, wall
        self._since = self._flushed = clock()
        self._open_categories: list[str] = []
        self._closed = False
        self._document = _load(self._path) if enabled else _empty()
        for entry in self._document["entries"]:
            if entry["exit"] is None:
                entry["exit"] = "killed"  # it never came to close(); last_seen is all we know
        self._entry: dict[str, Any] = {
            "started": wall() - elapsed_before,
            "last_seen": wall(),
            "exit": None,
            "first_step": None,  # the step continued from: the last one not done by this entry
            "last_step": None,
            "kept_step": None,  # steps beyond this one were done again by a later entry
            "seconds": {"start_up": float(elapsed_before)},
            "marks": [],  # [step, seconds of `step`, seconds of `data_wait`] up to it
        }
        self._document["entries"].append(self._entry)
        if enabled:
            self.flush()

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Books the time of the block to `category`; a block inside it books its own time.

        Raises:
            ValueError: there is no such category.
        """
        self._check(category)
        self._book()
        self._open_categories.append(category)
        try:
            yield
        finally:
            self._book()
            self._open_categories.pop()
            self._flush_if_due()

    def add(self, category: str, seconds: float) -> None:
        """Moves `seconds` that have just passed to `category` from the one being measured.

        For times measured elsewhere, such as a compilation inside a step. Never more is moved
        than was booked, so that the sums still equal the wall time.
        """
        self._check(category)
        self._book()
        booked = self._entry["seconds"]
        source = self._current()
        moved = max(0.0, min(float(seconds), booked.get(source, 0.0)))
        booked[source] = booked.get(source, 0.0) - moved
        booked[category] = booked.get(category, 0.0) + moved

    def resume_from(self, step: int) -> float:
        """Says that this start continues from `step`; returns the seconds of work lost by that.

        Steps that earlier starts did beyond `step` will be done again: their time (of `step` and
        `data_wait`) becomes `lost`. Call it once, with 0 for a start from nothing.
        """
        before = summarise(self._document)["seconds"]["lost"]
        for entry in self._document["entries"][:-1]:
            if entry["last_step"] is not None and step < _kept(entry):
                entry["kept_step"] = step
        self._entry["first_step"] = self._entry["last_step"] = step
        self._mark(step)
        if self._enabled:
            self.flush()
        return summarise(self._document)["seconds"]["lost"] - before

    def at_step(self, step: int) -> None:
        """Says that `step` is done; cheap enough for every step."""
        self._entry["last_step"] = step
        if self._entry["first_step"] is None:
            self._entry["first_step"] = step - 1
        self._flush_if_due()

    def saved(self, step: int) -> None:
        """Says that a checkpoint of `step` exists, so a restart can lose only what follows."""
        self._book()
        self._mark(step)
        if self._enabled:
            self.flush()

    def flush(self) -> None:
        """Writes the file; after `close` it does nothing."""
        if self._closed:
            return
        self._book()
        self._entry["last_seen"] = self._wall()
        self._flushed = self._since
        if self._enabled:
            write_atomically(self._path, json.dumps(self._document) + "\n")

    def close(self, reason: str = "finished") -> None:
        """Writes the file with the reason for the end, e.g. "finished" or "preempted"."""
        if not self._closed:
            self._entry["exit"] = reason
            self.flush()
            self._closed = True

    def summary(self) -> dict[str, Any]:
        """Returns `summarise` of everything booked until now."""
        self._book()
        if not self._closed:
            self._entry["last_seen"] = self._wall()
        return summarise(self._document)

    def table(self) -> str:
        """Returns `table` of the summary."""
        return table(self.summary())

    def _check(self, category: str) -> None:
        if category not in CATEGORIES or category == "lost":
            raise ValueError(f"no category {category!r} to book to; there are {CATEGORIES[:-1]}")

    def _current(self) -> str:
        return self._open_categories[-1] if self._open_categories else "other"

    def _book(self) -> None:
        now = self._clock()
        if not self._closed:  # a closed ledger keeps answering with what it had
            seconds, category = self._entry["seconds"], self._current()
            seconds[category] = seconds.get(category, 0.0) + now - self._since
        self._since = now

    def _mark(self, step: int) -> None:
        marks, seconds = self._entry["marks"], self._entry["seconds"]
        marks.append([step, *(seconds.get(category, 0.0) for category in _REDONE)])
        if len(marks) > _MAX_MARKS:
            # Old checkpoints are the least likely to be continued from: keep every other one.
            half = _MAX_MARKS // 2
            marks[:half] = marks[:half:2]

    def _flush_if_due(self) -> None:
        if self._enabled and self._clock() - self._flushed >= self._flush_every_s:
            self.flush()


def _empty() -> dict[str, Any]:
    return {"format": _FORMAT, "entries": []}


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return _empty()
    try:
        document = json.loads(path.read_text())
        summarise(document)
        if document["format"] == _FORMAT:
            return document
        why = f"of format {document['format']}"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        why = "damaged"
    log.warning("%s is %s: kept as %s, a new one begins", path, why, set_aside(path, "old").name)
    return _empty()


def _kept(entry: Mapping[str, Any]) -> int:
    kept = entry["kept_step"]
    return entry["last_step"] if kept is None else min(kept, entry["last_step"])


def _seconds_at(entry: Mapping[str, Any], step: int) -> list[float]:
    """Returns the seconds of each `_REDONE` category when `step` was done, between marks linear."""
    final = [entry["last_step"], *(entry["seconds"].get(c, 0.0) for c in _REDONE)]
    known = sorted([*entry["marks"], final])
    known = [mark for mark in known if mark[0] <= entry["last_step"]]
    below = [mark for mark in known if mark[0] <= step]
    above = [mark for mark in known if mark[0] > step]
    if not below or not above:
        return [0.0 for _ in _REDONE] if not below else below[-1][1:]
    a, b = below[-1], above[0]
    share = (step - a[0]) / (b[0] - a[0])
    return [x + share * (y - x) for x, y in zip(a[1:], b[1:], strict=True)]


def summarise(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a ledger says in total.

    The dictionary holds `seconds` (per category; their sum is the wall time all starts ran),
    `wall_seconds`, `away_seconds` (between the starts), `starts`, `lost_steps` (steps done more
    than once), `useful` (the share of wall time in steps that were kept), and `entries` (per
    start: started, last_seen, exit, first_step, last_step, lost_steps, seconds).
    """
    total = dict.fromkeys(CATEGORIES, 0.0)
    entries, away, previous = [], 0.0, None
    for entry in document["entries"]:
        seconds = dict.fromkeys(CATEGORIES, 0.0) | entry["seconds"]
        lost_steps = 0
        if entry["last_step"] is not None and _kept(entry) < entry["last_step"]:
            lost_steps = entry["last_step"] - max(_kept(entry), entry["first_step"])
            for category, until in zip(_REDONE, _seconds_at(entry, _kept(entry)), strict=True):
                seconds["lost"] += seconds[category] - until
                seconds[category] = until
        for category in CATEGORIES:
            total[category] += seconds[category]
        if previous is not None:
            away += max(0.0, entry["started"] - previous)
        previous = entry["last_seen"]
        shown = ("started", "last_seen", "exit", "first_step", "last_step")
        entries.append(
            {key: entry[key] for key in shown} | {"lost_steps": lost_steps, "seconds": seconds}
        )
    wall = sum(total.values())
    return {
        "seconds": total,
        "wall_seconds": wall,
        "away_seconds": away,
        "starts": len(entries),
        "lost_steps": sum(entry["lost_steps"] for entry in entries),
        "useful": total["step"] / wall if wall else 0.0,
        "entries": entries,
    }


def read_ledger(path: Path) -> dict[str, Any] | None:
    """Returns `summarise` of a ledger file, None where it is missing or cannot be read."""
    try:
        return summarise(json.loads(Path(path).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def duration(seconds: float) -> str:
    """Returns a time span for people.

    >>> duration(3.24), duration(75), duration(90000)
    ('3.2 s', '1:15', '25:00:00')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(summary: Mapping[str, Any]) -> str:
    """Returns a plain-text table of where the wall time went, with percentages, and the starts."""
    wall = summary["wall_seconds"]
    lines = [f"wall time {duration(wall)} in {summary['starts']} start(s)"]
    for category, seconds in summary["seconds"].items():
        share = 100 * seconds / wall if wall else 0.0
        lines.append(f"  {category.replace('_', ' '):<10} {duration(seconds):>10} {share:6.1f} %")
    if summary["starts"] > 1:
        lines.append(
            f"away between starts {duration(summary['away_seconds'])}; "
            f"{summary['lost_steps']} step(s) done again"
        )
        for number, entry in enumerate(summary["entries"], 1):
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["started"]))
            steps = f"steps {entry['first_step']} to {entry['last_step']}"
            steps = steps if entry["last_step"] is not None else "no step"
            lines.append(f"  start {number}: {began}, {steps}, {entry['exit'] or 'running'}")
    return "\n".join(lines)

"""Metrics of a run: a CSV that survives kills and resumes, TensorBoard events, weighted means.

`metrics.csv` has the columns `step`, `time` (Unix seconds) and one per metric, in the order of
their first appearance; each `write` appends one row and leaves the cells of other metrics empty.
The names the loop uses and the report looks for: `loss`, `learning_rate`, `grad_norm`,
`tokens_per_second`, `mfu`, `tokens` (seen so far), and `eval/loss` or `eval/<set>/loss`; losses in
nats per token.
"""

import csv
import io
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokjax.files import AppendFile, set_aside, storage_errors, write_atomically
from tokjax.training.tensorboard import ScalarEvents

log = logging.getLogger(__name__)

FILE_NAME = "metrics.csv"
TENSORBOARD_DIRECTORY = "tensorboard"
# What differs between two runs of the same computation: compare runs without these.
TIME_COLUMNS = ("time", "step_seconds", "steps_per_second", "tokens_per_second", "mfu")


class MetricWriter:
    """Writes metrics to `workdir/metrics.csv` and TensorBoard events in `workdir/tensorboard`.

    Args:
        workdir: the run's directory, made when missing.
        resume_step: the step the run continues from: rows of later steps, which will be computed
            again, are removed, so that the file equals that of an undisturbed run except for
            `TIME_COLUMNS`. (Write and `flush` everything up to a step before saving a checkpoint
            of that step.) None starts afresh; a file that is already there is kept under
            another name.
        enabled: False (every process but the first) writes nothing at all.
        flush_every_s: seconds between fsyncs. Rows reach the operating system at once, so only
            a power loss, not a killed process, can cost the rows since the last fsync.
        clock: returns Unix seconds.

    Attributes:
        notes: what was repaired or set aside on opening, for people.

    Raises:
        StorageError: the disk is full or the directory unwritable (also from every method).
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int | None,
        enabled: bool = True,
        flush_every_s: float = 10.0,
        clock: Callable[[], float] = time.time,
    ):
        self.notes: list[str] = []
        self._path = Path(workdir) / FILE_NAME
        self._columns, self._closed = ["step", "time"], False
        self._flush_every_s, self._clock, self._flushed = flush_every_s, clock, clock()
        self._file: AppendFile | None = None
        if not enabled:
            return
        with storage_errors(workdir, "create"):
            Path(workdir).mkdir(parents=True, exist_ok=True)
        self._prepare(resume_step)
        hide_from = 0 if resume_step is None else resume_step + 1
        self._events = ScalarEvents(Path(workdir) / TENSORBOARD_DIRECTORY, hide_from_step=hide_from)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row of `metrics` at `step`; values that are not finite are kept as such.

        Raises:
            ValueError: a metric's name is empty, reserved, or holds a line break; or the writer
                is closed.
        """
        if self._closed:
            raise ValueError(f"step {step}: {self._path} was closed, this row would be lost")
        if self._file is None or not metrics:
            return
        values = {name: float(value) for name, value in metrics.items()}
        now = self._clock()
        new = [name for name in values if name not in self._columns]
        for name in new:
            if not name or "\n" in name or "\r" in name:
                raise ValueError(f"metric name {name!r}: it must be one non-empty line")
        if reserved := {"step", "time"} & values.keys():
            raise ValueError(f"metric names {sorted(reserved)} are columns of their own")
        if new:
            self._widen(new)
        cells = [repr(values[name]) if name in values else "" for name in self._columns[2:]]
        self._file.append(_line([int(step), repr(now), *cells]).encode())
        self._events.write(int(step), values, now)
        if now - self._flushed >= self._flush_every_s or now < self._flushed:
            self.flush()

    def flush(self) -> None:
        """Makes every row written so far survive a power loss."""
        if self._file is not None:
            self._file.sync()
            self._events.sync()
            self._flushed = self._clock()

    def close(self) -> None:
        """Flushes and closes the files; a second call does nothing."""
        self._closed = True
        if self._file is None:
            return
        try:
            self.flush()
        finally:
            self._file.close()
            self._file = None
            self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, note: str) -> None:
        self.notes.append(note)
        log.warning("%s", note)

    def _prepare(self, resume_step: int | None) -> None:
        """Brings the file into the state it had right after `resume_step` and opens it."""
        rows: list[list[str]] = []
        if self._path.exists():
            with storage_errors(self._path, "read"):
                header, found, damaged = _parse(self._path.read_bytes())
            if resume_step is None or header[:2] != ["step", "time"]:
                kept = set_aside(self._path, "previous")
                why = "the run starts afresh" if resume_step is None else "it has no step column"
                self._note(f"{self._path} was kept as {kept.name}: {why}")
            else:
                if damaged:
                    self._note(f"{self._path}: removed {damaged} torn or malformed line(s)")
                rows = [row for row in found if int(row[0]) <= resume_step]
                # A column that only the removed rows used comes back where it first appears.
                used = [i for i in range(len(header)) if i < 2 or any(row[i] for row in rows)]
                rows = [[row[i] for i in used] for row in rows]
                self._columns = [header[i] for i in used]
        write_atomically(self._path, "".join(map(_line, [self._columns, *rows])))
        self._file = AppendFile(self._path)

    def _widen(self, new: list[str]) -> None:
        assert self._file is not None
        with storage_errors(self._path, "read"):
            _, _, rows = self._path.read_bytes().partition(b"\n")
        rows = rows.replace(b"\n", b"," * len(new) + b"\n")  # no cell holds a line break
        columns = [*self._columns, *new]
        write_atomically(self._path, _line(columns).encode() + rows)
        self._file.close()
        self._file = AppendFile(self._path)
        self._columns = columns


def _line(cells: Iterable[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


def _parse(data: bytes) -> tuple[list[str], list[list[str]], int]:
    """Returns the header, the rows padded to its width, and the number of lines left out."""
    lines = data.decode("utf-8", "replace").split("\n")
    torn = int(lines.pop() != "")  # whatever follows the last line break was cut off
    if not lines:
        return [], [], torn
    header, *rows = csv.reader(lines)
    good = [row for row in rows if _is_row(row, len(header))]
    return header, good, torn + len(rows) - len(good)


def _is_row(row: list[str], width: int) -> bool:
    try:
        int(row[0])
        for cell in row[1:]:
            float(cell or 0)
    except (ValueError, IndexError):
        return False
    return len(row) == width


def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Returns the columns of a metrics file, all of one length, in the file's order.

    `step` holds ints, the others floats (nan and inf included), None where a row has no value.
    Torn or malformed lines are left out, so a file that is being written can be read; a missing
    file gives an empty dictionary.

    Args:
        path: a `metrics.csv` or the workdir that holds it.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if not file.exists():
        return {}
    header, rows, _ = _parse(file.read_bytes())
    if header[:1] != ["step"]:
        return {}
    table: dict[str, list[Any]] = {name: [] for name in header}
    for row in rows:
        for name, cell in zip(header, row, strict=True):
            table[name].append(int(cell) if name == "step" else float(cell) if cell else None)
    return table


def series(table: Mapping[str, list[Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of one metric, without the rows that lack it."""
    pairs = [(s, v) for s, v in zip(table["step"], table[name], strict=True) if v is not None]
    return [s for s, _ in pairs], [v for _, v in pairs]


class Accumulator:
    """Weighted means of metrics over several batches: sums of values over sums of weights.

    Values may be arrays still being computed: each is read a few `add` calls later, so that
    adding does not wait for the device.

    >>> total = Accumulator()
    >>> total.add({"loss": (6.0, 2.0)})
    >>> total.add({"loss": (9.0, 1.0)})
    >>> total.means()
    {'loss': 5.0}
    """

    _LAG = 4  # adds between receiving an array and reading it

    def __init__(self):
        self._pending: list[Mapping[str, tuple[Any, Any]]] = []
        self._sums: dict[str, list[float]] = {}

    def add(self, pairs: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds, per name, a pair (sum of weighted values, sum of weights): scalars or arrays."""
        self._pending.append(pairs)
        if len(self._pending) > self._LAG:
            self._fold(self._pending.pop(0))

    def _fold(self, pairs: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (value, weight) in pairs.items():
            sums = self._sums.setdefault(name, [0.0, 0.0])
            sums[0] += float(value)
            sums[1] += float(weight)

    def totals(self) -> dict[str, tuple[float, float]]:
        """Returns, per name, the sums of weighted values and of weights so far."""
        while self._pending:
            self._fold(self._pending.pop(0))
        return {name: (value, weight) for name, (value, weight) in self._sums.items()}

    def means(self) -> dict[str, float]:
        """Returns the weighted mean of each name, nan where the weights sum to zero."""
        return {
            name: value / weight if weight else math.nan
            for name, (value, weight) in self.totals().items()
        }

    def reset(self) -> None:
        """Forgets everything added."""
        self._pending.clear()
        self._sums.clear()

"""What a person sees while a run goes on: the facts before the first step, then its progress."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from tokjax.training.ledger import duration
from tokjax.training.peak import device_peak_flops, measure_matmul_peak

__all__ = ["Progress", "banner", "device_peak_flops", "measure_matmul_peak", "si"]

MFU_FORMULA = "MFU = model FLOPs per second / peak FLOPs per second of the devices"
_SMOOTHING_S = 30.0  # rates are means over about this many seconds of training
_FIRST_LINES = 3  # without a terminal the first updates are always shown
_PLAIN_EVERY_S = 10.0


class Progress:
    """Progress of training: a bar on a terminal, plain lines in a log, the same facts in both.

    The rates count neither the time until the first update, which compiles, nor that inside
    `pause`. MFU is the model FLOPs per second of that time over `peak_flops`; model FLOPs are
    those the mathematics needs, not those that rematerialisation adds. Time left assumes that
    pauses go on taking the share they took so far.

    Nothing here waits for a device: every value received is a float already.

    Args:
        total_steps: the step the run ends at.
        start_step: the step the run continues from, 0 for a fresh one.
        tokens_per_step: tokens of one step over all devices.
        flops_per_step: model FLOPs of one step over all devices, None when unknown.
        peak_flops: peak FLOPs per second of all devices together, None when unknown.
        stream: where to print; standard error when None.
        enabled: False (every process but the first) prints nothing; rates still work.
        every_s: seconds between plain lines.
        clock: returns seconds that never jump.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        tokens_per_step: float = 0.0,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        stream: TextIO | None = None,
        enabled: bool = True,
        every_s: float = _PLAIN_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._step, self._peak = total_steps, start_step, peak_flops
        self._tokens_per_step, self._flops_per_step = float(tokens_per_step), flops_per_step
        self._stream: TextIO | None = (stream or sys.stderr) if enabled else None
        self._every_s, self._clock = every_s, clock
        self._last: float | None = None  # time of the last update; None until the first one
        self._paused = self._paused_total = self._active_total = 0.0
        self._pause_depth, self._updates, self._shown_at = 0, 0, -math.inf
        self._seconds = self._steps = self._tokens = self._flops = 0.0  # decaying sums
        self._values: dict[str, float] = {}
        self._bar = self._task = None

    def __enter__(self) -> "Progress":
        if self._stream is not None and is_terminal(self._stream):
            self._bar, self._task = _open_bar(self._stream, self._total, self._step)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, loss: float | None = None, **more: float) -> None:
        """Says that `step` is done; `loss` and `more` are shown until they are given again."""
        now = self._clock()
        done = step - self._step
        if self._last is not None and done > 0:
            self._measure(done, max(0.0, now - self._last - self._paused))
        self._last, self._paused, self._step = now, 0.0, step
        given = {"loss": loss, **more}
        self._values |= {name: value for name, value in given.items() if value is not None}
        self._updates += 1
        self._show(now)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time of the block (an evaluation, a save, a compilation) out of the rates."""
        start = self._clock()
        self._pause_depth += 1
        try:
            yield
        finally:
            self._pause_depth -= 1
            if self._pause_depth == 0 and self._last is not None:
                paused = self._clock() - start
                self._paused += paused
                self._paused_total += paused

    def stage(self, *, tokens_per_step: float, flops_per_step: float | None) -> None:
        """Sets what a step costs from now on, and forgets the rates of the stage before."""
        self._tokens_per_step, self._flops_per_step = float(tokens_per_step), flops_per_step
        self._seconds = self._steps = self._tokens = self._flops = 0.0
        self._paused_total = self._active_total = self._paused = 0.0
        self._last = None  # the next update ends an interval that compiles

    def message(self, text: str) -> None:
        """Prints `text` above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def rates(self) -> dict[str, float]:
        """Returns `tokens_per_second`, `steps_per_second` and, where known, `mfu` (0 to 1).

        Empty until two updates have been made.
        """
        if self._seconds <= 0:
            return {}
        rates = {"tokens_per_second": self._tokens / self._seconds}
        rates["steps_per_second"] = self._steps / self._seconds
        if self._flops_per_step is not None and self._peak:
            rates["mfu"] = self._flops / self._seconds / self._peak
        return rates

    def seconds_left(self) -> float | None:
        """Returns the expected wall time until the last step in seconds, None when unknown."""
        if self._steps <= 0:
            return None
        pauses = self._paused_total / self._active_total if self._active_total else 0.0
        return (self._total - self._step) * self._seconds / self._steps * (1.0 + pauses)

    def facts(self) -> list[str]:
        """Returns the parts of a progress line after the step: values, rates, time left."""
        facts = [f"{name} {_short(value)}" for name, value in self._values.items()]
        rates = self.rates()
        if self._tokens_per_step and rates:
            facts.append(f"tokens/s {si(rates['tokens_per_second'])}")
        if "mfu" in rates:
            facts.append(f"MFU {100 * rates['mfu']:.1f} %")
        left = self.seconds_left()
        if left is not None and self._step < self._total:
            facts.append(f"left {_clock_time(left)}")
        return facts

    def _measure(self, steps: int, seconds: float) -> None:
        # Sums that forget at the rate of the time measured: their quotients are unbiased means
        # from the first interval on, unlike an average of rates that starts somewhere.
        keep = math.exp(-seconds / _SMOOTHING_S)
        self._seconds = self._seconds * keep + seconds
        self._steps = self._steps * keep + steps
        self._tokens = self._tokens * keep + steps * self._tokens_per_step
        self._flops = self._flops * keep + steps * (self._flops_per_step or 0.0)
        self._active_total += seconds

    def _show(self, now: float) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._step, facts="  ".join(self.facts()))
        elif (
            self._updates <= _FIRST_LINES
            or now - self._shown_at >= self._every_s
            or self._step >= self._total
        ):
            self._shown_at = now
            share = 100 * self._step / self._total if self._total else 100.0
            place = f"step {self._step}/{self._total} ({share:.1f} %)"
            self._print("  ".join([place, *self.facts()]))

    def _print(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            print(text, file=self._stream, flush=True)
        except (OSError, ValueError):
            # The reader of the pipe has gone, or the stream was closed: training outlives it.
            self._stream = None


def is_terminal(stream: TextIO) -> bool:
    """Returns whether `stream` can show a bar that moves."""
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty()) and os.environ.get("TERM") != "dumb"


def _open_bar(stream: TextIO, total: int, start: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.completed:.0f}/{task.total:.0f}", style="bold"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:.0f} %"),
        TextColumn("{task.fields[facts]}", markup=False),
        console=Console(file=stream),
        refresh_per_second=4,
    )
    bar.start()
    return bar, bar.add_task("train", total=total, completed=start, facts="compiling ...")


def banner(facts: Mapping[str, Mapping[str, str]], stream: TextIO | None = None) -> None:
    """Prints what a run will do, section by section, and the formula of MFU.

    Args:
        facts: section ("model", "data", "compute", "mesh", "saved") to label to value.
        stream: where to print; standard error when None.
    """
    out = stream or sys.stderr
    sections = {name: dict(rows) for name, rows in facts.items() if rows}
    sections.setdefault("compute", {})["note"] = MFU_FORMULA
    if is_terminal(out):
        _rich_banner(sections, out)
        return
    width = max(len(label) for rows in sections.values() for label in rows)
    for name, rows in sections.items():
        print(name, file=out)
        for label, value in rows.items():
            lines = str(value).split("\n")
            print(f"  {label:<{width}}  {lines[0]}", file=out)
            for line in lines[1:]:
                print(f"  {'':<{width}}  {line}", file=out)
    out.flush()


def _rich_banner(sections: Mapping[str, Mapping[str, str]], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")  # nothing is ever cut off
    for name, rows in sections.items():
        for i, (label, value) in enumerate(rows.items()):
            grid.add_row(Text(name if i == 0 else ""), Text(label), Text(str(value)))
    Console(file=stream).print(grid)


def si(number: float) -> str:
    """Returns a number with three digits and a decimal prefix.

    >>> si(45210), si(1.3e9), si(980), si(0.5)
    ('45.2k', '1.30G', '980', '0.5')
    """
    if not math.isfinite(number):
        return str(number)
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5 or prefix == "E":
            break
        number /= 1000
    if not prefix:
        return f"{number:.3g}"
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}{prefix}"


def _short(value: float) -> str:
    value = float(value)
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3e}"


def _clock_time(seconds: float) -> str:
    """Returns whole seconds, so that a line does not flicker in its tenths."""
    return duration(seconds) if seconds >= 60 else f"{seconds:.0f} s"

"""Reproductions by treatments of items: how they are run, recorded, drawn and tabulated."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokjax.errors import ConfigError
from tokjax.files import storage_errors, write_atomically
from tokjax.reproduction.comparison import Bars, Comparison, Lines, Measurements
from tokjax.reproduction.materials import Interrupted
from tokjax.reproduction.running import Stopped
from tokjax.training.curves import COLORS, Curve, plot_bars, plot_curves
from tokjax.training.ledger import duration

_STYLES = ("-", "--", ":", "-.")


def run(
    plan: Comparison, workdir: Path, seeds: Sequence[int], say: Callable[[str], None]
) -> Measurements | Stopped:
    """Returns the measurements of all arms and seeds, after taking those that are missing.

    Args:
        plan: what to measure.
        workdir: holds a folder `seed-<n>` for each seed, with its materials and a file an arm.
        seeds: the materials and measurements are made with.
        say: receives lines about the progress over all arms.

    Raises:
        ConfigError: the workdir holds measurements of other settings, or a measurement is no
            metric with values of items.
        StorageError: the workdir cannot be written.
    """
    jobs = [(seed, arm) for seed in seeds for arm in plan.arms]
    found = {job: _read(plan, workdir, *job) for job in jobs}
    missing = [job for job in jobs if found[job] is None]
    say(
        f"{len(jobs)} measurements ({len(plan.arms)} arms x {len(seeds)} seeds), {len(missing)} "
        f"to do"
    )
    materials: dict[int, Any] = {}
    began = time.monotonic()
    for number, (seed, arm) in enumerate(missing, 1):
        folder = workdir / f"seed-{seed}"
        if seed not in materials:
            materials.clear()  # of one seed at a time
            say(f"--- materials of seed {seed}")
            with storage_errors(folder, "create"):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                materials[seed] = plan.prepare(folder, seed)
            except Interrupted as stop:
                return Stopped(stop.signal)
        start = time.monotonic()
        try:  # an arm may train a model of its own
            values = plan.measure(materials[seed], plan.arms[arm].options, seed)
        except Interrupted as stop:
            return Stopped(stop.signal)
        seconds = time.monotonic() - start
        found[seed, arm] = _write(plan, workdir, seed, arm, values, seconds)
        shown = ""
        if plan.metric in values:
            shown = f": {plan.metric} {np.nanmean(np.asarray(values[plan.metric], float)):.4g}"
        say(
            f"--- {number} of {len(missing)}: {arm}, seed {seed}{shown} ({duration(seconds)}; "
            f"{duration(time.monotonic() - began)} in all)"
        )
    records = {arm: {seed: found[seed, arm] or {} for seed in seeds} for arm in plan.arms}
    return Measurements(
        values={
            arm: {seed: _values(record) for seed, record in of_arm.items()}
            for arm, of_arm in records.items()
        },
        seconds={
            arm: {seed: record["seconds"] for seed, record in of_arm.items()}
            for arm, of_arm in records.items()
        },
        loads=tuple(r["load_average"] for of_arm in records.values() for r in of_arm.values()),
    )


def digests(plan: Comparison, seeds: Sequence[int]) -> dict[tuple[str, int], str]:
    """Returns the identity of each arm with each seed."""
    return {(arm, seed): plan.digest(arm, seed) for seed in seeds for arm in plan.arms}


def loads(results: Measurements) -> list[float | None]:
    """Returns how busy the machine was in each measurement."""
    return list(results.loads)


def arms_record(plan: Comparison, results: Measurements) -> dict[str, Any]:
    """Returns what a record tells of each arm: means and intervals, not every item."""
    return {
        name: {
            "role": arm.role,
            "label": arm.label,
            "metrics": {
                metric: _plain_interval(results, name, metric) for metric in results.metrics(name)
            },
            "seeds": {
                str(seed): {
                    "config": plan.digest(name, seed),
                    "items": {
                        metric: int(np.isfinite(np.asarray(values, float)).sum())
                        for metric, values in results.values[name][seed].items()
                    },
                    "means": {
                        metric: _rounded(np.nanmean(np.asarray(values, float)))
                        for metric, values in results.values[name][seed].items()
                        if np.isfinite(np.asarray(values, float)).any()
                    },
                    "seconds": round(results.seconds[name][seed], 2),
                }
                for seed in results.seeds
            },
        }
        for name, arm in plan.arms.items()
    }


def figures(plan: Comparison, results: Measurements) -> list[Any]:
    """Returns a figure for each panel."""
    return [_panel(plan, results, panel) for panel in plan.panels]


def _panel(plan: Comparison, results: Measurements, panel: Bars | Lines) -> Any:
    several = len(results.seeds)
    title = panel.title + (f", {several} seeds" if several > 1 else "")
    if isinstance(panel, Lines):
        curves = [
            Curve(
                label,
                sorted(line),
                [results.mean(line[x], panel.metric) for x in sorted(line)],
                _STYLES[number % len(_STYLES)],
            )
            for number, (label, line) in enumerate(panel.lines.items())
        ]
        return plot_curves(
            curves, title=title, x_label=panel.x_label, y_label=panel.y_label, size=(8.0, 4.2)
        )
    names = panel.arms or [name for name in plan.arms if panel.metric in results.metrics(name)]
    intervals = [results.interval(name, panel.metric) for name in names]
    color = {"method": COLORS[0], "baseline": COLORS[6], "control": COLORS[1]}
    return plot_bars(
        [plan.arms[name].label for name in names],
        [i.mean for i in intervals],
        [(i.low, i.high) for i in intervals],
        colors=[color[plan.arms[name].role] for name in names],
        title=title,
        x_label=panel.y_label,
        legend={role: color[role] for role in color},
    )


def table(plan: Comparison, results: Measurements) -> Any:
    """Returns the table of the arms, for rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(plan.claim), title_justify="left", title_style="bold")
    table.add_column("arm", no_wrap=True)
    table.add_column("role", no_wrap=True)
    table.add_column("time", justify="right")
    shown = list(dict.fromkeys([plan.metric, *(panel.metric for panel in plan.panels)]))
    for metric in shown:
        table.add_column(f"{metric} [95 % interval]", justify="right", overflow="fold")
    for name, arm in plan.arms.items():
        has = results.metrics(name)
        table.add_row(
            name,
            arm.role,
            duration(sum(results.seconds[name].values())),
            *[str(results.interval(name, m)) if m in has else "" for m in shown],
        )
    return table


def _file(workdir: Path, seed: int, arm: str) -> Path:
    return workdir / f"seed-{seed}" / f"{arm}.json"


def _read(plan: Comparison, workdir: Path, seed: int, arm: str) -> dict[str, Any] | None:
    path = _file(workdir, seed, arm)
    try:
        record = json.loads(path.read_text())
        digest, _ = record["digest"], (record["values"], record["seconds"], record["load_average"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); remove it to measure anew") from error
    if digest != plan.digest(arm, seed):
        raise ConfigError(
            f"{path} holds a measurement of other settings. Name another --workdir, or remove "
            f"{path.parent} to measure anew."
        )
    return record


def _write(
    plan: Comparison,
    workdir: Path,
    seed: int,
    arm: str,
    values: Mapping[str, Sequence[float]],
    seconds: float,
) -> dict[str, Any]:
    plain = {}
    for metric, items in values.items():
        array = np.asarray(items, float)
        if array.ndim != 1 or not len(array):
            raise ConfigError(
                f"arm {arm!r} measured {metric!r} of shape {array.shape}: one value an item is "
                f"needed, of one item at least"
            )
        # JSON has no NaN: an item without value is null.
        plain[metric] = [None if math.isnan(v) else v for v in array.tolist()]
    record = {
        "arm": arm,
        "seed": seed,
        "digest": plan.digest(arm, seed),
        "values": plain,
        "seconds": seconds,
        "load_average": os.getloadavg()[2] if hasattr(os, "getloadavg") else None,
    }
    write_atomically(_file(workdir, seed, arm), json.dumps(record) + "\n")
    return record


def _values(record: Mapping[str, Any]) -> dict[str, list[float]]:
    return {
        metric: [math.nan if v is None else v for v in items]
        for metric, items in record["values"].items()
    }


def _plain_interval(results: Measurements, arm: str, metric: str) -> dict[str, float | None]:
    interval = results.interval(arm, metric)
    return {
        "mean": _rounded(interval.mean),
        "low": _rounded(interval.low),
        "high": _rounded(interval.high),
    }


def _rounded(value: Any) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")

"""Reproductions whose arms are measured item by item: decoders, detectors, selections.

The arms of a `Plan` are training runs; those of a `Comparison` are treatments of the same items
(questions, prompts, texts), given materials that are made once for each seed, for example models
trained for the purpose. What comes out are values for each item, so that arms are compared item by
item, with intervals.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokjax.config import plain
from tokjax.errors import ConfigError, nearest
from tokjax.reproduction.plan import Verdict, check_roles

_DRAWS = 2000  # of a bootstrap


@dataclass(frozen=True)
class Treatment:
    """One arm of a comparison.

    Attributes:
        role: the published method, what it is compared with, or a control that should lose what
            the method gains.
        label: what it is, in a few words.
        options: what `Comparison.measure` needs to know of it, as plain values.
    """

    role: Literal["method", "baseline", "control"]
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bars:
    """A panel: the mean of a metric for each arm, with its interval.

    Attributes:
        metric: which.
        title: what the panel shows.
        y_label: name and unit of the metric.
        arms: names of the arms drawn; empty means all that have the metric.
    """

    metric: str
    title: str
    y_label: str
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lines:
    """A panel: the mean of a metric over a swept value, a line for each group of arms.

    Attributes:
        metric: which.
        title: what the panel shows.
        x_label: name and unit of the swept value.
        y_label: name and unit of the metric.
        lines: label of the line -> swept value -> name of the arm.
    """

    metric: str
    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Mapping[float, str]]


@dataclass(frozen=True)
class Interval:
    """A mean with a 95 % bootstrap interval over items.

    >>> str(Interval(0.5, 0.41, 0.587))
    '0.5 [0.41, 0.587]'
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Measurements:
    """What was measured: values of metrics for each item, by arm and seed.

    Attributes:
        values: arm -> seed -> metric -> one value for each item; NaN where it does not apply.
        seconds: arm -> seed -> wall time of the measurement.
        loads: load averages during the measurements.
    """

    values: Mapping[str, Mapping[int, Mapping[str, Any]]]
    seconds: Mapping[str, Mapping[int, float]]
    loads: tuple[float | None, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        return tuple(next(iter(self.values.values())))

    def metrics(self, arm: str) -> tuple[str, ...]:
        """Returns the metrics that an arm has."""
        return tuple(next(iter(self._arm(arm).values())))

    def items(self, arm: str, metric: str) -> tuple[np.ndarray, ...]:
        """Returns the values of all items, an array a seed.

        Raises:
            ConfigError: there is no such arm or metric.
        """
        for of_seed in self._arm(arm).values():
            if metric not in of_seed:
                raise ConfigError(
                    f"arm {arm!r} has no metric {metric!r}.{nearest(metric, of_seed)}"
                )
        return tuple(np.asarray(of_seed[metric], float) for of_seed in self._arm(arm).values())

    def mean(self, arm: str, metric: str) -> float:
        """Returns the mean over seeds of the mean over items."""
        return float(np.mean([np.nanmean(values) for values in self.items(arm, metric)]))

    def interval(self, arm: str, metric: str) -> Interval:
        """Returns the mean of a metric with its interval; items are drawn anew within each seed."""
        return _bootstrapped(self.items(arm, metric))

    def difference(self, arm: str, other: str, metric: str) -> Interval:
        """Returns how much more an arm has than another of the same items, item by item.

        Raises:
            ConfigError: the two were not measured on equally many items.
        """
        pairs = list(zip(self.items(arm, metric), self.items(other, metric), strict=True))
        for first, second in pairs:
            if first.shape != second.shape:
                raise ConfigError(
                    f"arms {arm!r} and {other!r} have {len(first)} and {len(second)} items of "
                    f"{metric!r}: they cannot be compared item by item"
                )
        return _bootstrapped(tuple(first - second for first, second in pairs))

    def _arm(self, arm: str) -> Mapping[int, Mapping[str, Any]]:
        if arm not in self.values:
            raise ConfigError(f"there is no arm {arm!r}.{nearest(arm, self.values)}")
        return self.values[arm]


def _bootstrapped(of_seeds: tuple[np.ndarray, ...]) -> Interval:
    rng = np.random.default_rng(0)
    kept = [values[np.isfinite(values)] for values in of_seeds]
    if not all(len(values) for values in kept):
        return Interval(float("nan"), float("nan"), float("nan"))
    drawn = np.zeros(_DRAWS)
    for values in kept:
        at = rng.integers(0, len(values), (_DRAWS, len(values)))
        drawn += values[at].mean(axis=1) / len(kept)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(np.mean([v.mean() for v in kept])), float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """Everything that a reproduction by treatments of the same items consists of.

    Attributes:
        claim: what the paper says and is tested here, in one sentence.
        arms: by name.
        prepare: (folder, seed) -> materials of all arms of a seed; what takes long is kept in the
            folder and found there again. See `tokjax.reproduction.materials`.
        measure: (materials, arm's options, seed) -> metric -> a value for each item.
        judge: turns the measurements into a verdict. What it demands is written down before the
            first run.
        metric: what the table shows.
        panels: of the plot, from the top.
        settings: plain values that decide what comes out besides the arms' options: sizes, numbers
            of items. They and the options are the identity of a measurement.
        seeds: used where none are given.
        notes: what a reader must know: sizes, how arms differ, what was not tuned on what.
    """

    claim: str
    arms: Mapping[str, Treatment]
    prepare: Callable[[Path, int], Any]
    measure: Callable[[Any, Mapping[str, Any], int], Mapping[str, Sequence[float]]]
    judge: Callable[[Measurements], Verdict]
    metric: str
    panels: tuple[Bars | Lines, ...]
    settings: Mapping[str, Any]
    seeds: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        check_roles(self.arms)
        if not self.panels:
            raise ConfigError("a reproduction needs at least one panel to plot")
        for panel in self.panels:
            drawn = panel.arms if isinstance(panel, Bars) else _arms_of(panel)
            for name in drawn:
                if name not in self.arms:
                    raise ConfigError(
                        f"panel {panel.title!r} draws the arm {name!r}, which does not exist."
                        f"{nearest(name, self.arms)}"
                    )

    def digest(self, arm: str, seed: int) -> str:
        """Returns the identity of what an arm with a seed measures."""
        told = [plain(self.settings), plain(self.arms[arm].options), arm, seed]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _arms_of(panel: Lines) -> list[str]:
    return [arm for line in panel.lines.values() for arm in line.values()]

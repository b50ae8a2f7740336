"""What was measured: the runs of all arms and seeds, as judges, tables and plots read them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokjax.errors import ConfigError, nearest


@dataclass(frozen=True)
class StageCost:
    """What one step of a stage takes.

    Attributes:
        name: of its objective.
        first_step: number of its first step.
        steps: number of its steps.
        tokens: token places of a step.
        model_flops: operations of a step by formula; see `tokjax.models.cost`.
        counted_flops: operations of the matrix products in a step's program, updates by the
            optimiser included.
        step_seconds: median wall time of a step, as logged; None when none was logged.
    """

    name: str
    first_step: int
    steps: int
    tokens: int
    model_flops: float
    counted_flops: float
    step_seconds: float | None = None


@dataclass(frozen=True)
class Series:
    """A metric over steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """The last value."""
        return self.values[-1]

    def from_step(self, first: int) -> "Series":
        """Returns the part from step `first` on, its steps counted from there.

        >>> Series((0, 5, 10), (3.0, 2.0, 1.0)).from_step(5)
        Series(steps=(0, 5), values=(2.0, 1.0))
        """
        kept = [(s - first, v) for s, v in zip(self.steps, self.values, strict=True) if s >= first]
        return Series(tuple(s for s, _ in kept), tuple(v for _, v in kept))

    def at(self, step: int) -> float:
        """Returns the value at exactly this step.

        Raises:
            ConfigError: nothing was measured there.
        """
        if step not in self.steps:
            raise ConfigError(f"nothing was measured at step {step}, only at {list(self.steps)}")
        return self.values[self.steps.index(step)]

    def thinned(self, most: int) -> "Series":
        """Returns at most `most` evenly chosen points, the first and the last among them."""
        n = len(self.steps)
        if n <= most:
            return self
        kept = sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})
        return Series(tuple(self.steps[i] for i in kept), tuple(self.values[i] for i in kept))


@dataclass(frozen=True)
class ArmResult:
    """One finished run.

    Attributes:
        arm: name of the arm.
        seed: of parameters and data.
        parameters: number of trained numbers.
        stages: in order.
        curves: metric to its values over steps.
        seconds: wall time by category, as the run's ledger tells it.
        eval_data: evaluation set to the fingerprint of its store.
        load_average: processes that wanted the machine's cores during the last quarter of an hour
            of the run, its own included; None where the system does not tell.
    """

    arm: str
    seed: int
    parameters: int
    stages: tuple[StageCost, ...]
    curves: Mapping[str, Series]
    seconds: Mapping[str, float]
    eval_data: Mapping[str, str]
    load_average: float | None = None

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return sum(stage.steps for stage in self.stages)

    def cost_at(self, step: int, what: str) -> float:
        """Returns the sum of `tokens`, `model_flops` or `counted_flops` of the first steps."""
        done = 0.0
        for stage in self.stages:
            steps = max(0, min(step, stage.first_step + stage.steps) - stage.first_step)
            done += steps * getattr(stage, what)
        return done

    @property
    def tokens(self) -> float:
        """Token places read in training."""
        return self.cost_at(self.steps, "tokens")

    @property
    def model_flops(self) -> float:
        """Operations of training, by formula."""
        return self.cost_at(self.steps, "model_flops")

    @property
    def counted_flops(self) -> float:
        """Operations of training in the matrix products of its program."""
        return self.cost_at(self.steps, "counted_flops")

    @property
    def step_seconds(self) -> float:
        """Wall seconds in training steps, without evaluation, saving and compilation."""
        return self.seconds["step"]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ArmResult":
        """Returns the result that `to_json` wrote."""
        curves = {
            name: Series(tuple(c["steps"]), tuple(c["values"]))
            for name, c in record["curves"].items()
        }
        stages = tuple(StageCost(**stage) for stage in record["stages"])
        return cls(**{**record, "curves": curves, "stages": stages})


@dataclass(frozen=True)
class Results:
    """The runs of all arms and seeds.

    Raises:
        ConfigError: a run is missing, or two were evaluated on different data.
    """

    runs: tuple[ArmResult, ...]
    seeds: tuple[int, ...]

    def __post_init__(self):
        for arm in self.arms:
            self.of(arm)
        first = self.runs[0]
        for run in self.runs:
            if run.eval_data != first.eval_data:
                raise ConfigError(
                    f"the arms {first.arm!r} (seed {first.seed}) and {run.arm!r} (seed {run.seed}) "
                    f"were evaluated on different data, {first.eval_data} and {run.eval_data}; "
                    f"they cannot be compared"
                )

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in order."""
        return tuple(dict.fromkeys(run.arm for run in self.runs))

    def of(self, arm: str) -> tuple[ArmResult, ...]:
        """Returns the runs of an arm, one a seed.

        Raises:
            ConfigError: there is no such arm, or a seed's run is missing.
        """
        found = {run.seed: run for run in self.runs if run.arm == arm}
        if not found:
            raise ConfigError(f"there is no arm {arm!r}.{nearest(arm, self.arms)}")
        if missing := set(self.seeds) - set(found):
            raise ConfigError(f"arm {arm!r} lacks the run of seed {min(missing)}")
        return tuple(found[seed] for seed in self.seeds)

    def curves(self, arm: str, metric: str) -> tuple[Series, ...]:
        """Returns a metric of an arm, one series a seed.

        Raises:
            ConfigError: there is no such arm or metric.
        """
        for run in self.of(arm):
            if metric not in run.curves or not run.curves[metric].steps:
                raise ConfigError(
                    f"arm {arm!r} (seed {run.seed}) has no metric {metric!r}."
                    f"{nearest(metric, run.curves)}"
                )
        return tuple(run.curves[metric] for run in self.of(arm))

    def final(self, arm: str, metric: str) -> tuple[float, ...]:
        """Returns the last value of a metric, one a seed."""
        return tuple(series.last for series in self.curves(arm, metric))

    def mean_final(self, arm: str, metric: str) -> float:
        """Returns the mean over seeds of the last value of a metric."""
        return statistics.fmean(self.final(arm, metric))


def mean_series(series: Sequence[Series]) -> Series:
    """Returns the mean over seeds at the steps that all of them have."""
    common = sorted(set.intersection(*(set(s.steps) for s in series)))
    means = tuple(statistics.fmean(s.at(step) for s in series) for step in common)
    return Series(tuple(common), means)

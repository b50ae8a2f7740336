"""What a reproduction is: a claim, arms, seeds, a judge and the plot that shows it."""

import runpy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokjax.config import plain
from tokjax.errors import ConfigError, nearest
from tokjax.reproduction.results import Results

Scale = Literal["full", "smoke"]
State = Literal["reproduced", "did not reproduce"]

ROOT = Path(__file__).resolve().parents[2]
PLANS = ROOT / "configs" / "repro"


@dataclass(frozen=True)
class Verdict:
    """Whether the claim came out, and the sentences with numbers that say so."""

    reproduced: bool
    sentences: tuple[str, ...]

    @classmethod
    def of(cls, findings: Iterable[tuple[bool | None, str]]) -> "Verdict":
        """Returns the verdict on findings (holds, sentence): reproduced when all hold.

        A finding whose `holds` is None is told and demands nothing.

        >>> Verdict.of([(True, "3 < 4"), (None, "took 5 s")]).sentences
        ('holds: 3 < 4', 'took 5 s')
        """
        findings = tuple(findings)
        label = {True: "holds: ", False: "fails: ", None: ""}
        demanded = [holds for holds, _ in findings if holds is not None]
        if not demanded:
            raise ConfigError("a verdict needs at least one finding that can fail")
        return cls(all(demanded), tuple(label[holds] + text for holds, text in findings))

    @property
    def state(self) -> State:
        """The state that the table of methods gives the method."""
        return "reproduced" if self.reproduced else "did not reproduce"


@dataclass(frozen=True)
class Arm:
    """One training run of a reproduction, repeated for every seed.

    Attributes:
        role: the published method, what it is compared with, or a control that should lose what
            the method gains.
        label: what it is, in a few words.
        config: the tree of a `TrainConfig`, as a config file returns it. Its `seed` and
            `data.seed` are set by the seed of the reproduction.
        data_of: the arm whose data this one reads, or None: data as its configuration lays them
            out. Needed where objectives take rows of different lengths, which are packed
            differently; see `tokjax.reproduction.same_data`.
        from_stage: the stage of that arm where reading begins.
    """

    role: Literal["method", "baseline", "control"]
    label: str
    config: Mapping[str, Any]
    data_of: str | None = None
    from_stage: int = 0

    def tree(self, seed: int) -> dict[str, Any]:
        """Returns the tree of this arm's `TrainConfig` for a seed."""
        tree = plain(self.config)
        data = {**tree.get("data", {}), "seed": seed}
        return {**tree, "seed": seed, "data": data}


@dataclass(frozen=True)
class Panel:
    """One set of axes of the plot: a metric of some arms, the mean over seeds.

    Attributes:
        x: what lies across: model FLOPs, data tokens, steps, or steps of the last stage.
        metric: a column of metrics.csv.
        y_label: its name and unit.
        title: what the panel shows.
        arms: names of the arms drawn; empty means all.
    """

    x: Literal["flops", "tokens", "step", "last_stage"]
    metric: str
    y_label: str
    title: str
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that a reproduction of one claim consists of.

    Attributes:
        claim: what the paper says and is tested here, in one sentence.
        arms: by name.
        judge: turns the measurements into a verdict. What it demands is written down before the
            first run.
        metric: the column of metrics.csv that the table shows the last value of.
        panels: of the plot, from the top.
        seeds: used where none are given.
        notes: what a reader must know: sizes, how arms differ, what was not tuned on what.
    """

    claim: str
    arms: Mapping[str, Arm]
    judge: Callable[[Results], Verdict]
    metric: str
    panels: tuple[Panel, ...]
    seeds: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        check_roles(self.arms)
        for name, arm in self.arms.items():
            if arm.data_of is not None and (arm.data_of not in self.arms or arm.data_of == name):
                others = sorted(set(self.arms) - {name})
                raise ConfigError(
                    f"arm {name!r} reads the data of {arm.data_of!r}, which is no other arm."
                    f"{nearest(arm.data_of, others)}"
                )
        for panel in self.panels:
            for name in panel.arms:
                if name not in self.arms:
                    raise ConfigError(
                        f"panel {panel.title!r} draws the arm {name!r}, which does not exist."
                        f"{nearest(name, self.arms)}"
                    )
        if not self.panels:
            raise ConfigError("a reproduction needs at least one panel to plot")


def check_roles(arms: Mapping[str, Any]) -> None:
    """Refuses arms among which a role is missing.

    Raises:
        ConfigError: there is no method, no baseline or no control.
    """
    roles = {arm.role for arm in arms.values()}
    for role in ("method", "baseline", "control"):
        if role not in roles:
            raise ConfigError(f"no arm has the role {role!r}; a reproduction needs one")


def plan_files(folder: Path = PLANS) -> dict[str, Path]:
    """Returns the plan files by slug."""
    return {path.stem: path for path in sorted(Path(folder).glob("*.py"))}


def load_plan(slug: str, scale: Scale = "full", folder: Path = PLANS) -> Any:
    """Returns the plan of a method, a `Plan` or a `Comparison`.

    Args:
        slug: of the method.
        scale: "full" for a result, "smoke" for seconds of every part.
        folder: where the plan files lie.

    Raises:
        ConfigError: there is none, or its file fails or makes no plan.
    """
    files = plan_files(folder)
    if slug not in files:
        raise ConfigError(
            f"there is no reproduction of {slug!r} in {folder}.{nearest(slug, files)}"
        )
    file = files[slug]
    try:
        make = runpy.run_path(str(file)).get("get_plan")
        plan = None if make is None else make(scale)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{file}: {type(error).__name__}: {error}") from error
    from tokjax.reproduction.comparison import Comparison

    if not isinstance(plan, (Plan, Comparison)):
        raise ConfigError(f"{file}: define get_plan(scale), returning a Plan or a Comparison")
    return plan

"""Runs a grid of configurations, one after the other or several at once, and compares them.

    python launch/sweep.py --config=configs/patch.py --workdir=runs/sweep \
        --grid.optimizer.peak_lr=1e-3,3e-4 --grid.seed=0,1

Every point of the grid is a run of `python -m tokjax.train` in a folder of its own below the
workdir, with its output in `log.txt`. Points that are finished are skipped, so the same command
goes on after an interruption; a point that fails is told and the others go on. At the end stand
`sweep.csv`, `sweep.png` and a table, best first.

Instead of `--grid`, `--points=FILE.py` names a file whose function `points()` returns dictionaries
of overrides. `--emit` prints one command a point instead of running it, for a queue:

    python launch/sweep.py ... --emit | xargs -d '\\n' -n 1 sbatch --wrap

Exit codes: 0 all points are finished; 1 some failed; 2 the command is wrong.
"""

import csv
import hashlib
import io
import itertools
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokjax import cli
from tokjax.commands import Command, run_commands
from tokjax.errors import PREEMPTED_EXIT_CODE, ConfigError
from tokjax.files import write_atomically
from tokjax.training.run_facts import read_run

FLAGS = {
    "workdir": cli.FlagSpec("folder of the sweep, with one for each point", str, required=True),
    "grid": cli.FlagSpec("values of a config key, comma-separated", dict),
    "points": cli.FlagSpec("Python file with points() -> list of {key: value}", str | None),
    "emit": cli.FlagSpec("print the commands of unfinished points and end", bool, False),
    "jobs": cli.FlagSpec("points that run at once", int, 1),
    "metric": cli.FlagSpec("what is compared; default the first held-out loss", str | None),
    "best": cli.FlagSpec("whether less or more of it is better", Literal["min", "max"], "min"),
}


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        overrides: config key -> value.
        workdir: its folder.
    """

    overrides: Mapping[str, Any]
    workdir: Path

    @property
    def finished(self) -> bool:
        """Whether it has run to its end."""
        return read_run(self.workdir).get("state") == "finished"

    @property
    def metrics(self) -> dict[str, float]:
        """Its last metrics, once it is finished."""
        return read_run(self.workdir).get("final") or {} if self.finished else {}

    def command(self, config: str, shared: Sequence[str]) -> list[str]:
        """Returns the command that runs it or goes on with it."""
        own = [f"--config.{key}={_text(value)}" for key, value in self.overrides.items()]
        return [
            *(sys.executable, "-u", "-m", "tokjax.train"),
            *(f"--config={config}", f"--workdir={self.workdir}"),
            *(f"--config.{each}" for each in shared),
            *own,
        ]


def grid_points(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns every combination of the values of a grid.

    >>> grid_points({"seed": (0, 1), "name": "a,b"})[:2]
    [{'seed': 0, 'name': 'a'}, {'seed': 0, 'name': 'b'}]
    """
    values = {key: _values(value) for key, value in grid.items()}
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def _values(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [cli.parse_literal(part) for part in value.split(",")]
    return list(value) if isinstance(value, tuple | list) else [value]


def file_points(path: Path) -> list[dict[str, Any]]:
    """Returns what a file's `points()` returns.

    Raises:
        ConfigError: there is no such file or function, or it returns something else.
    """
    if not path.exists():
        raise ConfigError(f"--points={path}: there is no such file")
    names: dict[str, Any] = {"__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), names)
    if not callable(names.get("points")):
        raise ConfigError(f"--points={path} must define a function points()")
    found = names["points"]()
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ConfigError(f"points() of {path} must return a list of dictionaries")
    return found


def lay_out(points: Sequence[Mapping[str, Any]], workdir: Path) -> list[Point]:
    """Returns the points with a folder each, named by what they change.

    Raises:
        ConfigError: no point, or one that is there twice.
    """
    if not points:
        raise ConfigError("there is no point to run: give --grid.KEY=A,B or --points=FILE.py")
    keys = {key for point in points for key in point}
    short = {key: _short(key, keys) for key in keys}
    laid: dict[str, Point] = {}
    for point in points:
        text = ",".join(f"{short[key]}={_text(value)}" for key, value in point.items()) or "base"
        name = re.sub(r"[^\w.,=+-]+", "_", text)
        if len(name) > 120 or name != text:
            name = f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        if name in laid:
            raise ConfigError(f"the point {text} is there twice")
        laid[name] = Point(dict(point), workdir / name)
    return list(laid.values())


def _short(key: str, keys: set[str]) -> str:
    """Returns as much of a key's end as tells it from the others."""
    parts = key.split(".")
    for i in range(len(parts) - 1, 0, -1):
        tail = ".".join(parts[i:])
        if not any(other != key and f".{other}".endswith(f".{tail}") for other in keys):
            return tail
    return key


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def run_points(
    points: Sequence[Point], command: Callable[[Point], list[str]], jobs: int
) -> dict[Path, int]:
    """Runs points, `jobs` at once, which says how it goes; returns the exit code of each."""
    by_log = {point.workdir / "log.txt": point for point in points}

    def outcome(done: Command) -> str:
        metrics = by_log[done.log].metrics
        return ", ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:3])

    commands = [Command(p.workdir.name, command(p), log) for log, p in by_log.items()]
    codes = run_commands(commands, jobs, outcome)
    return {point.workdir: code for point, code in zip(points, codes, strict=True)}


def chosen_metric(points: Sequence[Point], wanted: str | None) -> str | None:
    """Returns the metric that points are compared by; None where none is finished.

    Raises:
        ConfigError: no finished point has the metric that was asked for.
    """
    known = list(dict.fromkeys(name for point in points for name in point.metrics))
    if wanted is not None:
        if known and wanted not in known:
            raise ConfigError(f"no point has the metric {wanted!r}; there are {', '.join(known)}")
        return wanted
    losses = [name for name in known if name.startswith("eval/") and name.endswith("loss")]
    return (losses or known or [None])[0]


def write_results(
    points: Sequence[Point], metric: str | None, best: str, workdir: Path
) -> list[list[str]]:
    """Writes `sweep.csv` and `sweep.png`; returns the table's rows, header first."""
    keys = list(dict.fromkeys(key for point in points for key in point.overrides))
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    sign = 1 if best == "min" else -1
    ordered = sorted(points, key=lambda p: sign * p.metrics.get(metric or "", math.inf * sign))
    rows = [[*keys, "state", *names]]
    for point in ordered:
        state = "finished" if point.finished else read_run(point.workdir).get("state", "not begun")
        values = [f"{point.metrics[name]:.6g}" if name in point.metrics else "" for name in names]
        rows.append([*(_text(point.overrides.get(key, "")) for key in keys), state, *values])
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_atomically(workdir / "sweep.csv", text.getvalue())
    if metric is not None:
        _plot([p for p in ordered if metric in p.metrics], keys, metric, workdir / "sweep.png")
    shown = [name for name in names if name == metric or name.endswith(("loss", "accuracy"))][:5]
    kept = [*range(len(keys) + 1), *(len(keys) + 1 + names.index(name) for name in shown)]
    return [[row[i] for i in kept] for row in rows]


def _plot(points: Sequence[Point], keys: Sequence[str], metric: str, path: Path) -> None:
    """Draws the metric over every key that was swept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    swept = [k for k in keys if len({_text(p.overrides.get(k)) for p in points}) > 1] or keys[:1]
    figure, axes = plt.subplots(1, len(swept), figsize=(4 * len(swept), 3.2), squeeze=False)
    for axis, key in zip(axes[0], swept, strict=True):
        values: list[Any] = [p.overrides.get(key) for p in points]
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        labels = values if numeric else [_text(v) for v in values]
        axis.plot(labels, [p.metrics[metric] for p in points], "o", alpha=0.7)
        if numeric and min(values) > 0 and max(values) / min(values) >= 10:
            axis.set_xscale("log")
        axis.set_xlabel(key)
    axes[0][0].set_ylabel(metric)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS)
    if args.help:
        print(cli.help_text("launch/sweep.py", __doc__, FLAGS))
        return 0
    if args["grid"] and args["points"]:
        raise ConfigError("give --grid or --points, not both")
    if args["jobs"] < 1:
        raise ConfigError(f"--jobs={args['jobs']} must be at least 1")
    from tokjax.training.config import TrainConfig

    workdir, config = Path(args["workdir"]), args.config
    assert config is not None
    found = file_points(Path(args["points"])) if args["points"] else grid_points(args["grid"] or {})
    points = lay_out(found, workdir)
    for point in points:  # a misspelt key is told before the first run
        own = tuple(f"{key}={_text(value)}" for key, value in point.overrides.items())
        cli.load_config(TrainConfig, cli.Arguments(config=config, overrides=args.overrides + own))
    left = [point for point in points if not point.finished]
    if args["emit"]:
        for point in left:
            print(shlex.join(point.command(config, args.overrides)))
        return 0
    if len(left) < len(points):
        print(f"{len(points) - len(left)} of {len(points)} points are finished already")
    codes = run_points(left, lambda p: p.command(config, args.overrides), args["jobs"])
    workdir.mkdir(parents=True, exist_ok=True)
    metric = chosen_metric(points, args["metric"])
    _show(write_results(points, metric, args["best"], workdir))
    print(f"table: {workdir / 'sweep.csv'}; plot: {workdir / 'sweep.png'}")
    if PREEMPTED_EXIT_CODE in codes.values():
        print("stopped; the same command continues")
        return PREEMPTED_EXIT_CODE
    return 1 if any(codes.values()) else 0


def _show(rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)

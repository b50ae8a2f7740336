"""Reproductions whose arms are training runs: how they are run, recorded, drawn and tabulated."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokjax.reproduction.plan import Panel, Plan
from tokjax.reproduction.results import ArmResult, Results, mean_series
from tokjax.reproduction.running import Stopped, plan_jobs, run_plan
from tokjax.training.curves import Curve, plot_curves
from tokjax.training.progress import si

_POINTS = 60  # of a curve in a record
_LINES = {"method": "-", "baseline": "--", "control": ":"}
_X = {
    "flops": "training operations (model FLOPs)",
    "tokens": "training tokens",
    "step": "step",
    "last_stage": "step of the last stage",
}


def run(
    plan: Plan, workdir: Path, seeds: Sequence[int], say: Callable[[str], None]
) -> Results | Stopped:
    """Returns the measurements, after running what is not finished; see `run_plan`."""
    return run_plan(plan, workdir, seeds, say=say)


def digests(plan: Plan, seeds: Sequence[int]) -> dict[tuple[str, int], str]:
    """Returns the identity of each arm with each seed."""
    return {(job.arm, job.seed): job.digest for job in plan_jobs(plan, Path(), seeds)}


def loads(results: Results) -> list[float | None]:
    """Returns how busy the machine was in each run."""
    return [run.load_average for run in results.runs]


def arms_record(plan: Plan, results: Results) -> dict[str, Any]:
    """Returns what a record tells of each arm."""
    shown = dict.fromkeys([plan.metric, *(panel.metric for panel in plan.panels)])
    identity, arms = digests(plan, results.seeds), {}
    for name, arm in plan.arms.items():
        reads = None if arm.data_of is None else f"{arm.data_of} from stage {arm.from_stage}"
        arms[name] = {
            "role": arm.role,
            "label": arm.label,
            "data_of": reads,
            "seeds": {
                str(run.seed): _run_record(run, list(shown), identity[name, run.seed])
                for run in results.of(name)
            },
        }
    return arms


def _run_record(run: ArmResult, metrics: Sequence[str], digest: str) -> dict[str, Any]:
    curves = {m: run.curves[m].thinned(_POINTS) for m in metrics}
    return {
        "config": digest,
        "parameters": run.parameters,
        "final": {m: series.last for m, series in run.curves.items() if m.startswith("eval/")},
        "tokens": run.tokens,
        "model_flops": run.model_flops,
        "counted_flops": run.counted_flops,
        "seconds": {k: round(v, 3) for k, v in run.seconds.items()},
        "stages": run.to_json()["stages"],
        "curves": {
            m: {"steps": list(s.steps), "values": [round(v, 5) for v in s.values]}
            for m, s in curves.items()
        },
    }


def figures(plan: Plan, results: Results) -> list[Any]:
    """Returns a figure for each panel; curves are means over seeds."""
    return [_panel(plan, results, panel) for panel in plan.panels]


def _panel(plan: Plan, results: Results, panel: Panel) -> Any:
    curves = []
    for name in panel.arms or tuple(plan.arms):
        arm = plan.arms[name]
        mean = mean_series(results.curves(name, panel.metric))
        run = results.of(name)[0]  # what a step costs does not depend on the seed
        if panel.x == "last_stage":
            mean = mean.from_step(run.stages[-1].first_step)
        across = [float(step) for step in mean.steps]
        if panel.x in ("flops", "tokens"):
            what = "model_flops" if panel.x == "flops" else "tokens"
            across = [run.cost_at(step, what) for step in mean.steps]
        curves.append(Curve(arm.label, across, mean.values, _LINES[arm.role]))
    seeds = len(results.seeds)
    title = panel.title + (f", mean of {seeds} seeds" if seeds > 1 else "")
    return plot_curves(
        curves, title=title, x_label=_X[panel.x], y_label=panel.y_label, size=(8.0, 4.2)
    )


def table(plan: Plan, results: Results) -> Any:
    """Returns the table of the arms, for rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(plan.claim), title_justify="left", title_style="bold")
    table.add_column("arm", no_wrap=True)
    table.add_column("role", no_wrap=True)
    for column in ("steps", "tokens", "FLOPs", "time in steps", plan.metric):
        table.add_column(column, justify="right", overflow="fold")
    for name, arm in plan.arms.items():
        runs = results.of(name)
        finals = results.final(name, plan.metric)
        spread = f" ± {statistics.stdev(finals):.4f}" if len(finals) > 1 else ""
        table.add_row(
            name,
            arm.role,
            str(runs[0].steps),
            si(runs[0].tokens),
            si(runs[0].model_flops),
            f"{statistics.fmean(run.step_seconds for run in runs):.0f} s",
            f"{statistics.fmean(finals):.4f}{spread}",
        )
    return table

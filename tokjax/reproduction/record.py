"""What is kept of a reproduction: a JSON record, a plot, and the table that a person sees."""

import datetime
import io
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tokjax.errors import DataError
from tokjax.files import storage_errors, write_atomically
from tokjax.reproduction.plan import Panel, Plan, Scale, Verdict
from tokjax.reproduction.results import ArmResult, Results, mean_series
from tokjax.training.curves import Curve, plot_curves
from tokjax.training.facts import git_state, versions
from tokjax.training.progress import si

FORMAT = 1
_POINTS = 60  # of a curve in a record
_LINES = {"method": "-", "baseline": "--", "control": ":"}
_X = {
    "flops": "training operations (model FLOPs)",
    "tokens": "training tokens",
    "step": "step",
    "last_stage": "step of the last stage",
}


def make_record(
    slug: str,
    plan: Plan,
    results: Results,
    verdict: Verdict,
    digests: Mapping[tuple[str, int], str],
    scale: Scale,
) -> dict[str, Any]:
    """Returns the record of a reproduction, as plain values.

    Args:
        slug: of the method.
        plan: what was run.
        results: what was measured.
        verdict: what follows.
        digests: (arm, seed) to the identity of its configuration.
        scale: of the plan.
    """
    shown = dict.fromkeys([plan.metric, *(panel.metric for panel in plan.panels)])
    command = f"python -m tokjax.reproduce {slug} --seeds={','.join(map(str, results.seeds))}"
    host, arms = machine(), {}
    for name, arm in plan.arms.items():
        reads = None if arm.data_of is None else f"{arm.data_of} from stage {arm.from_stage}"
        arms[name] = {
            "role": arm.role,
            "label": arm.label,
            "data_of": reads,
            "seeds": {
                str(run.seed): _run_record(run, list(shown), digests[name, run.seed])
                for run in results.of(name)
            },
        }
    return {
        "format": FORMAT,
        "slug": slug,
        "claim": plan.claim,
        "verdict": verdict.state,
        "findings": list(verdict.sentences),
        "notes": [*plan.notes, *machine_notes(host, results)],
        "scale": scale,
        "command": command if scale == "full" else f"{command} --scale={scale}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": host,
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "versions": versions(),
        "recorded_at_commit": git_state(Path(__file__).parent),
        "seeds": list(results.seeds),
        "arms": arms,
    }


def machine() -> dict[str, Any]:
    """Returns what the processor is, how many cores it has, and how busy it was lately."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    load = os.getloadavg()[2] if hasattr(os, "getloadavg") else None
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "load_average_15_min": load,
    }


def machine_notes(host: Mapping[str, Any], results: Results) -> list[str]:
    """Returns what a reader of wall times must know about the machine they were taken on."""
    cores = host["cores"]
    loads = [host["load_average_15_min"], *(run.load_average for run in results.runs)]
    load = max((load for load in loads if load is not None), default=0.0)
    if load <= cores:
        return []
    return [
        f"Other work used the machine at the same time (load average {load:.1f} on {cores} cores): "
        f"wall times say little, operations are the measure of compute."
    ]


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


def write_record(folder: Path, record: Mapping[str, Any], plot: bytes) -> tuple[Path, Path]:
    """Writes `<slug>.json` and `<slug>.png` and returns their paths, the record last.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storage_errors(folder, "create"):
        folder.mkdir(parents=True, exist_ok=True)
    image, text = folder / f"{record['slug']}.png", folder / f"{record['slug']}.json"
    write_atomically(image, plot)
    write_atomically(text, json.dumps(record, indent=1) + "\n")
    return text, image


def read_record(path: Path) -> dict[str, Any]:
    """Returns a record.

    Raises:
        DataError: the file is none.
    """
    try:
        record = json.loads(Path(path).read_text())
        _ = record["slug"], record["verdict"], record["date"], record["findings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no record of a reproduction: {error!r}") from error
    return record


def plot(plan: Plan, results: Results) -> bytes:
    """Returns a PNG of the plan's panels, one below the other; curves are means over seeds."""
    import matplotlib.image
    import numpy as np

    images = []
    for panel in plan.panels:
        figure = _panel(plan, results, panel)
        figure.set_dpi(144)
        figure.canvas.draw()
        images.append(np.asarray(figure.canvas.buffer_rgba()))  # type: ignore[attr-defined]
    out = io.BytesIO()
    matplotlib.image.imsave(out, np.concatenate(images), format="png")
    return out.getvalue()


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


def show(plan: Plan, results: Results, verdict: Verdict) -> None:
    """Prints the table of the arms, the findings and the verdict."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=Text(plan.claim), title_justify="left", title_style="bold")
    table.add_column("arm", no_wrap=True)
    table.add_column("role", no_wrap=True)
    columns = ("steps", "tokens", "FLOPs", "time in steps", plan.metric)
    for column in columns:
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
    console.print(table)
    for sentence in verdict.sentences:
        style = {"holds": "green", "fails": "red"}.get(sentence.partition(":")[0], "")
        console.print(Text(f"- {sentence}", style=style))
    console.print(Text(verdict.state, style="bold green" if verdict.reproduced else "bold red"))

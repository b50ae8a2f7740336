"""What is kept of a reproduction: a JSON record and a plot, and what a person sees of it."""

import datetime
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tokjax.errors import DataError
from tokjax.files import storage_errors, write_atomically
from tokjax.reproduction.plan import Scale, Verdict
from tokjax.training.facts import git_state, versions

FORMAT = 1


def make_record(
    slug: str,
    *,
    claim: str,
    arms: Mapping[str, Any],
    seeds: Sequence[int],
    notes: Sequence[str],
    loads: Sequence[float | None],
    verdict: Verdict,
    scale: Scale,
) -> dict[str, Any]:
    """Returns the record of a reproduction, as plain values.

    Args:
        slug: of the method.
        claim: what was tested.
        arms: what is told of each arm.
        seeds: that were run.
        notes: what a reader must know.
        loads: load averages during the runs.
        verdict: what follows.
        scale: of the plan.
    """
    command = f"python -m tokjax.reproduce {slug} --seeds={','.join(map(str, seeds))}"
    host = machine()
    return {
        "format": FORMAT,
        "slug": slug,
        "claim": claim,
        "verdict": verdict.state,
        "findings": list(verdict.sentences),
        "notes": [*notes, *machine_notes(host, loads)],
        "scale": scale,
        "command": command if scale == "full" else f"{command} --scale={scale}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": host,
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "versions": versions(),
        "recorded_at_commit": git_state(Path(__file__).parent),
        "seeds": list(seeds),
        "arms": dict(arms),
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


def machine_notes(host: Mapping[str, Any], loads: Sequence[float | None]) -> list[str]:
    """Returns what a reader of wall times must know about the machine they were taken on."""
    cores = host["cores"]
    known = [load for load in (host["load_average_15_min"], *loads) if load is not None]
    load = max(known, default=0.0)
    if load <= cores:
        return []
    return [
        f"Other work used the machine at the same time (load average {load:.1f} on {cores} cores): "
        f"wall times say little, operations are the measure of compute."
    ]


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


def stacked_png(figures: Sequence[Any]) -> bytes:
    """Returns a PNG of figures of equal width, one below the other."""
    import matplotlib.image
    import numpy as np

    images = []
    for figure in figures:
        figure.set_dpi(144)
        figure.canvas.draw()
        images.append(np.asarray(figure.canvas.buffer_rgba()))
    out = io.BytesIO()
    matplotlib.image.imsave(out, np.concatenate(images), format="png")
    return out.getvalue()


def show(table: Any, verdict: Verdict) -> None:
    """Prints the table of the arms, the findings and the verdict."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(table)
    for sentence in verdict.sentences:
        style = {"holds": "green", "fails": "red"}.get(sentence.partition(":")[0], "")
        console.print(Text(f"- {sentence}", style=style))
    console.print(Text(verdict.state, style="bold green" if verdict.reproduced else "bold red"))

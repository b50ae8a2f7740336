"""Estimates for people to read."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tokjax.ahead.chips import GIB, Topology
from tokjax.ahead.estimate import Estimate
from tokjax.models.parameters import count_parameters
from tokjax.training.program import Program
from tokjax.training.progress import si


def show(found: Sequence[Estimate], made: Program, topology: Topology) -> None:
    """Prints the estimates of a run's programs on a topology."""
    console = Console()
    size = sum(count_parameters(made.model.config).values())
    mesh = ", ".join(f"{name} {n}" for name, n in made.mesh.shape.items())
    console.print(
        f"{si(size)} parameters on {len(topology.devices)} chips ({topology.name}): {mesh}"
    )
    for each in found:
        console.print(_table(each))


def _table(found: Estimate) -> Table:
    table = Table(title=found.name, show_header=False, title_justify="left")
    limit = "" if found.memory is None else f" of {found.memory / GIB:.1f}"
    verdict = {True: "fits", False: "does not fit", None: ""}[found.fits]
    table.add_row("memory of a chip", f"{found.bytes / GIB:.2f} GiB{limit}", verdict)
    table.add_row("  parameters, state, batch", f"{found.arguments / GIB:.2f} GiB", "")
    table.add_row("  temporary", f"{found.temporary / GIB:.2f} GiB", "")
    again = found.flops / found.model_flops if found.model_flops else 0.0
    table.add_row(
        "operations of a chip", f"{si(found.flops)}", f"{again:.2f} of the model's formula"
    )
    table.add_row("memory traffic", f"{found.traffic / GIB:.2f} GiB", "at least")
    for kind, (times, size) in found.sent.items():
        table.add_row(f"  {kind}", f"{size / GIB:.3f} GiB", f"{times} times")
    if not found.sent:
        table.add_row("collectives", "none", "")
    for name, seconds in (found.seconds or {}).items():
        bound = "the bound" if name == found.bound else ""
        table.add_row(f"time of {name}", f"{1000 * seconds:.2f} ms", bound)
    if found.mfu is not None:
        low, high = found.mfu
        table.add_row("predicted MFU", f"{low:.0%} to {high:.0%}", "nothing or all overlaps")
    return table

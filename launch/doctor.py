"""Says in a few seconds whether training can start here, and what to do where it cannot.

    python launch/doctor.py [--workdir=runs/first]

Run it on every host, in the environment and by the launcher that the training will have: it checks
versions, how this process was started, the coordinator, devices of every process, a collective
over all of them, free disk, and writing into the workdir. Exit code 0: all is well; 1: something
would keep a run from starting or finishing.
"""

import importlib.util
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from tokjax import cli
from tokjax.errors import TokjaxError

FLAGS = {
    "workdir": cli.FlagSpec("folder of the run to come; it must be writable", str, "runs"),
    "free_gib": cli.FlagSpec("disk that the run will need, in GiB", float, 5.0),
}
Verdict = Literal["ok", "warning", "failed"]
_PACKAGES = ("tokjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
_OLDEST = {"jax": (0, 10), "flax": (0, 12)}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        verdict: how it is.
        found: what there is.
        advice: what to do about it, "" where nothing.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def versions() -> Finding:
    """Looks at the versions of Python and of what the numbers depend on."""
    found, old = [f"python {sys.version_info.major}.{sys.version_info.minor}"], []
    for name in _PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            return Finding("versions", "failed", f"{name} is missing", "install: pip install -e .")
        found.append(f"{name} {version}")
        parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if parts < _OLDEST.get(name, ()):
            old.append(name)
    if metadata.version("jax") != metadata.version("jaxlib"):
        old.append("jaxlib, which must be of jax's version")
    if old:
        return Finding("versions", "failed", ", ".join(found), f"install newer: {', '.join(old)}")
    return Finding("versions", "ok", ", ".join(found))


def cluster() -> Finding:
    """Joins the other processes, if the environment names any."""
    from tokjax.parallel import distributed

    try:
        launch = distributed.initialise()
    except TokjaxError as error:
        return Finding("processes", "failed", "did not find each other", str(error))
    return Finding("processes", "ok", "one, alone" if launch.count == 1 else launch.name)


def devices() -> Finding:
    """Looks at the devices of every process, and at accelerators that JAX does not use."""
    import jax

    try:
        all_devices = jax.devices()
    except RuntimeError as error:
        return Finding("devices", "failed", str(error).splitlines()[0], _driver_advice())
    counts = {
        index: sum(device.process_index == index for device in all_devices)
        for index in range(jax.process_count())
    }
    kind = all_devices[0].device_kind
    found = f"{len(all_devices)} x {kind}; each process: {', '.join(map(str, counts.values()))}"
    if len(set(counts.values())) > 1:
        advice = "give every process the same number of devices"
        return Finding("devices", "failed", found, advice)
    if all_devices[0].platform == "cpu" and (unused := _unused_accelerator()):
        return Finding("devices", "warning", found, unused)
    return Finding("devices", "ok", found)


def _unused_accelerator() -> str:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return ""
    if Path("/dev/nvidia0").exists():
        return "there is an NVIDIA GPU: pip install -e '.[cuda]'"
    if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists():
        return "there may be a TPU: pip install -e '.[tpu]'"
    return ""


def _driver_advice() -> str:
    if importlib.util.find_spec("libtpu"):
        return "is another process using the TPU? it serves one at a time"
    return "look at the driver (nvidia-smi), or set JAX_PLATFORMS=cpu"


def collective() -> Finding:
    """Sums a number over all devices of all processes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from tokjax.parallel.mesh import MeshConfig, build_mesh

    mesh = build_mesh(MeshConfig())
    count, began = jax.device_count(), time.perf_counter()
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    ones = jax.make_array_from_callback((count,), sharding, lambda index: np.ones(1, np.float32))
    replicated = NamedSharding(mesh, PartitionSpec())
    found = float(jax.jit(jnp.sum, out_shardings=replicated)(ones))
    took = time.perf_counter() - began
    if found != count:
        advice = "the network between the devices gives wrong numbers: look at the hosts"
        return Finding("sum over devices", "failed", f"{found:g} instead of {count}", advice)
    return Finding("sum over devices", "ok", f"{found:g} in {took:.1f} s, compiling included")


def disk(workdir: Path, needed_gib: float) -> Finding:
    """Looks at the space where the workdir will be."""
    place = workdir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    if free < needed_gib:
        advice = f"the run wants {needed_gib:g} GiB: free some, or choose another --workdir"
        return Finding("disk", "failed", f"{free:.1f} GiB free at {place}", advice)
    return Finding("disk", "ok", f"{free:.1f} GiB free at {place}")


def writing(workdir: Path) -> Finding:
    """Writes a file into the workdir, reads it, and removes it."""
    if "://" in str(workdir) or str(workdir).startswith("gs:/"):
        advice = "mount the bucket (gcsfuse) and name the mounted folder"
        return Finding("workdir", "failed", f"{workdir} is no folder", advice)
    probe = workdir / f".doctor-{uuid.uuid4().hex}"
    made = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("tokjax")
        same = probe.read_text() == "tokjax"
        probe.unlink()
        if made:
            workdir.rmdir()
    except OSError as error:
        advice = "choose a --workdir that this user may write"
        return Finding("workdir", "failed", f"{workdir}: {error.strerror}", advice)
    if not same:
        advice = "this file system does not return what was written: choose another"
        return Finding("workdir", "failed", str(workdir), advice)
    return Finding("workdir", "ok", f"{workdir} can be written")


def examine(checks: Sequence[Callable[[], Finding]]) -> list[Finding]:
    """Returns what the checks find; one that breaks is itself a finding."""
    found = []
    for check in checks:
        try:
            found.append(check())
        except Exception as error:  # whatever it is, people want the rest of the table too
            name = getattr(check, "__name__", "check")
            found.append(Finding(name, "failed", f"{type(error).__name__}: {error}", ""))
    return found


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False)
    if args.help:
        print(cli.help_text("launch/doctor.py", __doc__, FLAGS))
        return 0
    began, workdir = time.monotonic(), Path(args["workdir"])
    found = examine(
        [
            versions,
            cluster,
            devices,
            collective,
            lambda: disk(workdir, args["free_gib"]),
            lambda: writing(workdir),
        ]
    )
    _show(found)
    failed = [each.check for each in found if each.verdict == "failed"]
    took = time.monotonic() - began
    if failed:
        print(f"training cannot start: {', '.join(failed)} ({took:.1f} s)")
        return 1
    print(f"training can start ({took:.1f} s)")
    return 0


def _show(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "warning": "yellow", "failed": "red"}
    table = Table("check", "", "found", "what to do")
    for each in found:
        colour = colours[each.verdict]
        table.add_row(each.check, f"[{colour}]{each.verdict}", each.found, each.advice)
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)

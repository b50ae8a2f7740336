"""What accelerators can do, and the topologies that programs can be compiled for."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokjax.errors import ConfigError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A kind of accelerator.

    Attributes:
        name: for people.
        memory: bytes of its memory.
        flops: bfloat16 operations per second.
        bandwidth: bytes per second between it and its memory.
        link: bytes per second that one axis of the torus carries, both directions together.
        axes: axes of the torus.
        outside: bytes per second to chips of other slices.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    axes: int
    outside: float = 6.25e9


# Memory, peak and bandwidth: Google Cloud's TPU pages. Links: 2 x 45 GB/s an axis for v5e and v4,
# twice that for v5p and v6e; 25 GB/s of a host's network among its four chips.
CHIPS = {
    "v4": Chip("TPU v4", 32e9, 275e12, 1.228e12, 9e10, 3),
    "v5e": Chip("TPU v5e", 16e9, 197e12, 8.19e11, 9e10, 2),
    "v5p": Chip("TPU v5p", 95e9, 459e12, 2.765e12, 1.8e11, 3),
    "v6e": Chip("TPU v6e", 32e9, 918e12, 1.64e12, 1.8e11, 2),
}


@dataclass(frozen=True)
class Topology:
    """Devices that a program is compiled for.

    Attributes:
        name: as it was asked for.
        chip: what each is; None for this machine's CPU, which has no figures.
        devices: of all slices.
        slices: how many there are.
    """

    name: str
    chip: Chip | None
    devices: Sequence[Any]
    slices: int = 1


def topology(name: str, slices: int = 1) -> Topology:
    """Returns the topology of a name such as "v5e:16x16", or "cpu", this machine's devices.

    Compiling for TPUs needs their compiler, which the package `libtpu` holds, and no TPU.

    Raises:
        ConfigError: an unknown kind or shape, or no libtpu.
    """
    kind, _, shape = name.partition(":")
    if kind == "cpu":
        import jax

        return Topology(name, None, jax.devices("cpu"))
    if kind not in CHIPS:
        raise ConfigError(f"unknown topology {name!r}: {nearest(kind, (*CHIPS, 'cpu')).strip()}")
    sides = shape.split("x")
    if not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ConfigError(f"topology {name!r} has no shape such as {kind}:4x4")
    axes = CHIPS[kind].axes
    if len(sides) != axes:
        raise ConfigError(
            f"topology {name!r}: {CHIPS[kind].name} has {axes} axes, as in {kind}:"
            + "x".join("4" * axes)
        )
    if slices < 1:
        raise ConfigError(f"slices={slices} must be at least 1")
    devices = _devices(name, slices)
    assert len(devices) == slices * math.prod(map(int, sides))
    return Topology(name if slices == 1 else f"{slices} x {name}", CHIPS[kind], devices, slices)


def _devices(name: str, slices: int) -> Sequence[Any]:
    try:
        import libtpu  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise ConfigError(
            "compiling for TPUs needs their compiler: pip install -e '.[tpu]' (no TPU is needed)"
        ) from None
    # Nobody is to ask the metadata server of a cloud that this machine may not be in.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        more = {"num_slices": slices} if slices > 1 else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
    except Exception as error:
        raise ConfigError(f"libtpu knows no topology {name!r}: {error}") from error

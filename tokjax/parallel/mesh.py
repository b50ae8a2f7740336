"""The device mesh, from configuration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from tokjax.errors import ConfigError
from tokjax.parallel.rules import MESH_AXES


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that remain.

    Devices form groups joined by a slower network: slices of TPUs that reach each other over the
    data centre, or hosts. One axis spans the groups, all others stay within one.
    """

    data: int = -1  # replicas: parameters copied, batch split
    fsdp: int = 1  # parameters, their state and the batch split
    tensor: int = 1  # heads, feed-forward width and vocabulary split
    sequence: int = 1  # positions of a row split
    # groups of devices joined by a slower network; None: as many as there are TPU slices
    slices: int | None = None
    across: Literal["data", "fsdp"] = "data"  # the axis that spans them

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ConfigError(f"{name}={size} must be at least 1, or -1 for what remains")
        if list(sizes.values()).count(-1) > 1:
            raise ConfigError(f"only one mesh axis may be -1, got {sizes}")
        if self.slices is not None and self.slices < 1:
            raise ConfigError(f"slices={self.slices} must be at least 1, or None")
        if self.across not in ("data", "fsdp"):
            raise ConfigError(f"across={self.across!r} must be 'data' or 'fsdp'")

    def sizes(self, devices: int) -> dict[str, int]:
        """Returns the size of each axis on so many devices.

        Raises:
            ConfigError: the sizes do not multiply to the number of devices.
        """
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if devices % fixed or (-1 not in sizes.values() and fixed != devices):
            raise ConfigError(
                f"mesh {sizes} does not fit {devices} devices: the sizes must multiply to "
                f"{devices}, or one of them be -1 and the others divide it"
            )
        return {n: devices // fixed if size == -1 else size for n, size in sizes.items()}


def build_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of the given devices (default: all), axes `data, fsdp, tensor, sequence`.

    Raises:
        ConfigError: sizes that do not fit the devices, or groups that do not fit the sizes.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    types = (AxisType.Auto,) * len(sizes)
    groups = _groups(config, devices)
    if groups == 1:
        shape, names = tuple(sizes.values()), tuple(sizes)
        try:
            return jax.make_mesh(shape, names, axis_types=types, devices=devices)
        except NotImplementedError:
            # No sides of the torus multiply to an axis, as 32 of 16x16: it takes part of a side.
            placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(placed, names, axis_types=types)
    if sizes[config.across] % groups:
        raise ConfigError(
            f"{groups} slices do not divide mesh axis {config.across}={sizes[config.across]}: make "
            f"it a multiple of {groups}, or let mesh.across name the axis that spans the slices"
        )
    outer = {name: groups if name == config.across else 1 for name in sizes}
    inner = {name: size // outer[name] for name, size in sizes.items()}
    placed: np.ndarray = mesh_utils.create_hybrid_device_mesh(
        tuple(inner.values()),
        tuple(outer.values()),
        devices,
        process_is_granule=_slice_count(devices) == 1,
        allow_split_physical_axes=True,
    )
    return Mesh(placed, tuple(sizes), axis_types=types)


def _slice_count(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _groups(config: MeshConfig, devices: Sequence[Any]) -> int:
    """Returns the number of groups, whose devices are told apart by slice, else by process."""
    found = _slice_count(devices)
    if config.slices is None or config.slices == found:
        return found
    processes = len({device.process_index for device in devices})
    if found > 1 or config.slices not in (1, processes):
        raise ConfigError(
            f"mesh.slices={config.slices}, but the {len(devices)} devices are of {found} TPU "
            f"slices and {processes} processes: leave it out, or give one of these numbers"
        )
    return config.slices

"""The device mesh, from configuration."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from tokjax.errors import ConfigError
from tokjax.parallel.rules import MESH_AXES


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that remain."""

    data: int = -1  # replicas: parameters copied, batch split
    fsdp: int = 1  # parameters, their state and the batch split
    tensor: int = 1  # heads, feed-forward width and vocabulary split
    sequence: int = 1  # positions of a row split

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ConfigError(f"{name}={size} must be at least 1, or -1 for what remains")
        if list(sizes.values()).count(-1) > 1:
            raise ConfigError(f"only one mesh axis may be -1, got {sizes}")

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


def build_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Returns the mesh of the given devices (default: all), axes `data, fsdp, tensor, sequence`."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )

"""Which mesh axes carry which logical axes of parameters and activations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    "batch": BATCH_AXES,  # rows of a batch
    "tokens": "sequence",  # positions within a row
    "embed": "fsdp",  # model width of parameters (gathered where it is used)
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
}


def partition_spec(axes: Sequence[str | None], rules: Rules = RULES) -> P:
    """Returns the mesh axes of an array from its logical axes.

    Raises:
        ConfigError: a logical axis has no rule, or two of them claim one mesh axis.
    """
    claimed: dict[str, str] = {}
    entries: list[Any] = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ConfigError(f"no sharding rule for logical axis {axis!r}; known: {list(rules)}")
        target = None if axis is None else rules[axis]
        for mesh_axis in (target,) if isinstance(target, str) else target or ():
            if mesh_axis in claimed:
                raise ConfigError(
                    f"logical axes {claimed[mesh_axis]!r} and {axis!r} of one array both claim "
                    f"mesh axis {mesh_axis!r}"
                )
            claimed[mesh_axis] = str(axis)
        entries.append(target)
    return P(*entries)


def fit_spec(spec: P, shape: Sequence[int], mesh: Mesh) -> P:
    """Returns the spec without the entries whose mesh axes together do not divide their dimension.

    An array is replicated along such a dimension. Axes that the mesh does not have count for
    nothing.
    """
    entries = []
    for size, entry in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        names = (entry,) if isinstance(entry, str) else entry or ()
        present = tuple(name for name in names if name in mesh.shape)
        divides = size % math.prod(mesh.shape[name] for name in present) == 0
        entries.append((entry if present == names else present or None) if divides else None)
    return P(*entries)


def parameter_shardings(axes: Any, shapes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns the sharding of every parameter, from trees of logical axes and of shapes."""
    return jax.tree.map(
        lambda a, s: NamedSharding(mesh, fit_spec(partition_spec(a, rules), s.shape, mesh)),
        axes,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def current_mesh_shape() -> dict[str, int]:
    """Returns the sizes of the axes of the mesh in force (`jax.set_mesh`); empty without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


def current_platform() -> str:
    """Returns what a program is written for: the platform of the mesh in force, else JAX's own.

    They differ where a program is compiled ahead of time, for devices that are not there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Rules = RULES) -> jax.Array:
    """Returns `x`, laid out by its logical axes when a mesh of several devices is in force."""
    shape = current_mesh_shape()
    if not any(size > 1 for size in shape.values()):
        return x
    spec = fit_spec(partition_spec(axes, rules), x.shape, jax.sharding.get_abstract_mesh())  # type: ignore[arg-type]
    return jax.lax.with_sharding_constraint(x, spec)

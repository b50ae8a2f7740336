"""Loading a checkpoint: tensor by tensor, straight into the target's sharding."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from tokjax.errors import CheckpointError, ConfigError
from tokjax.models import parameters
from tokjax.models.config import ModelConfig
from tokjax.models.huggingface.family import (
    Family,
    Tensor,
    config_from_fields,
    family_of,
    missing_tensor,
)
from tokjax.models.huggingface.safetensors_files import Entry
from tokjax.parallel.rules import parameter_shardings

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def read_config(folder: Path) -> ModelConfig:
    """Returns the configuration of a checkpoint's folder, or of a config.json.

    Raises:
        CheckpointError: there is no readable config.json.
        ConfigError: the model is not supported.
    """
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold one JSON object")
    try:
        return config_from_fields(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_parameters(
    config: ModelConfig,
    tensors: Mapping[str, Entry],
    where: str,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns the configuration with the dtypes that were loaded, and the parameters.

    Args:
        config: what config.json says.
        tensors: every tensor of the checkpoint.
        where: what error messages call it.
        mesh: devices to lay the parameters out on; default the first device.
        dtype: of every parameter; default as stored, each its own.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape or kind.
    """
    family = family_of(config.family)
    names = _stored_names(family, family.tensors(config), tensors)
    found = parameters.map_table(config, lambda path, p, stacked: path)
    plan = _check(config, family, names, tensors, where)
    kinds = Counter(entry.dtype for entries in plan.values() for entry in entries)
    stored = _FLOATS[kinds.most_common(1)[0][0]]
    param_dtype = dtype or ("float32" if stored == "float64" else stored)
    compute = "bfloat16" if param_dtype == "bfloat16" else "float32"
    config = dataclasses.replace(config, param_dtype=param_dtype, dtype=compute)  # type: ignore[arg-type]
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), found)
    else:
        abstract = jax.eval_shape(lambda: parameters.init_parameters(config, jax.random.key(0)))
        shardings = parameter_shardings(parameters.logical_axes(config), abstract, mesh)

    def place(path: str, parameter: parameters.Parameter, stacked: bool, sharding: Any):
        own = dtype or _FLOATS[plan[path][0].dtype]
        reads = [functools.partial(_read, names[path], e, own) for e in plan[path]]
        if stacked:
            return _stack(reads, parameter.shape, own, sharding)
        return _put(reads[0](), sharding)

    flat = {
        path: place(path, p, path.startswith("layers/"), s)
        for (path, p), s in zip(
            _flat_table(config).items(), jax.tree.leaves(shardings), strict=True
        )
    }
    return config, jax.tree.map(lambda path: flat[path], found)


def _flat_table(config: ModelConfig) -> dict[str, parameters.Parameter]:
    """Returns path -> parameter, in the order of the tree's leaves."""
    tree = parameters.map_table(config, lambda path, p, stacked: (path, p))
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple))
    return dict(leaves)


def _stored_names(
    family: Family, tensors: Mapping[str, Tensor], stored: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Returns the tensors under the names a bare backbone has, if this is one."""
    if any(name.startswith(family.prefix) for name in stored):
        return dict(tensors)
    return {
        path: dataclasses.replace(t, name=t.name.removeprefix(family.prefix))
        for path, t in tensors.items()
    }


def _check(
    config: ModelConfig,
    family: Family,
    names: Mapping[str, Tensor],
    tensors: Mapping[str, Entry],
    where: str,
) -> dict[str, list[Entry]]:
    """Returns the entries of each parameter, one per layer, when nothing is wrong with them."""
    plan: dict[str, list[Entry]] = {}
    used = set()
    for path, parameter in _flat_table(config).items():
        if path not in names:
            raise ConfigError(f"a {family.name} checkpoint has no place for {path}")
        tensor = names[path]
        layers = range(config.n_layers) if path.startswith("layers/") else range(1)
        plan[path] = []
        for layer in layers:
            name = tensor.name.format(layer=layer)
            if name not in tensors:
                raise missing_tensor(name, where)
            entry, expected = tensors[name], tensor.stored_shape(parameter.shape)
            if entry.shape != expected:
                raise CheckpointError(
                    f"{entry.file}: tensor {name!r} has shape {list(entry.shape)}, but the "
                    f"configuration makes it {list(expected)}"
                )
            if entry.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{entry.file}: tensor {name!r} holds {entry.dtype}, not floating-point numbers"
                )
            used.add(name)
            plan[path].append(entry)
    _check_left_over(config, family, names, tensors, used)
    return plan


def _check_left_over(config, family: Family, names, tensors: Mapping[str, Entry], used) -> None:
    head = names["head"].name if "head" in names else None
    for name in sorted(set(tensors) - used):
        entry = tensors[name]
        if name == head and config.tie_embeddings:
            embedding = tensors[names["embedding"].name]
            if not np.array_equal(entry.read(), embedding.read()):
                raise CheckpointError(
                    f"{entry.file}: {name!r} differs from {names['embedding'].name!r}, but the "
                    f"configuration ties them (tie_word_embeddings)"
                )
        elif not name.endswith(family.ignored) and name not in family.unused:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has no place in a {family.name} model of this "
                f"configuration ({config.n_layers} layers)"
            )


def _read(tensor: Tensor, entry: Entry, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(tensor.from_stored(entry.read())).astype(
        jnp.dtype(dtype), copy=False
    )


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _stack(
    reads: list[Callable[[], np.ndarray]], shape: tuple[int, ...], dtype: str, sharding: Any
) -> jax.Array:
    """Returns the layers as one array, filled one layer at a time."""
    inner = sharding
    if isinstance(sharding, NamedSharding):
        inner = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    whole = _empty((len(reads), *shape), dtype, sharding)
    for i, read in enumerate(reads):
        whole = _set_layer(sharding)(whole, _put(read(), inner), i)
    return whole


@functools.lru_cache(maxsize=256)
def _zeros(shape: tuple[int, ...], dtype: str, sharding: Any):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _empty(shape: tuple[int, ...], dtype: str, sharding: Any) -> jax.Array:
    return _zeros(shape, dtype, sharding)()


@functools.lru_cache(maxsize=64)
def _set_layer(sharding: Any):
    return jax.jit(
        lambda whole, layer, i: jax.lax.dynamic_update_index_in_dim(whole, layer, i, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )

"""Loading a checkpoint: tensor by tensor, straight into the target's sharding."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from tokjax.errors import CheckpointError, ConfigError
from tokjax.models import parameters
from tokjax.models.config import Config, with_dtypes
from tokjax.models.huggingface.family import (
    Family,
    Tensor,
    config_from_fields,
    family_of,
    missing_tensor,
)
from tokjax.parallel.rules import parameter_shardings

_DTYPES = ("float32", "bfloat16", "float16")
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class Source(Protocol):
    """A named array that lies in a file: what a checkpoint of any format is made of."""

    @property
    def file(self) -> Path:
        """Where it lies."""
        ...

    @property
    def dtype(self) -> str:
        """Of the array that `read` returns, as safetensors call it: F32, BF16, ..."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that `read` returns."""
        ...

    def read(self) -> np.ndarray:
        """Returns the array."""
        ...


def read_config(folder: Path) -> Any:
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
    config: Config,
    tensors: Mapping[str, Source],
    where: str,
    *,
    family: Family | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Returns the configuration with the dtypes that were loaded, and the parameters.

    Args:
        config: what config.json says.
        tensors: every tensor of the checkpoint.
        where: what error messages call it.
        family: says where each parameter lies; default the configuration's.
        mesh: devices to lay the parameters out on; default the first device.
        dtype: of every parameter; default as stored, each its own.

    Raises:
        ConfigError: the dtype is unknown.
        CheckpointError: a tensor is missing, left over, or of another shape or kind.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}, or None")
    family = family or family_of(config.family)
    tensors = {_present_name(family, name): entry for name, entry in tensors.items()}
    config = family.adapt(config, frozenset(tensors))
    names = _stored_names(family, family.tensors(config), tensors)
    found = parameters.map_table(config, lambda path, p, layers: path)
    plan = _check(config, family, names, tensors, where)
    kinds = Counter(entry.dtype for entries in plan.values() for entry in entries)
    stored_kind = kinds.most_common(1)[0][0]
    stored = _FLOATS[stored_kind]
    param_dtype = dtype or ("float32" if stored == "float64" else stored)
    compute = "bfloat16" if param_dtype == "bfloat16" else "float32"
    config = with_dtypes(config, param_dtype, compute)
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), found)
    else:
        abstract = jax.eval_shape(lambda: parameters.init_parameters(config, jax.random.key(0)))
        shardings = parameter_shardings(parameters.logical_axes(config), abstract, mesh)

    def place(path: str, parameter: parameters.Parameter, layers: int, sharding: Any):
        entries = plan[path]
        own = dtype or _FLOATS[entries[0].dtype if entries else stored_kind]
        reads = [functools.partial(_read, names[path], e, own) for e in entries]
        if not layers:
            return _put(reads[0](), sharding)
        # What the first blocks lack in the checkpoint they do not use.
        unused = functools.partial(_unused, parameter, own)
        return _stack([unused] * (layers - len(reads)) + reads, parameter.shape, own, sharding)

    flat = {
        path: place(path, *described, s)
        for (path, described), s in zip(
            _flat_table(config).items(), jax.tree.leaves(shardings), strict=True
        )
    }
    return config, jax.tree.map(lambda path: flat[path], found)


def _flat_table(config: Config) -> dict[str, tuple[parameters.Parameter, int]]:
    """Returns path -> (parameter, layers it is stacked over), in the order of the tree's leaves."""
    found = {}
    tree = parameters.map_table(
        config, lambda path, p, layers: found.update({path: (p, layers)}) or path
    )
    return {path: found[path] for path in jax.tree.leaves(tree)}


def _present_name(family: Family, name: str) -> str:
    for former, present in family.renamed:
        if name.endswith(former):
            return name.removesuffix(former) + present
    return name


def _stored_names(
    family: Family, tensors: Mapping[str, Tensor], stored: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Returns the tensors under the names a bare backbone has, if this is one."""
    if any(name.startswith(family.prefix) for name in stored):
        return dict(tensors)
    return family.without_prefix(tensors)


def _check(
    config: Config,
    family: Family,
    names: Mapping[str, Tensor],
    tensors: Mapping[str, Source],
    where: str,
) -> dict[str, list[Source]]:
    """Returns the entries of each parameter, one per layer, when nothing is wrong with them."""
    plan: dict[str, list[Source]] = {}
    used = set()
    for path, (parameter, depth) in _flat_table(config).items():
        if path not in names:
            raise ConfigError(f"a {family.name} checkpoint has no place for {path}")
        tensor = names[path]
        layers = range(tensor.first_layer, depth) if depth else range(1)
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


def _check_left_over(config, family: Family, names, tensors: Mapping[str, Source], used) -> None:
    copies = dict(family.copies)
    table = "decoder/embedding" if "decoder/embedding" in names else "embedding"
    if config.tie_embeddings:
        copies |= {names[p].name: table for p in ("head", "decoder/head") if p in names}
    for name in sorted(set(tensors) - used):
        entry = tensors[name]
        if name in copies and names[copies[name]].name in used:
            original = names[copies[name]]
            read = original.from_stored(tensors[original.name].read())
            if not np.array_equal(entry.read(), read):
                raise CheckpointError(
                    f"{entry.file}: {name!r} differs from {original.name!r}, but the "
                    f"configuration ties them (tie_word_embeddings)"
                )
        elif not name.endswith(family.ignored) and name not in family.unused:
            depths = " and ".join(str(n) for n in config.depths.values())
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has no place in a {family.name} model of this "
                f"configuration ({depths} layers)"
            )


def _unused(parameter: parameters.Parameter, dtype: str) -> np.ndarray:
    return np.full(parameter.shape, parameter.std is None, jnp.dtype(dtype))


def _read(tensor: Tensor, entry: Source, dtype: str) -> np.ndarray:
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

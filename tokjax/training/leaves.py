"""The state of a training run as named arrays, and how it is compared with what a reader expects.

A leaf's name is its path in the pytree joined by "/", for example `params/layers/wq`. Nothing is
ever cast or padded: what does not fit is an error that names the leaf.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.errors import CheckpointError, nearest

PyTree = Any
_MAX_LINES = 30


@dataclass(frozen=True)
class LeafSpec:
    """Shape and dtype of one leaf; typed random keys have a dtype such as `key<threefry2x32>`.

    The shape of random keys counts keys, not the words they are made of.

    >>> str(LeafSpec((2, 3), "bfloat16"))
    'bfloat16[2,3]'
    >>> LeafSpec.parse("bfloat16[2,3]")
    LeafSpec(shape=(2, 3), dtype='bfloat16')
    """

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def parse(cls, text: str) -> "LeafSpec":
        """Returns the spec that prints as `text`."""
        dtype, _, sizes = text.removesuffix("]").partition("[")
        return cls(tuple(int(size) for size in sizes.split(",") if size), dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def empty(self) -> bool:
        """Whether the leaf has no elements, so that its spec says all there is to say."""
        return 0 in self.shape


def name_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a pytree by name.

    Raises:
        ValueError: two leaves have the same name (dictionary keys 1 and "1").
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(_escape(jax.tree_util.keystr((key,), simple=True)) for key in path)
        name = name or "value"  # the tree is a single leaf
        if name in named:
            raise ValueError(f"two leaves of the state are both named {name!r}; rename one")
        named[name] = leaf
    return named


def spec_of(name: str, leaf: Any) -> LeafSpec:
    """Returns the spec of an array, a NumPy array or scalar, or a `jax.ShapeDtypeStruct`.

    Raises:
        TypeError: the leaf is something else, such as a Python number.
    """
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        raise TypeError(
            f"leaf {name!r} of the state is a {type(leaf).__name__}, not an array: make it an "
            "array, or keep it in the metadata"
        )
    if is_key(leaf):
        return LeafSpec(tuple(leaf.shape), f"key<{_generator(leaf)}>")
    if np.dtype(leaf.dtype).hasobject:
        raise TypeError(f"leaf {name!r} of the state is an array of Python objects")
    return LeafSpec(tuple(leaf.shape), np.dtype(leaf.dtype).name)


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of typed random keys (or stands for one)."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dictionaries from leaves by name, the form that Orbax writes."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def to_storable(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves as Orbax can write them: keys as their words, empty arrays left out.

    Raises:
        TypeError: a leaf is not an array.
        ValueError: there is nothing to write, or an array lives on this process alone while
            several run.
    """
    storable: dict[str, Any] = {}
    for name, leaf in named.items():
        if spec_of(name, leaf).empty:
            continue
        if isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
        if isinstance(leaf, jax.Array):
            if jax.process_count() > 1 and leaf.is_fully_addressable:
                raise ValueError(
                    f"leaf {name!r} of the state is on process {jax.process_index()} alone, so "
                    "the processes could save different values: make it a global array"
                )
            leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        storable[name] = leaf
    if not storable:
        raise ValueError("the state has no arrays to save")
    return storable


def restore_leaves(template: PyTree, load: Callable[[dict[str, Any]], Mapping[str, Any]]) -> PyTree:
    """Returns a pytree like `template` with the values that `load` reads.

    Args:
        template: a pytree of `jax.ShapeDtypeStruct` or arrays. Where a leaf has a sharding the
            value gets it; where it is a NumPy array, or of a dtype that JAX would narrow, the
            value is a NumPy array; else it lies on the first device (with several processes: on
            all devices).
        load: given the leaves to read by name, each a `jax.ShapeDtypeStruct` with sharding, or a
            NumPy array for which NumPy is wanted, returns their values by name.
    """
    named = name_leaves(template)
    wanted: dict[str, Any] = {}
    for name, leaf in named.items():
        if spec_of(name, leaf).empty:
            continue
        if _stays_numpy(leaf):
            wanted[name] = np.empty(leaf.shape, leaf.dtype)
            continue
        words = jax.eval_shape(jax.random.key_data, _shape_of(leaf)) if is_key(leaf) else leaf
        # A partition spec may be shorter than the array: the words of one key stay together.
        wanted[name] = jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=_sharding(leaf))
    values = load(wanted)
    leaves = [_finish(name, leaf, values) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def mismatches(saved: Mapping[str, LeafSpec], wanted: Mapping[str, LeafSpec]) -> list[str]:
    """Returns a line for every leaf that differs in shape or dtype, is missing or not expected."""
    missing = [name for name in wanted if name not in saved]
    extra = [name for name in saved if name not in wanted]
    lines = [
        f"{name}: the checkpoint has {saved[name]}, the model {wanted[name]}"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    lines += [f"{name}: not in the checkpoint.{_near(name, extra)}" for name in missing]
    return lines + [f"{name}: only in the checkpoint.{_near(name, missing)}" for name in extra]


def check_leaves(place: str, saved: Mapping[str, LeafSpec], wanted: Mapping[str, LeafSpec]) -> None:
    """Does nothing if the checkpoint at `place` holds exactly the wanted leaves.

    Raises:
        CheckpointError: naming every leaf that differs (the first thirty).
    """
    lines = mismatches(saved, wanted)
    if lines:
        more = len(lines) - _MAX_LINES
        shown = "".join(f"\n  {line}" for line in lines[:_MAX_LINES])
        raise CheckpointError(
            f"{place} does not fit the model and optimiser ({len(lines)} of "
            f"{len({*saved, *wanted})} leaves differ; values are never cast):{shown}"
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nUse the configuration it was written with, or another workdir."
        )


def _escape(part: str) -> str:
    # "/" joins the parts here and "." joins them inside Orbax: neither may come from a part.
    escaped = part.replace("%", "%25").replace("/", "%2F").replace(".", "%2E")
    return escaped or "%"


def _generator(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_impl(leaf)
    # A ShapeDtypeStruct cannot be asked; what traces in its place can.
    found: list[Any] = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), _shape_of(leaf))
    return found[0]


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _stays_numpy(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return True
    return not is_key(leaf) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None:
        return sharding
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _finish(name: str, leaf: Any, values: Mapping[str, Any]) -> Any:
    if name not in values:  # empty
        if _stays_numpy(leaf):
            return np.zeros(leaf.shape, leaf.dtype)
        words = jax.eval_shape(jax.random.key_data, _shape_of(leaf)) if is_key(leaf) else leaf
        zeros = np.zeros(words.shape, words.dtype)
        value = jax.make_array_from_callback(zeros.shape, _sharding(leaf), zeros.__getitem__)
    else:
        value = values[name]
    if is_key(leaf):
        return jax.random.wrap_key_data(value, impl=_generator(leaf))
    return value


def _near(name: str, candidates: list[str]) -> str:
    text = nearest(name, candidates)
    return text if "Did you mean" in text else ""

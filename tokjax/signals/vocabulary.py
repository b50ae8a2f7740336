"""Streaming over tokens and over the vocabulary, so that only a tile of logits exists at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from tokjax.models.head import Head, logits
from tokjax.parallel.rules import BATCH_AXES, current_mesh_shape, current_platform

# A chunk's logits take 16 MB up to a vocabulary of 16,384: they stay in a CPU's last-level cache.
# From there on 256 tokens, since smaller products would run below the matmul peak. (Half as many
# logits cost 1.2 % of a training step of 29M parameters on 2 cores, twice as many gained nothing.)
_CHUNK_LOGITS = 2**22
_CHUNK_TOKENS = 256

# The largest vocabulary that is not cut, and the size of a block of one that is. A tile of 1,024
# tokens by 2,048 ids keeps every product of a CPU at its peak and every operand in its cache;
# an accelerator's products need more to work on.
_UNCUT = 4096
_BLOCK = 2048
_TILE_LOGITS = 2**21
_ACCELERATOR = 4  # times as many tokens and as many ids


def chunk_size(vocabulary: int, tokens: int) -> int:
    """Returns how many tokens to score at a time against the whole vocabulary."""
    # The whole gradient of the head is read and written once a chunk: longer ones hide that, and
    # an accelerator has no cache that they would have to fit.
    factor = 1 if current_platform() == "cpu" else _ACCELERATOR
    return min(tokens, max(factor * _CHUNK_TOKENS, factor**2 * _CHUNK_LOGITS // vocabulary))


def tile_size(vocabulary: int, tokens: int) -> tuple[int, int]:
    """Returns how many tokens, against how many token ids, to score at a time."""
    # Cutting a vocabulary that is split over devices would gather it.
    whole = vocabulary <= _UNCUT or current_mesh_shape().get("tensor", 1) > 1
    factor = 1 if current_platform() == "cpu" else _ACCELERATOR
    ids = vocabulary if whole else min(vocabulary, factor * _BLOCK)
    most = max(_CHUNK_TOKENS, factor**2 * _TILE_LOGITS // ids)
    return math.ceil(tokens / math.ceil(tokens / most)), ids


def in_chunks(arrays: Any, size: int) -> tuple[Any, int]:
    """Returns arrays [N, ...] as [chunks, size, ...], filled up with zeros, and N."""
    n = jax.tree.leaves(arrays)[0].shape[0]
    chunks = math.ceil(n / size)

    def split(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, ((0, chunks * size - n), *((0, 0),) * (a.ndim - 1)))
        return padded.reshape(chunks, size, *a.shape[1:])

    return jax.tree.map(split, arrays), n


def from_chunks(arrays: Any, n: int) -> Any:
    """Returns arrays [chunks, size, ...] as [N, ...]."""
    return jax.tree.map(lambda a: flat(a)[:n], arrays)


def flat(arrays: Any) -> Any:
    """Returns arrays [B, T, ...] as [B * T, ...]; axes behind may be empty."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), arrays)


def unflat(arrays: Any, like: Any) -> Any:
    """Returns arrays [B * T, ...] as [B, T, ...], the axes with which the leaves of `like` lead."""
    leading = jax.tree.leaves(like)[0].shape[:2]
    return jax.tree.map(lambda a: a.reshape(*leading, *a.shape[1:]), arrays)


def fold_blocks(step: Callable, carry: Any, vocabulary: int, size: int) -> Any:
    """Returns `carry = step(carry, start)` after the blocks that start at 0, size, 2 size, ..."""
    if size == vocabulary:
        return step(carry, 0)
    starts = jnp.arange(0, vocabulary, size)
    return jax.lax.scan(lambda c, start: (step(c, start), None), carry, starts)[0]


def block_ids(
    start: int | Int[Array, ""], vocabulary: int, size: int
) -> tuple[Int[Array, "v"], Bool[Array, "v"]]:
    """Returns the ids of the block at `start`, and which of them no earlier block holds.

    The last block is moved back to end with the vocabulary: padding the table would copy it.
    """
    ids = jnp.minimum(start, vocabulary - size) + jnp.arange(size)
    return ids, ids >= start


def head_block(head: Head, start: int | Int[Array, ""], size: int) -> Head:
    """Returns the head of the ids of the block at `start`."""
    if size == head.table.shape[0]:
        return head
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), head)


def logits_tile(
    head: Head, x: Float[Array, "n D"], start: int | Int[Array, ""], size: int
) -> Float[Array, "n v"]:
    """Returns the logits of the block at `start`; -inf for ids that an earlier block holds."""
    z = logits(head_block(head, start, size), x)
    vocabulary = head.table.shape[0]
    if vocabulary % size:
        z = jnp.where(block_ids(start, vocabulary, size)[1], z, -jnp.inf)
    return z


def per_shard(fn: Callable, tokens: Any, shared: Any) -> Any:
    """Returns fn(tokens, shared, summed), run by each device on its own rows and positions.

    Without this, the compiler would sum the table's gradient over devices once per chunk instead
    of once per step. The leaves of `tokens` lead with the axes [B, T]; `shared` is the same on
    every device. `fn` returns a pair: arrays that lead with [B, T] or, for sums, with a single
    axis of length 1, of which each device contributes one entry; and a tree of arrays that
    `summed`, given a float32 tree, has added up over the devices (`()` where there are none).

    A gradient of `shared` is returned that way, by a custom derivative around this call. JAX's
    own would add it up in the dtype of `shared`: in bfloat16 with a rounding for each device.
    """
    mesh = current_mesh_shape()
    shape = jax.tree.leaves(tokens)[0].shape
    rows = tuple(a for a in BATCH_AXES if mesh.get(a, 1) > 1)
    columns = "sequence" if mesh.get("sequence", 1) > 1 else None
    if shape[0] % math.prod(mesh[a] for a in rows):
        rows = ()
    if columns and shape[1] % mesh[columns]:
        columns = None
    manual = (*rows, *((columns,) if columns else ()))
    if not manual:
        return fn(tokens, shared, lambda tree: tree)

    def divided(leaf: Any) -> bool:
        return "fsdp" in manual and leaf.ndim == 2 and leaf.shape[1] % mesh["fsdp"] == 0

    def summed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: _sum(leaf, manual, divided(leaf)), tree)

    spec = P(rows, columns)
    found, sums = jax.eval_shape(lambda *args: fn(*args, lambda tree: tree), tokens, shared)
    out_specs = (
        jax.tree.map(lambda a: P(manual) if a.shape == (1,) else spec, found),
        jax.tree.map(lambda a: P(None, "fsdp") if divided(a) else P(), sums),
    )
    return jax.shard_map(
        lambda tokens, shared: fn(tokens, shared, summed),
        in_specs=(spec, P()),
        out_specs=out_specs,
        axis_names=frozenset(manual),
        check_vma=False,
    )(tokens, shared)


def _sum(leaf: Float[Array, "..."], axes: tuple[str, ...], divided: bool) -> Float[Array, "..."]:
    """Returns the sum over devices; where it fits, each keeps its columns of it, as of parameters.

    Where the compiler can scatter, that moves half as much as a whole sum for everybody.
    """
    if divided:
        leaf = jax.lax.psum_scatter(leaf, "fsdp", scatter_dimension=1, tiled=True)
        axes = tuple(axis for axis in axes if axis != "fsdp")
    return jax.lax.psum(leaf, axes) if axes else leaf

"""Streaming over tokens, so that logits exist for a few hundred tokens at a time only."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tokjax.parallel.rules import BATCH_AXES, current_mesh_shape

# A chunk's logits take 8 MB up to a vocabulary of 8,192: they stay in a CPU's last-level cache.
# From there on 256 tokens, since smaller products would run below the matmul peak.
_CHUNK_LOGITS = 2**21
_CHUNK_TOKENS = 256


def chunk_size(vocabulary: int, tokens: int) -> int:
    """Returns how many tokens to score at a time."""
    return min(tokens, max(_CHUNK_TOKENS, _CHUNK_LOGITS // vocabulary))


def in_chunks(arrays: Any, size: int) -> tuple[Any, int]:
    """Returns arrays [N, ...] as [chunks, size, ...], filled up with zeros, and N."""
    n = jax.tree.leaves(arrays)[0].shape[0]
    chunks = math.ceil(n / size)

    def split(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, ((0, chunks * size - n), *((0, 0),) * (a.ndim - 1)))
        return padded.reshape(chunks, size, *a.shape[1:])

    return jax.tree.map(split, arrays), n


def per_shard(fn: Callable, x: jax.Array, table: jax.Array, *per_token: jax.Array) -> Any:
    """Returns fn(x, table, *per_token), run by each device on its own rows and positions.

    Without this, the compiler would sum the table's gradient over devices once per chunk instead
    of once per step. `fn` must return arrays that lead with the token axes [B, T] or, for sums,
    with a single axis of length 1, of which each device contributes one entry.
    """
    mesh = current_mesh_shape()
    rows = tuple(a for a in BATCH_AXES if mesh.get(a, 1) > 1)
    columns = "sequence" if mesh.get("sequence", 1) > 1 else None
    if x.shape[0] % math.prod(mesh[a] for a in rows):
        rows = ()
    if columns and x.shape[1] % mesh[columns]:
        columns = None
    manual = (*rows, *((columns,) if columns else ()))
    if not manual:
        return fn(x, table, *per_token)
    tokens = P(rows, columns)
    out = jax.eval_shape(fn, x, table, *per_token)
    out_specs = jax.tree.map(lambda a: P(manual) if a.shape == (1,) else tokens, out)
    return jax.shard_map(
        fn,
        in_specs=(tokens, P(), *(tokens for _ in per_token)),
        out_specs=out_specs,
        axis_names=frozenset(manual),
        check_vma=False,
    )(x, table, *per_token)

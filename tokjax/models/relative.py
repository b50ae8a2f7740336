"""Relative positions as a bias on attention scores, by distance in buckets.

Reference: Raffel et al. 2020, arXiv 1910.10683, section 2.1 (T5).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.models.config import ModelConfig


def relative_bias(
    config: ModelConfig,
    table: Float[Array, "buckets H"],
    queries: Int[Array, "B T"],
    slots: int,
) -> Float[Array, "B H T S"]:
    """Returns what is added to the scores of keys in the slots 0, 1, ... of a row.

    Distances are those between places in the row, which within a segment are those between
    positions.

    Args:
        config: the model's.
        table: its parameter `relative_bias`, one row a bucket.
        queries: place of each query in its row; one row serves all.
        slots: number of keys.
    """
    rows = bucket_of(
        np.arange(1 - slots, slots),
        config.relative_buckets,
        config.relative_distance,
        causal=config.causal,
    )
    by_distance = jnp.take(table.astype(jnp.float32), rows, axis=0)
    at = jnp.arange(slots) - queries[..., None] + slots - 1
    return jnp.moveaxis(jnp.take(by_distance, at, axis=0, mode="clip"), -1, 1)


def bucket_of(distances: np.ndarray, buckets: int, limit: int, *, causal: bool) -> np.ndarray:
    """Returns the bucket of each distance, the key's place less the query's.

    Half of the buckets are for one distance each, the others for ranges that grow
    logarithmically up to `limit`; without `causal` later keys have half of all buckets.

    >>> bucket_of(np.array([-40, -3, 0, 5]), 8, 32, causal=True).tolist()
    [7, 3, 0, 0]
    >>> bucket_of(np.array([-40, -3, 0, 5]), 8, 32, causal=False).tolist()
    [3, 2, 0, 6]
    """
    first = np.zeros_like(distances)
    if causal:
        away = np.maximum(-distances, 0)
    else:
        buckets //= 2
        first, away = np.where(distances > 0, buckets, 0), np.abs(distances)
    exact = buckets // 2
    # In float32 as the checkpoints' own code has it: limits of buckets see the rounding.
    growth = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
    growth = growth / np.float32(math.log(limit / exact)) * np.float32(buckets - exact)
    coarse = np.minimum(exact + growth.astype(np.int64), buckets - 1)
    return first + np.where(away < exact, away, coarse)

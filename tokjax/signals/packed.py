"""Sums over the samples of packed rows, and values of samples back on their tokens.

A sample is a segment of a row (`Batch.segment_ids`: 1 to S, 0 is filling); what belongs to
samples has the shape [B, S], with sample s of a row in column s - 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def packed_sums(
    values: Float[Array, "B T"], segment_ids: Int[Array, "B T"], num: int
) -> Float[Array, "B S"]:
    """Returns the float32 sum of the values of each sample; filling belongs to none.

    Args:
        values: one for each token.
        segment_ids: 1 to `num`, 0 for filling.
        num: S, samples that a row has room for.
    """
    ids = jnp.arange(1, num + 1, dtype=segment_ids.dtype)
    member = (segment_ids[..., None] == ids).astype(jnp.float32)
    return jnp.einsum("bts,bt->bs", member, values.astype(jnp.float32), precision="highest")


def packed_spread(
    values: Float[Array, "B S"], segment_ids: Int[Array, "B T"], fill: float = 0.0
) -> Float[Array, "B T"]:
    """Returns each sample's value at all of its tokens, and `fill` at filling.

    >>> packed_spread(jnp.array([[5.0, 7.0]]), jnp.array([[1, 2, 2, 0]])).tolist()
    [[5.0, 7.0, 7.0, 0.0]]
    """
    found = jnp.take_along_axis(values, jnp.maximum(segment_ids - 1, 0), axis=1)
    return jnp.where(segment_ids > 0, found, jnp.asarray(fill, found.dtype))


def packed_means(
    values: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    num: int,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Returns each sample's weighted mean (0 where its weights sum to 0) and its sum of weights."""
    weight = packed_sums(weights, segment_ids, num)
    total = packed_sums(jnp.where(weights == 0, 0.0, values * weights), segment_ids, num)
    return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight)), weight

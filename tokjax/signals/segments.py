"""Counts, sums and moments of the values that share a segment id, in static shapes.

S is the number of segments, `num`. An id outside [0, num) belongs to no segment; by convention
that is written as -1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def segment_counts(ids: Int[Array, " N"], num: int) -> Int[Array, " S"]:
    """Returns how many entries carry each id."""
    return jnp.zeros(num, jnp.int32).at[_known(ids, num)].add(1, mode="drop")


def segment_sums(values: Float[Array, "N *F"], ids: Int[Array, " N"], num: int) -> Array:
    """Returns the float32 sum [S, *F] of the values of each id, 0 where there are none.

    Values are sorted by id and added in a tree: the same result bit for bit on every run, which
    a scatter-add on a GPU does not give, and a rounding error that grows with log N only.
    """
    N = ids.shape[0]
    if N == 0:
        return jnp.zeros((num, *values.shape[1:]), jnp.float32)
    order = jnp.argsort(ids, stable=True)
    ids, sums = ids[order], values[order].astype(jnp.float32)
    slots = jnp.arange(N)

    def double(step, sums):
        # Every entry holds the sum of up to `back` entries of its id, and takes on as many more.
        back = 1 << step
        same = (slots >= back) & (jnp.roll(ids, back) == ids)
        same = same.reshape(-1, *(1,) * (sums.ndim - 1))
        return sums + jnp.where(same, jnp.roll(sums, back, axis=0), 0.0)

    sums = jax.lax.fori_loop(0, (N - 1).bit_length(), double, sums)
    ends = jnp.append(ids[1:] != ids[:-1], True)
    place = jnp.where(ends, _known(ids, num), num)
    return jnp.zeros((num, *values.shape[1:]), jnp.float32).at[place].set(sums, mode="drop")


def segment_moments(
    values: Float[Array, " N"], ids: Int[Array, " N"], num: int
) -> tuple[Int[Array, " S"], Float[Array, " S"], Float[Array, " S"]]:
    """Returns each id's count, mean and sum of squared deviations from that mean.

    Deviations rather than squares: a float32 sum of squares minus a squared sum has no correct
    digit left once the mean is some thousand times the spread.
    """
    values, known = values.astype(jnp.float32), _known(ids, num)
    count = segment_counts(ids, num)
    mean = segment_sums(values, ids, num) / jnp.maximum(count, 1).astype(jnp.float32)
    deviation = values - jnp.take(mean, known, mode="fill", fill_value=0.0)
    return count, mean, segment_sums(jnp.square(deviation), ids, num)


def segment_extremes(
    values: Float[Array, "N *F"], ids: Int[Array, " N"], num: int
) -> tuple[Array, Array]:
    """Returns the least and the greatest value of each id; +inf and -inf where there are none."""
    values, known = values.astype(jnp.float32), _known(ids, num)
    empty = jnp.full((num, *values.shape[1:]), jnp.inf, jnp.float32)
    low = empty.at[known].min(values, mode="drop")
    return low, (-empty).at[known].max(values, mode="drop")


def _known(ids: Int[Array, " N"], num: int) -> Int[Array, " N"]:
    """Returns ids with the negative ones moved behind the end: JAX would count them from there."""
    return jnp.where(ids < 0, num, ids)

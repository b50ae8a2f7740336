"""Statistics per token type (row of the vocabulary) and per frequency bin, gathered in a stream.

An average over tokens is an average over the frequent types. What happens to the rare ones, which
are most of the vocabulary, shows only when each type counts once.

Reference: Pinto, Galanti and Balestriero, "The Fair Language Model Paradox", arXiv 2410.11985.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.errors import nearest
from tokjax.signals.segments import segment_moments, segment_sums


@struct.dataclass
class TypeStats:
    """What has been seen of each token type.

    Attributes:
        count: number of values.
        mean: their mean; 0 for types not seen.
        squares: sum of squared deviations from the mean.
    """

    count: Int[Array, " V"]
    mean: Float[Array, " V"]
    squares: Float[Array, " V"]

    @property
    def seen(self) -> Bool[Array, " V"]:
        """Which types have at least one value."""
        return self.count > 0

    @property
    def total(self) -> Float[Array, " V"]:
        """Sum of each type's values."""
        return self.mean * self.count.astype(jnp.float32)

    def variance(self, ddof: int) -> Float[Array, " V"]:
        """Returns the variance of each type's values; 0 with `ddof` values or fewer.

        Args:
            ddof: 0 divides by the count (population), 1 by the count less one (sample).
        """
        divisor = jnp.maximum(self.count - ddof, 1).astype(jnp.float32)
        return jnp.where(self.count > ddof, self.squares / divisor, 0.0)


def init_type_stats(vocab_size: int) -> TypeStats:
    """Returns the statistics of no value."""
    zeros = jnp.zeros(vocab_size, jnp.float32)
    return TypeStats(count=jnp.zeros(vocab_size, jnp.int32), mean=zeros, squares=zeros)


def update_type_stats(
    stats: TypeStats,
    ids: Int[Array, "*B T"],
    values: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
) -> TypeStats:
    """Returns the statistics with a batch added; the same bit for bit on every run.

    Args:
        stats: so far.
        ids: the type of each value. For a loss that is the target, not the input token.
        values: for instance the negative log-likelihood of each target.
        mask: values that count.

    Raises:
        ValueError: shapes that differ.
    """
    if not ids.shape == values.shape == mask.shape:
        raise ValueError(f"ids {ids.shape}, values {values.shape}, mask {mask.shape} must agree")
    counted = jnp.where(mask, ids, -1).reshape(-1)
    batch = segment_moments(values.reshape(-1), counted, stats.count.shape[0])
    return merge_type_stats(stats, TypeStats(*batch))


def merge_type_stats(a: TypeStats, b: TypeStats) -> TypeStats:
    """Returns the statistics of both sets together, whichever hosts or batches they come from."""
    count = a.count + b.count
    share = b.count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
    apart = b.mean - a.mean
    between = a.count.astype(jnp.float32) * share * jnp.square(apart)
    return TypeStats(count, a.mean + apart * share, a.squares + b.squares + between)


@struct.dataclass
class BinStats:
    """Statistics of bins of token types.

    Attributes:
        types: number of types with at least one value.
        count: number of values.
        micro: mean over values: frequent types dominate.
        macro: mean over types, each counting once.
    """

    types: Int[Array, " bins"]
    count: Int[Array, " bins"]
    micro: Float[Array, " bins"]
    macro: Float[Array, " bins"]


def by_bin(stats: TypeStats, bins: Int[Array, " V"], num: int) -> BinStats:
    """Returns the statistics of each bin; types not seen are left out, an empty bin's means are 0.

    With every type in bin 0 and `num=1` these are the micro and macro averages of the whole.

    Args:
        stats: of each type.
        bins: the bin of each type, as of `frequency_bins`; -1 for none.
        num: number of bins.
    """
    bins = jnp.where(stats.seen, bins, -1)
    counts = stats.count.astype(jnp.float32)
    columns = jnp.stack([jnp.ones_like(counts), counts, stats.total, stats.mean], axis=-1)
    types, values, total, of_means = segment_sums(columns, bins, num).T
    count = (
        jnp.zeros(num, jnp.int32).at[jnp.where(bins < 0, num, bins)].add(stats.count, mode="drop")
    )
    return BinStats(
        types=types.astype(jnp.int32),
        count=count,
        micro=total / jnp.maximum(values, 1.0),
        macro=of_means / jnp.maximum(types, 1.0),
    )


def frequency_bins(
    counts: Int[np.ndarray, " V"], num: int, by: Literal["types", "mass"] = "types"
) -> Int[np.ndarray, " V"]:
    """Returns the frequency bin of each type: 0 the rarest, num - 1 the most frequent.

    Types of count 0 are in no bin (-1). Equal counts are ordered by id, in exact arithmetic.

    Args:
        counts: occurrences of each type in the training data, not in the evaluation data.
        num: number of bins.
        by: `types` gives all bins equally many types, up to one; `mass` equal shares of the
            occurrences, a type belonging where the middle of its mass lies (bins between very
            frequent types may be empty).

    Raises:
        ValueError: another `by`; fewer than one bin; a negative count.
    """
    if by not in ("types", "mass"):
        raise ValueError(f"unknown binning {by!r}.{nearest(by, ('types', 'mass'))}")
    counts = np.asarray(counts, np.int64)
    if num < 1 or (counts < 0).any():
        raise ValueError(f"need at least one bin, not {num}, and counts of 0 or more")
    seen = np.flatnonzero(counts)
    order = seen[np.argsort(counts[seen], kind="stable")]
    if by == "types":
        place = np.arange(order.size) * num // max(order.size, 1)
    else:
        mass = counts[order]
        doubled_middle = 2 * np.cumsum(mass) - mass
        place = doubled_middle * num // max(2 * int(mass.sum()), 1)
    bins = np.full(counts.size, -1, np.int32)
    bins[order] = place
    return bins

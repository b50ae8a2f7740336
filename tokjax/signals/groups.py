"""Statistics of groups, such as the rewards of one prompt's answers, and values relative to them.

A group varies if its greatest value differs from its least. A computed standard deviation does
not tell: in float32 that of seven rewards of 0.1 is not 0, and dividing by it makes advantages
out of rounding.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.signals.segments import segment_extremes, segment_moments


@struct.dataclass
class GroupStats:
    """Statistics of each group, shaped to broadcast against the values they were taken from.

    Attributes:
        count: number of values.
        mean: their mean; 0 for an empty group.
        squares: sum of squared deviations from the mean.
        low: least value; 0 for an empty group.
        high: greatest value; 0 for an empty group.
    """

    count: Int[Array, "..."]
    mean: Float[Array, "..."]
    squares: Float[Array, "..."]
    low: Float[Array, "..."]
    high: Float[Array, "..."]

    @property
    def constant(self) -> Bool[Array, "..."]:
        """Whether all values are equal, as they are in an empty group and in one of one value."""
        return self.low == self.high

    def std(self, ddof: int) -> Float[Array, "..."]:
        """Returns the standard deviation, exactly 0 for constant groups.

        Args:
            ddof: 0 divides by the count (population), 1 by the count less one (sample).
        """
        divisor = jnp.maximum(self.count - ddof, 1).astype(jnp.float32)
        varies = ~self.constant & (self.squares > 0)
        variance = jnp.where(varies, self.squares, 1.0) / divisor
        return jnp.where(varies, jnp.sqrt(variance), 0.0)


def group_stats(
    values: Float[Array, "..."],
    mask: Bool[Array, "..."] | None = None,
    axis: int | Sequence[int] = -1,
) -> GroupStats:
    """Returns the statistics of groups that lie along an axis; that axis stays, with length 1.

    Args:
        values: for instance rewards [B, G].
        mask: values that count, broadcast to values; by default all.
        axis: one axis, or several taken together: (-2, -1) of [G, T] is one group of tokens.
    """
    values = values.astype(jnp.float32)
    mask = jnp.ones(values.shape, bool) if mask is None else jnp.broadcast_to(mask, values.shape)
    axes = axis if isinstance(axis, int) else tuple(axis)
    count = mask.sum(axes, keepdims=True).astype(jnp.int32)
    total = jnp.where(mask, values, 0.0).sum(axes, keepdims=True)
    mean = total / jnp.maximum(count, 1).astype(jnp.float32)
    squares = jnp.where(mask, jnp.square(values - mean), 0.0).sum(axes, keepdims=True)
    low = jnp.where(mask, values, jnp.inf).min(axes, keepdims=True)
    high = jnp.where(mask, values, -jnp.inf).max(axes, keepdims=True)
    held = count > 0
    return GroupStats(count, mean, squares, jnp.where(held, low, 0.0), jnp.where(held, high, 0.0))


def group_stats_by_id(
    values: Float[Array, " N"], ids: Int[Array, " N"], num: int, mask: Bool[Array, " N"]
) -> GroupStats:
    """Returns for each value the statistics of its group, where groups are told by an id.

    Args:
        values: for instance one reward a rollout, groups in any order and of any size.
        ids: group of each value, in [0, num).
        num: number of groups.
        mask: values that count; the others get their group's statistics all the same.
    """
    values = values.astype(jnp.float32)
    counted = jnp.where(mask, ids, -1)
    count, mean, squares = segment_moments(values, counted, num)
    low, high = segment_extremes(values, counted, num)
    held = count > 0
    low, high = jnp.where(held, low, 0.0), jnp.where(held, high, 0.0)
    known = jnp.clip(ids, 0, num - 1)
    return GroupStats(*(a[known] for a in (count, mean, squares, low, high)))


def centred(
    values: Float[Array, "..."], stats: GroupStats, mask: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Returns the values minus their group's mean: 0 in constant groups and where masked out."""
    kept = ~stats.constant if mask is None else mask & ~stats.constant
    return jnp.where(kept, values.astype(jnp.float32) - stats.mean, 0.0)


def standardised(
    values: Float[Array, "..."],
    stats: GroupStats,
    *,
    ddof: int,
    eps: float = 0.0,
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Returns (value - mean) / (std + eps): 0 in constant groups and where masked out.

    The group-relative advantage of GRPO. Both conventions are in use: D3S ("Learning More with
    Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization", arXiv
    2509.22115) and GTPO (arXiv 2508.04349) divide by the population deviation, UniR (arXiv
    2505.19075) by the sample deviation plus 1e-4.

    Args:
        values: what the statistics were taken from.
        stats: of the groups.
        ddof: see `GroupStats.std`.
        eps: added to the standard deviation.
        mask: values that count.
    """
    std = stats.std(ddof)
    # Deviations so small that their squares vanish in float32 leave no scale to divide by.
    safe = jnp.where(std > 0, std, 1.0) + eps
    return jnp.where(std > 0, centred(values, stats, mask) / safe, 0.0)


def min_max(
    values: Float[Array, "..."], stats: GroupStats, mask: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Returns (value - least) / (greatest - least): 0 in constant groups and where masked out.

    Masked positions never set the minimum, as padding zeros would. With the advantage of RLFR
    ("Extending Reinforcement Learning for LLMs with Flow Environment", arXiv 2510.10201) each
    response is one group.
    """
    kept = ~stats.constant if mask is None else mask & ~stats.constant
    width = jnp.where(stats.constant, 1.0, stats.high - stats.low)
    return jnp.where(kept, (values.astype(jnp.float32) - stats.low) / width, 0.0)

"""Which samples and which of their tokens Q-Tuning keeps, told from perplexity and entropy.

Samples lie on a plane of perplexity (error) and entropy (uncertainty). Q2 is confidently wrong
(high, low) and Q4 uncertain but right (low, high); both are kept. Q1, noise (high, high), and Q3,
mastered (low, low), are not. All functions are pure, take masks, and compile with fixed shapes.

Reference: "Winning the Pruning Gamble: A Unified Approach to Joint Sample and Token Pruning for
Efficient Supervised Fine-Tuning", arXiv 2509.23873, section 4 and Algorithm 1.
"""

from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.signals import fraction_count, group_stats, masked_quantile, min_max, top_mask
from tokjax.signals.packed import packed_spread, packed_sums

Scale = Literal["minmax", "rank", "log"]
Supplement = Literal["by_side", "keep_all"]

MAX_LEVEL = 0.49  # of the quantiles (Algorithm 1; the text says 0.5)
_MOST_NLL = 80.0  # exp of it, tripled, is still a float32


@struct.dataclass
class Samples:
    """What is decided about samples.

    Attributes:
        keep: which are trained on.
        quadrant: 2 where noisy tokens are pruned, 4 where all tokens stay; 0 on samples that are
            not kept, and on those kept for the budget's sake by `supplement="keep_all"`.
        supplemented: which are kept without lying in Q2 or Q4.
        level: the quantile level of the thresholds.
        counts: how many samples lie in Q1, Q2, Q3 and Q4 at that level, kept or not.
    """

    keep: Bool[Array, "*N"]
    quadrant: Int[Array, "*N"]
    supplemented: Bool[Array, "*N"]
    level: Float[Array, ""]
    counts: Int[Array, "4"]


def perplexity(nll: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns exp(nll), at most e^80: sums and differences of perplexities stay finite."""
    return jnp.exp(jnp.minimum(nll, _MOST_NLL))


def as_fraction(ratio: float) -> Fraction:
    """Returns a ratio as the short fraction that is meant, so that 0.7 of 90 is 63.

    >>> as_fraction(0.7), as_fraction(1 / 3)
    (Fraction(7, 10), Fraction(1, 3))
    """
    return Fraction(str(ratio)).limit_denominator(10_000)


def quadrants(
    ppl: Float[Array, " N"],
    entropy: Float[Array, " N"],
    mask: Bool[Array, " N"],
    level: float | Float[Array, ""],
) -> Int[Array, " N"]:
    """Returns each sample's quadrant, 1 to 4, or 0 between the thresholds and outside the mask.

    The thresholds are the quantiles at `level` and 1 - `level`. A sample that ties put into
    several quadrants is counted once: in Q4, else in Q2.

    Args:
        ppl: perplexity of each sample.
        entropy: its mean entropy.
        mask: samples that exist.
        level: from 0 to 0.49; traced or not.
    """
    levels = jnp.stack([jnp.float32(level), 1 - jnp.float32(level)])
    low, high = masked_quantile(jnp.stack([ppl, entropy]), levels, mask)
    wrong, right = ppl >= high[0], ppl <= low[0]
    unsure, sure = entropy >= high[1], entropy <= low[1]
    places = [right & unsure, wrong & sure, wrong & unsure, right & sure]
    found = jnp.select(places, [jnp.int32(q) for q in (4, 2, 1, 3)], jnp.int32(0))
    return jnp.where(mask, found, 0)


def find_level(
    ppl: Float[Array, " N"],
    entropy: Float[Array, " N"],
    mask: Bool[Array, " N"],
    ratio: float,
    iterations: int = 10,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the bracket of levels within which Q2 and Q4 begin to hold a share of the samples.

    Bisection from [0, 0.49]: both thresholds share one level. At the high end at least `ratio` of
    the samples are kept, unless no level tried kept so many.
    """
    needed = fraction_count(mask.sum(dtype=jnp.int32), as_fraction(ratio), "ceil")

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        at = quadrants(ppl, entropy, mask, middle)
        enough = ((at == 2) | (at == 4)).sum() >= needed
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    return jax.lax.fori_loop(0, iterations, halve, (jnp.float32(0), jnp.float32(MAX_LEVEL)))


def side(
    ppl: Float[Array, " N"],
    entropy: Float[Array, " N"],
    mask: Bool[Array, " N"],
    scale: Scale = "minmax",
) -> Float[Array, " N"]:
    """Returns scaled perplexity less scaled entropy: above 0 towards Q2, below towards Q4.

    Its size is the score by which a batch is filled up. By "minmax" (the paper's) one enormous
    perplexity leaves nothing between the others; "log" takes the logarithm of perplexity before,
    "rank" takes ranks for both (equals share theirs).
    """
    if scale == "rank":
        return _ranks(ppl, mask) - _ranks(entropy, mask)
    if scale == "log":
        ppl = jnp.log(jnp.where(mask, ppl, 1.0))
    return _min_max(ppl, mask) - _min_max(entropy, mask)


def choose_samples(
    ppl: Float[Array, " N"],
    entropy: Float[Array, " N"],
    mask: Bool[Array, " N"],
    ratio: float,
    *,
    supplement: Supplement = "by_side",
    scale: Scale = "minmax",
    iterations: int = 10,
) -> Samples:
    """Returns the samples to train on: floor(ratio * N) of them, but at least one of any.

    Those of Q2 and Q4 at the high end of the bisection's bracket come first; beyond the budget
    the ones nearest to the diagonal go, and below it the samples farthest from it are added.
    Ties go to the lower index.

    Args:
        ppl: perplexity of each sample.
        entropy: its mean entropy.
        mask: samples that exist.
        ratio: share to keep, above 0 and at most 1.
        supplement: whether added samples count as of the quadrant on their side of the diagonal
            (recommendation of tokjax; the paper is silent) or as of none, keeping all tokens.
        scale: see `side`.
        iterations: of the bisection.
    """
    _, level = find_level(ppl, entropy, mask, ratio, iterations)
    at = quadrants(ppl, entropy, mask, level)
    lean = side(ppl, entropy, mask, scale)
    exist = mask.sum(dtype=jnp.int32)
    budget = jnp.maximum(fraction_count(exist, as_fraction(ratio), "floor"), 1)
    chosen = top_mask(jnp.abs(lean), budget, (at == 2) | (at == 4))
    added = top_mask(jnp.abs(lean), budget - chosen.sum(dtype=jnp.int32), mask & ~chosen)
    counts = jnp.stack([(at == q).sum(dtype=jnp.int32) for q in (1, 2, 3, 4)])
    of_added = jnp.where(lean > 0, 2, 4) if supplement == "by_side" else jnp.zeros_like(at)
    quadrant = jnp.where(added, of_added, jnp.where(chosen, at, 0))
    return Samples(chosen | added, quadrant.astype(jnp.int8), added, level, counts)


def neighbour_scores(
    values: Float[Array, "B T"],
    trainable: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    weight: float = 0.5,
    neighbor: Literal["sum", "mean"] = "sum",
) -> Float[Array, "B T"]:
    """Returns (1 - weight) v_i + weight (v_{i-1} + v_{i+1}), 0 outside the trainable tokens.

    Neighbours are the trainable tokens before and behind within the sample; at its edges the
    token itself stands in (recommendation of tokjax).

    Args:
        values: perplexity of each token.
        trainable: tokens that count.
        segment_ids: samples of the rows.
        weight: lambda, of the neighbours.
        neighbor: their sum, as the paper's equation has it, or their mean, as its prose.

    Reference: arXiv 2509.23873, the neighbour-aware score of stage 2.
    """
    T = values.shape[1]
    here = jnp.broadcast_to(jnp.arange(T), values.shape)
    last = jax.lax.cummax(jnp.where(trainable, here, -1), axis=1)
    first = jax.lax.cummin(jnp.where(trainable, here, T), axis=1, reverse=True)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    behind = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=T)

    def at(place):
        inside = jnp.clip(place, 0, T - 1)
        same = jnp.take_along_axis(segment_ids, inside, axis=1) == segment_ids
        use = jnp.where((place == inside) & same, inside, here)
        return jnp.take_along_axis(values, use, axis=1)

    factor = weight if neighbor == "sum" else weight / 2
    scores = (1 - weight) * values + factor * (at(before) + at(behind))
    return jnp.where(trainable, scores, 0.0)


def keep_lowest(
    scores: Float[Array, "B T"],
    trainable: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    num: int,
    ratio: float,
    *,
    reverse: bool = False,
) -> Bool[Array, "B T"]:
    """Returns which trainable tokens of each sample stay: floor(ratio * all), but at least one.

    Args:
        scores: the lowest stay; ties go to the lower index.
        trainable: tokens that count.
        segment_ids: samples of the rows.
        num: S, samples that a row has room for.
        ratio: share to keep, above 0 and at most 1.
        reverse: the highest stay instead (the paper's ablation).
    """
    size = packed_sums(trainable.astype(jnp.float32), segment_ids, num).astype(jnp.int32)
    budget = jnp.maximum(fraction_count(size, as_fraction(ratio), "floor"), 1)
    scores = -scores if reverse else scores
    order = jnp.lexsort((scores, ~trainable, segment_ids), axis=-1)
    place = jnp.argsort(order, axis=-1)
    length = packed_sums(jnp.ones_like(scores), segment_ids, num).astype(jnp.int32)
    filling = segment_ids.shape[1] - length.sum(1, keepdims=True, dtype=jnp.int32)
    start = filling + jnp.cumsum(length, axis=1) - length
    rank = place - packed_spread(start, segment_ids)
    return trainable & (rank < packed_spread(budget, segment_ids))


def _min_max(values: Float[Array, " N"], mask: Bool[Array, " N"]) -> Float[Array, " N"]:
    return min_max(values, group_stats(values, mask), mask)


def _ranks(values: Float[Array, " N"], mask: Bool[Array, " N"]) -> Float[Array, " N"]:
    """Returns the share of the other samples that lie below, equals counted half."""
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf))
    below = jnp.searchsorted(ordered, values, side="left")
    upto = jnp.searchsorted(ordered, values, side="right")
    others = jnp.maximum(mask.sum() - 1, 1).astype(jnp.float32)
    return jnp.where(mask, (below + upto - 1).astype(jnp.float32) / (2 * others), 0.0)

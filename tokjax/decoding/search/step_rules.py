"""The rules of search over steps: aggregation of rewards, allotment, PUCT, ESS, resampling."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from tokjax.errors import ConfigError

Aggregation = Literal["product", "min", "last"]
_AGGREGATIONS = ("product", "min", "last")


def aggregate(rewards: Sequence[float], how: Aggregation = "last") -> float:
    """Returns one value for the rewards of a text's steps.

    >>> aggregate([0.5, 0.8], "product"), aggregate([0.5, 0.8], "min"), aggregate([0.5, 0.8])
    (0.4, 0.5, 0.8)

    Args:
        rewards: of each step; for "product" usually probabilities.
        how: their product, the least, or the last one.

    Raises:
        ConfigError: no reward, or an unknown rule.

    Reference: Lightman et al., "Let's Verify Step by Step", arXiv 2305.20050 (product and minimum).
    """
    if how not in _AGGREGATIONS:
        raise ConfigError(f"aggregation={how!r} must be one of {_AGGREGATIONS}")
    if not len(rewards):
        raise ConfigError("no rewards to aggregate")
    if how == "product":
        return float(np.prod(rewards))
    return float(min(rewards) if how == "min" else rewards[-1])


def rebase_allocation(
    values: Sequence[float] | np.ndarray, budget: int, temperature: float = 0.2
) -> Int[np.ndarray, "N"]:
    """Returns how many children each node gets: round(budget softmax(value / temperature)).

    Halves round to even. The rounded numbers may sum to less than the budget, and it is left so;
    should they exceed it, the least valuable nodes (of equals the latest) lose theirs first; should
    all be zero, the best node gets the whole budget (recommendations of tokjax).

    >>> rebase_allocation([0.9, 0.5, 0.1], 8).tolist()
    [7, 1, 0]

    Args:
        values: of each node, such as its reward.
        budget: number of children.
        temperature: lower gives more to the best; usual are 0.1 to 0.2.

    Raises:
        ConfigError: no node, a value that is not finite, or an impossible budget or temperature.

    Reference: Wu et al., "Inference Scaling Laws: An Empirical Analysis of Compute-Optimal
    Inference for Problem-Solving with Language Models", arXiv 2408.00724 (REBASE).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ConfigError(f"values={values.tolist()} must be one finite number or more")
    if budget < 1 or not temperature > 0:
        raise ConfigError(f"budget={budget} must be at least 1, temperature={temperature} above 0")
    shares = np.exp((values - values.max()) / temperature)
    counts = np.round(budget * shares / shares.sum()).astype(np.int64)
    if not counts.any():
        counts[values.argmax()] = budget
    for i in np.argsort(-values, kind="stable")[::-1]:
        counts[i] -= min(counts[i], max(0, counts.sum() - budget))
    return counts


def puct(
    values: Float[np.ndarray, "A"],
    visits: Int[np.ndarray, "A"],
    priors: Float[np.ndarray, "A"],
    exploration: float = 1.0,
) -> Float[np.ndarray, "A"]:
    """Returns Q + c P sqrt(sum of N) / (1 + N), by which tree search goes down.

    >>> puct(np.array([0.5, 0.2, 0]), np.array([10, 3, 0]), np.array([0.5, 0.3, 0.2])).round(4)
    array([0.6639, 0.4704, 0.7211])

    Args:
        values: mean value Q of each action.
        visits: how often each was taken, N.
        priors: probability P of each.
        exploration: c; usual are 1 to 2.

    Reference: Silver et al., "Mastering Chess and Shogi by Self-Play with a General Reinforcement
    Learning Algorithm", arXiv 1712.01815.
    """
    visits = np.asarray(visits)
    bonus = np.asarray(priors) * np.sqrt(visits.sum()) / (1 + visits)
    return np.asarray(values) + exploration * bonus


def effective_sample_size(weights: Float[np.ndarray, "N"]) -> float:
    """Returns (sum w)^2 / sum w^2: n for equal weights, 1 where one has all; 0 where all are 0.

    >>> round(effective_sample_size(np.array([0.7, 0.1, 0.1, 0.1])), 3)
    1.923
    """
    weights = np.asarray(weights, np.float64)
    largest = weights.max(initial=0.0)
    if largest == 0:
        return 0.0
    weights = weights / largest
    return float(weights.sum() ** 2 / np.square(weights).sum())


def systematic_resampling(
    weights: Float[np.ndarray, "N"], offset: float, count: int | None = None
) -> Int[np.ndarray, "M"]:
    """Returns which particles go on, in order: particle i floor(M w_i) or one more times.

    >>> systematic_resampling(np.array([0.7, 0.1, 0.1, 0.1]), 0.5).tolist()
    [0, 0, 0, 2]

    Args:
        weights: of the particles; they need not sum to one.
        offset: a uniform number of [0, 1), the only randomness.
        count: M; default as many as there are.

    Raises:
        ConfigError: weights that are no weights, or an offset outside [0, 1).

    Reference: Doucet & Johansen, "A Tutorial on Particle Filtering and Smoothing", 2009, section
    3.4.
    """
    weights = np.asarray(weights, np.float64)
    total = weights.sum()
    if not (np.isfinite(weights).all() and (weights >= 0).all() and total > 0):
        raise ConfigError(f"weights={weights.tolist()} must be 0 or more and not all 0")
    if not 0 <= offset < 1:
        raise ConfigError(f"offset={offset} must be at least 0 and below 1")
    count = len(weights) if count is None else count
    ends = np.cumsum(weights) / total
    points = (np.arange(count) + offset) / count
    # Rounding may leave the last end below a point; a particle of weight 0 must never be taken.
    last = int(np.flatnonzero(weights)[-1])
    return np.minimum(np.searchsorted(ends, points, side="right"), last)

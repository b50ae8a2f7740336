"""Frequency bias: how far a model prefers the more frequent of two tokens to the right one.

Reference: Diehl Martinez et al., "Mitigating Frequency Bias and Anisotropy in Language Model
Pre-Training with Syntactic Smoothing", arXiv 2410.11462, section 4, and its code.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64


@dataclass(frozen=True)
class FrequencyBias:
    """Accuracies on minimal pairs by frequency; shares, not percentage points.

    Attributes:
        bias: accuracy where frequency favours the good sentence, less that where it favours the bad
            one. 0 is unbiased.
        low: accuracy where the bad sentence has the more frequent words.
        high: accuracy where the good one has them.
        low_threshold: difference below which a pair is in `low`.
        high_threshold: difference above which it is in `high`.
    """

    bias: float
    low: float
    high: float
    low_threshold: float
    high_threshold: float


def frequency_difference(
    good: Iterable[int], bad: Iterable[int], counts: Sequence[int] | np.ndarray, add: float = 0.0
) -> float:
    """Returns how much more frequent the good sentence's own tokens are, as a log-ratio.

    That is the mean logarithm of the counts of the tokens that only the good sentence has, less
    that of those that only the bad one has; NaN where one has no tokens of its own (the pair
    replaces nothing).

    Args:
        good: ids of the good sentence.
        bad: ids of the bad one.
        counts: occurrences of each id in the training data.
        add: added to counts; with 0, tokens that never occur are left out.

    >>> round(frequency_difference([1, 2, 3], [1, 4, 3], [0, 5, 20, 5, 10]), 6)
    0.693147
    """
    table = np.asarray(counts)
    means = []
    for own in (set(good) - set(bad), set(bad) - set(good)):
        found = table[sorted(own)].astype(float) + add if own else np.zeros(0)
        found = found[found > 0]
        if not found.size:
            return float("nan")
        means.append(np.log(found).mean())
    return float(means[0] - means[1])


def frequency_bias(
    differences: Sequence[float] | Float64[np.ndarray, "N"],
    correct: Sequence[bool] | np.ndarray,
    low: float = 33.0,
    high: float = 66.0,
) -> FrequencyBias:
    """Returns the frequency bias of a model on minimal pairs.

    Args:
        differences: of each pair, `frequency_difference`; NaN leaves a pair out.
        correct: whether the model prefers the good sentence.
        low: percentile of the differences below which the bad sentence is the frequent one.
        high: percentile above which the good one is.

    Raises:
        ValueError: lengths that differ, no pair, or percentiles in the wrong order.
    """
    found, right = np.asarray(differences, float), np.asarray(correct, float)
    if found.shape != right.shape or not np.isfinite(found).any():
        raise ValueError(
            f"differences {found.shape} and correct {right.shape} must be of the same pairs, at "
            f"least one of which replaces a token"
        )
    if not 0 <= low <= high <= 100:
        raise ValueError(f"percentiles low={low} and high={high} must rise, from 0 to 100")
    kept = np.isfinite(found)
    found, right = found[kept], right[kept]
    lower, upper = np.percentile(found, [low, high])
    # Bins may be empty where differences tie.
    mean = lambda inside: float(right[inside].mean()) if inside.any() else float("nan")  # noqa: E731
    below, above = mean(found < lower), mean(found > upper)
    return FrequencyBias(above - below, below, above, float(lower), float(upper))

"""How well tags and scores of quality agree with those of people."""

from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float

from tokjax.errors import DataError


def tag_metrics(bad: Bool[np.ndarray, "N"], predicted: Bool[np.ndarray, "N"]) -> dict[str, float]:
    """Returns agreement of tags, all words of all sentences together.

    `mcc` is Matthews' correlation, 0 where one side has only one kind of tag; `f1_ok` and `f1_bad`
    are F1 of each kind, 0 where there is none, and `f1_product` is their product.

    >>> bad, predicted = np.array([1, 1, 0, 0], bool), np.array([1, 0, 0, 0], bool)
    >>> {name: round(value, 4) for name, value in tag_metrics(bad, predicted).items()}
    {'mcc': 0.5774, 'f1_ok': 0.8, 'f1_bad': 0.6667, 'f1_product': 0.5333}

    Raises:
        DataError: there are no tags, or not equally many.
    """
    bad, predicted = np.asarray(bad, bool), np.asarray(predicted, bool)
    if bad.shape != predicted.shape or not bad.size:
        raise DataError(f"{bad.size} tags cannot be compared with {predicted.size}")
    hit, rest = float((bad & predicted).sum()), float((~bad & ~predicted).sum())
    missed, false = float((bad & ~predicted).sum()), float((~bad & predicted).sum())
    spread = (hit + false) * (hit + missed) * (rest + false) * (rest + missed)
    f1 = [2 * n / (2 * n + missed + false) if n else 0.0 for n in (rest, hit)]
    return {
        "mcc": (hit * rest - false * missed) / spread**0.5 if spread else 0.0,
        "f1_ok": f1[0],
        "f1_bad": f1[1],
        "f1_product": f1[0] * f1[1],
    }


def score_metrics(
    scores: Sequence[float] | Float[np.ndarray, "N"],
    predicted: Sequence[float] | Float[np.ndarray, "N"],
) -> dict[str, float]:
    """Returns Pearson's and Spearman's correlation; NaN where one side is constant.

    Raises:
        DataError: there are fewer than two scores, or not equally many.
    """
    one, other = np.asarray(scores, np.float64), np.asarray(predicted, np.float64)
    if one.shape != other.shape or len(one) < 2:
        raise DataError(f"{one.size} scores cannot be correlated with {other.size}")
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return {"pearson": float("nan"), "spearman": float("nan")}
    found = (scipy.stats.pearsonr(one, other), scipy.stats.spearmanr(one, other))
    pearson, spearman = (np.asarray(each)[0].item() for each in found)
    return {"pearson": pearson, "spearman": spearman}

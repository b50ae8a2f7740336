"""How well scores separate two classes: AUROC, average precision, operating points.

On the host, in float64: detection pools ragged token sets, whose sizes change with each call. Ties
are resolved exactly, by equality of scores. The orientation is always "higher score, more likely
positive"; a value below one half means reversed and is not flipped.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class RocCurve(NamedTuple):
    """The operating points of a detector, one per distinct score, strictest first.

    Attributes:
        fpr: false positive rate when every score >= threshold is called positive; begins with 0.
        tpr: true positive rate.
        thresholds: the scores; begins with +inf, where nothing is called positive.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray


def roc_curve(
    scores: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> RocCurve:
    """Returns the receiver operating characteristic; equal scores make one point.

    Args:
        scores: any shape; higher means more likely positive.
        labels: of the same shape; true, or nonzero, is positive.
        weights: how much each entry counts; by default 1.
        mask: entries that count; by default all.

    Raises:
        ValueError: shapes differ; a class is empty or weighs nothing; a score is NaN; a weight
            is negative or not finite.
    """
    thresholds, positive, negative = _cumulated(scores, labels, weights, mask)
    fpr = np.concatenate([[0.0], negative / negative[-1]])
    tpr = np.concatenate([[0.0], positive / positive[-1]])
    return RocCurve(fpr, tpr, np.concatenate([[np.inf], thresholds]))


def auroc(
    scores: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> float:
    """Returns the probability that a positive scores above a negative, a tie counting one half.

    Args, Raises: see `roc_curve`.

    >>> auroc([0.9, 0.4, 0.1, 0.4, 0.6], [1, 1, 0, 0, 0])
    0.75
    """
    _, positive, negative = _cumulated(scores, labels, weights, mask)
    own = np.diff(negative, prepend=0.0)
    above = np.concatenate([[0.0], positive[:-1]])
    # Divided once, at the end: sums of integer weights are exact and so is their comparison.
    return float((own * (above + positive)).sum() / (2 * positive[-1] * negative[-1]))


def average_precision(
    scores: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> float:
    """Returns the sum over thresholds of the gain in recall times the precision there.

    No interpolation between points, which would be optimistic. Of scores that do not tell the
    classes apart it is the share of positives.

    Args, Raises: see `roc_curve`.
    """
    _, positive, negative = _cumulated(scores, labels, weights, mask)
    precision = positive / (positive + negative)
    return float((np.diff(positive, prepend=0.0) * precision).sum() / positive[-1])


def tpr_at_fpr(curve: RocCurve, fpr: float) -> float:
    """Returns the greatest true positive rate at a false positive rate of at most `fpr`."""
    return float(curve.tpr[curve.fpr <= fpr].max())


def fpr_at_tpr(curve: RocCurve, tpr: float) -> float:
    """Returns the least false positive rate at a true positive rate of at least `tpr`."""
    return float(curve.fpr[curve.tpr >= tpr].min())


def _cumulated(scores, labels, weights, mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the distinct scores, highest first, and either class's weight from there on up."""
    given = np.asarray(scores)
    entries = {"labels": labels, "weights": weights, "mask": mask}
    for name, value in entries.items():
        if value is not None and np.shape(value) != given.shape:
            raise ValueError(
                f"{name} {np.shape(value)} must have the shape of scores {given.shape}"
            )
    score = given.astype(np.float64).ravel()
    positive = np.asarray(labels).astype(bool).ravel()
    weight = np.ones(score.shape) if weights is None else np.array(weights, np.float64).ravel()
    if mask is not None:
        kept = np.asarray(mask, bool).ravel()
        score, positive, weight = score[kept], positive[kept], weight[kept]
    if np.isnan(score).any():
        raise ValueError(f"{int(np.isnan(score).sum())} of {score.size} scores are NaN")
    if not np.all(np.isfinite(weight) & (weight >= 0)):
        raise ValueError("weights must be finite and not negative")
    for name, total in (
        ("positive", weight[positive].sum()),
        ("negative", weight[~positive].sum()),
    ):
        if not total > 0:
            raise ValueError(f"no {name} entry among {score.size}: ranking needs both classes")
    used = weight > 0
    distinct, place = np.unique(-score[used], return_inverse=True)
    positive, weight = positive[used], weight[used]
    n = distinct.size
    up = np.bincount(place, weight * positive, n).cumsum()
    down = np.bincount(place, weight * ~positive, n).cumsum()
    return -distinct, up, down

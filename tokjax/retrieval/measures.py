"""How good an order of passages is."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

Values = Sequence[float] | Shaped[np.ndarray, "N"]


def ndcg(relevance: Values, k: int | None = None, ideal: Values | None = None) -> float:
    """Returns the normalised discounted cumulative gain, with gains 2^r - 1 and discounts log2.

    Args:
        relevance: r of the passages, best-ranked first.
        k: places that count; None: all.
        ideal: relevances of everything that could have been ranked; default those ranked.

    Returns:
        0 to 1; NaN where nothing is relevant.

    >>> round(ndcg([3, 2, 0, 1]), 6)
    0.99262
    """
    best = sorted(relevance if ideal is None else ideal, reverse=True)
    top = _gain(best, k)
    return _gain(relevance, k) / top if top > 0 else float("nan")


def _gain(relevance: Values, k: int | None) -> float:
    kept = np.asarray(relevance, float)[:k]
    return float(((np.exp2(kept) - 1) / np.log2(np.arange(len(kept)) + 2)).sum())


def reciprocal_rank(relevance: Values, k: int | None = None) -> float:
    """Returns 1 / the place of the first relevant passage; 0 where none is among the first k.

    Its mean over queries is the MRR.

    >>> reciprocal_rank([0, 0, 1, 1])
    0.3333333333333333
    """
    found = np.flatnonzero(np.asarray(relevance, float)[:k] > 0)
    return 1.0 / (1 + int(found[0])) if len(found) else 0.0


def kendall_tau(a: Values, b: Values) -> float:
    """Returns Kendall's rank correlation (tau b, which allows for ties) of two lists of scores.

    Returns:
        -1 to 1; NaN where one of them ties everything.

    >>> kendall_tau([1, 2, 3], [10, 30, 20])
    0.3333333333333333
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    i, j = np.triu_indices(len(x), 1)
    dx, dy = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
    size = np.sqrt((dx != 0).sum() * (dy != 0).sum())
    return float((dx * dy).sum() / size) if size else float("nan")

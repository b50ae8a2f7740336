"""How recommendations compare with what they should be: distribution, fairness, diversity, hits.

Reference: "Process-Supervised LLM Recommenders via Flow-guided Tuning", arXiv 2503.07377.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def kl(p: Float[np.ndarray, "I"], q: Float[np.ndarray, "I"]) -> float:
    """Returns KL(p || q) in nats; infinite where q lacks something.

    >>> kl(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == math.log(2)
    True
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    some = p > 0
    with np.errstate(divide="ignore"):
        return float((p[some] * (np.log(p[some]) - np.log(q[some]))).sum())


def js(p: Float[np.ndarray, "I"], q: Float[np.ndarray, "I"]) -> float:
    """Returns the Jensen-Shannon divergence of two distributions in nats, at most ln 2."""
    middle = (np.asarray(p, np.float64) + np.asarray(q, np.float64)) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def frequencies(items: Sequence[int] | np.ndarray, size: int) -> Float[np.ndarray, "I"]:
    """Returns each item's share of those that are items (number >= 0); zeros where none is."""
    items = np.asarray(items)
    counts = np.bincount(items[items >= 0], minlength=size).astype(np.float64)
    return counts / max(counts.sum(), 1.0)


def popularity_groups(counts: Float[np.ndarray, "I"], groups: int = 8) -> Int[np.ndarray, "I"]:
    """Returns the group of each item, by popularity, 0 the most popular; groups are alike in size.

    Args:
        counts: of each item in the data.
        groups: how many; the paper has 8.
    """
    order = np.argsort(-np.asarray(counts), kind="stable")
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order)) * groups // len(order)
    return found


def unfairness(data: Float[np.ndarray, "K"], output: Float[np.ndarray, "K"]) -> tuple[float, float]:
    """Returns DGU = max d - min d and MGU = mean |d| of d = output - data, groups' shares.

    >>> [round(v, 5) for v in unfairness(np.array([0.5, 0.3, 0.2]), np.array([0.7, 0.2, 0.1]))]
    [0.3, 0.13333]
    """
    d = np.asarray(output, np.float64) - np.asarray(data, np.float64)
    return float(d.max() - d.min()), float(np.abs(d).mean())


def word_diversity(texts: Sequence[str]) -> tuple[float, float]:
    """Returns the entropy of words in bits, and distinct words over words (0 of no words).

    >>> word_diversity(["a b", "a c"])
    (1.5, 0.75)
    """
    counts = Counter(word for text in texts for word in text.split())
    total = sum(counts.values())
    if not total:
        return 0.0, 0.0
    return (
        -sum(n / total * math.log2(n / total) for n in counts.values()),
        len(counts) / total,
    )


def hits(
    ranked: Int[np.ndarray, "B K"], wanted: Int[np.ndarray, "B"], at: int
) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"]]:
    """Returns HR@at and NDCG@at of each list, with one wanted item a list.

    >>> [a.round(4).tolist() for a in hits(np.array([[3, 5], [1, 2]]), np.array([5, 7]), 2)]
    [[1.0, 0.0], [0.6309, 0.0]]
    """
    found = np.asarray(ranked)[:, :at] == np.asarray(wanted)[:, None]
    hit = found.any(1)
    gain = 1 / np.log2(found.argmax(1) + 2)
    return hit.astype(np.float64), np.where(hit, gain, 0.0)

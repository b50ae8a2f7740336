"""Classes of tokens by what stands beside them: parts of speech without a tagger.

Each token is described by how often the most frequent tokens stand to its left and to its right;
directions of that space are clustered. The idea is that of Schütze, "Distributional Part-of-Speech
Tagging" (EACL 1995); every choice here is a recommendation of tokjax.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, Float64, Int64

_ROUNDS = 50  # of k-means, at most
_STARTS = 5  # of k-means
_PART = 1 << 20  # tokens counted at a time


def context_counts(
    sequences: Iterable[np.ndarray], vocabulary: int, contexts: Int64[np.ndarray, "M"]
) -> Float32[np.ndarray, "V 2M"]:
    """Returns how often each context token stands to the left, then to the right, of each id.

    Args:
        sequences: ids; nothing is counted across their ends.
        vocabulary: number of ids V.
        contexts: ids that count as neighbours.
    """
    size = len(contexts)
    column = np.full(vocabulary, -1, np.int64)
    column[contexts] = np.arange(size)
    found = np.zeros((vocabulary, 2 * size), np.float32)
    for left, right in _neighbours(sequences):
        at = column[left]
        seen = at >= 0
        np.add.at(found, (right[seen], at[seen]), 1.0)
        at = column[right]
        seen = at >= 0
        np.add.at(found, (left[seen], size + at[seen]), 1.0)
    return found


def _neighbours(sequences: Iterable[np.ndarray]):
    """Yields the ids of neighbours, many at a time."""
    lefts, rights, held = [], [], 0
    for ids in sequences:
        lefts.append(np.asarray(ids[:-1], np.int64))
        rights.append(np.asarray(ids[1:], np.int64))
        held += max(len(ids) - 1, 0)
        if held >= _PART:
            yield np.concatenate(lefts), np.concatenate(rights)
            lefts, rights, held = [], [], 0
    if held:
        yield np.concatenate(lefts), np.concatenate(rights)


def distributional_classes(
    contexts: Float32[np.ndarray, "V C"],
    counts: Int64[np.ndarray, "V"],
    *,
    classes: int,
    dimensions: int = 50,
    min_count: int = 5,
    seed: int = 0,
) -> Int64[np.ndarray, "V"]:
    """Returns the class of each token; -1 for those that occur too rarely to be told.

    Square roots of context probabilities are reduced to their leading directions; directions of
    tokens are clustered by cosine, each token weighing the square root of its count.

    Args:
        contexts: of each token, as of `context_counts`.
        counts: occurrences of each token.
        classes: how many to make; fewer where there are fewer tokens.
        dimensions: leading directions that are kept.
        min_count: occurrences below which a token has no class.
        seed: of the beginning.
    """
    found = np.full(len(counts), -1, np.int64)
    known = np.flatnonzero((counts >= min_count) & (contexts.sum(-1) > 0))
    if not known.size:
        return found
    half = contexts.shape[1] // 2
    sides = [contexts[known][:, side] for side in (slice(None, half), slice(half, None))]
    shares = [side / np.maximum(side.sum(-1, keepdims=True), 1.0) for side in sides]
    roots = np.sqrt(np.concatenate(shares, -1))
    mass = np.sqrt(counts[known].astype(np.float64))
    roots = roots - np.average(roots, axis=0, weights=mass)
    weighted = roots * np.sqrt(mass)[:, None]
    values, vectors = np.linalg.eigh((weighted.T @ weighted).astype(np.float64))
    kept = vectors[:, np.argsort(values)[::-1][:dimensions]]
    found[known] = _spherical_k_means(_unit(roots @ kept), mass, classes, seed)
    return found


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _spherical_k_means(
    x: Float64[np.ndarray, "n d"], mass: Float64[np.ndarray, "n"], classes: int, seed: int
) -> Int64[np.ndarray, "n"]:
    """Returns the cluster of each direction, the best of some by k-means++."""
    rng = np.random.default_rng(seed)
    found = [_clustered(x, mass, classes, rng) for _ in range(_STARTS)]
    return max(found, key=lambda each: each[1])[0]


def _clustered(
    x: Float64[np.ndarray, "n d"],
    mass: Float64[np.ndarray, "n"],
    classes: int,
    rng: np.random.Generator,
) -> tuple[Int64[np.ndarray, "n"], float]:
    """Returns clusters from one beginning, and the cosine of directions with their centres."""
    centres = x[[rng.choice(len(x), p=mass / mass.sum())]]
    nearest = x @ centres[0]
    while len(centres) < classes:
        far = np.where(nearest < 1 - 1e-9, mass * (1 - nearest), 0.0)
        if not far.any():
            break  # there are no more directions than that
        centres = np.concatenate([centres, x[[rng.choice(len(x), p=far / far.sum())]]])
        nearest = np.maximum(nearest, x @ centres[-1])
    own = np.full(len(x), -1)
    for _ in range(_ROUNDS):
        new = (x @ centres.T).argmax(-1)
        if (new == own).all():
            break
        own = new
        members = np.zeros((len(x), len(centres)))
        members[np.arange(len(x)), own] = mass
        sums, used = members.T @ x, members.sum(0) > 0
        centres = np.where(used[:, None], _unit(sums), centres)
    return own, float((mass * (x * centres[own]).sum(-1)).sum())

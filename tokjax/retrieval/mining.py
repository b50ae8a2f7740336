"""How well translations find each other among sentence vectors: mining accuracy and xSIM.

Reference: Artetxe and Schwenk, "Margin-based Parallel Corpus Mining with Multilingual Sentence
Embeddings" (arXiv 1811.01136); xSIM is the error rate of that search.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

from tokjax.errors import ConfigError, DataError, nearest

Vectors = Shaped[np.ndarray, "N D"]
Margin = Literal["cosine", "ratio", "distance"]
MARGINS = ("cosine", "ratio", "distance")


@dataclass(frozen=True)
class MiningAccuracy:
    """Shares of sentences whose nearest neighbour in the other language is their translation."""

    forward: float
    backward: float

    @property
    def mean(self) -> float:
        """Mean of both directions."""
        return (self.forward + self.backward) / 2


def mining_accuracy(first: Vectors, second: Vectors, margin: Margin = "cosine") -> MiningAccuracy:
    """Returns how often the nearest neighbour is the translation, in both directions.

    Args:
        first: sentence vectors, of any length.
        second: of the translations, in the same order.
        margin: what a neighbour is near by; see `margin_scores`.

    Raises:
        DataError: the two have different shapes.

    >>> a = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> mining_accuracy(a, np.array([[2.0, 1.0], [1.0, 0.9]]))
    MiningAccuracy(forward=1.0, backward=0.5)
    """
    if np.shape(first) != np.shape(second):
        raise DataError(
            f"{np.shape(first)} and {np.shape(second)}: there must be a translation for each "
            f"sentence, with vectors of one width"
        )
    scores = margin_scores(first, second, margin)
    rows = np.arange(len(scores))
    return MiningAccuracy(
        float((scores.argmax(1) == rows).mean()), float((scores.argmax(0) == rows).mean())
    )


def xsim(
    sources: Vectors,
    targets: Vectors,
    gold: Sequence[int] | Int[np.ndarray, "N"] | None = None,
    margin: Margin = "ratio",
    neighbours: int = 4,
) -> float:
    """Returns the share of sources whose best target is not their translation, 0 to 1.

    Args:
        sources: sentence vectors.
        targets: candidates; behind the translations there may be others, such as sentences that
            differ from them by a word (xSIM++).
        gold: which target is the translation of each source; default the one of the same row.
        margin: see `margin_scores`.
        neighbours: of the margins "ratio" and "distance".

    Raises:
        DataError: there is no translation for every source.
    """
    gold = np.arange(len(sources)) if gold is None else np.asarray(gold)
    if len(gold) != len(sources) or not len(gold) or gold.min() < 0 or gold.max() >= len(targets):
        raise DataError(
            f"gold must name one of {len(targets)} targets for each of {len(sources)} sources"
        )
    found = margin_scores(sources, targets, margin, neighbours).argmax(1)
    return float((found != gold).mean())


def margin_scores(
    sources: Vectors, targets: Vectors, margin: Margin = "ratio", neighbours: int = 4
) -> Float[np.ndarray, "N M"]:
    """Returns how near each target is to each source.

    "cosine" is the cosine alone. The others compare it with how near the closest neighbours of
    both are, a mean over those of the source and of the target: "ratio" divides by that,
    "distance" subtracts it. They correct for vectors that are near to everything.

    Args:
        sources: vectors of any length; one of zeros has cosine 0 with all.
        targets: likewise.
        margin: which.
        neighbours: how many are closest; fewer where there are not so many.

    Raises:
        ConfigError: an unknown margin, or no neighbour.
        DataError: vectors of different widths.
    """
    if margin not in MARGINS:
        raise ConfigError(f"unknown margin={margin!r}.{nearest(margin, MARGINS)}")
    if neighbours < 1:
        raise ConfigError(f"neighbours={neighbours} must be at least 1")
    a, b = _unit(sources), _unit(targets)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise DataError(f"vectors {a.shape} and {b.shape} must be [N, D] and [M, D] with one D")
    cosines = a @ b.T
    if margin == "cosine":
        return cosines
    near = (
        _mean_of_largest(cosines, neighbours)[:, None] + _mean_of_largest(cosines.T, neighbours)
    ) / 2
    if margin == "distance":
        return cosines - near
    return cosines / np.where(near == 0, 1.0, near)


def _unit(vectors: Vectors) -> np.ndarray:
    wide = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / np.where(norms == 0, 1.0, norms)


def _mean_of_largest(values: np.ndarray, count: int) -> np.ndarray:
    count = min(count, values.shape[1])
    return np.partition(values, values.shape[1] - count, axis=1)[:, -count:].mean(1)

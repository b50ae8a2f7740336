"""How near predictions come: of replay curves, of counts, of texts."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tokjax.errors import DataError


@dataclass(frozen=True)
class ReplayScores:
    """Of simulated replay values.

    Attributes:
        rmse: root mean square error of each video, then their mean.
        accuracy: share of values within the band, of all videos together.
        unread: share of values that could not be read: wrong, and the fallback in `rmse`.
        by_video: the error of each.
    """

    rmse: float
    accuracy: float
    unread: float
    by_video: Float[np.ndarray, "N"]


def replay_scores(
    truth: Sequence[Sequence[float]],
    found: Sequence[Sequence[float]],
    *,
    fallback: float = 50.0,
    band: float = 5.0,
) -> ReplayScores:
    """Returns how near replay values come.

    Args:
        truth: masked values of each video, 0 to 100.
        found: predictions of the same; NaN for what could not be read.
        fallback: value that stands for what could not be read, the mean of the training data.
        band: largest error that counts as right.

    Raises:
        DataError: the two differ in shape, or there is nothing.
    """
    pairs = [
        (np.asarray(t, float), np.asarray(f, float)) for t, f in zip(truth, found, strict=False)
    ]
    if len(truth) != len(found) or any(t.shape != f.shape for t, f in pairs):
        raise DataError("true and predicted replay values are not of the same videos and scenes")
    if not pairs or not all(t.size for t, _ in pairs):
        raise DataError("there is no replay value to compare, of some video or of all")
    errors, right, unread = [], [], []
    for t, f in pairs:
        missing = np.isnan(f)
        filled = np.where(missing, fallback, f)
        errors.append(math.sqrt(np.mean((filled - t) ** 2)))
        right.append(~missing & (np.abs(filled - t) <= band))
        unread.append(missing)
    return ReplayScores(
        rmse=float(np.mean(errors)),
        accuracy=float(np.concatenate(right).mean()),
        unread=float(np.concatenate(unread).mean()),
        by_video=np.array(errors),
    )


@dataclass(frozen=True)
class RegressionScores:
    """Of numbers such as views or shares of likes.

    Attributes:
        rmse: root mean square error.
        r2: share of the variance that is explained; NaN where the truth does not vary.
        accuracy: share within a relative band.
        unread: share that could not be read: wrong, and the fallback in the others.
    """

    rmse: float
    r2: float
    accuracy: float
    unread: float


def value_scores(
    truth: Sequence[float], found: Sequence[float], *, fallback: float, band: float = 0.1
) -> RegressionScores:
    """Returns how near numbers come.

    Args:
        truth: one number of each item.
        found: predictions; NaN for what could not be read.
        fallback: number that stands for it, the mean of the training data.
        band: largest error that counts as right, over the truth.

    Raises:
        DataError: the two differ in length, or there is nothing.
    """
    t, f = np.asarray(truth, float), np.asarray(found, float)
    if t.shape != f.shape or not t.size:
        raise DataError(f"there are {t.size} true and {f.size} predicted numbers")
    missing = np.isnan(f)
    filled = np.where(missing, fallback, f)
    squares, spread = np.sum((filled - t) ** 2), np.sum((t - t.mean()) ** 2)
    return RegressionScores(
        rmse=math.sqrt(squares / t.size),
        r2=float(1 - squares / spread) if spread > 0 else math.nan,
        accuracy=float((~missing & (np.abs(filled - t) <= band * np.abs(t) + 1e-12)).mean()),
        unread=float(missing.mean()),
    )


def interpolated(
    replays: Mapping[int, float], masked: Sequence[int], *, fallback: float
) -> list[float]:
    """Returns values of masked scenes on straight lines between known ones: the baseline.

    Beyond the first or last known scene its value is taken; without any, the fallback.

    Args:
        replays: known values of scenes.
        masked: scenes to fill.
        fallback: the mean of the training data.

    >>> interpolated({0: 10, 3: 40}, [1, 2, 4], fallback=50)
    [20.0, 30.0, 40.0]
    """
    known = sorted(replays)
    if not known:
        return [float(fallback)] * len(masked)
    return np.interp(list(masked), known, [replays[i] for i in known]).tolist()


def bleu(found: Sequence[str], truth: Sequence[str], order: int = 4) -> float:
    """Returns BLEU of a corpus, 0 to 1: words, n-grams up to `order`, one reference, no smoothing.

    >>> bleu(["the cat sat down"], ["the cat sat down"]), bleu(["a b"], ["a c"], order=1)
    (1.0, 0.5)
    """
    hits, counts, lengths = np.zeros(order), np.zeros(order), np.zeros(2)
    for one, other in zip(found, truth, strict=True):
        a, b = one.split(), other.split()
        lengths += len(a), len(b)
        for n in range(1, order + 1):
            grams, wanted = _grams(a, n), _grams(b, n)
            counts[n - 1] += grams.total()
            hits[n - 1] += (grams & wanted).total()
    if not hits.all():
        return 0.0
    brevity = min(1.0, math.exp(1 - lengths[1] / lengths[0]))
    return float(brevity * math.exp(np.mean(np.log(hits / counts))))


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def rouge_l(found: str, truth: str) -> float:
    """Returns ROUGE-L: the F1 of the longest common subsequence of words.

    >>> round(rouge_l("the cat sat", "the old cat sat down"), 3)
    0.75
    """
    a, b = found.split(), truth.split()
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = before + 1 if word == other else max(row[j], row[j - 1])
            before = above
    return 2 * row[-1] / (len(a) + len(b)) if a and b else 0.0

"""Where to stop: thresholds on the entropy of a first attempt, from a few labelled examples.

On the host, in float64. Entropies of right and of wrong answers are taken for normal; standard
deviations are those of samples (n - 1), and a variance of 0 counts as 1e-6.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float

from tokjax.errors import ConfigError, DataError, nearest
from tokjax.signals.auroc import auroc

Method = Literal["entropy_mean", "overall_mean", "bayes", "mutual_information"]
NEVER = float("-inf")
_VARIANCE = 1e-6  # instead of none

Entropies = Float[np.ndarray, "n"] | Any
Correct = Bool[np.ndarray, "n"] | Any


def entropy_mean(entropies: Entropies, correct: Correct) -> float:
    """Returns the mean entropy of right answers; where there is none, that of all.

    Reference: "Think Just Enough", arXiv 2510.08146 (its headline variant; that the mean is that
    of right answers is our reading of it).
    """
    right, wrong = _classes(entropies, correct)
    return float((right if right.size else wrong).mean())


def overall_mean(entropies: Entropies, correct: Correct) -> float:
    """Returns the mean entropy of all answers: the other reading of "entropy mean"."""
    return float(np.concatenate(_classes(entropies, correct)).mean())


def bayes(entropies: Entropies, correct: Correct, *, prior: float | None = None) -> float:
    """Returns the entropy at which an answer is as likely right as wrong, between the two means.

    The root between them of N(x; m_c, s_c) P(c) = N(x; m_w, s_w) P(w). Without such a root, or
    with one class alone, `entropy_mean`; never stop (-inf) where right answers have no lower mean.

    Args:
        entropies: of the answers.
        correct: which are right.
        prior: probability P(c) of a right answer; None takes their share.

    Raises:
        ConfigError: the prior is not between 0 and 1.

    Reference: "Think Just Enough", arXiv 2510.08146.
    """
    if prior is not None and not 0 < prior < 1:
        raise ConfigError(f"prior={prior} must lie between 0 and 1")
    right, wrong = _classes(entropies, correct)
    if not right.size or not wrong.size:
        return entropy_mean(entropies, correct)
    low, high = right.mean(), wrong.mean()
    if low >= high:
        return NEVER
    prior = right.size / (right.size + wrong.size) if prior is None else prior
    v_c, v_w = _variance(right), _variance(wrong)
    # Of u = x - low: a u^2 + b u + c = 0 is the difference of the two log-densities.
    gap = high - low
    a = (1 / v_w - 1 / v_c) / 2
    b = -gap / v_w
    c = gap**2 / (2 * v_w) + np.log(prior / (1 - prior)) + np.log(v_w / v_c) / 2
    square = b**2 - 4 * a * c
    if square >= 0:
        # Of the two roots the one where right turns into wrong, written so that a may be 0.
        root = 2 * c / (np.sqrt(square) - b)
        if 0 <= root <= gap:
            return float(low + root)
    return entropy_mean(entropies, correct)


def mutual_information(entropies: Entropies, correct: Correct) -> float:
    """Returns the cut that tells most about being right: of midpoints between entropies.

    Only cuts below which the share of right answers is higher than above; of equally good ones the
    lowest; without one, never stop (-inf). With one class alone, `entropy_mean`. Stands for the
    paper's information-theoretic variant, whose formula is not public (recommendation of tokjax).
    """
    right, wrong = _classes(entropies, correct)
    if not right.size or not wrong.size:
        return entropy_mean(entropies, correct)
    values = np.unique(np.concatenate([right, wrong]))
    best, most = NEVER, 0.0
    for cut in (values[:-1] + values[1:]) / 2:
        table = np.array([[(c <= cut).sum(), (c > cut).sum()] for c in (right, wrong)], float)
        below, above = table[0] / table.sum(0)
        found = _information(table)
        if below > above and found > most + 1e-12:  # a tie is not decided by rounding
            best, most = float(cut), found
    return best


def _information(table: Float[np.ndarray, "2 2"]) -> float:
    joint = table / table.sum()
    apart = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    used = joint > 0
    return float((joint[used] * np.log(joint[used] / apart[used])).sum())


@dataclass(frozen=True)
class Separation:
    """How far entropies tell right answers from wrong ones. NaN where a class is too small.

    Attributes:
        n_correct: number of right answers.
        n_wrong: number of wrong ones.
        mean_correct: mean entropy of right answers.
        mean_wrong: mean entropy of wrong ones.
        sd_correct: sample standard deviation of right answers.
        sd_wrong: likewise of wrong ones.
        cohens_d: (mean_wrong - mean_correct) / pooled standard deviation.
        t: Welch's statistic of mean_wrong - mean_correct.
        p: its two-sided p-value.
        interval: confidence interval of mean_wrong - mean_correct.
        auroc: probability that a right answer has the lower entropy, ties one half.
    """

    n_correct: int
    n_wrong: int
    mean_correct: float
    mean_wrong: float
    sd_correct: float
    sd_wrong: float
    cohens_d: float
    t: float
    p: float
    interval: tuple[float, float]
    auroc: float

    @property
    def clear(self) -> bool:
        """Whether the whole confidence interval of the difference lies above 0."""
        return self.interval[0] > 0


def separation(entropies: Entropies, correct: Correct, *, level: float = 0.95) -> Separation:
    """Returns how far entropies tell right answers from wrong ones.

    Args:
        entropies: of first attempts.
        correct: which are right.
        level: of the confidence interval.

    Raises:
        ConfigError: the level is not between 0 and 1.
        DataError: there is no example, shapes differ, or an entropy is not finite.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level={level} must lie between 0 and 1")
    right, wrong = _classes(entropies, correct)
    (n_c, n_w), nan = (right.size, wrong.size), float("nan")
    m_c, m_w = (float(c.mean()) if c.size else nan for c in (right, wrong))
    s_c, s_w = (float(np.sqrt(_variance(c))) if c.size > 1 else nan for c in (right, wrong))
    d, t, p, interval = nan, nan, nan, (nan, nan)
    if min(n_c, n_w) > 1:
        pooled = ((n_c - 1) * s_c**2 + (n_w - 1) * s_w**2) / (n_c + n_w - 2)
        d = (m_w - m_c) / pooled**0.5
        t, p = (
            float(found)
            for found in scipy.stats.ttest_ind_from_stats(
                m_w, s_w, n_w, m_c, s_c, n_c, equal_var=False
            )
        )
        e_c, e_w = s_c**2 / n_c, s_w**2 / n_w
        freedom = (e_c + e_w) ** 2 / (e_c**2 / (n_c - 1) + e_w**2 / (n_w - 1))
        reach = float(scipy.stats.t.ppf((1 + level) / 2, freedom)) * (e_c + e_w) ** 0.5
        interval = (m_w - m_c - reach, m_w - m_c + reach)
    ranked = auroc(-np.concatenate([right, wrong]), [1] * n_c + [0] * n_w) if n_c and n_w else nan
    return Separation(n_c, n_w, m_c, m_w, s_c, s_w, d, t, p, interval, ranked)


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it rests on.

    Attributes:
        threshold: stop at or below it; -inf never stops.
        refused: whether it is -inf because entropies do not separate right from wrong clearly.
        method: how it was chosen.
        separation: of the examples.
    """

    threshold: float
    refused: bool
    method: str
    separation: Separation


def calibrate(
    entropies: Entropies,
    correct: Correct,
    *,
    method: Method = "entropy_mean",
    prior: float | None = None,
    level: float = 0.95,
    force: bool = False,
) -> Calibration:
    """Returns the threshold on first attempts' entropies at or below which to stop.

    Refuses to stop early (-inf) unless wrong answers have clearly the higher entropy: the Welch
    confidence interval of the difference of means must lie above 0. With fewer than two examples
    of a class nothing is clear. (That it must be refused is the paper's finding on ordinary
    instruct models; this way of deciding is the recommendation of tokjax.)

    Args:
        entropies: of first attempts, 5 to 20 of them in the paper; nats, or the unit used later.
        correct: which are right.
        method: see the functions of these names.
        prior: probability of a right answer, for `bayes`; None takes their share.
        level: of the confidence interval.
        force: give the threshold in any case.

    Raises:
        ConfigError: an unknown method, or a prior or level out of range.
        DataError: there is no example, shapes differ, or an entropy is not finite.

    Reference: "Think Just Enough", arXiv 2510.08146.
    """
    rules = {
        "entropy_mean": entropy_mean,
        "overall_mean": overall_mean,
        "bayes": lambda e, c: bayes(e, c, prior=prior),
        "mutual_information": mutual_information,
    }
    if method not in rules:
        raise ConfigError(f"unknown method={method!r}.{nearest(method, rules)}")
    found = separation(entropies, correct, level=level)
    refused = not (found.clear or force)
    threshold = NEVER if refused else rules[method](entropies, correct)
    return Calibration(threshold, refused, method, found)


def _classes(entropies: Entropies, correct: Correct) -> tuple[np.ndarray, np.ndarray]:
    """Returns the entropies of right and of wrong answers."""
    values, labels = np.asarray(entropies, np.float64), np.asarray(correct)
    if values.ndim != 1 or values.shape != labels.shape or not values.size:
        raise DataError(
            f"entropies {values.shape} and correct {labels.shape} must be of one length, 1 or more"
        )
    if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        raise DataError(f"entropy {at} is {values[at]}: leave out attempts without tokens")
    right = labels.astype(bool)
    return values[right], values[~right]


def _variance(values: np.ndarray) -> float:
    # By the extremes: the mean of equal numbers may differ from them by rounding.
    if values.max() == values.min():
        return _VARIANCE
    return float(values.var(ddof=1))

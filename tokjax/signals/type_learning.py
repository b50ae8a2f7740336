"""How early each token type is learned, and what weight decay must cost the rare ones.

Reference: Pinto, Galanti and Balestriero, "The Fair Language Model Paradox", arXiv 2410.11985. The
definitions of learning speed and the closed form are recommendations of tokjax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64, Int

from tokjax.signals.type_statistics import BinStats, TypeStats, by_bin


@dataclass(frozen=True)
class Fairness:
    """A loss averaged in two ways, and by how frequent types are.

    Attributes:
        micro: mean over values, the usual average.
        macro: mean over types that have values, each counting once.
        gap: macro mean of the rarest bin that has values, less that of the most frequent.
        bins: statistics of each bin, from the rarest.
    """

    micro: float
    macro: float
    gap: float
    bins: BinStats


def fairness(stats: TypeStats, bins: Int[np.ndarray, " V"], num: int) -> Fairness:
    """Returns the averages of what was gathered by type.

    Args:
        stats: losses of each type.
        bins: the bin of each type, as of `frequency_bins`.
        num: number of bins.

    Raises:
        ValueError: no type of any bin has a value.
    """
    found = by_bin(stats, jnp.asarray(bins), num)
    filled = np.flatnonzero(np.asarray(found.types))
    if not filled.size:
        raise ValueError("no type of these bins has a value")
    whole = by_bin(stats, jnp.zeros(stats.count.shape, jnp.int32), 1)
    of_bins = np.asarray(found.macro, float)
    return Fairness(
        micro=float(whole.micro[0]),
        macro=float(whole.macro[0]),
        gap=float(of_bins[filled[0]] - of_bins[filled[-1]]),
        bins=found,
    )


def learning_step(
    steps: Sequence[float] | np.ndarray, losses: Float[np.ndarray, "S V"]
) -> Float64[np.ndarray, " V"]:
    """Returns the first step at which each type has lost half of what it loses in all.

    NaN for types without values and for those whose loss does not fall.

    Args:
        steps: rising, of each row of losses.
        losses: of each type at each step; NaN for types without values.

    Raises:
        ValueError: shapes that do not fit, fewer than two steps, or steps that do not rise.

    >>> learning_step([0, 10, 20], np.array([[4.0, 4.0], [1.0, 3.5], [0.0, 2.0]])).tolist()
    [10.0, 20.0]
    """
    at, values = _checked(steps, losses)
    half = (values[0] + values[-1]) / 2
    first = at[(values <= half).argmax(0)]
    return np.where(values[-1] < values[0], first, np.nan)


def learning_area(
    steps: Sequence[float] | np.ndarray, losses: Float[np.ndarray, "S V"]
) -> Float64[np.ndarray, " V"]:
    """Returns the area under each type's loss, scaled to fall from 1 to 0 as steps go from 0 to 1.

    Smaller is faster. NaN as in `learning_step`.

    Args:
        steps: rising, of each row of losses.
        losses: of each type at each step; NaN for types without values.

    Raises:
        ValueError: as `learning_step`.

    >>> learning_area([0, 10, 20], np.array([[4.0], [2.0], [0.0]])).tolist()
    [0.5]
    """
    at, values = _checked(steps, losses)
    falls = values[-1] < values[0]
    size = np.where(falls, values[0] - values[-1], 1.0)
    scaled = (values - values[-1]) / size
    area = np.trapezoid(scaled, at, axis=0) / (at[-1] - at[0])
    return np.where(falls, area, np.nan)


def _checked(steps, losses) -> tuple[np.ndarray, np.ndarray]:
    at, values = np.asarray(steps, float), np.asarray(losses, float)
    if values.ndim != 2 or at.shape != values.shape[:1] or len(at) < 2:
        raise ValueError(
            f"steps {at.shape} and losses {values.shape} must be [S] and [S, V], S > 1"
        )
    if (np.diff(at) <= 0).any():
        raise ValueError(f"steps {at.tolist()} must rise")
    return at, values


def penalised_loss(ratio: float, classes: int) -> float:
    """Returns the loss of a context that an L2 penalty leaves, in nats.

    Contexts c of probability p_c have logits w_c of their own and one right class each. At the
    minimum of sum_c p_c * CE(w_c) + decay / 2 * |w_c|^2 the loss of a context depends on
    decay / p_c alone: the rarer it is, the more the penalty costs it.

    Args:
        ratio: decay / p_c, above 0.
        classes: number of classes, 2 or more.

    Raises:
        ValueError: a ratio or number outside these.

    >>> round(penalised_loss(0.001 / 0.5, 10), 4), round(penalised_loss(0.1 / 0.01, 10), 4)
    (0.012, 2.214)
    """
    return float(-_log_right(penalised_logit(ratio, classes), classes))


def penalised_logit(ratio: float, classes: int) -> float:
    """Returns the logit of the right class at that minimum; the others have -a / (classes - 1).

    Args:
        ratio: decay / p_c, above 0.
        classes: number of classes, 2 or more.

    Raises:
        ValueError: a ratio or number outside these.
    """
    if not ratio > 0 or classes < 2:
        raise ValueError(f"ratio={ratio} must be above 0 and classes={classes} 2 or more")
    # a = (1 - q(a)) / ratio, whose right side falls in a.
    low, high = 0.0, 1.0 / ratio
    for _ in range(200):
        middle = (low + high) / 2
        wrong = -np.expm1(_log_right(middle, classes))
        low, high = (middle, high) if middle < wrong / ratio else (low, middle)
    return (low + high) / 2


def _log_right(a: float, classes: int) -> float:
    """Returns the log-probability of the right class."""
    return -np.log1p((classes - 1) * np.exp(-a - a / (classes - 1)))

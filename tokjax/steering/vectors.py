"""Steering vectors from differences of hidden states, on the host in float64."""

from typing import Literal

import numpy as np
from jaxtyping import Float

from tokjax.errors import ConfigError

Method = Literal["pca", "mean"]
Mode = Literal["both", "pos", "neg"]


def direction(
    differences: Float[np.ndarray, "*L N D"], method: Method = "pca"
) -> Float[np.ndarray, "*L D"]:
    """Returns what differences of states have in common, for each layer.

    "mean" is their mean. "pca" is the unit vector along which they vary most about their mean: it
    leaves out the shift that is common to all, and need not point along it. Its sign, which is
    arbitrary, is such that the mean has no negative part along it; where nothing varies, it is the
    mean.

    >>> shifts = np.array([[1, 0.1], [1.2, -0.1], [0.8, 0], [1, 0.2]])
    >>> direction(shifts, "mean").round(4).tolist(), direction(shifts).round(4).tolist()
    ([1.0, 0.05], [0.8944, -0.4472])

    Args:
        differences: of each layer, one a row.
        method: "pca" or "mean".

    Raises:
        ConfigError: no difference, or an unknown method.

    Reference: GrAInS, arXiv 2507.18043; the sign is a recommendation of tokjax.
    """
    differences = np.asarray(differences, np.float64)
    if differences.ndim < 2 or not differences.shape[-2]:
        raise ConfigError(f"differences {differences.shape} must be [..., N, D] with N at least 1")
    mean = differences.mean(-2)
    if method == "mean":
        return mean
    if method != "pca":
        raise ConfigError(f"method={method!r} must be 'pca' or 'mean'")
    centred = differences - mean[..., None, :]
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    first = axes[..., 0, :]
    first = np.where((first * mean).sum(-1, keepdims=True) < 0, -first, first)
    scale = np.abs(differences).max((-2, -1), initial=0.0)[..., None]
    return np.where(sizes[..., :1] > 1e-7 * scale, first, mean)


def steering_direction(
    without_positive: Float[np.ndarray, "*L N D"],
    without_negative: Float[np.ndarray, "*L N D"],
    method: Method = "pca",
    mode: Mode = "both",
) -> Float[np.ndarray, "*L D"]:
    """Returns v+ - v-, or one of its two parts.

    Args:
        without_positive: states of texts minus those without their most positive tokens (v+).
        without_negative: the same without their most negative tokens (v-).
        method: how each is summed up; see `direction`.
        mode: "both"; "pos" for v+ alone; "neg" for -v- alone, which also points to the preferred
            side.

    Raises:
        ConfigError: an unknown method or mode.

    Reference: GrAInS, arXiv 2507.18043.
    """
    if mode not in ("both", "pos", "neg"):
        raise ConfigError(f"mode={mode!r} must be 'both', 'pos' or 'neg'")
    if mode == "pos":
        return direction(without_positive, method)
    if mode == "neg":
        return -direction(without_negative, method)
    return direction(without_positive, method) - direction(without_negative, method)

"""Dependence between two hidden states: normalised HSIC over their coordinates.

Computed on the host in float64: the inverses are ill-conditioned, and in float32 small values
lose half of their size.
"""

import numpy as np
from jaxtyping import Float

from tokjax.errors import ConfigError

SIGMA = 50.0
EPS = 1e-5
_RESIDUAL = 1e-13  # of a kernel's unit diagonal; times 1/eps, what the factors leave out
_CHUNK_BYTES = 2**27


def normalised_hsic(
    x: Float[np.ndarray, "*T m"],
    y: Float[np.ndarray, " m"],
    *,
    sigma: float = SIGMA,
    eps: float = EPS,
) -> Float[np.ndarray, "*T"]:
    """Returns the dependence between x and y, whose m coordinates count as samples of a scalar.

    With K_ij = exp(-(x_i - x_j)^2 / (2 sigma^2)) centred, and R = K (K + eps m I)^-1, it is
    tr(R_x R_y): from 0, for constant vectors, to m - 1. It does not change when a constant is
    added to x or y, nor when x changes sign, nor when the coordinates of both are permuted. For
    fewer coordinates, index both.

    Both kernels are factored to their numerical rank (about 10 to 50), y's once: m^2 numbers are
    never held, and m = 4096 costs milliseconds. Only a sigma far below the spread of x is slow.

    >>> x = np.arange(4.0)
    >>> [round(float(normalised_hsic(x, y, sigma=1)), 5) for y in (x, x % 2, 0 * x)]
    [2.9992, 0.99967, 0.0]

    Args:
        x: states, one or many.
        y: the state they are compared with, usually that of the gold solution.
        sigma: width of the kernel. With the paper's 50 the kernel of states of unit scale is
            nearly constant: values are small, but still ordered.
        eps: regularisation.

    Raises:
        ConfigError: shapes that do not fit, values that are not finite, or a sigma or eps that is
            not positive.

    Reference: "Demystifying Reasoning Dynamics with Mutual Information: Thinking Tokens are
    Information Peaks in LLM Reasoning", arXiv 2506.02867. Its one-sided centring gives the same
    trace as the symmetric one used here.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if y.ndim != 1 or not x.ndim or x.shape[-1] != len(y) or not len(y):
        raise ConfigError(f"states {x.shape} and {y.shape} must be [..., m] and [m]")
    if not (sigma > 0 and eps > 0):
        raise ConfigError(f"sigma={sigma} and eps={eps} must be positive")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ConfigError("the states hold values that are not finite")
    m = len(y)
    factor_y = _factor(y[None] / sigma)
    weights_y = _weights(factor_y, eps * m)[0]
    states = x.reshape(-1, m) / sigma
    # Rank is not known beforehand; 64 is beyond most.
    step = max(1, _CHUNK_BYTES // (8 * 64 * m))
    found = [
        _traces(_factor(states[i : i + step]), factor_y[0], weights_y, eps * m)
        for i in range(0, len(states), step)
    ]
    return np.concatenate([*found, np.zeros(0)]).reshape(x.shape[:-1])


def _traces(factors, factor_y, weights_y, ridge: float) -> np.ndarray:
    """Returns tr(R_x R_y) where R = G W G' with the factors G and weights W."""
    across = np.swapaxes(factors, 1, 2) @ factor_y
    weighted = _weights(factors, ridge) @ across @ weights_y
    return np.maximum((weighted * across).sum((-2, -1)), 0.0)


def _weights(factors: np.ndarray, ridge: float) -> np.ndarray:
    """Returns (G'G + ridge I)^-1, so that GG' (GG' + ridge I)^-1 is G times it times G'."""
    inner = np.swapaxes(factors, 1, 2) @ factors
    return np.linalg.inv(inner + ridge * np.eye(inner.shape[-1]))


def _factor(scaled: Float[np.ndarray, "T m"]) -> Float[np.ndarray, "T m r"]:
    """Returns G with GG' the centred kernels, by Cholesky decomposition with pivots.

    Each round takes the coordinate that the factors so far explain least, in every row, until all
    rows are explained; a row explained earlier gets columns of zeros.
    """
    rows, m = scaled.shape
    at, left = np.arange(rows), np.ones((rows, m))
    columns: list[np.ndarray] = []
    for _ in range(m):
        pivot = left.argmax(1)
        size = left[at, pivot]
        if not (size > _RESIDUAL).any():
            break
        kernel = np.exp(-0.5 * np.square(scaled - scaled[at, pivot][:, None]))
        if columns:
            so_far = np.stack(columns, -1)
            kernel -= (so_far @ so_far[at, pivot][:, :, None])[..., 0]
        live = (size > _RESIDUAL)[:, None]
        column = np.where(live, kernel / np.sqrt(np.where(live[:, 0], size, 1.0))[:, None], 0.0)
        left = np.maximum(left - np.square(column), 0.0)
        left[at, pivot] = np.where(live[:, 0], 0.0, left[at, pivot])
        columns.append(column)
    factors = np.stack(columns, -1)
    return factors - factors.mean(1, keepdims=True)

"""One attention layer over given queries, keys and values, in float64: the rates of the collapse.

Reference: "Transformers need glasses! Information over-squashing in language tasks",
arXiv 2406.04267.
"""

from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from jaxtyping import Float

from tokjax.errors import ConfigError, nearest

Positions = Literal["none", "rotary", "sinusoids", "alibi"]
Attention = Literal["softmax", "sum"]
_BASE = 10_000.0


def attend(
    q: Float[np.ndarray, "T d"],
    k: Float[np.ndarray, "T d"],
    v: Float[np.ndarray, "T d"],
    *,
    positions: Positions = "none",
    attention: Attention = "softmax",
    slope: float = 0.5,
) -> Float[np.ndarray, " d"]:
    """Returns what the last token's query gets from all tokens.

    Args:
        q: queries, of which the last is used.
        k: keys.
        v: values.
        positions: none, turned queries and keys, sinusoids added to both, or a penalty on distance.
        attention: a mean by softmax, or the sum with the same weights before normalisation: a
            control that can count.
        slope: of the penalty, for each token of distance.

    Raises:
        ConfigError: an unknown option, or an odd width that positions cannot turn.
    """
    if positions not in get_args(Positions):
        raise ConfigError(
            f"unknown positions={positions!r}.{nearest(str(positions), get_args(Positions))}"
        )
    if attention not in get_args(Attention):
        raise ConfigError(
            f"unknown attention={attention!r}.{nearest(str(attention), get_args(Attention))}"
        )
    k, v = np.asarray(k, np.float64), np.asarray(v, np.float64)
    query = np.asarray(q, np.float64)[-1]
    T, d = k.shape
    if positions in ("rotary", "sinusoids"):
        if d % 2:
            raise ConfigError(f"positions={positions!r} needs an even width, not {d}")
        angles = np.arange(T)[:, None] * _BASE ** (-2 * np.arange(d // 2) / d)
        if positions == "rotary":
            query, k = _turned(query[None], angles[-1:])[0], _turned(k, angles)
        else:
            codes = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
            query, k = query + codes[-1], k + codes
    scores = k @ query / np.sqrt(d)
    if positions == "alibi":
        scores = scores - slope * (T - 1 - np.arange(T))
    weights = np.exp(scores - (scores.max() if attention == "softmax" else 0.0))
    return (weights / weights.sum() if attention == "softmax" else weights) @ v


def _turned(x: Float[np.ndarray, "T d"], angles: Float[np.ndarray, "T h"]) -> np.ndarray:
    half = x.shape[-1] // 2
    a, b, cos, sin = x[:, :half], x[:, half:], np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=1)


def rounded(x: Any, dtype: Literal["bfloat16", "float16", "float32", "float64"]) -> np.ndarray:
    """Returns numbers rounded once to a dtype, to the nearest, ties to even.

    >>> rounded(1 / 3, "bfloat16").item()
    0.333984375
    """
    kinds = {"bfloat16": ml_dtypes.bfloat16, **{n: n for n in ("float16", "float32", "float64")}}
    if dtype not in kinds:
        raise ConfigError(f"unknown dtype={dtype!r}.{nearest(str(dtype), kinds)}")
    return np.asarray(x, np.float64).astype(np.dtype(kinds[dtype]))

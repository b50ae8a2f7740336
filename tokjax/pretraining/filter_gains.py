"""Gains of a filter bank's components at each token, by a small causal transformer.

Reference: Verma and Pilanci, "Towards Signal Processing In Large Language Models", arXiv
2406.10254. One block with one head, whose attention sees a fixed number of tokens, so that it
runs beside a cache as the filters do; a reconstruction of tokjax.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.models.mixing import earlier
from tokjax.models.parameters import Parameter


def gain_parameters(d_model: int, width: int, window: int, filters: int) -> dict[str, Parameter]:
    """Returns the parameters; the last matrix and its bias are zero, which makes all gains 1."""

    def matrix(rows: int, columns: int) -> Parameter:
        return Parameter((rows, columns), (None, None), rows**-0.5)

    return {
        "gain_in": matrix(d_model, width),
        "gain_query": matrix(width, width),
        "gain_key": matrix(width, width),
        "gain_value": matrix(width, width),
        "gain_lag": Parameter((window,), (None,), 0),
        "gain_up": matrix(width, 4 * width),
        "gain_down": matrix(4 * width, width),
        "gain_head": Parameter((width, filters), (None, None), 0),
        "gain_bias": Parameter((filters,), (None,), 0),
    }


def token_gains(
    x: Float[Array, "B S D"],
    segments: Int[Array, "B S"],
    w: Mapping[str, jax.Array],
    places: int,
    window: int,
    form: str,
) -> Float[Array, "B P M"]:
    """Returns the gain of each component at the last places.

    Args:
        x: the stream, which is read normalised.
        segments: of each place; a token sees those of its own.
        w: see `gain_parameters`.
        places: number of places P.
        window: tokens that each sees, itself included.
        form: "sigmoid" (times 2) or "softmax" (times the number of components).
    """
    S = x.shape[1]
    near, of = (a[:, max(0, S - places - window + 1) :] for a in (x, segments))
    wide = near.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6)
    h = (wide * scale).astype(x.dtype) @ w["gain_in"]
    first = h.shape[1] - places
    query, key, value = (h @ w[f"gain_{name}"] for name in ("query", "key", "value"))
    one = jnp.ones((*of.shape, 1), jnp.float32)
    scores, seen = [], []
    for lag in range(window):
        score = (query * earlier(key, of, lag)).sum(-1).astype(jnp.float32)
        exists = earlier(one, of, lag)[..., 0] > 0
        score = score * h.shape[-1] ** -0.5 + w["gain_lag"][lag].astype(jnp.float32)
        scores.append(jnp.where(exists, score, -jnp.inf)[:, first:])
        seen.append(earlier(value, of, lag)[:, first:])
    shares = jax.nn.softmax(jnp.stack(scores), axis=0).astype(h.dtype)
    h = h[:, first:] + jnp.einsum("lbp,lbpw->bpw", shares, jnp.stack(seen))
    h = h + jax.nn.gelu(h @ w["gain_up"]) @ w["gain_down"]
    logits = (h @ w["gain_head"] + w["gain_bias"]).astype(jnp.float32)
    if form == "sigmoid":
        return 2.0 * jax.nn.sigmoid(logits)
    return logits.shape[-1] * jax.nn.softmax(logits, axis=-1)

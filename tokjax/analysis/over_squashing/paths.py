"""How many ways lead from a token to the last one, and how much comes through: over-squashing.

With attention and residual additions alone, what the last state changes with input token i is
bounded by the sum over all paths i -> j_1 -> ... -> n of the products of their weights
alpha / beta + delta: entry (n, i) of (A_L / beta + I) ... (A_1 / beta + I).

Reference: "Transformers need glasses! Information over-squashing in language tasks",
arXiv 2406.04267.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.analysis.over_squashing.collapse import check_sequences, variant
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals.attention import head_mean

Heads = Literal["mean", "max"]


def path_counts(n: int, layers: int, window: int | None = None) -> list[int]:
    """Returns how many paths lead from each of n tokens to the last one.

    A layer goes from a token to itself or to a later one. Without a window these are the binomial
    numbers C(n - i + layers - 1, layers - 1) of token i = 1 ... n: early tokens have far more.

    >>> path_counts(5, 2), path_counts(5, 3)
    ([5, 4, 3, 2, 1], [15, 10, 6, 3, 1])

    Args:
        n: number of tokens.
        layers: number of layers.
        window: keys that a query sees, itself included.

    Raises:
        ConfigError: a number is below 1.
    """
    if n < 1 or layers < 1 or (window is not None and window < 1):
        raise ConfigError(f"n={n}, layers={layers} and window={window} must be at least 1")
    reach = n if window is None else window
    counts = [0] * (n - 1) + [1]
    for _ in range(layers):
        # Whole numbers of any size: they outgrow 64 bits soon.
        behind = [0]
        for count in reversed(counts):
            behind.append(behind[-1] + count)
        behind.reverse()
        counts = [behind[i] - behind[min(i + reach, n)] for i in range(n)]
    return counts


def path_sums(
    attention: Float[Array, "L *B T T"],
    *,
    beta: float = 1.0,
    residual: float = 1.0,
) -> Float[Array, "*B T"]:
    """Returns the last row of (A_L / beta + residual I) ... (A_1 / beta + residual I).

    Args:
        attention: probabilities of each layer, rows are queries.
        beta: the paper's constant of the norms.
        residual: weight of the residual addition; 0 leaves attention alone, whose product comes
            to depend on the first token only as layers are added.

    Raises:
        ConfigError: beta is not positive.
    """
    if beta <= 0:
        raise ConfigError(f"beta={beta} must be positive")
    attention = jnp.asarray(attention)
    weights = jnp.zeros(attention.shape[1:-1], jnp.float32).at[..., -1].set(1.0)
    for layer in attention[::-1]:
        through = jnp.einsum("...t,...ts->...s", weights, layer.astype(jnp.float32))
        weights = through / beta + residual * weights
    return weights


def attention_of(
    model: Transformer,
    params: Params,
    tokens: Int[np.ndarray, "B T"],
    *,
    heads: Heads = "mean",
    dtype: str | None = None,
) -> Float[Array, "L B T T"]:
    """Returns each layer's attention probabilities, one matrix of all heads.

    Args:
        model: a causal one.
        params: its parameters.
        tokens: rows of one length.
        heads: the mean over heads, or their largest (a bound; its rows add up to more than 1).
            The paper has one head: this choice is tokjax's.
        dtype: of the activations; None takes the model's.

    Raises:
        ConfigError: the model is not causal, a row too long, or an option unknown.
        DataError: there is no row, or an id that is not in the vocabulary.
    """
    if heads not in ("mean", "max"):
        raise ConfigError(f"unknown heads={heads!r}.{nearest(str(heads), ('mean', 'max'))}")
    model, tokens = variant(model, dtype=dtype), np.asarray(tokens, np.int32)
    check_sequences(model, tokens)  # type: ignore[arg-type]
    return _attention(model, heads, params, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention(
    model: Transformer, heads: Heads, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "L B T T"]:
    largest = lambda probs: probs.astype(jnp.float32).max(-3)  # noqa: E731
    reduce = head_mean if heads == "mean" else largest
    out = model.backbone(params, model.embed(params, tokens), capture={"attn_probs": reduce})
    return out.captured["attn_probs"]


def path_bound(
    model: Transformer,
    params: Params,
    tokens: Int[np.ndarray, "B T"],
    *,
    beta: float = 1.0,
    heads: Heads = "mean",
    dtype: str | None = None,
) -> Float[Array, "B T"]:
    """Returns, up to a constant, the paper's bound on how much the last state feels each token.

    Args:
        model: a causal one.
        params: its parameters.
        tokens: rows of one length.
        beta: the paper's constant of the norms; it decides how attention weighs beside the
            residual stream, and is not derived from the model.
        heads: see `attention_of`.
        dtype: of the activations; None takes the model's.

    Raises:
        ConfigError: as `attention_of` and `path_sums`.
        DataError: as `attention_of`.
    """
    return path_sums(attention_of(model, params, tokens, heads=heads, dtype=dtype), beta=beta)

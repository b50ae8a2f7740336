"""Arithmetic on next-token log-probabilities: contrasts, weighted sums, plausibility.

Everything here takes log-probabilities along the last axis (log-softmax of logits), in generation
[B, V] and in teacher-forced scoring [T, V] or [B, T, V] alike; -inf is a probability of 0. Weights
and thresholds are numbers or arrays that broadcast against the axes before the vocabulary's.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IMPOSSIBLE = -jnp.inf  # what implausible tokens get in generation
SCORED = -1000.0  # and in scoring, where a masked answer must still be comparable with another
_FLOOR = -1e9  # of a log-probability that is subtracted: 0 * inf and inf - inf would be NaN


def log_probabilities(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Returns the log-softmax, in float32."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def contrast(
    expert: Float[Array, "*B V"], amateur: Float[Array, "*B V"], alpha: Any
) -> Float[Array, "*B V"]:
    """Returns expert + alpha (expert - amateur); with alpha = 0 exactly the expert.

    A token that the expert excludes stays excluded.

    >>> expert, amateur = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> [round(float(p), 3) for p in jax.nn.softmax(contrast(expert, amateur, 1.0))]
    [0.75, 0.25]
    """
    alpha = jnp.asarray(alpha, jnp.float32)
    return weighted_sum([expert, amateur], [1.0 + alpha, -alpha])


def weighted_sum(
    branches: Sequence[Float[Array, "*B V"]], weights: Sequence[Any]
) -> Float[Array, "*B V"]:
    """Returns the sum of the branches' log-probabilities, each times its weight.

    A branch of weight 0 changes nothing. A token that the first branch excludes stays excluded.
    """
    first = branches[0]
    total = as_column(weights[0]) * jnp.maximum(first, _FLOOR)
    for branch, weight in zip(branches[1:], weights[1:], strict=True):
        total = total + as_column(weight) * jnp.maximum(branch, _FLOOR)
    return jnp.where(jnp.isneginf(first), -jnp.inf, total)


def plausible(logp: Float[Array, "*B V"], share: Any, min_keep: int = 1) -> Bool[Array, "*B V"]:
    """Returns the tokens x with p(x) >= share max p, and at least the `min_keep` likeliest.

    Never none: the likeliest token is kept whatever the share. 0 keeps all.

    Args:
        logp: log-probabilities (after the log-softmax: masking before it would move mass).
        share: of the largest probability.
        min_keep: number of tokens always kept, and those as likely as the last of them.

    Reference: Li et al., "Contrastive Decoding", arXiv 2210.15097.
    """
    best = logp.max(-1, keepdims=True)
    least = best if min_keep == 1 else jax.lax.top_k(logp, min_keep)[0][..., -1:]
    floor = jnp.minimum(best + jnp.log(as_column(jnp.asarray(share, jnp.float32))), least)
    return logp >= floor


def restrict(
    scores: Float[Array, "*B V"], kept: Bool[Array, "*B V"], sentinel: float = IMPOSSIBLE
) -> Float[Array, "*B V"]:
    """Returns the scores where tokens are kept, `sentinel` elsewhere.

    The sentinel is `IMPOSSIBLE` (-inf) in generation and `SCORED` (-1000) in scoring.
    """
    return jnp.where(kept, scores, sentinel)


def sequence_score(
    scores: Float[Array, "*B T V"], tokens: Int[Array, "*B T"]
) -> Float[Array, "*B"]:
    """Returns the sum of the tokens' scores; `scores[t]` says how likely `tokens[t]` is."""
    return jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0].sum(-1)


def as_column(value: Any) -> Any:
    """Returns a weight with an axis for the vocabulary, unless it is one number."""
    return value[..., None] if jnp.ndim(value) else value

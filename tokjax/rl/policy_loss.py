"""The clipped policy loss, of which GRPO, DAPO, Dr. GRPO, GSPO, RLOO and PPO are settings."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

RATIOS = ("token", "sequence_geo", "sequence_arith", "mixed")
NORMS = ("token", "kept", "response", "constant")
Ratio = Literal["token", "sequence_geo", "sequence_arith", "mixed"]
Norm = Literal["token", "kept", "response", "constant"]


def importance_ratios(
    logprobs: Float[Array, "R T"],
    old: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    kind: Ratio = "token",
    sequence: Bool[Array, "R T"] | None = None,
) -> Float[Array, "R T"]:
    """Returns pi / pi_old at each action, 1 elsewhere.

    Args:
        logprobs: of the actions under the policy in training.
        old: under the policy that took them.
        mask: actions.
        kind: "token"; "sequence_geo", exp of the mean log-ratio of a row's actions, the same at
            all of them (GSPO, arXiv 2507.18071, equation 7); "sequence_arith", the mean of their
            ratios (GRPO-S, arXiv 2508.04349); "mixed", the geometric one over the actions that
            `sequence` names and by token at the others (TS-GRPO, arXiv 2510.00186).
        sequence: for "mixed".

    >>> logprobs = jnp.log(jnp.array([[1.0, 4.0]]))
    >>> mask = jnp.ones((1, 2), bool)
    >>> [importance_ratios(logprobs, jnp.zeros((1, 2)), mask, k)[0, 0].round(2).item()
    ...  for k in ("token", "sequence_geo", "sequence_arith")]
    [1.0, 2.0, 2.5]
    """
    difference = jnp.where(mask, logprobs - old, 0.0)
    if kind == "token":
        return jnp.exp(difference)
    if kind == "sequence_arith":
        return jnp.where(mask, _row_means(jnp.exp(difference), mask), 1.0)
    pooled = mask if kind == "sequence_geo" or sequence is None else mask & sequence
    whole = jnp.exp(_row_means(difference, pooled))
    return jnp.where(pooled, whole, jnp.exp(difference))


def _row_means(values: Array, mask: Array) -> Array:
    count = jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(jnp.float32)
    return jnp.where(mask, values, 0.0).sum(-1, keepdims=True) / count


def clipped_surrogate(
    ratios: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    clip: tuple[Any, Any],
) -> tuple[Float[Array, "R T"], Bool[Array, "R T"]]:
    """Returns min(r A, clip(r, 1 - low, 1 + high) A), to be maximised, and where the clip decides.

    Args:
        ratios: r.
        advantages: A.
        clip: low and high, of all actions or of each. DAPO's "clip-higher" has a larger high
            (arXiv 2503.14476).

    Reference: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347,
    equation 7.
    """
    low, high = clip
    free = ratios * advantages
    held = jnp.clip(ratios, 1 - low, 1 + high) * advantages
    return jnp.minimum(free, held), held < free


def aggregate(
    values: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    weights: Float[Array, "R T"],
    norm: Norm,
    most_tokens: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the weighted sum of values of actions and what it is to be divided by.

    Args:
        values: of the actions.
        mask: actions.
        weights: of each action's value; 0 leaves one out.
        norm: "token" divides by all actions (DAPO), "kept" by those whose weight is not 0,
            "response" takes each answer's mean over its actions and then that of the answers (GRPO,
            arXiv 2402.03300, equation 3), "constant" divides by answers x `most_tokens` (Dr. GRPO,
            arXiv 2503.20783).
        most_tokens: longest answer.
    """
    weighed = jnp.where(mask & (weights != 0), values * weights, 0.0)
    answers = mask.any(-1).sum().astype(jnp.float32)
    if norm == "response":
        return _row_means(weighed, mask).sum(), answers
    total = weighed.sum()
    if norm == "constant":
        return total, answers * most_tokens
    counted = mask & (weights != 0) if norm == "kept" else mask
    return total, counted.sum().astype(jnp.float32)


def policy_loss(
    logprobs: Float[Array, "R T"],
    old: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    *,
    weights: Float[Array, "R T"] | None = None,
    ratio: Ratio = "token",
    clip: tuple[float, float] = (0.2, 0.2),
    norm: Norm = "token",
    most_tokens: int = 1,
    sequence: Bool[Array, "R T"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sum of the clipped policy losses of actions and its divisor.

    Args:
        logprobs: of the actions under the policy in training, with the gradient.
        old: under the policy that took them; a constant.
        advantages: a constant.
        mask: actions.
        weights: of the actions' losses; default 1.
        ratio: see `importance_ratios`.
        clip: see `clipped_surrogate`.
        norm: see `aggregate`.
        most_tokens: for norm "constant".
        sequence: for ratio "mixed".
    """
    old, advantages = jax.lax.stop_gradient((old, advantages))
    ratios = importance_ratios(logprobs, old, mask, ratio, sequence)
    gain, _ = clipped_surrogate(ratios, advantages, clip)
    weights = jnp.ones_like(advantages) if weights is None else weights
    return aggregate(-gain, mask, weights, norm, most_tokens)

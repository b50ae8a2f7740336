"""Who attends to whom: attention received and given, sinks, saliency.

Everything here takes attention probabilities [..., T, S] and a mask of the (query, key) pairs
that count, and reduces the two long axes to one. Used inside the backbone, [L, B, H, T, S] never
exists; what comes back is stacked over layers:

    pairs = visible_pairs(tokens != pad)
    reduce = lambda probs: attention_received(head_mean(probs), pairs)
    model.backbone(params, x, capture={"attn_probs": reduce}).captured["attn_probs"]  # [L, B, S]

Reference: Anand et al., "Mitigating Attention Sinks and Massive Activations in Audio-Visual
Speech Recognition with LLMs", arXiv 2510.22603 (sink mass); "TRIM: Token-wise Attention-Derived
Saliency for Data-Efficient Instruction Tuning", arXiv 2510.07118 (saliency); "LayerCake:
Token-Aware Contrastive Decoding within Large Language Model Layers", arXiv 2507.04404 (attention
on a class of tokens).
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import nearest


def head_mean(probs: Float[Array, "*B H T S"]) -> Float[Array, "*B T S"]:
    """Returns the attention probabilities averaged over heads, in float32."""
    return probs.astype(jnp.float32).mean(-3)


def visible_pairs(
    tokens: Bool[Array, "*B T"],
    segments: Int[Array, "*B T"] | None = None,
    include_self: bool = True,
) -> Bool[Array, "*B T T"]:
    """Returns which (query, key) pairs causal attention has, between real tokens.

    Args:
        tokens: True for real tokens, False for filling.
        segments: documents of packed rows; pairs lie within one of them.
        include_self: whether a token's attention to itself counts.
    """
    slots = jnp.arange(tokens.shape[-1])
    pairs = slots[:, None] >= slots if include_self else slots[:, None] > slots
    pairs = pairs & tokens[..., :, None] & tokens[..., None, :]
    if segments is not None:
        pairs = pairs & (segments[..., :, None] == segments[..., None, :])
    return pairs


def attention_received(
    attention: Float[Array, "*B T S"],
    pairs: Bool[Array, "*#B T S"],
    reduce: Literal["mean", "sum", "max"] = "mean",
) -> Float[Array, "*B S"]:
    """Returns what each key receives from the queries it is paired with; 0 where it has none.

    The mean is the sink mass of arXiv 2510.22603: an early key is seen by more queries, so that
    sums of different keys do not compare. `max` is what LayerCake (arXiv 2507.04404) compares
    with a threshold, over the answer's rows, to find the columns it blocks.

    Args:
        attention: probabilities; average over heads first (`head_mean`) unless heads are to be
            told apart.
        pairs: the (query, key) pairs that count, as of `visible_pairs`; restrict its rows to
            some queries, its columns to some keys.
        reduce: over the queries.

    Raises:
        ValueError: another `reduce`.
    """
    kept = jnp.where(pairs, attention.astype(jnp.float32), 0.0)
    if reduce == "max":
        return kept.max(-2)
    if reduce == "sum":
        return kept.sum(-2)
    if reduce == "mean":
        return kept.sum(-2) / jnp.maximum(pairs.sum(-2), 1).astype(jnp.float32)
    raise ValueError(f"unknown reduction {reduce!r}.{nearest(reduce, ('mean', 'sum', 'max'))}")


def attention_given(
    attention: Float[Array, "*B T S"], pairs: Bool[Array, "*#B T S"]
) -> Float[Array, "*B T"]:
    """Returns how much of its attention each query spends on the keys it is paired with.

    With the columns of a token class as pairs this is the concept attention c of LayerCake
    (arXiv 2507.04404).
    """
    return jnp.where(pairs, attention.astype(jnp.float32), 0.0).sum(-1)


def uniform_attention(visible: Bool[Array, "*B T S"]) -> Float[Array, "*B T S"]:
    """Returns attention spread evenly over the visible keys: what a sink's mass is compared to."""
    n = visible.sum(-1, keepdims=True)
    return jnp.where(visible, 1.0 / jnp.maximum(n, 1).astype(jnp.float32), 0.0)


def attention_sinks(
    mass: Float[Array, "*B S"],
    uniform: Float[Array, "*#B S"],
    candidates: Bool[Array, "*#B S"],
    over_uniform: float = 5.0,
    over_median: float = 10.0,
) -> Bool[Array, "*B S"]:
    """Returns which keys are attention sinks.

    A sink receives more than `over_uniform` times its share under uniform attention and more
    than `over_median` times the median of the other candidates. Without another candidate the
    second condition is dropped. Intermediate sinks are those found behind the first token.
    arXiv 2510.22603 gives no thresholds: these are a recommendation of tokjax.

    Args:
        mass: `attention_received` of each key; may lead with a layer axis.
        uniform: `attention_received(uniform_attention(visible), pairs)` of the same pairs.
        candidates: keys that may be sinks, the first token included: for a speech or instruction
            model everything but the output.
        over_uniform: factor over the uniform share.
        over_median: factor over the median.
    """
    median = _median_of_others(mass.astype(jnp.float32), candidates)
    return candidates & (mass > over_uniform * uniform) & (mass > over_median * median)


def _median_of_others(
    values: Float[Array, "*B S"], mask: Bool[Array, "*#B S"]
) -> Float[Array, "*B S"]:
    """Returns for each entry the median of the other masked entries; 0 where there is none."""
    mask = jnp.broadcast_to(mask, values.shape)
    order = jnp.argsort(jnp.where(mask, values, jnp.inf), axis=-1, stable=True)
    ordered = jnp.take_along_axis(values, order, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    others = mask.sum(-1, keepdims=True) - 1

    def without_own(place):
        # Taking an entry out of the sorted list moves everything from its rank on down by one.
        place = jnp.where(place >= rank, place + 1, place)
        return jnp.take_along_axis(ordered, jnp.clip(place, 0, values.shape[-1] - 1), axis=-1)

    median = 0.5 * (without_own((others - 1) // 2) + without_own(others // 2))
    return jnp.where(others > 0, median, 0.0)


def attention_entropy(
    attention: Float[Array, "*B T S"], visible: Bool[Array, "*#B T S"]
) -> Float[Array, "*B T"]:
    """Returns the entropy (nats) of each query's attention over its visible keys."""
    p = jnp.where(visible, attention.astype(jnp.float32), 0.0)
    return -(p * jnp.log(jnp.where(p > 0, p, 1.0))).sum(-1)


def row_saliency(
    attention: Float[Array, "*B T S"],
    visible: Bool[Array, "*#B T S"],
    norm: Literal["visible", "none"] = "visible",
) -> Float[Array, "*B T"]:
    """Returns how sharply each query attends: 1 - entropy / log(visible keys), in [0, 1].

    A query with fewer than two visible keys has nothing to choose and gets 0. `norm="none"`
    returns the negative entropy itself.

    Reference: TRIM, arXiv 2510.07118; its scaling is not known, `visible` is a recommendation of
    tokjax.
    """
    entropy = attention_entropy(attention, visible)
    if norm == "none":
        return -entropy
    n = visible.sum(-1).astype(jnp.float32)
    sharpness = 1.0 - entropy / jnp.log(jnp.maximum(n, 2.0))
    return jnp.where(n > 1, jnp.clip(sharpness, 0.0, 1.0), 0.0)


def column_saliency(
    attention: Float[Array, "*B T S"],
    visible: Bool[Array, "*#B T S"],
    scope: Bool[Array, "*#B S"],
    norm: Literal["visible", "none"] = "visible",
) -> Float[Array, "*B S"]:
    """Returns the attention each key receives, relative to the largest in scope; 0 outside it.

    Attention received is averaged over the queries that see the key. `norm="none"` returns the
    sum over queries instead, unscaled.

    Reference: TRIM, arXiv 2510.07118; its scaling is not known, `visible` is a recommendation of
    tokjax.

    Args:
        attention: averaged over heads and layers.
        visible: the pairs of the causal mask.
        scope: keys whose saliency is asked for. Leave the first token out where it is a sink: it
            would take the maximum.
        norm: the scaling.
    """
    if norm == "none":
        return jnp.where(scope, attention_received(attention, visible, "sum"), 0.0)
    received = jnp.where(scope, attention_received(attention, visible), 0.0)
    largest = received.max(-1, keepdims=True)
    return jnp.where(largest > 0, received / jnp.where(largest > 0, largest, 1.0), 0.0)


def attention_saliency(
    attention: Float[Array, "*B T T"],
    visible: Bool[Array, "*#B T T"],
    scope: Bool[Array, "*#B T"],
    row_weight: float = 0.5,
    norm: Literal["visible", "none"] = "visible",
) -> Float[Array, "*B T"]:
    """Returns each token's saliency: a mix of how sharply it attends and how much it is attended.

    Args:
        attention: averaged over heads and the layers used.
        visible: the pairs of the causal mask between real tokens.
        scope: tokens whose saliency is asked for; 0 elsewhere.
        row_weight: share of `row_saliency`; the rest is `column_saliency`.
        norm: scaling of both.

    Raises:
        ValueError: another `norm`.

    Reference: TRIM, arXiv 2510.07118.
    """
    if norm not in ("visible", "none"):
        raise ValueError(f"unknown norm {norm!r}.{nearest(norm, ('visible', 'none'))}")
    rows = row_saliency(attention, visible, norm)
    columns = column_saliency(attention, visible, scope, norm)
    return jnp.where(scope, row_weight * rows + (1 - row_weight) * columns, 0.0)

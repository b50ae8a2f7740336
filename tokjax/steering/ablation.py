"""Tokens taken out of a text by their scores, and what that does to its last hidden states."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError
from tokjax.models.transformer import Transformer


def select_tokens(
    scores: Float[Array, "B T"],
    eligible: Bool[Array, "B T"],
    k: int | Int[Array, ""],
    which: Literal["positive", "negative"] = "positive",
) -> Bool[Array, "B T"]:
    """Returns each row's k tokens of largest score, or of smallest; of equals the earlier ones.

    Where fewer than k + 1 are eligible, all but one are taken.

    >>> scores, all_of_them = jnp.array([[0.2, -1.0, 0.5]]), jnp.ones((1, 3), bool)
    >>> select_tokens(scores, all_of_them, 1, "negative").tolist()
    [[False, True, False]]

    Args:
        scores: of the tokens, with their sign.
        eligible: tokens that may be taken; leave out BOS and padding.
        k: how many.
        which: the largest ("positive") or the smallest ("negative") scores.

    Raises:
        ConfigError: an unknown choice.

    Reference: GrAInS, arXiv 2507.18043.
    """
    if which not in ("positive", "negative"):
        raise ConfigError(f"which={which!r} must be 'positive' or 'negative'")
    signed = scores if which == "positive" else -scores
    order = jnp.argsort(jnp.where(eligible, -signed, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    most = jnp.minimum(k, eligible.sum(-1, keepdims=True) - 1)
    return eligible & (rank < most)


def ablate(
    tokens: Int[Array, "B T"], selected: Bool[Array, "B T"], ablation_id: int | Int[Array, ""]
) -> Int[Array, "B T"]:
    """Returns the tokens with the selected ones replaced, usually by PAD or UNK."""
    return jnp.where(selected, ablation_id, tokens)


def last_states(
    model: Transformer, params: Any, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Float[Array, "L B D"]:
    """Returns every block's output at each row's last token, before the final norm, in float32."""
    at = (lengths - 1)[:, None, None]

    def of_last(states: Array) -> Array:
        return jnp.take_along_axis(states, at, axis=1)[:, 0].astype(jnp.float32)

    embedded = model.embed(params, tokens)
    return model.backbone(params, embedded, capture={"resid_post": of_last}).captured["resid_post"]

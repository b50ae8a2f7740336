"""NVIDIA's fused attention kernel, told as much as it can use.

A causal mask it makes itself, and it leaves out the half that is never seen; any other mask is a
matrix of scores that it has to read. Most rows hold one piece of text, and then causality is all.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from tokjax.models import attention

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def cudnn_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segments: Int[Array, "B T"] | None,
    window: Any,
    scores: "attention.Scores",
) -> Float[Array, "B T H d"]:
    """Returns attention of a sequence to itself, within segments and window when given.

    What queries of segment 0, which is filling, get behind the one other segment of their row is of
    no meaning.

    Args:
        q: queries.
        k: keys.
        v: values.
        segments: or None for one a row.
        window: number of keys a query sees, or None.
        scores: how scores are computed.
    """

    def attend(q, k, v, mask):
        # The kernel's own window counts keys before the query and knows none behind it.
        own = window if scores.causal and isinstance(window, int) else None
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scores.scale, is_causal=scores.causal,
            local_window_size=None if own is None else (own - 1, 0), implementation="cudnn",
        )  # fmt: skip

    built_in = window is None or (scores.causal and isinstance(window, int))
    if built_in and segments is None:
        return attend(q, k, v, None)
    if built_in:
        return by_documents(attend, scores.causal, q, k, v, segments)
    return attend(q, k, v, _mask(q, segments, window, scores.causal))


def _mask(q: jax.Array, segments: Any, window: Any, causal: bool) -> Bool[Array, "B 1 T T"]:
    places = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return attention.visible_keys(
        places, places, window, causal=causal, query_segments=segments, key_segments=segments
    )


def one_document(segments: Int[Array, "B T"], causal: bool) -> Bool[Array, ""]:
    """Returns whether no token that is not filling would see one of another segment.

    >>> [bool(one_document(jnp.array([row]), True)) for row in ([1, 1, 0], [1, 2, 0], [0, 1, 1])]
    [True, False, False]
    """
    first = segments == segments[:, :1]
    if not causal:
        return first.all()
    # Filling behind the text is seen by nothing before it.
    filling = segments == 0
    back = filling[:, :-1] & ~filling[:, 1:]
    return (first | filling).all() & ~back.any()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def by_documents(attend: Attend, causal: bool, q, k, v, segments) -> Float[Array, "B T H d"]:
    """Returns attention within segments, without a mask where each row is one document.

    Which it is is known when the program runs. The derivative is written here because that of a
    branch would keep what either branch needs.

    Args:
        attend: the kernel, given a mask or none.
        causal: whether the kernel is causal.
        q: queries.
        k: keys.
        v: values.
        segments: of the tokens.
    """
    return jax.lax.cond(
        one_document(segments, causal),
        lambda: attend(q, k, v, None),
        lambda: attend(q, k, v, _mask(q, segments, None, causal)),
    )


def _forward(attend, causal, q, k, v, segments):
    out = checkpoint_name(by_documents(attend, causal, q, k, v, segments), attention.SAVED)
    return out, (q, k, v, segments)


def _backward(attend, causal, saved, d_out):
    *qkv, segments = saved

    def through(mask):
        return jax.vjp(lambda *qkv: attend(*qkv, mask), *qkv)[1](d_out)

    d_q, d_k, d_v = jax.lax.cond(
        one_document(segments, causal),
        lambda: through(None),
        lambda: through(_mask(qkv[0], segments, None, causal)),
    )
    return d_q, d_k, d_v, None


by_documents.defvjp(_forward, _backward)

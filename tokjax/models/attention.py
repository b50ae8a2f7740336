"""Scaled dot-product attention: one signature, several kernels.

`dense` can do everything (any mask, bias, probabilities, caches). `blockwise` walks over the rows
of the batch and over blocks of queries, each against the keys it may see, so that a block stays in
a CPU's cache and scores exist for one row at a time; it does attention of a sequence to itself
within segments and windows. `cudnn` is NVIDIA's fused kernel
(`tokjax.models.cudnn_attention`), `splash` that of TPUs (`tokjax.models.splash`).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError
from tokjax.models.edits import Edits, suppressed
from tokjax.parallel.rules import BATCH_AXES, current_mesh_shape, current_platform

SAVED = "attention"  # name of what a rematerialised block keeps of attention
LANES = 128  # of a TPU: its fused kernel takes rows of a multiple of them
_LONG = 1024  # queries from which on `auto` takes that kernel; below, whole scores are small
_EXCLUDED = -1e30  # finite, so that a row without any key gives numbers, not NaN


@dataclass(frozen=True)
class Scores:
    """What is static about a model's attention.

    Attributes:
        scale: factor of the products of queries and keys.
        softcap: bound on the size of a score; None leaves them as they are.
        causal: queries see no later key.
    """

    scale: float
    softcap: float | None = None
    causal: bool = True


def visible_keys(
    queries: Int[Array, "B T"],
    keys: Int[Array, "B S"],
    window: Any = None,
    *,
    causal: bool = True,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B 1 T S"]:
    """Returns which keys each query may see.

    Args:
        queries: place of each query in its row.
        keys: place of each key in its row; negative for none.
        window: number of keys a query sees, itself included; without `causal` that many to
            either side, itself included.
        causal: no key behind the query.
        query_segments: a query sees keys of its own segment.
        key_segments: of the keys.
    """
    behind = queries[:, :, None] - keys[:, None, :]
    mask = jnp.broadcast_to(keys[:, None, :] >= 0, behind.shape)
    if causal:
        mask &= behind >= 0
    if window is not None:
        mask &= (behind if causal else jnp.abs(behind)) < window
    if query_segments is not None and key_segments is not None:
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask[:, None]


def dense_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    mask: Bool[Array, "B 1 T S"],
    scores: Scores,
    edits: Edits | None = None,
    bias: Float[Array, "B H T S"] | None = None,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B H T S"]]:
    """Returns the attention output and the probabilities, the scores computed in float32.

    Args:
        q: queries.
        k: keys; each serves H / K query heads.
        v: values.
        mask: keys that a query may see.
        scores: how scores are computed.
        edits: of one layer. An edited bias of -inf (or below -1e30) excludes a key like the mask
            does; a query left without any key gets zeros.
        bias: of the model itself, added like an edited one.
    """
    B, T, H, d = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, H // K, d)
    products = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    logits = products.reshape(B, H, T, -1) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * jnp.tanh(logits / scores.softcap)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    edits = Edits() if edits is None else edits
    if edits.attention_bias is not None:
        added = edits.attention_bias.astype(jnp.float32)
        mask = mask & (added > _EXCLUDED)
        logits = logits + jnp.where(mask, added, 0.0)
    probabilities = _softmax(logits, mask, can_be_empty=edits.attention_bias is not None)
    if edits.suppression:
        # Decided without a gradient: a threshold has none.
        decided_by = jax.lax.stop_gradient(probabilities)
        logits = suppressed(edits.suppression, logits, decided_by, mask.any(1)[:, None])
        probabilities = _softmax(logits, mask, can_be_empty=edits.attention_bias is not None)
    probabilities = edits.at("attn_probs", probabilities)
    grouped = probabilities.reshape(B, K, H // K, T, -1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", grouped, v)
    return out.reshape(B, T, H, d), probabilities


def _softmax(logits: jax.Array, mask: jax.Array, *, can_be_empty: bool) -> jax.Array:
    probabilities = jax.nn.softmax(jnp.where(mask, logits, _EXCLUDED), axis=-1)
    # Without a key to see the softmax is uniform, over the future and other segments too.
    return jnp.where(mask, probabilities, 0.0) if can_be_empty else probabilities


def choose_kernel(
    requested: str, *, plain: bool, softcap: bool, dtype, length: int, window: Any = None
) -> str:
    """Returns the kernel to use: the requested one where it can do what is asked, else `dense`.

    Args:
        requested: `auto` or a kernel's name.
        plain: no cache, no bias, no probabilities asked for.
        softcap: scores are capped, which `cudnn` cannot do.
        dtype: of the queries.
        length: number of queries.
        window: of the layer; an array where layers of a scan differ, which `splash` cannot do.

    Raises:
        ConfigError: the requested kernel cannot run here.
    """
    platform = current_platform()
    if requested == "cudnn" and platform != "gpu":
        raise ConfigError(f"model.attention='cudnn' needs an NVIDIA GPU, this is {platform}")
    if requested == "cudnn" and softcap:
        raise ConfigError("model.attention='cudnn' cannot cap scores: use 'auto'")
    if requested == "splash" and platform != "tpu":
        raise ConfigError(f"model.attention='splash' needs a TPU, this is {platform}")
    # Only `dense` does everything; the others also need whole rows on each device.
    if not plain or current_mesh_shape().get("sequence", 1) > 1:
        return "dense"
    splash = platform == "tpu" and length % LANES == 0 and not isinstance(window, jax.Array)
    if requested == "splash" or (requested == "auto" and splash and length >= _LONG):
        return "splash" if splash else "dense"
    if requested != "auto":
        return requested
    if platform == "gpu" and dtype == jnp.bfloat16 and not softcap:
        return "cudnn"
    return "blockwise" if platform == "cpu" and length > 1 else "dense"


def self_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segments: Int[Array, "B T"] | None,
    window: Any,
    scores: Scores,
    kernel: str,
) -> Float[Array, "B T H d"]:
    """Returns attention of a sequence to itself, within segments and window when given."""
    B, T = q.shape[:2]
    if kernel == "blockwise":
        filled = jnp.zeros((B, T), jnp.int32) if segments is None else segments
        attend = functools.partial(blockwise_attention, scores=scores)
        if window is None:
            return _sharded(attend, q, k, v, filled)
        return _sharded(attend, q, k, v, filled, jnp.asarray(window, jnp.int32))
    if kernel == "splash":
        from tokjax.models.splash import splash_attention

        filled = jnp.zeros((B, T), jnp.int32) if segments is None else segments
        attend = functools.partial(splash_attention, window=window, scores=scores)
        return _sharded(attend, q, k, v, filled)
    if kernel == "cudnn":
        from tokjax.models.cudnn_attention import cudnn_attention

        return cudnn_attention(q, k, v, segments, window, scores)
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    mask = visible_keys(
        places,
        places,
        window,
        causal=scores.causal,
        query_segments=segments,
        key_segments=segments,
    )
    return dense_attention(q, k, v, mask, scores)[0]


def _sharded(attend, q, k, v, segments, *window):
    """Runs `attend` on each device's own rows and heads (attention needs no other's)."""
    mesh = current_mesh_shape()
    if math.prod(mesh.values()) == 1:
        return attend(q, k, v, segments, *window)
    rows = tuple(a for a in BATCH_AXES if a in mesh)
    rows = rows if q.shape[0] % math.prod(mesh[a] for a in rows) == 0 else ()
    heads = "tensor" if "tensor" in mesh and k.shape[2] % mesh["tensor"] == 0 else None
    spec = P(rows, None, heads, None)
    return jax.shard_map(
        attend,
        in_specs=(spec, spec, spec, P(rows, None), *(P() for _ in window)),
        out_specs=spec,
        check_vma=False,
    )(q, k, v, segments, *window)


def blockwise_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segments: Int[Array, "B T"],
    window: Int[Array, ""] | None = None,
    *,
    scores: Scores,
) -> Float[Array, "B T H d"]:
    """Returns attention within segments, one row and one block of queries at a time.

    The backward pass recomputes the probabilities from the log-sum-exp (Dao et al. 2022,
    "FlashAttention", arXiv 2205.14135, algorithm 4), so only O(T) is kept a row.
    """
    _, T, H, d = q.shape
    K = k.shape[2]

    def one_row(row):
        q_THd, k_TKd, v_TKd, segments_T = row
        q_KGTd = q_THd.reshape(T, K, H // K, d).transpose(1, 2, 0, 3) * jnp.asarray(
            scores.scale, q_THd.dtype
        )
        k_KTd, v_KTd = k_TKd.transpose(1, 0, 2), v_TKd.transpose(1, 0, 2)
        out: jax.Array = _row_attention(q_KGTd, k_KTd, v_KTd, segments_T, window, scores)
        return out.transpose(2, 0, 1, 3).reshape(T, H, d)

    return jax.lax.map(one_row, (q, k, v, segments))


def _blocks(length: int, causal: bool) -> list[tuple[slice, slice]]:
    """Returns the blocks of queries, each with the keys that any of them may see."""
    # 64 queries keep a block's scores in the second-level cache; at most 16 blocks keep the
    # unrolled program small.
    size = max(64, -(-length // 16))
    rows = [slice(i, min(i + size, length)) for i in range(0, length, size)]
    return [(each, slice(0, each.stop if causal else length)) for each in rows]


def _visible(segments: jax.Array, window: Any, rows: slice, seen: slice, causal: bool) -> jax.Array:
    """Returns which of the keys `seen` the queries `rows` may see, as [1, 1, t, s]."""
    behind = jnp.arange(rows.start, rows.stop)[:, None] - jnp.arange(seen.stop)
    mask = segments[rows, None] == segments[seen]
    if causal:
        mask &= behind >= 0
    if window is not None:
        mask &= (behind if causal else jnp.abs(behind)) < window
    return mask[None, None]


_products = functools.partial(jnp.einsum, "kgtd,ksd->kgts", preferred_element_type=jnp.float32)


def _capped(products: jax.Array, scores: Scores) -> jax.Array:
    if scores.softcap is None:
        return products
    return scores.softcap * jnp.tanh(products / scores.softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _row_attention(q, k, v, segments, window, scores):
    return _row_forward(q, k, v, segments, window, scores)[0]


def _row_forward(q, k, v, segments, window, scores: Scores):
    outs, logsumexps = [], []
    for rows, seen in _blocks(q.shape[2], scores.causal):
        visible = _visible(segments, window, rows, seen, scores.causal)
        logits = _capped(_products(q[:, :, rows], k[:, seen]), scores)
        logits = jnp.where(visible, logits, _EXCLUDED)
        largest = logits.max(-1, keepdims=True)
        exponentials = jnp.exp(logits - largest)
        total = exponentials.sum(-1, keepdims=True)
        out = jnp.einsum(
            "kgts,ksd->kgtd",
            exponentials.astype(v.dtype),
            v[:, seen],
            preferred_element_type=jnp.float32,
        )
        outs.append((out / total).astype(v.dtype))
        logsumexps.append(largest + jnp.log(total))
    # Named so that rematerialisation can keep them: with q, k and v all the backward pass needs.
    out = checkpoint_name(jnp.concatenate(outs, axis=2), SAVED)
    logsumexp = checkpoint_name(jnp.concatenate(logsumexps, axis=2), SAVED)
    return out, (q, k, v, segments, window, out, logsumexp)


def _row_backward(scores: Scores, residuals, d_out):
    q, k, v, segments, window, out, logsumexp = residuals
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    into_keys = functools.partial(jnp.einsum, "kgts,kgtd->ksd", preferred_element_type=jnp.float32)
    for rows, seen in _blocks(q.shape[2], scores.causal):
        logits = _capped(_products(q[:, :, rows], k[:, seen]), scores)
        visible = _visible(segments, window, rows, seen, scores.causal)
        p = jnp.where(visible, jnp.exp(logits - logsumexp[:, :, rows]), 0.0)
        d_p = _products(d_out[:, :, rows], v[:, seen])
        d_logits = p * (d_p - inner[:, :, rows])
        if scores.softcap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / scores.softcap))
        d_logits = d_logits.astype(q.dtype)
        d_q.append(jnp.einsum("kgts,ksd->kgtd", d_logits, k[:, seen]))
        d_k = d_k.at[:, seen].add(into_keys(d_logits, q[:, :, rows]))
        d_v = d_v.at[:, seen].add(into_keys(p.astype(q.dtype), d_out[:, :, rows]))
    return jnp.concatenate(d_q, axis=2), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_row_attention.defvjp(_row_forward, _row_backward)

"""Scaled dot-product attention: one signature, several kernels.

`dense` can do everything (any mask, bias, probabilities, caches). `blockwise` walks over the rows
of the batch and over blocks of queries, each against the keys before it, so that a block stays in
a CPU's cache and scores exist for one row at a time; it does plain causal attention within
segments. `cudnn` is NVIDIA's fused kernel through `jax.nn.dot_product_attention`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError
from tokjax.parallel.rules import BATCH_AXES, current_mesh_shape

SAVED = "attention"  # name of what a rematerialised block keeps of attention
_EXCLUDED = -1e30  # finite, so that a row without any key gives numbers, not NaN


def causal_mask(
    query_slots: Int[Array, "B T"],
    key_slots: Int[Array, "B S"],
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B 1 T S"]:
    """Returns which keys each query may see: those not after it, in its own segment."""
    mask = query_slots[:, :, None] >= key_slots[:, None, :]
    if query_segments is not None and key_segments is not None:
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask[:, None]


def dense_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    mask: Bool[Array, "B 1 T S"],
    bias: Float[Array, "B H T S"] | None = None,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B H T S"]]:
    """Returns the attention output and the probabilities, the scores computed in float32.

    A bias of -inf (or below -1e30) excludes a key like the mask does; a query left without any key
    gets zeros.
    """
    B, T, H, d = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, H // K, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, H, T, -1) * d**-0.5
    if bias is not None:
        bias = bias.astype(jnp.float32)
        mask = mask & (bias > _EXCLUDED)
        scores = scores + jnp.where(mask, bias, 0.0)
    probabilities = jax.nn.softmax(jnp.where(mask, scores, _EXCLUDED), axis=-1)
    if bias is not None:
        # Without a key to see the softmax is uniform, over the future and other segments too.
        probabilities = jnp.where(mask, probabilities, 0.0)
    grouped = probabilities.reshape(B, K, H // K, T, -1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", grouped, v)
    return out.reshape(B, T, H, d), probabilities


def choose_kernel(requested: str, *, plain: bool, dtype, length: int) -> str:
    """Returns the kernel to use.

    Args:
        requested: `auto` or a kernel's name.
        plain: no cache, no bias, no probabilities asked for.
        dtype: of the queries.
        length: number of queries.

    Raises:
        ConfigError: the requested kernel cannot run here.
    """
    platform = jax.default_backend()
    if requested == "cudnn" and platform != "gpu":
        raise ConfigError(f"model.attention='cudnn' needs an NVIDIA GPU, this is {platform}")
    # Only `dense` does everything; the others also need whole rows on each device.
    if not plain or current_mesh_shape().get("sequence", 1) > 1:
        return "dense"
    if requested != "auto":
        return requested
    if platform == "gpu" and dtype == jnp.bfloat16:
        return "cudnn"
    return "blockwise" if platform == "cpu" and length > 1 else "dense"


def self_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segments: Int[Array, "B T"] | None,
    kernel: str,
) -> Float[Array, "B T H d"]:
    """Returns causal attention of a sequence to itself, within segments when they are given."""
    B, T = q.shape[:2]
    if kernel == "blockwise":
        filled = jnp.zeros((B, T), jnp.int32) if segments is None else segments
        return _sharded(blockwise_attention, q, k, v, filled)
    slots = jnp.broadcast_to(jnp.arange(T), (B, T))
    mask = causal_mask(slots, slots, segments, segments)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return dense_attention(q, k, v, mask)[0]


def _sharded(attend, q, k, v, segments):
    """Runs `attend` on each device's own rows and heads (attention needs no other's)."""
    mesh = current_mesh_shape()
    if math.prod(mesh.values()) == 1:
        return attend(q, k, v, segments)
    rows = tuple(a for a in BATCH_AXES if a in mesh)
    rows = rows if q.shape[0] % math.prod(mesh[a] for a in rows) == 0 else ()
    heads = "tensor" if "tensor" in mesh and k.shape[2] % mesh["tensor"] == 0 else None
    spec = P(rows, None, heads, None)
    return jax.shard_map(
        attend, in_specs=(spec, spec, spec, P(rows, None)), out_specs=spec, check_vma=False
    )(q, k, v, segments)


def blockwise_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B T H d"]:
    """Returns causal attention within segments, one row and one block of queries at a time.

    The backward pass recomputes the probabilities from the log-sum-exp (Dao et al. 2022,
    "FlashAttention", arXiv 2205.14135, algorithm 4), so only O(T) is kept a row.
    """
    _, T, H, d = q.shape
    K = k.shape[2]

    def one_row(row):
        q_THd, k_TKd, v_TKd, segments_T = row
        q_KGTd = q_THd.reshape(T, K, H // K, d).transpose(1, 2, 0, 3) * jnp.asarray(
            d**-0.5, q_THd.dtype
        )
        out = _row_attention(q_KGTd, k_TKd.transpose(1, 0, 2), v_TKd.transpose(1, 0, 2), segments_T)
        return out.transpose(2, 0, 1, 3).reshape(T, H, d)

    return jax.lax.map(one_row, (q, k, v, segments))


def _blocks(length: int) -> list[slice]:
    # 64 queries keep a block's scores in the second-level cache; at most 16 blocks keep the
    # unrolled program small.
    size = max(64, -(-length // 16))
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _visible(segments: Int[Array, "T"], rows: slice) -> Bool[Array, "1 1 t s"]:
    order = jnp.arange(rows.start, rows.stop)[:, None] >= jnp.arange(rows.stop)
    same = segments[rows, None] == segments[: rows.stop]
    return (order & same)[None, None]


_scores = functools.partial(jnp.einsum, "kgtd,ksd->kgts", preferred_element_type=jnp.float32)


@jax.custom_vjp
def _row_attention(q, k, v, segments):
    return _row_forward(q, k, v, segments)[0]


def _row_forward(q, k, v, segments):
    outs, logsumexps = [], []
    for rows in _blocks(q.shape[2]):
        seen = slice(0, rows.stop)
        scores = jnp.where(_visible(segments, rows), _scores(q[:, :, rows], k[:, seen]), _EXCLUDED)
        largest = scores.max(-1, keepdims=True)
        exponentials = jnp.exp(scores - largest)
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
    return out, (q, k, v, segments, out, logsumexp)


def _row_backward(residuals, d_out):
    q, k, v, segments, out, logsumexp = residuals
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows in _blocks(q.shape[2]):
        seen = slice(0, rows.stop)
        scores = _scores(q[:, :, rows], k[:, seen])
        p = jnp.where(_visible(segments, rows), jnp.exp(scores - logsumexp[:, :, rows]), 0.0)
        d_p = _scores(d_out[:, :, rows], v[:, seen])
        d_scores = (p * (d_p - inner[:, :, rows])).astype(q.dtype)
        d_q.append(jnp.einsum("kgts,ksd->kgtd", d_scores, k[:, seen]))
        into_keys = functools.partial(
            jnp.einsum, "kgts,kgtd->ksd", preferred_element_type=jnp.float32
        )
        d_k = d_k.at[:, seen].add(into_keys(d_scores, q[:, :, rows]))
        d_v = d_v.at[:, seen].add(into_keys(p.astype(q.dtype), d_out[:, :, rows]))
    return jnp.concatenate(d_q, axis=2), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_row_attention.defvjp(_row_forward, _row_backward)

"""Splash attention: JAX's fused kernel for TPUs, in the signature of `tokjax.models.attention`.

Blocks of keys that a causal mask or a window hides from a block of queries are never computed, and
scores exist for one block at a time. Segments are compared inside the blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from tokjax.models.attention import LANES, SAVED, Scores

_BLOCK = 512  # queries, and keys, of a block: what a v5e and larger chips have the memory for


def splash_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segments: Int[Array, "B T"],
    *,
    window: int | None = None,
    scores: Scores,
    interpret: bool = False,
) -> Float[Array, "B T H d"]:
    """Returns attention within segments, blocks that nobody sees left out.

    Args:
        q: queries; T is a multiple of 128.
        k: keys; each serves H / K query heads.
        v: values.
        segments: tokens attend within their own.
        window: number of keys a query sees, as in `attention.visible_keys`.
        scores: how scores are computed.
        interpret: compute as Pallas's interpreter does, on any platform, and slowly.
    """
    T, H = q.shape[1:3]
    # The kernel scales nothing. Named, so that rematerialisation can keep what it found.
    attend: Any = kernels.make_splash_mha(
        masks.MultiHeadMask([_mask(T, window, scores.causal)] * H),
        block_sizes=_blocks(T),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=scores.softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )

    def one_row(q, k, v, segments):
        return attend(q, k, v, kernels.SegmentIds(segments, segments))

    q = q * jnp.asarray(scores.scale, q.dtype)
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    return jax.vmap(one_row)(q, k, v, segments).transpose(0, 2, 1, 3)


def _mask(length: int, window: int | None, causal: bool) -> masks.Mask:
    shape = (length, length)
    if window is not None:
        return masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), offset=0)
    return masks.CausalMask(shape) if causal else masks.FullMask(shape)


def _blocks(length: int) -> kernels.BlockSizes:
    size = next(n for n in range(min(_BLOCK, length), 0, -LANES) if length % n == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return kernels.BlockSizes(**dict.fromkeys(names, size))

"""The parts of a block: norm, rotary positions, attention and feed-forward, as Flax modules."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.models import attention as attn
from tokjax.models import cache as kv
from tokjax.models.config import ModelConfig
from tokjax.models.parameters import block_table


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Any:
    """Returns x over its root mean square, times `scale`; computed in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def rotary_tables(
    positions: Int[Array, "B T"], width: int, theta: float
) -> tuple[Float[Array, "B T 1 d/2"], Float[Array, "B T 1 d/2"]]:
    """Returns the cosines and sines of the rotary angles (Su et al. 2021, arXiv 2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T H d"], tables) -> Float[Array, "B T H d"]:
    """Returns x turned by its position; the pairs are (i, i + d/2), as in Hugging Face's Llama."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


@jax.custom_vjp
def matmul(x: Float[Array, "B T N"], w: Float[Array, "N M"]) -> Float[Array, "B T M"]:
    """Returns x @ w, with a gradient that no compiler has to transpose.

    JAX's own rule computes the weight's gradient the other way round and turns it afterwards;
    XLA's CPU backend then writes both large operands transposed, which costs a third of the time
    of a feed-forward's backward pass. (Reverse mode only, like the attention kernel.)
    """
    return x @ w


def _matmul_forward(x, w):
    return x @ w, (x, w)


def _matmul_backward(saved, d_y):
    x, w = saved
    return jnp.einsum("btm,nm->btn", d_y, w), jnp.einsum("btn,btm->nm", x, d_y)


matmul.defvjp(_matmul_forward, _matmul_backward)


class _Part(nn.Module):
    """A module whose parameters are one part of the block's table.

    All but the norm's scale, which is applied in float32, are cast to the compute dtype.
    """

    config: ModelConfig

    def weights(self, part: str) -> dict[str, jax.Array]:
        dtype = jnp.dtype(self.config.dtype)
        param_dtype = jnp.dtype(self.config.param_dtype)
        found = {
            name: self.param(name, lambda key, p=p: p.initialise(key, param_dtype))
            for name, p in block_table(self.config)[part].items()
        }
        return {name: w if name == "norm" else w.astype(dtype) for name, w in found.items()}


class Attention(_Part):
    """Norm, projections, rotary positions, causal attention, output projection."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        rotary: Any,
        segments: Int[Array, "B T"] | None,
        cached: tuple[jax.Array, jax.Array, jax.Array] | None,
        bias: Float[Array, "B H T S"] | None,
        want: frozenset[str],
    ) -> tuple[Float[Array, "B T D"], tuple[jax.Array, jax.Array] | None, dict[str, jax.Array]]:
        """Returns the output, the layer's new cache buffers, and what was captured."""
        config, w = self.config, self.weights("attention")
        B, T, _ = x.shape
        h = rms_norm(x, w["norm"], config.norm_eps)

        def project(name: str, heads: int) -> jax.Array:
            y = matmul(h, w[name])
            if config.attention_bias:
                y = y + w[f"{name}_bias"]
            return y.reshape(B, T, heads, config.head_width)

        q = rotate(project("query", config.n_heads), rotary)
        k = rotate(project("key", config.kv_heads), rotary)
        v = project("value", config.kv_heads)
        captured = {name: a for name, a in (("q", q), ("k", k), ("v", v)) if name in want}

        plain = cached is None and bias is None and "attn_probs" not in want
        kernel = attn.choose_kernel(config.attention, plain=plain, dtype=q.dtype, length=T)
        buffers = None
        if plain and kernel != "dense":
            out = attn.self_attention(q, k, v, segments, kernel)
        else:
            start = jnp.zeros(B, jnp.int32)
            if cached is not None:
                start = cached[2]
                k, v = kv.write(cached[0], k, start), kv.write(cached[1], v, start)
                buffers = (k, v)
            query_slots = start[:, None] + jnp.arange(T)
            key_slots = jnp.broadcast_to(jnp.arange(k.shape[1]), (B, k.shape[1]))
            mask = attn.causal_mask(query_slots, key_slots, segments, segments)
            dtype = q.dtype
            out, probabilities = attn.dense_attention(
                q, k.astype(dtype), v.astype(dtype), mask, bias
            )
            if "attn_probs" in want:
                captured["attn_probs"] = probabilities
        return out.reshape(B, T, -1) @ w["out"], buffers, captured


class FeedForward(_Part):
    """Norm and gated feed-forward (Shazeer 2020, arXiv 2002.05202)."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what the feed-forward adds to the residual stream."""
        w = self.weights("mlp")
        h = rms_norm(x, w["norm"], self.config.norm_eps)
        gate = jax.nn.silu if self.config.activation == "silu" else jax.nn.gelu
        return matmul(gate(matmul(h, w["gate"])) * matmul(h, w["up"]), w["down"])

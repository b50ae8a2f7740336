"""The parts of a block: norms, attention and feed-forward, as functions of their weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.models import attention as attn
from tokjax.models import cache as kv
from tokjax.models.config import ModelConfig
from tokjax.models.lora import A as lora_a
from tokjax.models.lora import B as lora_b
from tokjax.models.parameters import FUSED, NORMS, Parameter
from tokjax.models.quantized import Int8Matrix
from tokjax.models.rotary import Tables, rotate
from tokjax.models.transposed import Transposed
from tokjax.parallel.rules import current_mesh_shape

Weights = Mapping[str, jax.Array]
Site = Callable[[str, jax.Array], jax.Array]  # applies a site's edits and captures it

ACTIVATIONS: Mapping[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@struct.dataclass
class LayerCache:
    """What one layer has of a cache.

    Attributes:
        keys: of earlier tokens.
        values: likewise.
        mixed: earlier inputs of the token mixer, or None.
        lengths: number of earlier tokens in each row.
        capacity: most tokens a row may have.
    """

    keys: kv.Buffer
    values: kv.Buffer
    mixed: kv.Buffer | None
    lengths: Int[Array, "B"]
    capacity: int = struct.field(pytree_node=False)


@struct.dataclass
class Memory:
    """What an encoder found, for the blocks of a decoder to attend to.

    Attributes:
        x: the encoder's final hidden states.
        mask: true where there is something to see.
        keys: of each layer, where they are computed ahead of decoding; else empty.
        values: likewise.
    """

    x: Float[Array, "B S D"]
    mask: Bool[Array, "B S"]
    keys: tuple[Float[Array, "B S K d"], ...] = ()
    values: tuple[Float[Array, "B S K d"], ...] = ()

    def of_layer(self, layer: int) -> "Memory":
        """Returns the memory with the keys and values of one layer alone."""
        one = slice(layer, layer + 1)
        return Memory(self.x, self.mask, self.keys[one], self.values[one])


@struct.dataclass
class Context:
    """What all parts of one layer are told beside their input.

    Attributes:
        rotary: cosines and sines of this layer, or None.
        segments: tokens attend within their own, or None.
        window: number of keys a query sees, or None for all.
        index: which layer this is.
        bias: the model's own addition to attention scores, or None.
        memory: what cross-attention sees, or None.
        visible: keys that each query may see, or None for all that the rest allows.
    """

    rotary: Tables | None
    segments: Int[Array, "B T"] | None
    window: Any
    index: Any
    bias: Float[Array, "B H T S"] | None = None
    memory: Memory | None = None
    visible: Bool[Array, "B T S"] | None = None


class Part(nn.Module):
    """The parameters of one part of a block, as its table says."""

    config: ModelConfig
    table: Mapping[str, Parameter]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """Returns the weights by name, ready to compute with."""
        param_dtype = jnp.dtype(self.config.param_dtype)
        found: dict[str, Any] = {
            name: self._transposed(name)
            or self.param(name, lambda key, p=p: p.initialise(key, param_dtype))
            for name, p in self._table().items()
        }
        return ready(self.config, found)

    def _transposed(self, name: str) -> Transposed | None:
        """Returns a matrix that was transposed, whose shape is not the table's."""
        there = self.has_variable("params", name)
        value = self.get_variable("params", name) if there else None
        return value if isinstance(value, Transposed) else None

    def _table(self) -> dict[str, Parameter]:
        """Returns the table of what there is: matrices may have been joined (`parameters.fuse`)."""
        table = dict(self.table)
        for fused, parts in FUSED.items():
            if not self.has_variable("params", fused):
                continue
            for ending in ("", "_bias"):
                apart = [table.pop(f"{p}{ending}", None) for p in parts]
                if not self.has_variable("params", fused + ending):
                    continue
                (*rows, _), axes = next((p.shape, p.axes) for p in apart if p is not None)
                width = sum(self.table[p].shape[-1] for p in parts)
                table[fused + ending] = Parameter((*rows, width), axes, 0)
        return table


def ready(config: ModelConfig, parameters: Weights) -> dict[str, jax.Array]:
    """Returns a part's parameters as they are computed with: scaled adapters, the compute dtype.

    Norms are applied in float32 and stay as they are.
    """
    found, dtype = dict(parameters), jnp.dtype(config.dtype)
    if config.lora is not None:
        scale = config.lora.scale
        found |= {name: scale * w for name, w in found.items() if name.endswith(lora_b)}
    return {name: w if name in NORMS else w.astype(dtype) for name, w in found.items()}


def norm(
    config: ModelConfig, w: Weights, x: Float[Array, "... D"], name: str = "norm"
) -> Float[Array, "... D"]:
    """Returns x normalised as the model does it, with the weights `name`; computed in float32."""
    wide, scale = x.astype(jnp.float32), w[name].astype(jnp.float32)
    if config.norm_plus_one:
        scale = 1.0 + scale
    if config.norm == "layer":
        wide = wide - wide.mean(axis=-1, keepdims=True)
    squares = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    out = wide * jax.lax.rsqrt(squares + config.norm_eps) * scale
    if f"{name}_bias" in w:
        out = out + w[f"{name}_bias"].astype(jnp.float32)
    return out.astype(x.dtype)


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
    d_x = jnp.einsum("btm,nm->btn", d_y, w)
    if current_mesh_shape().get("sequence", 1) > 1:
        # Rows and positions both split over devices do not merge without moving data.
        return d_x, jnp.einsum("btn,btm->nm", x, d_y)
    # Two dimensions, not three: XLA's CPU backend would write x transposed first, together with
    # whatever elementwise work makes x, reading it column by column (8 % of a training step).
    rows_x, rows_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    return d_x, jax.lax.dot_general(rows_x, rows_y, (((0,), (0,)), ((), ())))


matmul.defvjp(_matmul_forward, _matmul_backward)


def linear(w: Weights, name: str, x: Float[Array, "B T N"]) -> Float[Array, "B T M"]:
    """Returns x times the matrix `name`, plus its adapter and bias where the weights have them."""
    matrix = w[name]
    y = matrix.after(x) if isinstance(matrix, Int8Matrix | Transposed) else matmul(x, matrix)
    if f"{name}{lora_a}" in w:
        y = y + matmul(matmul(x, w[f"{name}{lora_a}"]), w[f"{name}{lora_b}"])
    bias = w.get(f"{name}_bias")
    return y if bias is None else y + bias


def side_by_side(
    w: Weights, fused: str, widths: Sequence[int], x: Float[Array, "B T N"]
) -> list[jax.Array]:
    """Returns x times each of the matrices that may be joined as `fused`; see `linear`.

    Args:
        w: the part's weights.
        fused: a name of `parameters.FUSED`.
        widths: of what each matrix gives.
        x: what they read.
    """
    if fused not in w:
        return [linear(w, name, x) for name in FUSED[fused]]
    return jnp.split(linear(w, fused, x), np.cumsum(widths)[:-1].tolist(), axis=-1)


def heads(
    config: ModelConfig, w: Weights, name: str, x: Float[Array, "B T D"]
) -> Float[Array, "B T H d"]:
    """Returns the heads' queries, keys or values of x."""
    return linear(w, name, x).reshape(*x.shape[:2], -1, config.head_width)


def self_attention(
    config: ModelConfig,
    w: Weights,
    x: Float[Array, "B T D"],
    context: Context,
    edits: Any,
    cached: LayerCache | None,
    site: Site,
    wants_probabilities: bool,
) -> tuple[Float[Array, "B T D"], tuple[kv.Buffer, kv.Buffer] | None]:
    """Returns what attention says of normed x, and the layer's new key and value buffers."""
    B, T, _ = x.shape
    widths = [n * config.head_width for n in (config.n_heads, config.kv_heads, config.kv_heads)]
    found = side_by_side(w, "query_key_value", widths, x)
    q, k, v = (each.reshape(B, T, -1, config.head_width) for each in found)
    if config.qk_norm:
        q, k = norm(config, w, q, "query_norm"), norm(config, w, k, "key_norm")
    if context.rotary is not None:
        q, k = rotate(q, context.rotary), rotate(k, context.rotary)
    q, k, v = site("q", q), site("k", k), site("v", v)

    scores = attn.Scores(config.score_scale, config.attention_softcap, config.causal)
    plain = (
        cached is None
        and context.bias is None
        and context.visible is None
        and not edits.attention_scores
        and not wants_probabilities
    )
    kernel = attn.choose_kernel(
        config.attention,
        plain=plain,
        softcap=scores.softcap is not None,
        dtype=q.dtype,
        length=T,
        window=context.window,
    )
    buffers = None
    if plain and kernel != "dense":
        out = attn.self_attention(q, k, v, context.segments, context.window, scores, kernel)
    else:
        start, keys = jnp.zeros(B, jnp.int32), jnp.broadcast_to(jnp.arange(T), (B, T))
        if cached is not None:
            start = cached.lengths
            buffers, (k, v), keys = _extend(cached, k, v)
        mask = attn.visible_keys(
            start[:, None] + jnp.arange(T),
            keys,
            context.window,
            causal=config.causal,
            query_segments=context.segments,
            key_segments=context.segments,
        )
        if context.visible is not None:
            mask = mask & context.visible[:, None]
        out, probabilities = attn.dense_attention(q, k, v, mask, scores, edits, context.bias)
        if wants_probabilities:
            site("attn_probs", probabilities)
    out = site("attn_heads", out)
    return linear(w, "out", out.reshape(B, T, -1)), buffers


def _extend(cached: LayerCache, k: jax.Array, v: jax.Array):
    """Returns the buffers with new keys and values, their contents, and the place of each slot."""
    B, T = k.shape[:2]
    slots = kv.width(cached.keys)
    ring = slots < cached.capacity
    keys = kv.write(cached.keys, k, cached.lengths, ring=ring)
    values = kv.write(cached.values, v, cached.lengths, ring=ring)
    places = jnp.broadcast_to(jnp.arange(slots), (B, slots))
    if ring:
        places = kv.token_of_slot(slots, cached.lengths + T)
    return (keys, values), (kv.read(keys, k.dtype), kv.read(values, v.dtype)), places


def cross_attention(
    config: ModelConfig,
    w: Weights,
    x: Float[Array, "B T D"],
    memory: Memory,
    edits: Any,
    site: Site,
    wants_probabilities: bool,
) -> Float[Array, "B T D"]:
    """Returns what attention to an encoder's memory says of normed x."""
    q = site("cross_q", heads(config, w, "query", x))
    if memory.keys:
        k, v = memory.keys[0], memory.values[0]
    else:
        k, v = (heads(config, w, name, memory.x) for name in ("key", "value"))
    mask = jnp.broadcast_to(memory.mask[:, None, None], (*q.shape[:1], 1, q.shape[1], k.shape[1]))
    scores = attn.Scores(config.score_scale, config.attention_softcap, causal=False)
    out, probabilities = attn.dense_attention(q, k, v, mask, scores, edits.of_cross_attention())
    if wants_probabilities:
        site("cross_probs", probabilities)
    out = site("cross_heads", out)
    return linear(w, "out", out.reshape(*x.shape[:2], -1))


def feed_forward(
    config: ModelConfig, w: Weights, x: Float[Array, "B T D"], site: Site
) -> Float[Array, "B T D"]:
    """Returns what the feed-forward says of normed x.

    Reference: with a gate, Shazeer 2020, arXiv 2002.05202.
    """
    activation = ACTIVATIONS[config.activation]
    if config.gated:
        gate, up = side_by_side(w, "gate_up", [config.ff_width] * 2, x)
        hidden = activation(gate) * up
    else:
        hidden = activation(linear(w, "up", x))
    return linear(w, "down", site("mlp_hidden", hidden))

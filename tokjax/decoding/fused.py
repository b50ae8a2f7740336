"""A token's pass of a plain decoder in five kernels a layer, for one NVIDIA GPU.

XLA makes fifteen of a layer, and starting those takes as long as reading the weights. What comes
out is the general pass's to rounding. Passes that capture, edit or do anything else than predict
are the general ones.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.models import decode_kernels as kernels
from tokjax.models.cache import Cache
from tokjax.models.config import ModelConfig
from tokjax.models.decode_kernels import Attention, Norm, attend, project
from tokjax.models.layers import ACTIVATIONS, norm
from tokjax.models.parameters import FUSED, Params
from tokjax.models.rotary import rotary_tables
from tokjax.models.transformer import Transformer
from tokjax.models.transposed import Transposed
from tokjax.parallel.rules import current_mesh_shape, current_platform

_HEAD = "transposed_table"
_MATRICES = {"attention": ("query_key_value", "out"), "mlp": ("gate_up", "down")}


def supported(config: ModelConfig) -> bool:
    """Returns whether a model is of the kind that the kernels compute.

    That is a stack of norm, rotary attention to all earlier tokens, norm and gated feed-forward, as
    in Llama and its like, whose widths are multiples of 64.
    """
    d = config.head_width
    widths = (config.d_model, config.n_heads * d, config.kv_heads * d, config.ff_width)
    return (
        kernels.available()
        and (config.norm, config.norm_placement, config.positions) == ("rms", "pre", "rotary")
        and config.gated
        and config.causal
        and config.first_attention_norm
        and config.final_norm
        and config.rotary_width == d
        and d in (32, 64, 128, 256)
        and all(map(kernels.fits, widths))
        and set(config.windows) == {None}
        and not (
            config.norm_bias
            or config.embedding_norm
            or config.parallel_residual
            or config.out_bias
            or config.mlp_bias
            or config.cross_attention
            or config.lora
            or config.mixer
            or config.embedding_width
        )
    )


def pays(config: ModelConfig) -> bool:
    """Returns whether programs written now run on one NVIDIA GPU with tensor cores for bfloat16."""
    if current_platform() != "gpu" or config.dtype != "bfloat16":
        return False
    if math.prod(current_mesh_shape().values()) != 1:
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    return capability.isdigit() and int(capability) >= 8


def prepare(model: Transformer, prepared: Params) -> dict[str, Any]:
    """Returns unstacked and joined parameters with matrices as the kernels read them; those that
    are so stay as they are.
    """
    dtype = jnp.dtype(model.config.dtype)

    def turned(part: Params, names: tuple[str, ...]) -> dict[str, Any]:
        return {n: Transposed.of(w, dtype) if n in names else w for n, w in part.items()}

    layers = tuple(
        {name: turned(part, _MATRICES.get(name, ())) for name, part in layer.items()}
        for layer in prepared["layers"]
    )
    found = {**prepared, "layers": layers}
    table = prepared["embedding"] if model.config.tie_embeddings else prepared["head"]
    if table.dtype != dtype and _HEAD not in prepared:
        found[_HEAD] = jax.lax.optimization_barrier(table.astype(dtype))
    return found


def is_prepared(prepared: Params) -> bool:
    """Returns whether parameters are in the form that `prepare` returns."""
    layers = prepared.get("layers")
    if not isinstance(layers, tuple):
        return False
    return all(
        isinstance(layers[0][p].get(n), Transposed) for p, ns in _MATRICES.items() for n in ns
    )


def fits(cache: Cache) -> bool:
    """Returns whether a cache is one that the kernels read: not of 8-bit integers, not too wide."""
    return isinstance(cache.keys[0], jax.Array) and len(cache.lengths) <= kernels.MOST_ROWS


def step(
    model: Transformer,
    prepared: Params,
    cache: Cache,
    tokens: Int[Array, "B"],
    *,
    interpret: bool = False,
) -> tuple[Cache, Float[Array, "B D"], Float[Array, "B V"] | None]:
    """Returns the cache with one more token a row, final states, and their products with the head.

    Args:
        model: a supported one.
        prepared: what `prepare` returns.
        cache: of earlier tokens.
        tokens: the new ones.
        interpret: runs without a GPU.

    The products are None where the vocabulary's size does not fit the kernels.
    """
    config = model.config
    B, d = tokens.shape[0], config.head_width
    rows = kernels.padded_rows(B)
    x = model.embed(prepared, tokens[:, None])[:, 0]
    x = jnp.pad(x, ((0, rows - B), (0, 0)))
    cosines, sines = rotary_tables(config, cache.lengths[:, None])
    rotary = cosines.reshape(B, d // 2), sines.reshape(B, d // 2)
    rms = Norm(config.norm_eps, config.norm_plus_one)
    settings = Attention(
        config.n_heads,
        config.kv_heads,
        d,
        config.score_scale,
        config.attention_softcap,
        rms if config.qk_norm else None,
    )
    keys, values = [], []
    joined, gated = FUSED
    layers = prepared["layers"]
    buffers: Any = (cache.keys, cache.values)  # plain arrays: `fits`
    # The norm before each product, in the order of the products that read the residual stream.
    weights = [w for layer in layers for w in (layer["attention"]["norm"], layer["mlp"]["norm"])]
    following = iter([(rms, w) for w in (*weights[1:], prepared["norm"])])
    wide = x.astype(jnp.float32)
    scaled = (wide * rms.scale(weights[0])).astype(x.dtype)
    squares = jnp.square(wide).sum(axis=1, keepdims=True)
    for layer, k, v in zip(layers, *buffers, strict=True):
        at, ff = layer["attention"], layer["mlp"]
        bias = at.get(f"{joined}_bias")
        qkv = project(scaled, at[joined], squares=(rms, squares), bias=bias, interpret=interpret)
        norms = (at["query_norm"], at["key_norm"]) if config.qk_norm else None
        heads, k, v = attend(
            settings, qkv, k, v, cache.lengths, rotary, norms, interpret=interpret
        )  # fmt: skip
        x, scaled, squares = project(
            heads, at["out"], residual=x, following=next(following), interpret=interpret
        )
        hidden = project(
            scaled, ff[gated], squares=(rms, squares), gate=ACTIVATIONS[config.activation],
            interpret=interpret,
        )  # fmt: skip
        x, scaled, squares = project(
            hidden, ff["down"], residual=x, following=next(following), interpret=interpret
        )
        keys.append(k)
        values.append(v)
    cache = dataclasses.replace(
        cache, keys=tuple(keys), values=tuple(values), lengths=cache.lengths + 1
    )
    products = None
    if kernels.fits(config.vocabulary):
        table = prepared.get(_HEAD)
        table = model.head(prepared).table if table is None else table
        products = project(
            scaled, Transposed(table), squares=(rms, squares), dtype=jnp.float32,
            interpret=interpret,
        )[:B]  # fmt: skip
    return cache, norm(config, prepared, x[:B]), products

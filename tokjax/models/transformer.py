"""The decoder: embed -> backbone -> unembed, pure functions of (params, inputs)."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from tokjax.errors import nearest
from tokjax.models import attention, parameters
from tokjax.models import cache as kv
from tokjax.models.cache import Cache
from tokjax.models.config import ModelConfig
from tokjax.models.edits import Edits
from tokjax.models.layers import Attention, FeedForward, rms_norm, rotary_tables
from tokjax.models.parameters import Params
from tokjax.parallel.rules import constrain

SITES = (
    "resid_pre",  # [B T D] the residual stream before a block
    "q",  # [B T H d] queries, turned by their positions
    "k",  # [B T K d] keys of this pass, turned by their positions
    "v",  # [B T K d] values of this pass
    "attn_probs",  # [B H T S] attention probabilities
    "attn_out",  # [B T D] what attention adds, layer gate included
    "resid_mid",  # [B T D] between attention and feed-forward
    "mlp_out",  # [B T D] what the feed-forward adds, layer gate included
    "resid_post",  # [B T D] the residual stream behind a block, edits included
)
_ACTIVATION = ("batch", "tokens", None)


@struct.dataclass
class Output:
    """What a backbone returns.

    Attributes:
        x: the final hidden states, normalised, ready for the output head.
        cache: the cache with this pass's keys and values, when one was given.
        captured: site name -> values stacked along a leading layer axis.
    """

    x: Float[Array, "B T D"]
    cache: Cache | None
    captured: dict[str, Any]


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, edits: Edits, cached, *, rotary, segments, want: frozenset[str]):
        """Returns (x, the layer's new cache buffers, what was captured)."""
        captured = {"resid_pre": x}
        attended, buffers, inner = Attention(self.config, name="attention")(
            x, rotary=rotary, segments=segments, cached=cached, bias=edits.attention_bias, want=want
        )
        gate = None
        if edits.layer_gate is not None:
            gate = edits.layer_gate[..., None].astype(x.dtype)
        captured["attn_out"] = attended if gate is None else attended * gate
        x = x + captured["attn_out"]
        captured["resid_mid"] = x
        out = FeedForward(self.config, name="mlp")(x)
        captured["mlp_out"] = out if gate is None else out * gate
        x = x + captured["mlp_out"]
        if edits.residual_add is not None:
            x = x + edits.residual_add.astype(x.dtype)
        if edits.write is not None and edits.write_mask is not None:
            x = jnp.where(edits.write_mask[..., None], edits.write.astype(x.dtype), x)
        x = constrain(x, _ACTIVATION)
        captured["resid_post"] = x
        return x, buffers, {k: v for k, v in (captured | inner).items() if k in want}


@dataclass(frozen=True)
class Transformer:
    """A decoder-only language model; parameters are an argument of every method.

    `params["layers"]` stacked along a leading axis is run by `lax.scan` (compile time does not
    grow with depth); a tuple of per-layer trees (`parameters.unstack`) is unrolled, which decodes
    faster. Caches need the unrolled form.
    """

    config: ModelConfig

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns initial parameters."""
        return parameters.init_parameters(self.config, key)

    def embed(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the embeddings of tokens, in the compute dtype."""
        # Cast behind the look-up: the backward pass then adds up a token's gradients in float32.
        x = jnp.take(params["embedding"], tokens, axis=0)
        return constrain(x.astype(jnp.dtype(self.config.dtype)), _ACTIVATION)

    def unembedding(self, params: Params) -> Float[Array, "V D"]:
        """Returns the output head as a table of one row per token id, in the compute dtype."""
        table = params["embedding"] if self.config.tie_embeddings else params["head"]
        return table.astype(jnp.dtype(self.config.dtype))

    def unembed(self, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits. Training uses `signals.token_stats` instead: no [B, T, V]."""
        return jnp.einsum(
            "btd,vd->btv", x, self.unembedding(params), preferred_element_type=jnp.float32
        )

    def backbone(
        self,
        params: Params,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        edits: Edits | None = None,
        capture: Mapping[str, Callable | None] | frozenset[str] | set[str] = frozenset(),
    ) -> Output:
        """Returns the final hidden states of embeddings x (any embeddings, not only of tokens).

        Args:
            params: stacked or unstacked parameters.
            x: embeddings in the compute dtype.
            positions: rotary positions; default 0, 1, ... from each row's cached length.
            segments: tokens attend within their own segment only; default one segment a row.
            cache: keys and values of earlier tokens; x continues each row from its length.
            edits: interventions; every leaf leads with the layer axis.
            capture: sites to return, stacked over layers; a mapping gives each a function
                applied inside the layer loop (so that [L, B, H, T, T] never has to exist).

        Raises:
            ValueError: an unknown site; a cache with segments, with stacked parameters or with
                fewer slots than tokens; edits of another number of layers.
        """
        reduce = dict(capture) if isinstance(capture, Mapping) else dict.fromkeys(capture)
        for site in reduce:
            if site not in SITES:
                raise ValueError(f"unknown capture site {site!r}.{nearest(site, SITES)}")
        if cache is not None and segments is not None:
            raise ValueError("a cached pass holds one sequence a row: give no segments")
        layers, edits = params["layers"], edits or Edits()
        edits.check(self.config.n_layers)
        B, T, _ = x.shape
        if cache is not None and not isinstance(layers, tuple):
            raise ValueError("a cached pass needs unstacked parameters: parameters.unstack(params)")
        if cache is not None and cache.capacity < T:
            raise ValueError(f"{T} tokens do not fit a cache of {cache.capacity} slots: grow it")
        if positions is None:
            start = jnp.zeros((B, 1), jnp.int32) if cache is None else cache.lengths[:, None]
            positions = start + jnp.arange(T)
        rotary = rotary_tables(positions, self.config.head_width, self.config.rope_theta)
        apply = self._block(rotary, segments, reduce)
        if isinstance(layers, tuple):
            x, cache, captured = _unrolled(apply, layers, x, edits, cache)
        else:

            def step(x, layer):
                # `None` stands for the cache, which a scanned pass does not have.
                x, _, captured = apply(layer[0], x, layer[1], None)
                return x, captured

            x, captured = jax.lax.scan(step, x, (layers, edits), unroll=self.config.unroll)
        return Output(rms_norm(x, params["norm"], self.config.norm_eps), cache, captured)

    def _block(self, rotary, segments, reduce):
        """Returns (weights, x, edits, cached) -> (x, buffers, captured), with remat applied."""
        module, want = Block(self.config, parent=None), frozenset(reduce)

        def apply(weights, x, edits, cached):
            x, buffers, captured = module.apply(  # type: ignore[misc]
                {"params": weights}, x, edits, cached, rotary=rotary, segments=segments, want=want
            )
            return x, buffers, {k: (reduce[k] or (lambda v: v))(v) for k, v in captured.items()}

        if self.config.remat == "block":
            return jax.checkpoint(apply)
        if self.config.remat == "elementwise":
            policies = jax.checkpoint_policies
            keep = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable,
                policies.save_only_these_names(attention.SAVED),
            )
            return jax.checkpoint(apply, policy=keep)
        return apply

    def __call__(
        self, params: Params, tokens: Int[Array, "B T"], **backbone: Any
    ) -> tuple[Float[Array, "B T V"], Output]:
        """Returns (logits, output) of tokens: embed, backbone and unembed in one call."""
        out = self.backbone(params, self.embed(params, tokens), **backbone)
        return self.unembed(params, out.x), out

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """Returns an empty cache."""
        return kv.init_cache(self.config, batch, capacity)

    def abstract_params(self) -> dict[str, Any]:
        """Returns the shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, jax.random.key(0))


def _unrolled(apply, layers, x, edits: Edits, cache: Cache | None):
    keys, values, captured = [], [], []
    for i, weights in enumerate(layers):
        edit = jax.tree.map(lambda e, i=i: e[i], edits)
        cached = None if cache is None else (cache.keys[i], cache.values[i], cache.lengths)
        x, buffers, sites = apply(weights, x, edit, cached)
        captured.append(sites)
        if buffers is not None:
            keys.append(buffers[0])
            values.append(buffers[1])
    if cache is not None:
        lengths = cache.lengths + x.shape[1]
        cache = Cache(keys=tuple(keys), values=tuple(values), lengths=lengths)
    return x, cache, jax.tree.map(lambda *leaves: jnp.stack(leaves), *captured)


def with_vocabulary(config: ModelConfig, vocab_size: int) -> ModelConfig:
    """Returns the configuration with an open vocabulary size filled in."""
    if config.vocab_size is not None:
        return config
    return dataclasses.replace(config, vocab_size=vocab_size)

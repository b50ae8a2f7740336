"""The transformer: embed -> backbone -> unembed, pure functions of (params, inputs)."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.errors import ConfigError, nearest
from tokjax.models import attention, parameters
from tokjax.models import cache as kv
from tokjax.models.cache import Cache
from tokjax.models.config import ModelConfig
from tokjax.models.edits import CROSS_SITES, SITES, Edits, layer_of
from tokjax.models.head import Head, logits
from tokjax.models.layers import (
    Context,
    LayerCache,
    Memory,
    Part,
    cross_attention,
    feed_forward,
    norm,
    self_attention,
)
from tokjax.models.mixing import TokenMixer, with_history
from tokjax.models.parameters import Params
from tokjax.models.relative import relative_bias
from tokjax.models.rotary import Tables, rotary_tables
from tokjax.parallel.rules import constrain

_ACTIVATION = ("batch", "tokens", None)
_NO_WINDOW = np.iinfo(np.int32).max


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
    """One layer: attention, to a memory too if there is one, and feed-forward, each added to the
    residual stream.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        edits: Edits,
        cached: LayerCache | None,
        context: Context,
        want: frozenset[str],
    ) -> tuple[Float[Array, "B T D"], tuple | None, dict[str, jax.Array]]:
        """Returns (x, the layer's new cache buffers, what was captured)."""
        config, captured = self.config, {}
        weights = {
            part: Part(config, table, name=part)()
            for part, table in parameters.block_table(config).items()
        }
        at, ff = weights["attention"], weights["mlp"]
        before, behind = config.norm_placement != "post", config.norm_placement == "both"

        def site(name: str, value: jax.Array) -> jax.Array:
            # Probabilities are edited where they arise; here they are only captured.
            value = value if name.endswith("_probs") else edits.at(name, value)
            if name in want:
                captured[name] = value
            return value

        def added(name: str, w: Mapping[str, jax.Array], value: jax.Array) -> jax.Array:
            if behind:
                value = norm(config, w, value, "post_norm")
            if edits.layer_gate is not None:
                value = value * edits.layer_gate[..., None].astype(value.dtype)
            return site(name, value)

        x = site("resid_pre", x)
        entered = x
        read = norm(config, at, x) if before else x
        if not config.first_attention_norm:
            read = jnp.where(context.index == 0, x, read)
        attended, buffers = self_attention(
            config,
            at,
            read,
            context,
            edits,
            cached,
            site,
            "attn_probs" in want,
        )
        x = x + added("attn_out", at, attended)
        x = site("resid_mid", x if before else norm(config, at, x))
        if context.memory is not None:
            cross = weights["cross"]
            read = norm(config, cross, x) if before else x
            found = cross_attention(
                config, cross, read, context.memory, edits, site, "cross_probs" in want
            )
            x = x + added("cross_out", cross, found)
            x = site("resid_cross", x if before else norm(config, cross, x))
        read = entered if config.parallel_residual else x
        out = feed_forward(config, ff, norm(config, ff, read) if before else read, site)
        x = x + added("mlp_out", ff, out)
        x = x if before else norm(config, ff, x)
        x = constrain(site("resid_post", x), _ACTIVATION)
        if config.mixer is not None:
            mixer = config.mixer
            x, mixed = _mix(mixer, x, weights["mixer"], cached, context, config.n_layers)
            buffers = None if buffers is None else (*buffers, mixed)
        return x, buffers, captured


def _mix(mixer: TokenMixer, x, weights, cached: LayerCache | None, context: Context, n_layers: int):
    """Returns x behind the token mixer, and the cache of the mixer's inputs."""
    before, exists, buffer = None, None, None
    if cached is not None and cached.mixed is not None:
        before, exists = kv.latest(cached.mixed, mixer.reach, cached.lengths, x.dtype)
        before = before[:, :, 0]
        buffer = kv.write(cached.mixed, x[:, :, None], cached.lengths, ring=False)
    inputs, segments = with_history(x, context.segments, before, exists, mixer.reach)
    mixed = mixer(inputs, segments, weights, context.index, n_layers)
    return mixed.astype(x.dtype), buffer


@dataclass(frozen=True)
class Transformer:
    """A stack of blocks between embeddings and an output head; parameters are always arguments.

    `params["layers"]` stacked along a leading axis is run by `lax.scan` (compile time does not
    grow with depth); a tuple of per-layer trees (`parameters.unstack`) is unrolled, which decodes
    faster. Caches need the unrolled form.
    """

    config: ModelConfig

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns initial parameters."""
        return parameters.init_parameters(self.config, key)

    def embed(
        self, params: Params, tokens: Int[Array, "B T"], types: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the embeddings of tokens, in the compute dtype; positions come in the backbone.

        Args:
            params: the model's.
            tokens: ids.
            types: segment types, for models that have them; default 0.

        Raises:
            ConfigError: the ids of this model have no vectors of their own.
        """
        self._check_table()
        dtype = jnp.dtype(self.config.dtype)
        # Cast behind the look-up: the backward pass then adds up a token's gradients in float32.
        x = jnp.take(params["embedding"], tokens, axis=0).astype(dtype)
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, dtype)
        if self.config.embedding_width is not None:
            x = x @ params["embedding_in"].astype(dtype)
        if self.config.token_types:
            types = jnp.zeros_like(tokens) if types is None else types
            x = x + jnp.take(params["type_embedding"], types, axis=0).astype(dtype)
        return constrain(x, _ACTIVATION)

    def head(self, params: Params) -> Head:
        """Returns the output head, in the compute dtype: what `tokjax.signals` score tokens by.

        Raises:
            ConfigError: as `embed`.
        """
        self._check_table()
        table = params["embedding"] if self.config.tie_embeddings else params["head"]
        return Head(
            table.astype(jnp.dtype(self.config.dtype)),
            bias=params["head_bias"] if self.config.head_bias else None,
            softcap=self.config.logit_softcap,
            scale=1.0 if self.config.logit_scale is None else self.config.logit_scale,
        )

    def _check_table(self) -> None:
        if self.config.embedding_rows is not None:
            raise ConfigError(
                f"embedding_rows={self.config.embedding_rows}: this model's ids have no vectors of "
                f"their own. Draw a table first (`Lexinvariant.drawn` of "
                f"tokjax.pretraining.lexinvariant), or train with that objective"
            )

    def unembed(self, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits. Training uses `signals.token_stats` instead: no [B, T, V]."""
        B, T, D = x.shape
        return logits(self.head(params), x.reshape(B * T, D)).reshape(B, T, -1)

    def backbone(
        self,
        params: Params,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        visible: Bool[Array, "B T S"] | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
        edits: Edits | None = None,
        capture: Mapping[str, Callable | None] | frozenset[str] | set[str] = frozenset(),
    ) -> Output:
        """Returns the final hidden states of embeddings x (any embeddings, not only of tokens).

        Args:
            params: stacked or unstacked parameters.
            x: embeddings in the compute dtype.
            positions: of the tokens; default 0, 1, ... from each row's cached length.
            segments: tokens attend within their own segment only; default one segment a row. For
                padded rows see `padding`.
            visible: keys that each query may see, among those that the model and the segments let
                it see; the batch axis may be 1. Beside a cache S counts its slots. Each query must
                be left a key, such as its own.
            memory: what an encoder found, for models with cross-attention.
            cache: keys and values of earlier tokens; x continues each row from its length.
            edits: interventions; every leaf leads with the layer axis.
            capture: sites to return, stacked over layers; a mapping gives each a function
                applied inside the layer loop (so that [L, B, H, T, T] never has to exist).

        Raises:
            ValueError: an unknown site; a cache with segments, with stacked parameters or with
                fewer slots than tokens; edits of another number of layers; more tokens than
                learned positions; `visible` of another shape.
        """
        config, edits = self.config, edits or Edits()
        sites = SITES + CROSS_SITES if config.cross_attention else SITES
        edits.check(config.n_layers, sites)
        reduce = dict(capture) if isinstance(capture, Mapping) else dict.fromkeys(capture)
        for site in reduce:
            if site not in sites:
                raise ValueError(f"unknown capture site {site!r}.{nearest(site, sites)}")
        if config.cross_attention != (memory is not None):
            raise ValueError("a memory is for models with cross_attention, and they need one")
        B, T, _ = x.shape
        if cache is not None:
            self._check_cache(params, cache, segments, T, visible is not None)
        if visible is not None:
            self._check_visible(visible, B, T, T if cache is None else cache.capacity)
        if positions is None:
            start = jnp.zeros((B, 1), jnp.int32) if cache is None else cache.lengths[:, None]
            positions = start + jnp.arange(T)
        x = self._enter(params, x, positions)
        bias = self._relative_bias(params, T, cache)
        layers = _Layers(config, positions, segments, reduce, bias, memory, visible)
        if isinstance(params["layers"], tuple):
            x, cache, captured = layers.unrolled(params["layers"], x, edits, cache)
        else:
            x, captured = layers.scanned(params["layers"], x, edits)
        if config.final_norm:
            x = norm(config, params, x)
        if config.embedding_width is not None:
            x = x @ params["embedding_out"].astype(x.dtype)
        return Output(x, cache, captured)

    def _check_visible(self, visible: Any, rows: int, queries: int, keys: int) -> None:
        if visible.ndim != 3 or visible.shape[0] not in (1, rows):
            raise ValueError(f"visible {visible.shape} must be [B, T, S] for {rows} rows")
        if visible.shape[1:] != (queries, keys):
            raise ValueError(
                f"visible {visible.shape} must say of each of {queries} queries which of {keys} "
                f"keys it sees"
            )
        if self.config.sliding_window is not None:
            raise ValueError(
                f"visible and sliding_window={self.config.sliding_window} cannot be combined: "
                f"leave far keys out of visible instead"
            )

    def _check_cache(
        self, params: Params, cache: Cache, segments: Any, tokens: int, masked: bool
    ) -> None:
        if segments is not None:
            raise ValueError("a cached pass holds one sequence a row: give no segments")
        if not isinstance(params["layers"], tuple):
            raise ValueError("a cached pass needs unstacked parameters: parameters.unstack(params)")
        if not self.config.causal and not masked:
            raise ValueError(
                "an encoder's tokens see each other: beside a cache it needs visible, which says "
                "which slots each of them sees"
            )
        if cache.capacity < tokens:
            raise ValueError(
                f"{tokens} tokens do not fit a cache of {cache.capacity} slots: grow it"
            )
        if self.config.sliding_window is not None and tokens > cache.chunk:
            raise ValueError(
                f"{tokens} tokens in one pass would overwrite keys that they see: this cache was "
                f"made for {cache.chunk} at a time; give init_cache chunk={tokens}"
            )
        if self.config.mixer is not None and not cache.mixed:
            raise ValueError("this model has a token mixer: give init_cache mixer=True")

    def _enter(self, params: Params, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns what the first block reads: embeddings with learned positions, normalised."""
        config = self.config
        if config.positions == "learned":
            if x.shape[1] > config.max_positions:
                raise ValueError(
                    f"{x.shape[1]} tokens, but the model has learned "
                    f"max_positions={config.max_positions} positions: shorten the input"
                )
            rows = positions + config.position_offset
            x = x + jnp.take(params["position_embedding"], rows, axis=0).astype(x.dtype)
        return norm(config, params, x, "embedding_norm") if config.embedding_norm else x

    def _relative_bias(self, params: Params, tokens: int, cache: Cache | None):
        """Returns the bias of relative positions on the scores of all layers, or None."""
        if self.config.positions != "relative":
            return None
        queries, slots = jnp.arange(tokens)[None], tokens
        if cache is not None:
            queries, slots = cache.lengths[:, None] + queries, cache.capacity
        return relative_bias(self.config, params["relative_bias"], queries, slots)

    def __call__(
        self, params: Params, tokens: Int[Array, "B T"], **backbone: Any
    ) -> tuple[Float[Array, "B T V"], Output]:
        """Returns (logits, output) of tokens: embed, backbone and unembed in one call."""
        out = self.backbone(params, self.embed(params, tokens), **backbone)
        return self.unembed(params, out.x), out

    def init_cache(self, batch: int, capacity: int, dtype: Any = None, *, chunk: int = 1) -> Cache:
        """Returns an empty cache; see `cache.init_cache`."""
        mixer = self.config.mixer is not None
        return kv.init_cache(self.config, batch, capacity, dtype, chunk=chunk, mixer=mixer)

    def abstract_params(self) -> dict[str, Any]:
        """Returns the shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, jax.random.key(0))


class _Layers:
    """The blocks of one pass, run one after the other or as a scan."""

    def __init__(
        self,
        config: ModelConfig,
        positions,
        segments,
        reduce: Mapping[str, Any],
        bias,
        memory: Memory | None,
        visible,
    ):
        self.config, self.segments, self.reduce = config, segments, reduce
        self.bias, self.memory, self.visible = bias, memory, visible
        self.module = Block(config, parent=None)
        self.tables: dict[bool, Tables | None] = {False: None, True: None}
        if config.positions == "rotary":
            self.tables[False] = rotary_tables(config, positions)
            if config.rope_local_theta is not None:
                self.tables[True] = rotary_tables(config, positions, local=True)

    def context(self, layer: int) -> Context:
        """Returns what a block is told whose index is known while the program is written."""
        window = self.config.windows[layer]
        memory = None if self.memory is None else self.memory.of_layer(layer)
        rotary = self._rotary(window is not None)
        return Context(rotary, self.segments, window, layer, self.bias, memory, self.visible)

    def _rotary(self, local: bool):
        return self.tables[local and self.config.rope_local_theta is not None]

    def apply(self, weights, x, edits: Edits, cached: LayerCache | None, context: Context):
        """Returns (x, the layer's new cache buffers, what was captured), with remat applied."""
        want, reduce = frozenset(self.reduce), self.reduce

        def run(weights, x, edits, cached, rotary, window, index, bias, memory):
            given = Context(rotary, self.segments, window, index, bias, memory, self.visible)
            out: Any = self.module.apply({"params": weights}, x, edits, cached, given, want)
            x, buffers, captured = out
            return x, buffers, {k: (reduce[k] or (lambda v: v))(v) for k, v in captured.items()}

        # A window that is a number stays one inside the checkpoint.
        static = () if isinstance(context.window, jax.Array) else (5,)
        if self.config.remat == "block":
            run = jax.checkpoint(run, static_argnums=static)
        elif self.config.remat == "elementwise":
            policies = jax.checkpoint_policies
            keep = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable,
                policies.save_only_these_names(attention.SAVED),
            )
            run = jax.checkpoint(run, policy=keep, static_argnums=static)
        c = context
        return run(weights, x, edits, cached, c.rotary, c.window, c.index, c.bias, c.memory)

    def scanned(self, layers, x, edits: Edits):
        """Returns (x, captured) behind a scan over stacked layers."""
        config = self.config
        if self.memory is not None and self.memory.keys:
            raise ValueError("a memory with keys needs unstacked parameters: parameters.unstack")
        windows = set(config.windows)
        uniform = len(windows) == 1
        local = np.array([w is not None for w in config.windows])
        sizes = np.array([_NO_WINDOW if w is None else w for w in config.windows], np.int32)

        def step(x, layer):
            weights, edit, index, size, is_local = layer
            if uniform:
                rotary, window = self._rotary(bool(local[0])), config.windows[0]
            else:
                rotary, window = self._rotary(False), size
                if config.rope_local_theta is not None:
                    rotary = jax.tree.map(
                        lambda a, b: jnp.where(is_local, a, b), self.tables[True], rotary
                    )
            context = Context(
                rotary, self.segments, window, index, self.bias, self.memory, self.visible
            )
            # `None` stands for the cache, which a scanned pass does not have.
            x, _, captured = self.apply(weights, x, edit, None, context)
            return x, captured

        over = (layers, edits, np.arange(config.n_layers, dtype=np.int32), sizes, local)
        return jax.lax.scan(step, x, jax.tree.map(jnp.asarray, over), unroll=config.unroll)

    def unrolled(self, layers, x, edits: Edits, cache: Cache | None):
        """Returns (x, cache, captured) behind per-layer weights."""
        keys, values, mixed, captured = [], [], [], []
        for i, weights in enumerate(layers):
            cached = None
            if cache is not None:
                inputs = cache.mixed[i] if cache.mixed else None
                cached = LayerCache(
                    cache.keys[i], cache.values[i], inputs, cache.lengths, cache.capacity
                )
            x, buffers, sites = self.apply(weights, x, layer_of(edits, i), cached, self.context(i))
            captured.append(sites)
            if buffers is not None:
                keys.append(buffers[0])
                values.append(buffers[1])
                mixed += buffers[2:]
        if cache is not None:
            cache = dataclasses.replace(
                cache,
                keys=tuple(keys),
                values=tuple(values),
                mixed=tuple(mixed),
                lengths=cache.lengths + x.shape[1],
            )
        return x, cache, jax.tree.map(lambda *leaves: jnp.stack(leaves), *captured)


def padding(mask: Bool[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Returns (positions, segments) of rows padded on either side; pass both to `backbone`.

    Args:
        mask: true where there is a token.
    """
    kept = mask.astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(kept, axis=1) - 1, 0), kept


def with_vocabulary(config: ModelConfig, vocab_size: int) -> ModelConfig:
    """Returns the configuration with an open vocabulary size filled in."""
    if config.vocab_size is not None:
        return config
    return dataclasses.replace(config, vocab_size=vocab_size)

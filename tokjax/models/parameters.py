"""One table per model: shape, logical axes and initialiser of each parameter.

Initialisation, sharding, restoring and conversion all read this table, so they cannot disagree.
Parameters are a nested dict; the blocks' parameters are stacked along a leading layer axis.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from tokjax.models.config import Config, EncDecConfig, ModelConfig
from tokjax.models.lora import A as lora_a
from tokjax.models.lora import B as lora_b
from tokjax.models.lora import LoraConfig

Params = Mapping[str, Any]

# Applied in float32 whatever the compute dtype is.
_NORMS = ("norm", "post_norm", "query_norm", "key_norm", "embedding_norm")
NORMS = frozenset([*_NORMS, *(f"{name}_bias" for name in _NORMS)])


@dataclass(frozen=True)
class Parameter:
    """What is known of one parameter before it has a value.

    Attributes:
        shape: without the layer axis.
        axes: the logical name of each axis, mapped to mesh axes by `tokjax.parallel.rules`.
        std: standard deviation of the initial normal distribution; None means all ones, 0 zeros.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float | None

    def initialise(self, key: jax.Array, dtype: Any) -> jax.Array:
        """Returns an initial value."""
        if self.std is None:
            return jnp.ones(self.shape, dtype)
        if self.std == 0:
            return jnp.zeros(self.shape, dtype)
        return (self.std * jax.random.normal(key, self.shape)).astype(dtype)


def _norm(config: ModelConfig, name: str = "norm", width: int | None = None) -> dict:
    shape = (config.d_model if width is None else width,)
    found = {name: Parameter(shape, (None,), 0 if config.norm_plus_one else None)}
    if config.norm_bias:
        found[f"{name}_bias"] = Parameter(shape, (None,), 0)
    return found


def block_table(config: ModelConfig) -> dict[str, dict[str, Parameter]]:
    """Returns the parameters of one block, by part and name."""
    D, d, F = config.d_model, config.head_width, config.ff_width
    H, K = config.n_heads * d, config.kv_heads * d
    # Matrices that write to the residual stream start smaller, so that its variance does not
    # grow with depth (Radford et al. 2019, section 2.3).
    depth = (2 * config.n_layers) ** -0.5

    def matrix(rows: int, columns: int, axes: tuple, scale: float = 1.0) -> Parameter:
        return Parameter((rows, columns), axes, scale * rows**-0.5)

    def bias(width: int, axis: str | None) -> Parameter:
        return Parameter((width,), (axis,), 0)

    def attention_table() -> dict[str, Parameter]:
        found = _norm(config) | {
            "query": matrix(D, H, ("embed", "heads")),
            "key": matrix(D, K, ("embed", "kv_heads")),
            "value": matrix(D, K, ("embed", "kv_heads")),
            "out": matrix(H, D, ("heads", "embed"), depth),
        }
        if config.attention_bias:
            found |= {"query_bias": bias(H, "heads"), "value_bias": bias(K, "kv_heads")}
        if config.attention_bias and config.key_bias:
            found["key_bias"] = bias(K, "kv_heads")
        if config.out_bias:
            found["out_bias"] = bias(D, None)
        if config.norm_placement == "both":
            found |= _norm(config, "post_norm")
        return found

    attention = attention_table()
    mlp = _norm(config) | {
        "up": matrix(D, F, ("embed", "mlp")),
        "down": matrix(F, D, ("mlp", "embed"), depth),
    }
    if config.gated:
        mlp["gate"] = matrix(D, F, ("embed", "mlp"))
    if config.qk_norm:
        plain = 0 if config.norm_plus_one else None
        attention |= {name: Parameter((d,), (None,), plain) for name in ("query_norm", "key_norm")}
    if config.mlp_bias:
        mlp |= {"up_bias": bias(F, "mlp"), "down_bias": bias(D, None)}
        if config.gated:
            mlp["gate_bias"] = bias(F, "mlp")
    if config.norm_placement == "both":
        mlp |= _norm(config, "post_norm")
    blocks = {"attention": attention, "mlp": mlp}
    if config.cross_attention:
        blocks["cross"] = attention_table()
    if config.lora is not None:
        blocks = {part: _with_adapters(table, config.lora) for part, table in blocks.items()}
    if config.mixer is not None:
        blocks["mixer"] = dict(config.mixer.parameters(D))
    return blocks


def _with_adapters(table: dict[str, Parameter], lora: LoraConfig) -> dict[str, Parameter]:
    """Returns a part's parameters with the adapters of its targets."""
    found = dict(table)
    for name in lora.targets:
        if name in table:
            (rows, columns), (row_axis, column_axis) = table[name].shape, table[name].axes
            # As in the library peft: A uniform with variance 1 / (3 fan in), B zero.
            std = (3 * rows) ** -0.5
            found[f"{name}{lora_a}"] = Parameter((rows, lora.rank), (row_axis, None), std)
            found[f"{name}{lora_b}"] = Parameter((lora.rank, columns), (None, column_axis), 0)
    return found


def table(config: Config) -> dict[str, Any]:
    """Returns the whole model's parameters; those under `layers` gain a leading layer axis."""
    if isinstance(config, EncDecConfig):
        encoder = _stack_table(config.encoder)
        if config.frame_width is not None:
            encoder["frames"] = _frames_table(config.frame_width, config.encoder.d_model)
        return {"encoder": encoder, "decoder": table(config.decoder)}
    V, E = config.vocabulary, config.table_width
    embedding = ("vocab", "embed")
    rows, tree = config.embedding_rows, _stack_table(config)
    if rows is None:
        tree["embedding"] = Parameter((V, E), embedding, config.init_scale)
    elif rows:
        tree["embedding"] = Parameter((rows, E), (None, "embed"), config.init_scale)
    if not config.tie_embeddings:
        tree["head"] = Parameter((V, E), embedding, E**-0.5)
    if config.head_bias:
        tree["head_bias"] = Parameter((V,), ("vocab",), 0)
    return tree


def _stack_table(config: ModelConfig) -> dict[str, Any]:
    """Returns the parameters between the embedding table and the output head."""
    D, E, std = config.d_model, config.table_width, config.init_scale
    tree: dict[str, Any] = {"layers": block_table(config)}
    if config.positions == "learned":
        rows = config.max_positions + config.position_offset
        tree["position_embedding"] = Parameter((rows, D), (None, "embed"), std)
    if config.positions == "relative":
        shape = (config.relative_buckets, config.n_heads)
        tree["relative_bias"] = Parameter(shape, (None, "heads"), D**-0.5)
    if config.token_types:
        tree["type_embedding"] = Parameter((config.token_types, D), (None, "embed"), std)
    if config.embedding_norm:
        tree |= _norm(config, "embedding_norm")
    if config.final_norm:
        tree |= _norm(config)
    if config.embedding_width is not None:
        tree["embedding_in"] = Parameter((E, D), (None, "embed"), E**-0.5)
        tree["embedding_out"] = Parameter((D, E), ("embed", None), D**-0.5)
    if config.mlm_head is not None:
        tree["mlm"] = _norm(config) | {"dense": Parameter((D, D), ("embed", None), D**-0.5)}
        if config.mlm_bias:
            tree["mlm"]["dense_bias"] = Parameter((D,), (None,), 0)
    return tree


def _frames_table(width: int, D: int) -> dict[str, Parameter]:
    """Returns the parameters of two convolutions over three frames each."""
    return {
        "first": Parameter((3, width, D), (None, None, "embed"), (3 * width) ** -0.5),
        "first_bias": Parameter((D,), (None,), 0),
        "second": Parameter((3, D, D), (None, None, "embed"), (3 * D) ** -0.5),
        "second_bias": Parameter((D,), (None,), 0),
    }


def map_table(config: Config, visit: Callable[[str, Parameter, int], Any]) -> dict[str, Any]:
    """Returns the tree of `visit(path, parameter, layers)` over the table.

    `layers` is the number of layers that the parameter is stacked over, 0 if it is not.
    """

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Parameter):
            stacked = (n for at, n in config.depths.items() if path.startswith(f"{at}/"))
            return visit(path, node, next(stacked, 0))
        return {name: walk(child, f"{path}/{name}".lstrip("/")) for name, child in node.items()}

    return walk(table(config), "")


def init_parameters(config: Config, key: jax.Array) -> dict[str, Any]:
    """Returns initial parameters. Each one's values depend on the key and its own path only."""
    dtype = jnp.dtype(config.param_dtype)

    def build(path: str, parameter: Parameter, layers: int) -> jax.Array:
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        if not layers:
            return parameter.initialise(own_key, dtype)
        layer_keys = jax.random.split(own_key, layers)
        return jax.vmap(lambda k: parameter.initialise(k, dtype))(layer_keys)

    return map_table(config, build)


def logical_axes(config: Config) -> dict[str, Any]:
    """Returns the tree of logical axes, the layer axis of stacked parameters included."""
    return map_table(
        config, lambda path, p, layers: ("layers", *p.axes) if layers else tuple(p.axes)
    )


def count_parameters(config: Config) -> dict[str, int]:
    """Returns the number of parameters by part: embedding, attention, mlp, norms, head, ...

    Those of an encoder and a decoder are added up.
    """
    counts: dict[str, int] = {}

    def add(path: str, parameter: Parameter, layers: int) -> None:
        names = [n for n in path.split("/") if n not in ("encoder", "decoder", "layers")]
        part = "norms" if names[-1] in NORMS else names[0]
        size = 1
        for n in parameter.shape:
            size *= n
        counts[part] = counts.get(part, 0) + size * (layers or 1)

    map_table(config, add)
    return counts


def unstack(params: Params) -> dict[str, Any]:
    """Returns the parameters with `layers` as a tuple of per-layer trees, for unrolled decoding."""

    def apart(layers: Any) -> tuple:
        if isinstance(layers, tuple):
            return layers
        n_layers = jax.tree.leaves(layers)[0].shape[0]
        return tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(n_layers))

    return _each_stack(params, apart)


def stack(params: Params) -> dict[str, Any]:
    """Returns the parameters with `layers` stacked along a leading axis; undoes `unstack`."""

    def together(layers: Any) -> Any:
        if not isinstance(layers, tuple):
            return layers
        return jax.tree.map(lambda *ws: jnp.stack(ws), *layers)

    return _each_stack(params, together)


# Matrices that read the same input, and what they are called where they are joined to one.
FUSED: Mapping[str, tuple[str, ...]] = {
    "query_key_value": ("query", "key", "value"),
    "gate_up": ("gate", "up"),
}


def fuse(params: Params) -> dict[str, Any]:
    """Returns the parameters with matrices that read the same input joined to one: fewer and
    larger products, which decoding is faster by.

    Every function of the model takes them. Matrices with adapters stay apart, and so do those of
    cross-attention. Training and checkpoints want them apart.
    """

    def joined(part: Params) -> dict[str, Any]:
        found = dict(part)
        for name, parts in FUSED.items():
            if not all(p in found for p in parts) or any(f"{p}{lora_a}" in found for p in parts):
                continue
            matrices = [found.pop(p) for p in parts]
            biases = [found.pop(f"{p}_bias", None) for p in parts]
            if any(bias is not None for bias in biases):
                widths = [jax.tree.leaves(m)[0].shape[-1] for m in matrices]
                like = next(bias for bias in biases if bias is not None)
                zeros = [jnp.zeros((*like.shape[:-1], width), like.dtype) for width in widths]
                filled = [z if b is None else b for z, b in zip(zeros, biases, strict=True)]
                found[f"{name}_bias"] = jnp.concatenate(filled, axis=-1)
            found[name] = jax.tree.map(lambda *m: jnp.concatenate(m, axis=-1), *matrices)
        return found

    def of_block(block: Params) -> dict[str, Any]:
        return {n: joined(w) if n in ("attention", "mlp") else w for n, w in block.items()}

    def of_layers(layers: Any) -> Any:
        return tuple(map(of_block, layers)) if isinstance(layers, tuple) else of_block(layers)

    return _each_stack(params, of_layers)


def _each_stack(params: Params, change: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns the parameters with the layers changed, those of an encoder and a decoder each."""
    if "layers" in params:
        return {**params, "layers": change(params["layers"])}
    return {name: _each_stack(stack, change) for name, stack in params.items()}

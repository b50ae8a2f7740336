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

from tokjax.models.config import ModelConfig

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

    attention = _norm(config) | {
        "query": matrix(D, H, ("embed", "heads")),
        "key": matrix(D, K, ("embed", "kv_heads")),
        "value": matrix(D, K, ("embed", "kv_heads")),
        "out": matrix(H, D, ("heads", "embed"), depth),
    }
    mlp = _norm(config) | {
        "up": matrix(D, F, ("embed", "mlp")),
        "down": matrix(F, D, ("mlp", "embed"), depth),
    }
    if config.gated:
        mlp["gate"] = matrix(D, F, ("embed", "mlp"))
    if config.attention_bias:
        attention |= {
            "query_bias": bias(H, "heads"),
            "key_bias": bias(K, "kv_heads"),
            "value_bias": bias(K, "kv_heads"),
        }
    if config.out_bias:
        attention["out_bias"] = bias(D, None)
    if config.qk_norm:
        plain = 0 if config.norm_plus_one else None
        attention |= {name: Parameter((d,), (None,), plain) for name in ("query_norm", "key_norm")}
    if config.mlp_bias:
        mlp |= {"up_bias": bias(F, "mlp"), "down_bias": bias(D, None)}
        if config.gated:
            mlp["gate_bias"] = bias(F, "mlp")
    if config.norm_placement == "both":
        attention |= _norm(config, "post_norm")
        mlp |= _norm(config, "post_norm")
    blocks = {"attention": attention, "mlp": mlp}
    if config.mixer is not None:
        blocks["mixer"] = dict(config.mixer.parameters(D))
    return blocks


def table(config: ModelConfig) -> dict[str, Any]:
    """Returns the whole model's parameters; those under `layers` gain a leading layer axis."""
    D, V, E = config.d_model, config.vocabulary, config.table_width
    embedding = ("vocab", "embed")
    std = config.init_scale
    tree: dict[str, Any] = {
        "embedding": Parameter((V, E), embedding, std),
        "layers": block_table(config),
    }
    if config.positions == "learned":
        rows = config.max_positions + config.position_offset
        tree["position_embedding"] = Parameter((rows, D), (None, "embed"), std)
    if config.token_types:
        tree["type_embedding"] = Parameter((config.token_types, D), (None, "embed"), std)
    if config.embedding_norm:
        tree |= _norm(config, "embedding_norm")
    if config.final_norm:
        tree |= _norm(config)
    if config.embedding_width is not None:
        tree["embedding_in"] = Parameter((E, D), (None, "embed"), E**-0.5)
        tree["embedding_out"] = Parameter((D, E), ("embed", None), D**-0.5)
    if not config.tie_embeddings:
        tree["head"] = Parameter((V, E), embedding, E**-0.5)
    if config.head_bias:
        tree["head_bias"] = Parameter((V,), ("vocab",), 0)
    return tree


def map_table(config: ModelConfig, visit: Callable[[str, Parameter, bool], Any]) -> dict[str, Any]:
    """Returns the tree of `visit(path, parameter, stacked)` over the table."""

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Parameter):
            return visit(path, node, path.startswith("layers/"))
        return {name: walk(child, f"{path}/{name}".lstrip("/")) for name, child in node.items()}

    return walk(table(config), "")


def init_parameters(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Returns initial parameters. Each one's values depend on the key and its own path only."""
    dtype = jnp.dtype(config.param_dtype)

    def build(path: str, parameter: Parameter, stacked: bool) -> jax.Array:
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        if not stacked:
            return parameter.initialise(own_key, dtype)
        layer_keys = jax.random.split(own_key, config.n_layers)
        return jax.vmap(lambda k: parameter.initialise(k, dtype))(layer_keys)

    return map_table(config, build)


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """Returns the tree of logical axes, the layer axis of stacked parameters included."""
    return map_table(
        config, lambda path, p, stacked: ("layers", *p.axes) if stacked else tuple(p.axes)
    )


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Returns the number of parameters by part: embedding, attention, mlp, norms, head."""
    counts: dict[str, int] = {}

    def add(path: str, parameter: Parameter, stacked: bool) -> None:
        names = path.split("/")
        part = "norms" if names[-1] in NORMS else names[1] if stacked else names[0]
        size = 1
        for n in parameter.shape:
            size *= n
        counts[part] = counts.get(part, 0) + size * (config.n_layers if stacked else 1)

    map_table(config, add)
    return counts


def unstack(params: Params) -> dict[str, Any]:
    """Returns the parameters with `layers` as a tuple of per-layer trees, for unrolled decoding."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return dict(params)
    n_layers = jax.tree.leaves(layers)[0].shape[0]
    per_layer = tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(n_layers))
    return {**params, "layers": per_layer}


def stack(params: Params) -> dict[str, Any]:
    """Returns the parameters with `layers` stacked along a leading axis; undoes `unstack`."""
    layers = params["layers"]
    if not isinstance(layers, tuple):
        return dict(params)
    return {**params, "layers": jax.tree.map(lambda *ws: jnp.stack(ws), *layers)}

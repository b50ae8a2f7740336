"""One table per model: shape, logical axes, initialiser and Hugging Face name of each parameter.

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


@dataclass(frozen=True)
class Parameter:
    """What is known of one parameter before it has a value.

    Attributes:
        shape: without the layer axis.
        axes: the logical name of each axis, mapped to mesh axes by `tokjax.parallel.rules`.
        std: standard deviation of the initial normal distribution; None means all ones, 0 zeros.
        hf_name: name of the tensor in a Hugging Face checkpoint; `{layer}` stands for the block.
        transposed: Hugging Face stores (output, input), tokjax (input, output).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float | None
    hf_name: str
    transposed: bool = False

    def initialise(self, key: jax.Array, dtype: Any) -> jax.Array:
        """Returns an initial value."""
        if self.std is None:
            return jnp.ones(self.shape, dtype)
        if self.std == 0:
            return jnp.zeros(self.shape, dtype)
        return (self.std * jax.random.normal(key, self.shape)).astype(dtype)


def block_table(config: ModelConfig) -> dict[str, dict[str, Parameter]]:
    """Returns the parameters of one block, by part and name."""
    D, d, F = config.d_model, config.head_width, config.ff_width
    H, K = config.n_heads * d, config.kv_heads * d
    # Matrices that write to the residual stream start smaller, so that its variance does not
    # grow with depth (Radford et al. 2019, section 2.3).
    depth = (2 * config.n_layers) ** -0.5
    at, ff = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"

    def norm(name: str) -> Parameter:
        return Parameter((D,), (None,), None, f"model.layers.{{layer}}.{name}.weight")

    def matrix(rows, columns, axes, name, scale=1.0) -> Parameter:
        return Parameter((rows, columns), axes, scale * rows**-0.5, f"{name}.weight", True)

    attention = {
        "norm": norm("input_layernorm"),
        "query": matrix(D, H, ("embed", "heads"), f"{at}.q_proj"),
        "key": matrix(D, K, ("embed", "kv_heads"), f"{at}.k_proj"),
        "value": matrix(D, K, ("embed", "kv_heads"), f"{at}.v_proj"),
        "out": matrix(H, D, ("heads", "embed"), f"{at}.o_proj", depth),
    }
    if config.attention_bias:
        attention |= {
            "query_bias": Parameter((H,), ("heads",), 0, f"{at}.q_proj.bias"),
            "key_bias": Parameter((K,), ("kv_heads",), 0, f"{at}.k_proj.bias"),
            "value_bias": Parameter((K,), ("kv_heads",), 0, f"{at}.v_proj.bias"),
        }
    mlp = {
        "norm": norm("post_attention_layernorm"),
        "gate": matrix(D, F, ("embed", "mlp"), f"{ff}.gate_proj"),
        "up": matrix(D, F, ("embed", "mlp"), f"{ff}.up_proj"),
        "down": matrix(F, D, ("mlp", "embed"), f"{ff}.down_proj", depth),
    }
    return {"attention": attention, "mlp": mlp}


def table(config: ModelConfig) -> dict[str, Any]:
    """Returns the whole model's parameters; those under `layers` gain a leading layer axis."""
    D, V = config.d_model, config.vocabulary
    embedding = ("vocab", "embed")
    tree: dict[str, Any] = {
        "embedding": Parameter((V, D), embedding, config.init_scale, "model.embed_tokens.weight"),
        "layers": block_table(config),
        "norm": Parameter((D,), (None,), None, "model.norm.weight"),
    }
    if not config.tie_embeddings:
        tree["head"] = Parameter((V, D), embedding, D**-0.5, "lm_head.weight")
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
        part = "norms" if names[-1] == "norm" else names[1] if stacked else names[0]
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

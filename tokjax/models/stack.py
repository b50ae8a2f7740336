"""A second stack of blocks on states of an encoder, trained beside it and not a part of it.

Decoders of masked autoencoders and heads that unmask are such stacks. They have no embeddings and
no table of positions: whoever uses one adds what it needs.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.errors import ConfigError
from tokjax.models import parameters
from tokjax.models.config import ModelConfig
from tokjax.models.encoder import Encoder
from tokjax.models.parameters import Params


@dataclass(frozen=True)
class StackConfig:
    """The shape of a second stack; all else (norms, activation, dtypes) is the model's."""

    n_layers: int = 4  # blocks; 0 leaves states as they are
    d_model: int | None = None  # width; None: that of the states
    n_heads: int | None = None  # heads of attention; None: as many as the model has
    # feed-forward width; None: the model's, or where the widths differ the usual multiple
    d_ff: int | None = None
    # whether its attention knows of distances, by rotary positions; a stack made by `own_stack`
    # always does
    rotary: bool = False

    def __post_init__(self):
        if self.n_layers < 0:
            raise ConfigError(f"n_layers={self.n_layers} of a second stack must not be negative")

    def of(self, model: ModelConfig) -> ModelConfig:
        """Returns the configuration of the stack on states of a model.

        Raises:
            ConfigError: the shape is impossible.
        """
        width = model.table_width if self.d_model is None else self.d_model
        same = width == model.d_model
        return dataclasses.replace(
            model,
            vocab_size=1,
            d_model=width,
            n_layers=max(self.n_layers, 1),
            n_heads=model.n_heads if self.n_heads is None else self.n_heads,
            n_kv_heads=None,
            head_dim=None,
            d_ff=self.d_ff if self.d_ff is not None or not same else model.ff_width,
            causal=False,
            cross_attention=False,
            positions="rotary" if self.rotary else "none",
            sliding_window=None,
            window_pattern=(),
            first_attention_norm=True,
            embedding_norm=False,
            embedding_rows=None,
            embedding_width=None,
            embedding_scale=None,
            tie_embeddings=True,
            token_types=0,
            head_bias=False,
            mlm_head=None,
            lora=None,
            mixer=None,
            unroll=1,
            base=None,
        )


def init_stack(shape: StackConfig, model: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Returns initial parameters of a stack on states of a model.

    The layers stay apart, so that weight decay tells matrices from norms.

    Args:
        shape: of the stack.
        model: whose states it reads.
        key: of random values.
    """
    if not shape.n_layers:
        return {"layers": {}}
    found = parameters.unstack(parameters.init_parameters(shape.of(model), key))
    norms = {name: found[name] for name in ("norm", "norm_bias") if name in found}
    return {"layers": {str(i): layer for i, layer in enumerate(found["layers"])}, **norms}


def run_stack(
    shape: StackConfig,
    model: ModelConfig,
    params: Params,
    x: Float[Array, "B T D"],
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Returns states behind a stack, whose tokens all see each other within their segment.

    Args:
        shape: of the stack.
        model: whose states it reads.
        params: what `init_stack` returns.
        x: states of the stack's width.
        segments: of the tokens; default one a row.
    """
    if not shape.n_layers:
        return x
    layers = tuple(params["layers"][str(i)] for i in range(shape.n_layers))
    return Encoder(shape.of(model)).backbone({**params, "layers": layers}, x, segments=segments).x


def init_norm(model: ModelConfig, width: int) -> dict[str, Array]:
    """Returns initial weights of a norm of the model's kind, of any width."""
    dtype = jnp.dtype(model.param_dtype)
    make = jnp.zeros if model.norm_plus_one else jnp.ones
    found = {"norm": make((width,), dtype)}
    if model.norm_bias:
        found["norm_bias"] = jnp.zeros((width,), dtype)
    return found

"""Small stacks of blocks with positions of their own, causal or not, beside a model.

They read and write characters around a backbone (`tokjax.tokenization`), and are an objective's
own parameters. See `tokjax.models.stack` for their shape.
"""

import dataclasses
from typing import Any

import jax

from tokjax.models import parameters
from tokjax.models.config import ModelConfig
from tokjax.models.encoder import decoder_or_encoder
from tokjax.models.parameters import Params
from tokjax.models.stack import StackConfig
from tokjax.models.transformer import Transformer


def own_stack(
    shape: StackConfig, model: ModelConfig, *, causal: bool, symbols: int = 1
) -> Transformer:
    """Returns a stack with rotary positions whose norms, activation and dtypes are the model's.

    Args:
        shape: of the stack; it has a layer at least.
        model: that it stands beside.
        causal: whether slots see earlier ones alone.
        symbols: rows of its embedding table, which is its output head too.

    Raises:
        ConfigError: the shape is impossible.
    """
    config = dataclasses.replace(
        shape.of(model), causal=causal, positions="rotary", vocab_size=symbols
    )
    return decoder_or_encoder(config)


def init_own_stack(stack: Transformer, key: jax.Array) -> dict[str, Any]:
    """Returns its initial parameters; layers stay apart, so that norms do not decay.

    A stack of one symbol has no embedding table.
    """
    found = parameters.unstack(stack.init(key))
    found["layers"] = {str(i): layer for i, layer in enumerate(found["layers"])}
    if stack.config.vocabulary == 1:
        del found["embedding"]
    return found


def in_layers(params: Params) -> dict[str, Any]:
    """Returns parameters of `init_own_stack` in the form that its stack takes."""
    layers = params["layers"]
    return {**params, "layers": tuple(layers[str(i)] for i in range(len(layers)))}

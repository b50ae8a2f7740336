"""Passes of a model under a hyperschedule: of one step, or of all blocks at once."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError
from tokjax.models.encoder import Encoder
from tokjax.models.head import Head
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.pretraining.hdlm.masks import OfActive, OfSettled, one_pass_mask


def check_model(model: Transformer) -> Encoder:
    """Returns a model that can be used.

    Raises:
        ConfigError: it sees one side alone, or goes by places in the row.
    """
    config = model.config
    if not isinstance(model, Encoder):
        raise ConfigError(
            "objective 'hdlm' needs a model that sees both sides: set model.causal=False"
        )
    for name, used in (
        ("mixer", config.mixer is not None),
        ("positions='relative'", config.positions == "relative"),
        ("sliding_window", config.sliding_window is not None),
        ("logit_softcap", config.logit_softcap is not None),
    ):
        if used:
            raise ConfigError(
                f"objective 'hdlm' decides by positions who sees whom, and never predicts the "
                f"mask: it cannot be combined with model.{name}"
            )
    return model


def read(model: Encoder, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns what the output head reads."""
    return x if model.config.mlm_head is None else model.mlm_hidden(params, x)


def head_without(model: Encoder, params: Params, mask_id: int) -> Head:
    """Returns the output head, under which the mask is impossible."""
    head = model.head(params)
    bias = jnp.zeros(head.table.shape[:1], jnp.float32) if head.bias is None else head.bias
    bias = jnp.where(jnp.arange(len(bias)) == mask_id, -jnp.inf, bias.astype(jnp.float32))
    return dataclasses.replace(head, bias=bias)


def step_states(
    model: Encoder,
    params: Params,
    tokens: Int[Array, "B T"],
    visible: Bool[Array, "B T T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    *,
    shifted: bool = False,
) -> Float[Array, "B T D"]:
    """Returns the states by which each position is predicted, at one step.

    Args:
        model: the model.
        params: its parameters.
        tokens: settled, noised and worthless ones.
        visible: `masks.step_mask`.
        positions: of the tokens.
        segments: tokens attend within their own.
        shifted: the state before a position predicts it.
    """
    x = model.embed(params, tokens)
    x = model.backbone(params, x, positions=positions, segments=segments, visible=visible).x
    return before(x) if shifted else x


def block_states(
    model: Encoder,
    params: Params,
    clean: Int[Array, "B T"],
    noised: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    block: int,
    *,
    attention: tuple[OfSettled, OfActive] = ("block_causal", "full"),
    shifted: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Returns the states by which noised and clean positions are predicted, of all blocks at once.

    The model reads both copies side by side, under the same positions; see `masks.one_pass_mask`.

    Args:
        model: the model.
        params: its parameters.
        clean: the tokens.
        noised: the tokens under noise.
        positions: of the tokens in their text, by which blocks are counted.
        segments: tokens attend within their own.
        block: width of the blocks.
        attention: what the clean copy, and what a noisy block, sees of itself.
        shifted: the state before a position predicts it; that before a block is of the clean copy.
    """
    T = clean.shape[1]
    if model.config.positions == "learned" and model.config.max_positions < 2 * T:
        raise ConfigError(
            f"one pass for all blocks reads rows of {T} twice: with positions='learned' set "
            f"model.max_positions={2 * T} or more, or passes='step'"
        )
    double = lambda a: jnp.concatenate([a, a], axis=1)  # noqa: E731
    x = model.backbone(
        params,
        model.embed(params, jnp.concatenate([clean, noised], axis=1)),
        positions=double(positions),
        segments=double(segments),
        visible=one_pass_mask(positions, block, *attention),
    ).x
    of_clean, of_noised = x[:, :T], x[:, T:]
    if not shifted:
        return of_noised, of_clean
    first = (positions % block == 0)[..., None]
    return jnp.where(first, before(of_clean), before(of_noised)), before(of_clean)


def before(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns each position's predecessor's state; zeros for the first of a row."""
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]

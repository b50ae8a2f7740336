"""MAE-LM: an encoder that never sees the mask, and a decoder that restores what was left out.

Reference: Meng et al., "Representation Deficiency in Masked Language Modeling" (arXiv 2302.02060),
and its released code.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.models.encoder import Encoder
from tokjax.models.head import Head
from tokjax.models.layers import ACTIVATIONS, norm
from tokjax.models.parameters import Params
from tokjax.models.stack import StackConfig, init_norm, init_stack, run_stack
from tokjax.models.transformer import Transformer
from tokjax.pretraining.corruption import Corruption, corrupt, with_ids
from tokjax.pretraining.masked_lm import among, own_weights
from tokjax.pretraining.predictions import Predictions, scored
from tokjax.training.objective import HEADS, Aux, Loss, Materials, PerToken, WithoutState

Removal = Literal["gather", "attention"]
_REMOVALS = ("gather", "attention")


@register("objective", "mae_lm")
@dataclass(frozen=True)
class MaeLM(PerToken, WithoutState):
    """Negative log-likelihood of tokens that the encoder was not given, averaged over them.

    A shallow decoder reads the encoder's states and, in the place of the missing tokens, the
    mask's embedding. It belongs to the objective: what a run leaves behind is the encoder alone.
    Needs `model.causal=False`; a head for masked tokens that the model has of its own (`mlm_head`)
    is not read. Held-out data are evaluated by the same loss.
    """

    # which tokens are left out; all of them become the mask in the decoder
    corruption: Corruption = Corruption(masked=1.0, random=0.0, count="fixed")
    # of the decoder; 4 layers of the encoder's width are the paper's
    decoder: StackConfig = StackConfig(n_layers=4)
    # how tokens are kept from the encoder, with the same states of the others: it runs over the
    # remaining ones alone, which is cheaper; or in place, where no token attends to them
    removal: Removal = "gather"
    z_loss: float = 0.0  # coefficient of the squared log-sum-exp of the logits
    exempt: tuple[int, ...] | None = None  # ids never left out; None: the tokenizer's special ones

    evaluates: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True

    def __post_init__(self):
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss} must not be negative")
        if self.removal not in _REMOVALS:
            raise ConfigError(
                f"unknown removal={self.removal!r}.{nearest(str(self.removal), _REMOVALS)}"
            )
        if self.corruption.masked != 1 or self.corruption.random:
            raise ConfigError(
                f"objective 'mae_lm' leaves every chosen token out: corruption.masked="
                f"{self.corruption.masked} must be 1 and corruption.random="
                f"{self.corruption.random} 0"
            )
        if self.corruption.rate >= 1:
            raise ConfigError("corruption.rate=1 leaves the encoder nothing to read")
        if self.removal == "gather" and self.corruption.count != "fixed":
            raise ConfigError(
                "removal='gather' needs a number of tokens known beforehand: set "
                "corruption.count='fixed', or removal='attention'"
            )

    def prepared(self, materials: Materials) -> "MaeLM":
        """Returns the objective with the ids that the tokenizer decides.

        Raises:
            ConfigError: there is no mask and no id to spare for one, or the model cannot be used.
        """
        self._check_model(materials.model)
        tokenizer = materials.tokenizer
        special = tokenizer.special_tokens
        model_ids = materials.model.config.vocabulary
        spec = with_ids(self.corruption, tokenizer.vocab_size, special, model_ids)
        exempt = tuple(sorted(special.values())) if self.exempt is None else self.exempt
        return dataclasses.replace(self, corruption=spec, exempt=exempt)

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the decoder's parameters.

        Raises:
            ConfigError: the decoder's shape is impossible.
        """
        config = model.config
        shape = self.decoder.of(config)
        outer, inner, dtype = config.d_model, shape.d_model, jnp.dtype(config.param_dtype)
        keys = jax.random.split(key, 4)

        def drawn(key: jax.Array, rows: int, columns: int, std: float) -> jax.Array:
            return (std * jax.random.normal(key, (rows, columns))).astype(dtype)

        found = {
            "positions": drawn(keys[0], config.max_positions, inner, config.init_scale),
            "enter": init_norm(config, inner),
            "stack": init_stack(self.decoder, config, keys[1]),
            "dense": drawn(keys[2], inner, outer, inner**-0.5),
            "dense_bias": jnp.zeros((outer,), dtype),
            "leave": init_norm(config, outer),
        }
        if inner != outer:
            found["narrow"] = drawn(keys[3], outer, inner, outer**-0.5)
        if not config.head_bias:
            found["bias"] = jnp.zeros((config.vocabulary,), dtype)
        return {"decoder": found}

    def chosen(self, batch: Batch, key: jax.Array) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
        """Returns the tokens left out, and those that might have been.

        With a fixed count a full row leaves out the nearest whole number to `rate` of its places,
        special tokens counted, so that what remains has one length for all rows.
        """
        weights = own_weights(batch)
        eligible = (weights != 0) & ~among(batch.tokens, self.exempt or ())
        spec, rate = self.corruption, None
        if spec.count == "fixed":
            T, size = batch.tokens.shape[1], eligible.sum(-1).astype(jnp.float32)
            own = jnp.floor(spec.rate * size + 0.5)
            surplus = (batch.segment_ids > 0).sum(-1) - (T - spec.most(T))
            wanted = jnp.clip(jnp.maximum(own, surplus.astype(jnp.float32)), 1.0, size)
            rate = wanted / jnp.maximum(size, 1.0)
        return corrupt(key, batch.tokens, eligible, spec, rate).chosen, eligible

    def predictions(
        self, model: Transformer, params: Params, batch: Batch, key: jax.Array
    ) -> Predictions:
        """Returns what each left-out position predicts: the token that is missing there.

        Raises:
            ConfigError: the model cannot be used, or the mask's id is not known.
        """
        encoder = self._check_model(model)
        hidden, eligible = self.chosen(batch, key)
        fixed = self.corruption.count == "fixed"
        T = batch.tokens.shape[1]
        most = self.corruption.most(T) if fixed else T
        states, gathered = encode_visible(
            encoder,
            params,
            batch.tokens,
            hidden,
            positions=batch.positions,
            segments=batch.segment_ids,
            room=T - most if self.removal == "gather" else None,
        )
        x = self.decoded(encoder, params, states, hidden, batch)
        targets, weights = batch.tokens, jnp.where(hidden, own_weights(batch), 0.0)
        if fixed:
            places = jnp.argsort(~hidden, axis=-1, stable=True)[:, :most]
            x = jnp.take_along_axis(x, places[..., None], axis=1)
            targets, weights = (jnp.take_along_axis(a, places, axis=1) for a in (targets, weights))
        metrics = {"chosen": (hidden.sum().astype(jnp.float32), eligible.sum().astype(jnp.float32))}
        if self.removal == "gather":
            metrics["gathered"] = (gathered.astype(jnp.float32), jnp.float32(1))
        return Predictions(
            x=self.read(encoder, params, x),
            head=self.output_head(encoder, params),
            targets=targets[..., None],
            weights=weights[..., None],
            weight=weights.sum(),
            metrics=metrics,
        )

    def decoded(
        self,
        model: Encoder,
        params: Params,
        states: Float[Array, "B T D"],
        hidden: Bool[Array, "B T"],
        batch: Batch,
    ) -> Float[Array, "B T D2"]:
        """Returns the decoder's states; it sees the mask wherever the encoder saw nothing."""
        w = params[HEADS]["decoder"]
        mask_id = self.corruption.mask_id
        assert mask_id is not None  # `corrupt` has refused that
        mask = model.embed(params, jnp.full((1, 1), mask_id, jnp.int32))
        y = jnp.where(hidden[..., None], mask.astype(states.dtype), states)
        if "narrow" in w:
            y = y @ w["narrow"].astype(y.dtype)
        y = y + jnp.take(w["positions"], batch.positions, axis=0).astype(y.dtype)
        y = norm(model.config, w["enter"], y)
        return run_stack(self.decoder, model.config, w["stack"], y, batch.segment_ids)

    def read(
        self, model: Encoder, params: Params, x: Float[Array, "B T D2"]
    ) -> Float[Array, "B T D"]:
        """Returns what the output head reads of the decoder's states."""
        w = params[HEADS]["decoder"]
        x = x @ w["dense"].astype(x.dtype) + w["dense_bias"].astype(x.dtype)
        return norm(model.config, w["leave"], ACTIVATIONS["gelu"](x))

    def output_head(self, model: Encoder, params: Params) -> Head:
        """Returns the output head: the encoder's, with a bias of its own where that has none."""
        head = model.head(params)
        if head.bias is not None:
            return head
        return dataclasses.replace(head, bias=params[HEADS]["decoder"]["bias"])

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of w * nll and the sum of w over the tokens left out.

        Raises:
            ConfigError: as `predictions`.
        """
        return scored(self.predictions(model, params, batch, key), self.z_loss, aux)

    def _check_model(self, model: Transformer) -> Encoder:
        if not isinstance(model, Encoder):
            raise ConfigError(
                "objective 'mae_lm' needs a model that sees both sides: set model.causal=False"
            )
        config = model.config
        if config.embedding_width is not None:
            raise ConfigError(
                f"objective 'mae_lm' puts the mask's embedding among the encoder's states: "
                f"model.embedding_width={config.embedding_width} must be None"
            )
        if config.mixer is not None:
            raise ConfigError(
                "objective 'mae_lm' leaves tokens out, so that a mixer's neighbours are others: "
                "set model.mixer=None"
            )
        by_place = [
            name
            for name, used in (
                ("positions='relative'", config.positions == "relative"),
                ("sliding_window", config.sliding_window is not None),
            )
            if used
        ]
        if by_place and self.removal == "gather":
            raise ConfigError(
                f"model.{by_place[0]} goes by places in the row, which removal='gather' changes: "
                f"set removal='attention'"
            )
        return model


def encode_visible(
    model: Encoder,
    params: Params,
    tokens: Int[Array, "B T"],
    hidden: Bool[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    room: int | None = None,
) -> tuple[Float[Array, "B T D"], Bool[Array, ""]]:
    """Returns an encoder's states of the tokens it may see, zeros elsewhere.

    Each token keeps its original position. The states are functions of the visible tokens alone.

    Args:
        model: the encoder.
        params: its parameters.
        tokens: ids, hidden ones included.
        hidden: tokens that the encoder must not see.
        positions: of the tokens; default 0, 1, ...
        segments: tokens attend within their own; 0 is filling. Default one a row.
        room: run over this many places, to which visible tokens are moved up; where a row has
            more of them, all rows are computed in place. None or 0: in place always.

    Returns:
        The states, and whether they were computed on `room` places.
    """
    B, T = tokens.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segments is None:
        segments = jnp.ones((B, T), jnp.int32)
    visible = (segments > 0) & ~hidden
    # In a segment of its own nothing is seen by others.
    segments = jnp.where(visible, segments, 0)

    def run(tokens: Array, positions: Array, segments: Array) -> Array:
        x = model.embed(params, tokens)
        return model.backbone(params, x, positions=positions, segments=segments).x

    def in_place() -> Array:
        return run(tokens, positions, segments)

    def moved_up() -> Array:
        order = jnp.argsort(~visible, axis=-1, stable=True)
        first = order[:, :room]
        few = (jnp.take_along_axis(a, first, axis=1) for a in (tokens, positions, segments))
        place = jnp.minimum(jnp.argsort(order, axis=-1), first.shape[1] - 1)
        return jnp.take_along_axis(run(*few), place[..., None], axis=1)

    if not room or room >= T:
        states, fits = in_place(), jnp.zeros((), bool)
    else:
        fits = visible.sum(-1).max() <= room
        states = jax.lax.cond(fits, moved_up, in_place)
    return jnp.where(visible[..., None], states, 0.0), fits

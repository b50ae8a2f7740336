"""Sink decorrelation: states of tokens that are only read are pushed away from the first token's.

Attention sinks behind the first token, and their massive activations, come with states that point
where the first token's does. The squared cosine with it, in all inner layers, is added to the loss
of any objective that reads its batch in one pass.

Reference: Anand et al., "Mitigating Attention Sinks and Massive Activations in Audio-Visual Speech
Recognition with LLMs", arXiv 2510.22603, and its released code.
"""

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.config import Choice, plain, register
from tokjax.config.values import to_dict
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.models.views import Observed
from tokjax.pretraining.next_token import NextToken
from tokjax.signals.hidden import cosine_to_bos
from tokjax.signals.sinks import first_positions
from tokjax.training.objective import Aux, Loss, Materials

BASES = (
    *("next_token", "patch", "syntactic_smoothing", "class_balanced"),
    *("sft", "star_dss", "one_token_rollout"),
)
_SITE = "resid_pre"  # what block l reads is the state behind l blocks, mixers included


@struct.dataclass
class Decorrelating:
    """What the objective carries.

    Attributes:
        coefficient: of the penalty; another value compiles nothing.
        base: the state of the objective whose loss it is added to.
    """

    coefficient: Float[Array, ""]
    base: Aux


@struct.dataclass
class Pairs:
    """Which states are compared with which.

    Attributes:
        anchors: position of the token that each one is compared with.
        mask: the tokens that are penalised.
    """

    anchors: Int[Array, "B T"]
    mask: Bool[Array, "B T"]


@register("objective", "sink_decorrelation")
@dataclass(frozen=True)
class SinkDecorrelation:
    """An objective's loss, plus the mean squared cosine of inner states with the first token's.

    The mean is over the inner layers (1 to L - 1: neither embeddings nor what the last block
    writes), and over the penalised tokens of a micro-batch. Both sides get gradient. The cosines
    are added up inside the layer loop; no states are kept for them. `nll` and `decorrelation` are
    reported apart, held-out data are evaluated without the penalty, and inference is unchanged.
    """

    # whose loss is added to: next_token, patch, syntactic_smoothing, class_balanced, sft, star_dss
    # or one_token_rollout, with its own options
    base: Annotated[Any, Choice("objective")] = NextToken()
    # of the penalty; the paper's code has 10,000 for models of 1B parameters and more, small ones
    # call for 1 to 100. At 0 it is only measured
    coefficient: float = 1e4
    # which tokens are penalised, the first of a segment never: "input", those before the first
    # target that counts; "all", for text without prompts; or as a control "output", the others
    tokens: Literal["input", "all", "output"] = "input"
    # what they are compared with: their segment's first token; or as a control another of the
    # penalised tokens, drawn anew in every step
    anchor: Literal["first", "random"] = "first"

    def __post_init__(self):
        name = to_dict(self.base).get("name")
        if name not in BASES:
            raise ConfigError(
                f"objective 'sink_decorrelation' regularises {', '.join(BASES)}, which read a "
                f"batch in one pass, not base={name!r}.{nearest(str(name), BASES)}"
            )
        if getattr(self.base, "bidirectional", False):
            raise ConfigError(
                f"base={name!r} restores tokens of a model that sees both sides, in which no token "
                f"comes first: choose one of a causal model"
            )
        if not 0 <= self.coefficient < math.inf:
            raise ConfigError(f"coefficient={self.coefficient} must not be negative, and finite")
        for field in ("tokens", "anchor"):
            choices = typing.get_args(type(self).__annotations__[field])
            value = getattr(self, field)
            if value not in choices:
                raise ConfigError(f"unknown {field}={value!r}.{nearest(str(value), choices)}")

    # ---------------------------------------------------------------- what the base decides

    @property
    def tokens_per_position(self) -> int:
        """Data tokens that one position of the model consumes."""
        return self.base.tokens_per_position

    def prepared(self, materials: Materials) -> "SinkDecorrelation":
        """Returns the objective with a base that knows what it needs of the run.

        Raises:
            ConfigError: the model has no inner layers, or as the base.
        """
        check(materials.model)
        if not hasattr(self.base, "prepared"):
            return self
        return dataclasses.replace(self, base=self.base.prepared(materials))

    @property
    def content(self) -> Mapping[str, str]:
        """Digest of the base, with what it has in files known by their content."""
        files = getattr(self.base, "content", None)
        if files is None:
            return {}
        told = plain({**to_dict(self.base), **files})
        return {"base": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Decorrelating:
        """Returns the coefficient and the base's state.

        Raises:
            ConfigError: the model has no inner layers.
        """
        check(model)
        return Decorrelating(jnp.float32(self.coefficient), self.base.init(key, model, params))

    def advance(self, aux: Decorrelating, progress: Float[Array, ""]) -> Decorrelating:
        """Returns the state with how much of the training is done, for the base."""
        advance = getattr(self.base, "advance", None)
        return (
            aux if advance is None else dataclasses.replace(aux, base=advance(aux.base, progress))
        )

    # ---------------------------------------------------------------- the loss

    def pairs(self, batch: Batch, key: jax.Array) -> Pairs:
        """Returns which positions of the model are penalised, and what they are compared with.

        Args:
            batch: whose weights say which targets count.
            key: of random anchors.
        """
        segments, outputs = batch.segment_ids, output_tokens(batch)
        k = self.tokens_per_position
        if k > 1:  # a patch is of the output if one of its tokens is; documents fill whole patches
            segments = segments[:, ::k]
            outputs = outputs.reshape(*segments.shape, k).any(-1)
        first = first_positions(segments)
        place = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
        mask = (segments > 0) & (place != first)
        last_output = jax.lax.cummax(jnp.where(outputs, place, -1), axis=1)
        begun = last_output >= first
        if self.tokens != "all":
            mask &= begun if self.tokens == "output" else ~begun
        if self.anchor == "first":
            return Pairs(first, mask)
        anchors = random_anchors(key, first, mask)
        return Pairs(anchors, mask & (place != anchors))

    def loss(
        self,
        model: Transformer,
        params: Params,
        aux: Decorrelating,
        batch: Batch,
        key: jax.Array,
    ) -> Loss:
        """Returns the base's loss with the penalty added, times the weight it is divided by.

        Raises:
            ConfigError: the model has no inner layers, or as the base.
        """
        check(model)
        pairs = self.pairs(batch, jax.random.fold_in(key, 1))
        observed = Observed.of(model, {_SITE: lambda h: squared_cosine_sum(h, pairs)})
        found = self.base.loss(observed, params, aux.base, batch, key)
        (noted,) = observed.found
        total = noted[_SITE][1:].mean()
        count = pairs.mask.sum().astype(jnp.float32)
        penalty = total / jnp.maximum(count, 1.0)
        real = (batch.segment_ids > 0).sum().astype(jnp.float32) / self.tokens_per_position
        metrics = {
            "decorrelation": (total, count),
            "penalised": (count, real),
        }
        return dataclasses.replace(
            found,
            total=found.total + aux.coefficient * found.weight * penalty,
            metrics=found.metrics | metrics,
            aux=dataclasses.replace(aux, base=found.aux),
        )


def squared_cosine_sum(states: Float[Array, "B T D"], pairs: Pairs) -> Float[Array, ""]:
    """Returns the sum of the squared cosines of one layer's states with those of their anchors."""
    cosines = cosine_to_bos(states, pairs.anchors)
    return jnp.where(pairs.mask, jnp.square(cosines), 0.0).sum()


def decorrelation(
    states: Float[Array, "L1 B T D"],
    mask: Bool[Array, "B T"],
    anchors: Int[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Returns the penalty of given states: the mean squared cosine, over inner layers and tokens.

    The objective computes the same inside the model's layer loop.

    Args:
        states: of all layers, from the embeddings to what the last block writes; the first and the
            last are left out.
        mask: penalised tokens; without any it is 0.
        anchors: position of the token that each one is compared with; default 0.

    Raises:
        ConfigError: there is no inner layer.

    >>> h = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-3.0, 0.0]])
    >>> states = jnp.stack([h, h, h])[:, None]
    >>> float(decorrelation(states, jnp.array([[False, True, True, True]])))
    0.5
    """
    if len(states) < 3:
        raise ConfigError(
            f"{len(states)} layers of states have no inner one: give those of a model of two "
            f"blocks or more, embeddings first"
        )
    anchors = jnp.zeros(mask.shape, jnp.int32) if anchors is None else anchors
    pairs = Pairs(anchors, mask)
    sums = jax.vmap(lambda h: squared_cosine_sum(h, pairs))(states[1:-1])
    return sums.mean() / jnp.maximum(mask.sum(), 1).astype(jnp.float32)


def output_tokens(batch: Batch) -> Bool[Array, "B T"]:
    """Returns which tokens are targets that count; the first of a segment never is."""
    segments = batch.segment_ids
    before = jnp.pad(batch.weights, ((0, 0), (1, 0)))[:, :-1]
    begins = first_positions(segments) == jnp.arange(segments.shape[1])
    return (before != 0) & ~begins & (segments > 0)


def random_anchors(
    key: jax.Array, first: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Int[Array, "B T"]:
    """Returns for each token one of its segment's tokens in the mask, the same for all of them.

    Where a segment has none it is its first token.

    Args:
        key: of the draw.
        first: where each token's segment begins.
        mask: tokens that may be drawn.
    """
    B, T = first.shape
    scores = jnp.where(mask, jax.random.uniform(key, (B, T)), -1.0)
    segment = (first + T * jnp.arange(B)[:, None]).reshape(-1)

    def largest(values: Array) -> Array:
        return jax.ops.segment_max(values.reshape(-1), segment, B * T)[segment].reshape(B, T)

    chosen = mask & (scores == largest(scores))
    place = largest(jnp.where(chosen, jnp.arange(T), -1))
    return jnp.where(place >= 0, place, first)


def check(model: Transformer) -> None:
    """Refuses models whose tokens have no inner states to decorrelate.

    Raises:
        ConfigError: the model sees both sides, or has one block.
    """
    if not model.config.causal:
        raise ConfigError(
            "objective 'sink_decorrelation' needs a model in which a token comes first: set "
            "model.causal=True"
        )
    if model.config.n_layers < 2:
        raise ConfigError(
            f"objective 'sink_decorrelation' penalises states between blocks, but the model has "
            f"model.n_layers={model.config.n_layers}: set 2 or more"
        )

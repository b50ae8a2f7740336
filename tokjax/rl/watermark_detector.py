"""The detector of a learnt watermark: a small transformer whose last state is read as a score.

Two texts of a pair, marked and not, are scored behind the same number of tokens, so that their
lengths never tell them apart.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError
from tokjax.models.config import ModelConfig
from tokjax.models.parameters import Params
from tokjax.models.scalar_head import init_scalar_head
from tokjax.models.transformer import Transformer
from tokjax.training.frozen import FrozenModel, frozen_model

DETECTOR = "detector"  # name of the detector among heads, frozen models and scores
_HEAD = ("head", "head_bias")  # of a language model; a detector reads states, not logits


@dataclass(frozen=True)
class DetectorConfig:
    """Which transformer reads texts."""

    # checkpoint whose states are read at first: whatever `tokjax.load` takes, with the run's
    # tokenizer; what is trained is the difference from it. None: random parameters
    checkpoint: str | None = None
    # without a checkpoint, the transformer; its vocabulary, types and positions are the run's
    model: ModelConfig = ModelConfig(d_model=128, n_layers=2, n_heads=4)

    def __post_init__(self):
        if not self.model.causal or self.model.lora is not None or self.model.cross_attention:
            raise ConfigError(
                "detector.model must be causal, without adapters and without cross-attention: a "
                "text is scored behind any of its tokens"
            )

    def frozen(self, model: Transformer) -> Mapping[str, FrozenModel]:
        """Returns the checkpoint under the detector's name, where there is one.

        Args:
            model: of the run.

        Raises:
            CheckpointError: there is no such checkpoint.
        """
        if self.checkpoint is None:
            return {}
        return {DETECTOR: frozen_model(self.checkpoint, model)}

    def trunk(self, model: Transformer) -> Transformer:
        """Returns the transformer, beside a run's model."""
        if self.checkpoint is not None:
            return self.frozen(model)[DETECTOR].model
        own = model.config
        return Transformer(
            dataclasses.replace(
                self.model,
                vocab_size=own.vocab_size,
                max_positions=own.max_positions + 1,  # rows hold their last target too
                tie_embeddings=True,
                head_bias=False,
                dtype=own.dtype,
                param_dtype="float32",
                attention=own.attention,
            )
        )

    def init(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns what is trained: the trunk or the difference from it, and the score's weights.

        Args:
            key: of random values.
            model: of the run.
        """
        trunk = self.trunk(model)
        trunk_key, score_key = jax.random.split(key)
        if self.checkpoint is None:
            params = trunk.init(trunk_key)
        else:
            shapes = {n: p for n, p in trunk.abstract_params().items() if n not in _HEAD}
            params = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), shapes)
        weight = init_scalar_head(score_key, trunk.config.d_model)["weight"]
        return {"trunk": params, "score": weight}

    def whole(self, detector: Params, frozen: Params | None) -> dict[str, Any]:
        """Returns a detector's parameters with those of its checkpoint added.

        Args:
            detector: what is trained; see `init`.
            frozen: parameters of the checkpoint, where there is one.
        """
        if self.checkpoint is None:
            return dict(detector)
        assert frozen is not None
        base = {name: frozen[name] for name in detector["trunk"]}
        added = jax.tree.map(lambda p, d: p.astype(jnp.float32) + d, base, detector["trunk"])
        return {**detector, "trunk": added}


def detector_scores(
    trunk: Transformer,
    detector: Params,
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """Returns the score of each row's text up to and with each token.

    Args:
        trunk: the transformer.
        detector: its parameters and the score's; see `DetectorConfig.whole`.
        tokens: prompt and text.
        real: False on filling, which lies behind the text and changes nothing before it.
    """
    params = detector["trunk"]
    x = trunk.backbone(params, trunk.embed(params, tokens), segments=real.astype(jnp.int32)).x
    return (x.astype(jnp.float32) @ detector["score"])[..., 0]


def pair_losses(
    marked: Float[Array, "*n"], other: Float[Array, "*n"], l2: float = 1e-4
) -> Float[Array, "*n"]:
    """Returns -log sigma(marked - other) + l2 (marked^2 + other^2) of each pair of scores.

    >>> found = pair_losses(jnp.array([1.2]), jnp.array([0.2]), l2=0.0)
    >>> round(float(found[0]), 5)
    0.31326
    """
    return jax.nn.softplus(other - marked) + l2 * (jnp.square(marked) + jnp.square(other))


def substituted(
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    share: Any,
    vocab_size: int,
    key: jax.Array,
) -> Int[Array, "B T"]:
    """Returns rows in which a share of the tokens that count, rounded, are random ids.

    Args:
        tokens: ids.
        mask: which of them count.
        share: of the counted tokens of each row, 0 to 1.
        vocab_size: ids are drawn uniformly below it; one may be what was there.
        key: of places and ids.
    """
    places, ids = jax.random.split(key)
    order = jnp.where(mask, jax.random.uniform(places, tokens.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(order, axis=1), axis=1)
    count = jnp.round(share * mask.sum(-1, keepdims=True))
    drawn = jax.random.randint(ids, tokens.shape, 0, vocab_size, tokens.dtype)
    return jnp.where(mask & (rank < count), drawn, tokens)

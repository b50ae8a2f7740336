"""UniR: a small reasoner learns by reward what to add to the logits of a frozen backbone.

Reference: Kim et al., "Universal Reasoner: A Single, Composable Plug-and-Play Reasoner for Frozen
LLMs", arXiv 2505.19075.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.decoding.contrast.reasoners import with_reasoners
from tokjax.errors import ConfigError, nearest
from tokjax.models.head import Head, sum_of_logits
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.rl.policy import Policy, RolloutConfig
from tokjax.training.frozen import FrozenModel, frozen_model
from tokjax.training.objective import FROZEN, Aux, of_model
from tokjax.training.passes import forward

_BACKBONE = "backbone"
_STARTS = ("pretrained", "zero_head")


@register("objective", "unir")
@dataclass(frozen=True)
class UniR(Policy):
    """The policy loss of softmax((z_backbone + weight z_model) / T); the model alone is trained.

    The divergence of `kl_coef` is that from the backbone. Held-out losses are the model's own;
    held-out answers and samples are those of the two together.
    """

    rollouts: RolloutConfig = RolloutConfig(temperature=0.7)  # how answers are collected
    # checkpoint of the frozen model that the run's model is added to: whatever `tokjax.load` takes,
    # with the run's tokenizer
    backbone: str | None = None
    weight: float = 1.0  # of the run's model's logits
    # the reasoner at the start: as the run begins (init_from, or the stage before), or with an
    # output table of zeros, so that the two together are the backbone
    start: Literal["pretrained", "zero_head"] = "pretrained"

    def __post_init__(self):
        super().__post_init__()
        if self.backbone is None:
            raise ConfigError("objective 'unir' needs a backbone: name its checkpoint")
        if not math.isfinite(self.weight):
            raise ConfigError(f"weight={self.weight} must be a finite number")
        if self.start not in _STARTS:
            raise ConfigError(f"unknown start={self.start!r}.{nearest(self.start, _STARTS)}")

    # ---------------------------------------------------------------- the backbone

    def frozen(self, model: Transformer) -> Mapping[str, FrozenModel]:
        """Returns the backbone.

        Raises:
            CheckpointError: there is no such checkpoint.
            ConfigError: logits of one of the two cannot be added to others, or `start` is
                impossible.
        """
        backbone = self._backbone(model)
        both = {f"backbone={self.backbone!r}": backbone.model, "the model": model}
        for name, each in both.items():
            if (cap := each.config.logit_softcap) is not None:
                raise ConfigError(
                    f"objective 'unir': {name} caps its logits (logit_softcap={cap}): they cannot "
                    f"be added to others as products are"
                )
        if self.start == "zero_head":
            if model.config.tie_embeddings:
                raise ConfigError(
                    "start='zero_head' needs a model with an output table of its own: set "
                    "model.tie_embeddings=False, or start='pretrained'"
                )
            if model.config.lora is not None:
                raise ConfigError("start='zero_head' trains the output table, model.lora does not")
        return {_BACKBONE: backbone}

    def _backbone(self, model: Transformer) -> FrozenModel:
        assert self.backbone is not None
        return frozen_model(self.backbone, model)

    def begin(self, model: Transformer, params: Params) -> dict[str, Any]:
        """Returns the reasoner's parameters at the start."""
        if self.start == "pretrained":
            return dict(params)
        zeroed = [name for name in ("head", "head_bias") if name in params]
        return {**params, **{name: jnp.zeros_like(params[name]) for name in zeroed}}

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns nothing: the reference is the backbone."""
        return ()

    # ---------------------------------------------------------------- the policy

    def policy(self, model: Transformer, params: Params, aux: Aux) -> tuple[Any, Any]:
        """Returns the backbone guided by the model, each with a cache of its own."""
        backbone = self._backbone(model)
        return with_reasoners(
            (backbone.model, params[FROZEN][_BACKBONE]),
            [(model, of_model(params))],
            weights=[self.weight],
            vocab_size=backbone.tokenizer.vocab_size,
        )

    def outputs(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch
    ) -> tuple[Float[Array, "B T E"], Head]:
        """Returns hidden states and head whose softmax is the policy, at its temperature.

        Logits of the two are one product of their hidden states side by side with their tables side
        by side, so that they are never held for all tokens; the backbone's half is a constant.
        """
        theirs = self.reference_outputs(model, params, aux, batch)
        ours = forward(model, params, batch).x, model.head(params)
        x, head = sum_of_logits([theirs, ours], [1.0, self.weight], theirs[1].table.shape[0])
        return x, self.tempered(head)

    def reference_outputs(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch
    ) -> tuple[Float[Array, "B T D"], Head]:
        """Returns the backbone's hidden states and head, as constants, at temperature 1."""
        backbone = self._backbone(model)
        fixed = jax.lax.stop_gradient(params[FROZEN][_BACKBONE])
        x, head = forward(backbone.model, fixed, batch).x, backbone.model.head(fixed)
        # Tables may be padded beyond the tokenizer's ids, each differently.
        return sum_of_logits([(x, head)], [1.0], backbone.tokenizer.vocab_size)

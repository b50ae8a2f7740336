"""RLFR: tokens whose hidden states fit a flow over good texts badly are penalised.

The objective "flow" fits the flow on texts, the model frozen (set `optimizer.weight_decay=0`, which
alone would still move it); "rlfr" in the stage behind it takes the flow on, penalises by it, and
trains it further on answers that were rewarded. No gradient of the flow goes into the model.

Reference: "Extending Reinforcement Learning for LLMs with Flow Environment", arXiv 2510.10201.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.config import Choice, register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.rl.advantages import GroupAdvantage, Shaped, group_advantages, merged
from tokjax.rl.flow_network import (
    FlowConfig,
    flow_loss,
    flow_scores,
    init_flow,
    row_numbers,
    state_pairs,
)
from tokjax.rl.policy import Policy
from tokjax.rl.rollout import Rollout
from tokjax.rl.token_rewards import reward_to_go
from tokjax.signals.groups import group_stats, min_max
from tokjax.training.objective import Aux, Loss, PerToken, WithoutState


def flow_values(
    scores: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    *,
    threshold: float = 0.6,
    top_k: int = 15,
) -> Float[Array, "R T"]:
    """Returns each answer's scores from 0 to 1, 0 up to a threshold and beyond the k largest.

    Args:
        scores: of the actions.
        mask: actions; filling never sets the least score.
        threshold: values up to it become 0.
        top_k: of the values left, the largest are kept; of equals, the first.
    """
    values = min_max(scores, group_stats(scores, mask), mask)
    values = jnp.where(values > threshold, values, 0.0)
    rank = jnp.argsort(jnp.argsort(-values, axis=1, stable=True), axis=1)
    return jnp.where(rank < top_k, values, 0.0)


@register("advantage", "group_returns")
@dataclass(frozen=True)
class GroupReturns(GroupAdvantage):
    """The sum of token rewards from an action on and the group's advantage at the answer's end."""

    kl_coef: float = 0.0  # of log pi / pi_ref, taken off each action's reward

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        _, weights = super().__call__(rollout)
        outcome = rollout.reward
        if rollout.group > 1:
            rewards = rollout.by_prompt(outcome)
            options = {"scale": self.scale, "ddof": self.ddof, "eps": self.eps}
            outcome = rollout.flat(group_advantages(rewards, **options))
        rewards = merged(rollout, outcome, self.kl_coef)
        return reward_to_go(rewards, rollout.mask), weights


@register("objective", "flow")
@dataclass(frozen=True)
class FlowMatching(PerToken, WithoutState):
    """The flow's own loss on the states of targets that weigh; the model is not trained.

    Of packed rows the state of an example's last target is left out: it is in no row. With
    `data.packing="none"` it counts too.
    """

    flow: FlowConfig = FlowConfig()  # the network
    keeps_heads = True

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the flow."""
        return {"flow": init_flow(key, model.config.d_model, self.flow.depth)}

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of the flow's errors over the targets that weigh."""
        whole = batch.example_id.shape[1] == 1
        pairs = state_pairs(self.flow, model, params, batch, whole=whole)
        errors = flow_loss(params["heads"]["flow"], self.flow, pairs, key)
        counted = batch.weights != 0
        if not whole:
            ends = jnp.pad(batch.segment_ids[:, 1:], ((0, 0), (0, 1)))
            counted &= ends == batch.segment_ids
        total, count = _sums(errors, counted)
        return Loss(total, count, {"flow_loss": (total, count)}, aux)


@register("objective", "rlfr")
@dataclass(frozen=True)
class RLFR(Policy):
    """The policy loss with a flow's penalty on single tokens, and the loss of the flow."""

    advantage: Annotated[Any, Choice("advantage")] = GroupReturns()  # from rewards to actions
    flow: FlowConfig = FlowConfig()  # the network, that of the stage before if that is one
    coef: float = 0.01  # of the penalty
    times: tuple[float, ...] = (0.8,)  # at which states are scored
    threshold: float = 0.6  # normalised scores up to it are no penalty
    top_k: int = 15  # most tokens of an answer that are penalised
    accept: float = 1.0  # least reward of the answers that the flow is trained on
    # of the flow: its learning rate over the run's; it is clipped by itself. 0 leaves it as it is
    head_rate: float = 100.0
    keeps_heads = True

    def __post_init__(self):
        super().__post_init__()
        if not self.times or not all(0 < t < 1 for t in self.times):
            raise ConfigError(f"times={self.times} must lie between 0 and 1, one at least")
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1")
        if not self.head_rate >= 0:
            raise ConfigError(f"head_rate={self.head_rate} must not be negative")

    @property
    def channels(self) -> tuple[str, ...]:
        """The values beside each action that a batch brings along."""
        return (*super().channels, "accepted")

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns a fresh flow, for a run without a stage of flow matching before."""
        return {"flow": init_flow(key, model.config.d_model, self.flow.depth)}

    def score(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch
    ) -> dict[str, Float[Array, "B T"]]:
        """Returns the policy's scores, and how badly the state of each action's token fits."""
        pairs = state_pairs(self.flow, model, params, batch, whole=True)
        keys = row_numbers(batch.targets, batch.segment_ids != 0)
        found = flow_scores(params["heads"]["flow"], pairs, keys, self.times)
        return {
            **super().score(model, params, aux, batch),
            "flow": jnp.where(batch.weights != 0, found, 0.0),
        }

    def token_rewards(self, rollout: Rollout, episodes: Sequence[Any]) -> Float[Array, "R T"]:
        """Returns the penalty of each action."""
        scores, mask = jnp.asarray(rollout.scores["flow"]), jnp.asarray(rollout.mask)
        values = flow_values(scores, mask, threshold=self.threshold, top_k=self.top_k)
        return -self.coef * values

    def shape(self, rollout: Rollout) -> dict[str, Float[Array, "R T"]]:
        """Returns the channels of the batches that the answers are trained on."""
        accepted = (rollout.reward >= self.accept).astype(jnp.float32)
        return {**super().shape(rollout), "accepted": rollout.at_actions(accepted)}

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the actions of a batch; the metric `flow_loss` is the flow's."""
        loss = super().loss(model, params, aux, batch, key)
        pairs = state_pairs(self.flow, model, params, batch, whole=True)
        errors = flow_loss(params["heads"]["flow"], self.flow, pairs, key)
        total, count = _sums(errors, (batch.weights != 0) & (batch.channels["accepted"] != 0))
        metrics = {**loss.metrics, "flow_loss": (jax.lax.stop_gradient(total), count)}
        return dataclasses.replace(loss, total=loss.total + total, metrics=metrics)


def _sums(errors: Array, counted: Array) -> tuple[Array, Array]:
    return jnp.where(counted, errors, 0.0).sum(), counted.sum().astype(jnp.float32)

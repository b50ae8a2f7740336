"""PPO: the policy objective with a critic, a head of values on the model's own hidden states.

Reference: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.config import Choice, register
from tokjax.data.batch import Batch
from tokjax.models.head import Head
from tokjax.models.parameters import Params
from tokjax.models.scalar_head import init_scalar_head, scalar_head
from tokjax.models.transformer import Transformer
from tokjax.rl.advantages import GeneralisedAdvantage
from tokjax.rl.policy import Policy
from tokjax.rl.policy_loss import aggregate
from tokjax.rl.rollout import Rollout
from tokjax.signals import token_stats
from tokjax.training.objective import Aux, Loss
from tokjax.training.passes import forward


@register("objective", "ppo")
@dataclass(frozen=True)
class PPO(Policy):
    """The clipped policy loss with generalised advantages, and the critic's squared error."""

    advantage: Annotated[Any, Choice("advantage")] = GeneralisedAdvantage()  # over the critic
    value_coef: float = 0.5  # of the critic's error in the loss
    # a value is held this close to what it was in the rollout, if that makes its error larger;
    # None does not clip
    value_clip: float | None = 0.2
    critic_trains_model: bool = True  # False: the critic's error moves its head alone

    @property
    def channels(self) -> tuple[str, ...]:
        """The values beside each action that a batch brings along."""
        return (*super().channels, "return", "value")

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the critic."""
        return {"value": init_scalar_head(key, model.config.d_model)}

    def score(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch
    ) -> dict[str, Float[Array, "B T"]]:
        """Returns the policy's scores and the critic's values."""
        value = _values(params, forward(model, params, batch).x)
        return {
            **super().score(model, params, aux, batch),
            "value": jnp.where(batch.weights != 0, value, 0.0),
        }

    def shape(self, rollout: Rollout) -> dict[str, Float[Array, "R T"]]:
        """Returns the channels of the batches that the answers are trained on."""
        values = rollout.scores["value"]
        returns = self.advantage.unscaled(rollout) + values
        return {**super().shape(rollout), "return": returns, "value": values}

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the actions of a batch; the metric `value_loss` is the critic's."""
        mask = batch.weights != 0
        x: Float[Array, "B T D"] = forward(model, params, batch).x
        head: Head = self.tempered(model.head(params))
        found = token_stats(x, head, batch.targets, ["logprob", "entropy"], mask=mask)
        assert found.logprob is not None
        assert found.entropy is not None
        loss = self.loss_of(found.logprob, found.entropy, batch, aux)
        values = _values(params, x if self.critic_trains_model else jax.lax.stop_gradient(x))
        errors = value_errors(
            values, batch.channels["value"], batch.channels["return"], self.value_clip
        )
        errors = jnp.where(mask, errors, 0.0)
        weights = batch.channels["weight"]
        total, _ = aggregate(errors, mask, weights, self.norm, self.rollouts.max_new_tokens)
        actions = mask.sum().astype(jnp.float32)
        metrics = {**loss.metrics, "value_loss": (errors.sum(), actions)}
        return dataclasses.replace(
            loss, total=loss.total + self.value_coef * total, metrics=metrics
        )


def value_errors(
    values: Float[Array, "*n"],
    before: Float[Array, "*n"],
    returns: Float[Array, "*n"],
    clip: float | None,
) -> Float[Array, "*n"]:
    """Returns half the squared error of each value, the larger one with and without the clip.

    Args:
        values: of the critic in training.
        before: of the critic at the rollout.
        returns: what the values should be.
        clip: see `PPO.value_clip`.
    """
    plain = jnp.square(values - returns)
    if clip is None:
        return 0.5 * plain
    held = before + jnp.clip(values - before, -clip, clip)
    return 0.5 * jnp.maximum(plain, jnp.square(held - returns))


def _values(params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    return scalar_head(params["heads"]["value"], x)[..., 0]

"""The objective "policy": the model answers, its answers are rewarded, and it learns from them.

GRPO, DAPO, Dr. GRPO, GSPO, RLOO and REINFORCE++ are settings of it (`presets.py`); PPO adds a
critic (`ppo.py`). Methods change its advantage, its rewards, or one of its functions.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.config import Choice, register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.models.head import Head
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.rl import policy_loss as losses
from tokjax.rl.advantages import GroupAdvantage
from tokjax.rl.policy_loss import Norm, Ratio
from tokjax.rl.rewards import Verified
from tokjax.rl.rollout import Rollout
from tokjax.signals import token_stats
from tokjax.signals.divergences import kl_estimate
from tokjax.training.objective import Aux, Loss, PerToken, of_model
from tokjax.training.passes import forward
from tokjax.training.reference import init_reference, reference_pass
from tokjax.training.sampling import SamplingConfig


@dataclass(frozen=True)
class RolloutConfig(SamplingConfig):
    """How answers are collected and rewarded: prompts come from `data.train`.

    An update trains on `data.batch_size` rows of `data.seq_len` tokens, one answer in each.
    """

    timeout_s: float = 10.0  # for the rewards of one answer

    def __post_init__(self):
        super().__post_init__()
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s={self.timeout_s} must be above 0")


@register("objective", "policy")
@dataclass(frozen=True)
class Policy(PerToken):
    """-min(r A, clip(r) A) of every action of the model's own answers, r = pi / pi_old."""

    rollouts: RolloutConfig = RolloutConfig()  # how answers are collected
    # what answers are worth: the sum of these, each times its weight
    rewards: tuple[Annotated[Any, Choice("reward")], ...] = (Verified(),)
    advantage: Annotated[Any, Choice("advantage")] = GroupAdvantage()  # from rewards to actions
    # r of each action, or of its whole answer: the geometric or the arithmetic mean
    ratio: Ratio = "token"
    clip_low: float = 0.2  # r is clipped to 1 - clip_low ...
    clip_high: float = 0.2  # ... and 1 + clip_high
    # what the sum over actions is divided by: all of them, those with weight, each answer's and
    # then the answers, or answers x max_new_tokens
    norm: Norm = "token"
    kl_coef: float = 0.0  # of the divergence from the model at the start of the stage
    kl: str = "k3"  # its estimate; see `tokjax.signals.divergences.kl_estimate`
    reference: bool = False  # score answers under that model also without kl_coef
    entropy_coef: float = 0.0  # of a bonus for entropy
    # actions are weighed by training's over the decoder's probability, at most this; None: not
    importance_cap: float | None = None
    needs_rewards = True  # False in subclasses that reward answers themselves

    def __post_init__(self):
        if self.needs_rewards and not self.rewards:
            raise ConfigError("rewards is empty: name at least one")
        for name, choices in (
            ("ratio", losses.RATIOS),
            ("norm", losses.NORMS),
            ("kl", ("k1", "k2", "k3")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")
        for name in ("clip_low", "clip_high", "kl_coef"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ConfigError(f"importance_cap={self.importance_cap} must be above 0, or None")

    @property
    def uses_reference(self) -> bool:
        """Whether answers are scored under the model at the start of the stage."""
        return self.reference or self.kl_coef > 0

    @property
    def channels(self) -> tuple[str, ...]:
        """The values beside each action that a batch brings along."""
        more = ("reference",) if self.uses_reference else ()
        more += tuple(getattr(self.advantage, "channels", ()))
        return ("advantage", "weight", "old", *more)

    def collector(self, run: Any, stage: Any, workdir: Path) -> Any:
        """Returns what makes this stage's batches."""
        from tokjax.rl.collector import Collector

        return Collector(self, run, stage, workdir)

    # ---------------------------------------------------------------- what methods change

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns the reference, where there is one."""
        return init_reference(model, params) if self.uses_reference else ()

    def policy(self, model: Transformer, params: Params, aux: Aux) -> tuple[Any, Any]:
        """Returns what answers: a model or predictor, and its parameters."""
        return model, of_model(params)

    def outputs(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch
    ) -> tuple[Float[Array, "B T D"], Head]:
        """Returns hidden states and head whose softmax is the policy, at its temperature."""
        return forward(model, params, batch).x, self.tempered(model.head(params))

    def reference_outputs(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch
    ) -> tuple[Float[Array, "B T D"], Head]:
        """Returns hidden states and head of the reference, as constants, at temperature 1."""
        return reference_pass(model, params, aux, batch)

    def score(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch
    ) -> dict[str, Float[Array, "B T"]]:
        """Returns what is known of a collection's actions: `logprob`, `entropy` and any more."""
        counted = batch.weights != 0
        x, head = self.outputs(model, params, aux, batch)
        found = token_stats(x, head, batch.targets, ["logprob", "entropy"], mask=counted)
        scores = {"logprob": found.logprob, "entropy": found.entropy}
        if self.uses_reference:
            x, head = self.reference_outputs(model, params, aux, batch)
            head = self.tempered(head)
            scores["reference"] = token_stats(
                x, head, batch.targets, ["logprob"], mask=counted
            ).logprob
        return scores  # type: ignore[return-value]

    def shape(self, rollout: Rollout) -> dict[str, Float[Array, "R T"]]:
        """Returns the channels of the batches that the answers are trained on."""
        advantages, weights = self.advantage(rollout)
        if self.importance_cap is not None:
            mismatch = rollout.logprobs - rollout.scores["decoded"]
            weights = weights * jnp.minimum(jnp.exp(mismatch), self.importance_cap)
        found = {"advantage": advantages, "weight": weights, "old": rollout.logprobs}
        if self.uses_reference:
            found["reference"] = rollout.scores["reference"]
        if hasattr(self.advantage, "beside"):
            found |= self.advantage.beside(rollout)
        return found

    def ratios(self, logprobs: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
        """Returns pi / pi_old of the actions."""
        return losses.importance_ratios(
            logprobs, batch.channels["old"], batch.weights != 0, self.ratio
        )

    def clip(self, batch: Batch) -> tuple[Any, Any]:
        """Returns how far below and above 1 the ratios may lie, for all or for each action."""
        return self.clip_low, self.clip_high

    # ---------------------------------------------------------------- the loss

    def tempered(self, head: Head) -> Head:
        """Returns the head with its logits divided by the temperature."""
        temperature = self.rollouts.temperature
        if temperature == 1.0:
            return head
        if head.softcap is not None:
            raise ConfigError(
                f"rollouts.temperature={temperature}: this model caps its logits, so it is trained "
                f"at temperature 1 only"
            )
        return dataclasses.replace(head, scale=head.scale / temperature)

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the actions of a batch."""
        mask = batch.weights != 0
        x, head = self.outputs(model, params, aux, batch)
        found = token_stats(x, head, batch.targets, ["logprob", "entropy"], mask=mask)
        assert found.logprob is not None
        assert found.entropy is not None
        return self.loss_of(found.logprob, found.entropy, batch, aux)

    def loss_of(
        self,
        logprobs: Float[Array, "B T"],
        entropies: Float[Array, "B T"],
        batch: Batch,
        aux: Aux = (),
    ) -> Loss:
        """Returns the loss from the actions' log-probabilities and the entropies there.

        Args:
            logprobs: under the policy in training, with the gradient.
            entropies: of its distributions, with the gradient.
            batch: with the channels that `shape` returned.
            aux: handed on.
        """
        mask, channels = batch.weights != 0, batch.channels
        advantages = channels["advantage"]
        if hasattr(self.advantage, "in_step"):
            fixed = jax.lax.stop_gradient(entropies)
            advantages = self.advantage.in_step(advantages, fixed, batch)
        advantages = jax.lax.stop_gradient(advantages)
        ratios = self.ratios(logprobs, batch)
        gain, clipped = losses.clipped_surrogate(ratios, advantages, self.clip(batch))
        values = -gain
        if self.entropy_coef:
            values = values - self.entropy_coef * entropies
        change = jnp.where(mask, logprobs - channels["old"], 0.0)
        shown = {
            "entropy": entropies,
            "clip_fraction": clipped.astype(jnp.float32),
            "ratio": ratios,
            "kl_old": kl_estimate(change, "k3"),
            "advantage_size": jnp.abs(advantages),
        }
        if self.uses_reference:
            ratio = jnp.where(mask, logprobs - channels["reference"], 0.0)
            shown["kl_reference"] = kl_estimate(ratio, self.kl)
            if self.kl_coef:
                values = values + self.kl_coef * shown["kl_reference"]
        total, weight = losses.aggregate(
            values, mask, channels["weight"], self.norm, self.rollouts.max_new_tokens
        )
        actions = mask.sum().astype(jnp.float32)
        metrics = {
            name: (jnp.where(mask, jax.lax.stop_gradient(value), 0.0).sum(), actions)
            for name, value in shown.items()
        }
        return Loss(total, weight, metrics, aux)

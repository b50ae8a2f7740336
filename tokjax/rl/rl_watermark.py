"""A watermark in the model: policy and detector are trained together, each on the other's work.

The detector learns to rank the model's answers above human continuations of the same prompts, and
PPO moves the model towards answers that it scores high; plain sampling then carries the mark.

Reference: Xu et al., "Learning to Watermark LLM-generated Text via Reinforcement Learning",
arXiv 2403.10553, and its code.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.config import Choice, register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.rl.advantages import GeneralisedAdvantage
from tokjax.rl.policy import RolloutConfig
from tokjax.rl.policy_loss import Norm, aggregate
from tokjax.rl.ppo import PPO
from tokjax.rl.rollout import Rollout
from tokjax.rl.watermark_collector import TextFunction, WatermarkCollector, text_function
from tokjax.rl.watermark_detector import (
    DETECTOR,
    DetectorConfig,
    detector_scores,
    pair_losses,
    substituted,
)
from tokjax.signals import token_stats
from tokjax.training.frozen import FrozenModel
from tokjax.training.objective import FROZEN, Aux, Loss

Pairs = list[tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B"]]]


@register("objective", "rl_watermark")
@dataclass(frozen=True)
class RLWatermark(PPO):
    """PPO on the score of a detector, which is trained on the same answers against human texts.

    `data.train` gives prompts with human continuations. With `trains_policy=False` the detector
    alone learns, of the model as it is: a first stage, or a plain detector of its texts. Set
    `optimizer.weight_decay=0` there, which alone would still move the model.
    """

    rollouts: RolloutConfig = RolloutConfig(group=1, max_new_tokens=128)  # how answers are drawn
    # of answers besides the score, for `watermark_share` below 1
    rewards: tuple[Annotated[Any, Choice("reward")], ...] = ()
    # over the critic; its kl_coef holds the model to what it was at the start of the stage
    advantage: Annotated[Any, Choice("advantage")] = GeneralisedAdvantage(kl_coef=0.1, whiten=False)
    norm: Norm = "kept"  # answers of one token or none count nowhere
    reference: bool = True  # score answers under the model at the start of the stage
    # the critic of the paper is a network of its own: its error does not move the model
    critic_trains_model: bool = False
    trains_policy: bool = True  # False: the model stays, and only the detector learns
    detector: DetectorConfig = DetectorConfig()  # what scores texts
    detector_rate: float = 1.0  # the detector's learning rate over the run's
    critic_rate: float = 1.0  # the critic's
    reward_clip: float = 5.0  # scores are rewards within -reward_clip ... reward_clip
    l2: float = 1e-4  # of the mean squared scores of a pair, in the detector's loss
    # share of the detector's score in the reward, beside the other rewards; None: 1 where there are
    # none, else 0.5
    watermark_share: float | None = None
    distill_coef: float = 0.0  # of KL(pi_0 || pi) at the actions: cross-entropy to the reference
    # tokens of a text that are a prompt, where data are plain texts: each is cut into prompts with
    # continuations of rollouts.max_new_tokens. None: the data have prompts
    prompt_tokens: int | None = None
    # more pairs for the detector: answers with this share of random tokens against human texts
    substitution: float = 0.0
    # answers in other words against human texts: "module:function" from a list of texts to a list
    paraphrase: TextFunction = ""
    # answers against texts of other models: "module:function" from a list of prompts to a list
    other_texts: TextFunction = ""
    keeps_heads = True
    needs_rewards = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("detector_rate", "critic_rate", "l2", "distill_coef"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if not self.reward_clip > 0:
            raise ConfigError(f"reward_clip={self.reward_clip} must be above 0")
        if not 0 <= self.substitution <= 1:
            raise ConfigError(f"substitution={self.substitution} must lie within 0 and 1")
        if self.prompt_tokens is not None and self.prompt_tokens < 1:
            raise ConfigError(f"prompt_tokens={self.prompt_tokens} must be at least 1, or None")
        share = self.watermark_share
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"watermark_share={share} must lie within 0 and 1, or be None")
        if self.share < 1 and not self.rewards:
            raise ConfigError(f"watermark_share={share} leaves a part to rewards: name some")
        if self.share == 1 and self.rewards:
            raise ConfigError(
                "watermark_share=1 leaves nothing to rewards: name none, or lower the share"
            )
        for path in (self.paraphrase, self.other_texts):
            if path:
                text_function(path)  # what is wrong with it is said now
        if not hasattr(self.advantage, "unscaled"):
            raise ConfigError("objective 'rl_watermark' has a critic: use the advantage 'gae'")

    @property
    def share(self) -> float:
        """Share of the detector's score in the reward."""
        if self.watermark_share is None:
            return 0.5 if self.rewards else 1.0
        return self.watermark_share

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts beside each answer that the detector reads."""
        more = {"paraphrase": self.paraphrase, "other": self.other_texts}
        return ("human", *(name for name, function in more.items() if function))

    @property
    def channels(self) -> tuple[str, ...]:
        """The values beside each action that a batch brings along."""
        return (*super().channels, *self.texts, *(f"{name}_end" for name in self.texts))

    @property
    def head_rate(self) -> Mapping[str, float]:
        """The learning rates of detector and critic over the run's."""
        return {DETECTOR: self.detector_rate, "value": self.critic_rate}

    def collector(self, run: Any, stage: Any, workdir: Path) -> WatermarkCollector:
        """Returns what makes this stage's batches."""
        return WatermarkCollector(self, run, stage, workdir)

    def frozen(self, model: Transformer) -> Mapping[str, FrozenModel]:
        """Returns the detector's checkpoint, where there is one."""
        return self.detector.frozen(model)

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns critic and detector."""
        own = self.detector.init(jax.random.fold_in(key, 1), model)
        return {**super().init_heads(key, model), DETECTOR: own}

    # ---------------------------------------------------------------- the reward

    def score(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch
    ) -> dict[str, Float[Array, "B T"]]:
        """Returns scores of PPO, and the detector's of the text up to each target."""
        rows = [(batch.targets, batch.segment_ids != 0)]
        return {
            **super().score(model, params, aux, batch),
            DETECTOR: self.detected(model, params, batch, rows)[0],
        }

    def shape(self, rollout: Rollout) -> dict[str, Float[Array, "R T"]]:
        """Returns the channels of the batches; answers that were dropped have no weight."""
        found = super().shape(rollout)
        weight = found["weight"] * rollout.extra["valid"][:, None]
        own = {name: rollout.extra[name] for name in rollout.extra if name != "valid"}
        return {**found, "weight": weight, **own}

    # ---------------------------------------------------------------- the losses

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the actions of a batch, with the detector's loss on its pairs.

        The metrics `detector_loss`, `detector_margin` and `detector_right` are the detector's: its
        loss without what is robust, the score of answers less that of human texts, and how often
        the answer has the higher one.
        """
        pairs = self.pairs(model, params, batch, key)
        marked, human, counted = pairs[0]
        count = counted.sum()
        losses = [(pair_losses(a, b, self.l2) * w).sum() for a, b, w in pairs]
        right = (marked > human) + 0.5 * (marked == human)
        shown = {"loss": losses[0], "margin": ((marked - human) * counted).sum()}
        shown["right"] = (right * counted).sum()
        metrics = {f"detector_{n}": (jax.lax.stop_gradient(v), count) for n, v in shown.items()}
        total = jnp.stack(losses).sum()
        if not self.trains_policy:
            return Loss(total, count, metrics, aux)
        loss = super().loss(model, params, aux, batch, key)
        # The sum is divided by tokens, or answers: a pair counts as the longest answer does. The
        # detector is clipped by itself, so only the pairs' shares of it matter.
        each = 1 if self.norm == "response" else self.rollouts.max_new_tokens
        total = loss.total + each * total
        if self.distill_coef:
            total = total + self.distill_coef * self.distilled(model, params, aux, batch)
        return dataclasses.replace(loss, total=total, metrics={**loss.metrics, **metrics})

    def distilled(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch
    ) -> Float[Array, ""]:
        """Returns the sum of KL(pi_0 || pi) over the actions: the gradient of a cross-entropy."""
        mask = batch.weights != 0
        x, head = self.outputs(model, params, aux, batch)
        fixed, fixed_head = self.reference_outputs(model, params, aux, batch)
        other = (fixed, self.tempered(fixed_head))
        found = token_stats(x, head, want=["reverse_kl"], other=other, mask=mask).reverse_kl
        weights = batch.channels["weight"]
        assert found is not None
        return aggregate(found, mask, weights, self.norm, self.rollouts.max_new_tokens)[0]

    def pairs(self, model: Transformer, params: Params, batch: Batch, key: jax.Array) -> Pairs:
        """Returns scores of texts that should be high and low, and which pairs there are.

        The first pair is that of answers and human texts.
        """
        rows = {"answer": (batch.targets, batch.segment_ids != 0)}
        for name in self.texts:
            ids = batch.channels[name].astype(jnp.int32)
            rows[name] = (jnp.maximum(ids - 1, 0), ids > 0)
        if self.substitution:
            mask, size = batch.weights != 0, model.config.vocab_size
            assert size is not None
            changed = substituted(batch.targets, mask, self.substitution, size, key)
            rows["changed"] = (changed, batch.segment_ids != 0)
        each = self.detected(model, params, batch, list(rows.values()))
        scores = dict(zip(rows, each, strict=True))
        wanted = [("answer", "human", "human")]
        wanted += [("changed", "human", "human")] if self.substitution else []
        wanted += [("paraphrase", "human", "paraphrase")] if self.paraphrase else []
        wanted += [("answer", "other", "other")] if self.other_texts else []
        found = []
        for high, low, name in wanted:
            end = batch.channels[f"{name}_end"] != 0
            at = [jnp.where(end, scores[side], 0.0).sum(-1) for side in (high, low)]
            found.append((*at, end.any(-1).astype(jnp.float32)))
        return found

    def detected(
        self, model: Transformer, params: Params, batch: Batch, rows: list[tuple[Array, Array]]
    ) -> list[Float[Array, "B T"]]:
        """Returns the detector's scores behind each target of several versions of a batch's rows.

        Args:
            model: of the run.
            params: with the detector.
            batch: whose first tokens the rows share.
            rows: targets, and which of them are there.
        """
        B = batch.tokens.shape[0]
        targets, real = (jnp.concatenate(part) for part in zip(*rows, strict=True))
        first = jnp.tile(batch.tokens[:, :1], (len(rows), 1))
        there = jnp.concatenate([real[:, :1], real], axis=1)
        frozen = params.get(FROZEN, {}).get(DETECTOR)
        detector = self.detector.whole(params["heads"][DETECTOR], frozen)
        trunk = self.detector.trunk(model)
        scores = detector_scores(trunk, detector, jnp.concatenate([first, targets], 1), there)
        return [scores[i * B : (i + 1) * B, 1:] for i in range(len(rows))]

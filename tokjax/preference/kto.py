"""Kahneman-Tversky optimisation: answers that are good or bad, without pairs.

Reference: "KTO: Model Alignment as Prospect Theoretic Optimization" (arXiv 2402.01306), equations
7 and 8. Token weights that are not 1 make it MR-ALIGN ("MR-ALIGN: Meta-Reasoning Informed
Factuality Alignment for Large Reasoning Models", arXiv 2510.24794).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.preference.mismatched import mismatched
from tokjax.signals.packed import packed_sums
from tokjax.training.objective import Aux, Loss, PerToken
from tokjax.training.reference import init_reference, log_ratios, sample_sums


def kto_loss(
    ratios: Float[Array, "*S"],
    good: Bool[Array, "*S"],
    kl: Float[Array, ""],
    beta: float,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> Float[Array, "*S"]:
    """Returns lambda - v of each answer, where v = lambda sigma(+-(beta ratio - beta kl)).

    Args:
        ratios: sum of log pi / pi_ref over each answer, in nats.
        good: whether it is wanted.
        kl: z0, how far the policy has moved from the reference, in nats; a constant, at least 0.
        beta: inverse temperature of the implicit reward.
        good_weight: lambda of good answers.
        bad_weight: lambda of bad ones.

    >>> round(float(kto_loss(jnp.float32(0.0), jnp.bool_(True), jnp.float32(0.0), 0.1)), 3)
    0.5
    """
    sign = jnp.where(good, 1.0, -1.0)
    weight = jnp.where(good, good_weight, bad_weight)
    return weight * (1 - jax.nn.sigmoid(beta * sign * (ratios - kl)))


@register("objective", "kto")
@dataclass(frozen=True)
class KTO(PerToken):
    """The loss of rated answers, averaged over answers.

    Bad answers are those whose targets weigh below 0 (source kind "rated"). The reference point z0
    is the mean log-ratio of answers, unweighted, at least 0; with `kl_decay` a moving average of
    it. The paper takes answers beside prompts they do not belong to, "mismatched", which costs a
    second pass of both models; the batch's own answers cost nothing.
    """

    evaluates: ClassVar[bool] = True

    beta: float = 0.1  # inverse temperature of the implicit reward
    good_weight: float = 1.0  # lambda of good answers
    bad_weight: float = 1.0  # lambda of bad answers
    # answers that z0 is estimated on: the batch's own, the same beside the prompt of the sample
    # before each, or none, which makes it 0
    reference_point: Literal["batch", "mismatched", "none"] = "batch"
    kl_decay: float = 0.0  # of the moving average of z0; 0 takes each micro-batch's own

    def __post_init__(self):
        if not self.beta > 0:
            raise ConfigError(f"beta={self.beta} must be above 0")
        for name in ("good_weight", "bad_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.kl_decay < 1:
            raise ConfigError(f"kl_decay={self.kl_decay} must be at least 0 and below 1")
        choices = ("batch", "mismatched", "none")
        if self.reference_point not in choices:
            raise ConfigError(
                f"unknown reference_point={self.reference_point!r}."
                f"{nearest(str(self.reference_point), choices)}"
            )

    @property
    def relative_cost(self) -> float:
        """Passes of the reference, and those that z0 takes, beside the three of training."""
        return 2.0 if self.reference_point == "mismatched" else 4 / 3

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns the reference, and z0's moving average."""
        return {"reference": init_reference(model, params), "kl": jnp.zeros(())}

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the answers of a batch."""
        num = batch.example_id.shape[1]
        found = log_ratios(model, params, aux["reference"], batch)
        counted = packed_sums((batch.weights != 0).astype(jnp.float32), batch.segment_ids, num) > 0
        good = packed_sums(jnp.sign(batch.weights), batch.segment_ids, num) > 0
        ratios = sample_sums(found.ratio, batch)
        kl = self._kl(model, params, aux, batch, found.ratio)
        losses = kto_loss(ratios, good, kl, self.beta, self.good_weight, self.bad_weight)
        count = counted.sum().astype(jnp.float32)
        rewards = self.beta * ratios
        metrics = {"kl": (kl * count, count)}
        for name, group in (("good_reward", counted & good), ("bad_reward", counted & ~good)):
            metrics[name] = (
                jnp.where(group, rewards, 0.0).sum(),
                group.sum().astype(jnp.float32),
            )
        total = jnp.where(counted, losses, 0.0).sum()
        return Loss(total, count, metrics, {**aux, "kl": kl})

    def _kl(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, ratio: Array
    ) -> Array:
        """Returns z0, a constant of the gradient."""
        if self.reference_point == "none":
            return jnp.zeros(())
        if self.reference_point == "mismatched":
            batch = mismatched(batch)
            fixed = jax.lax.stop_gradient(params)
            ratio = log_ratios(model, fixed, aux["reference"], batch).ratio
        num = batch.example_id.shape[1]
        each = packed_sums((batch.weights != 0).astype(jnp.float32), batch.segment_ids, num)
        count = jnp.maximum((each > 0).sum().astype(jnp.float32), 1.0)
        total = jnp.where(batch.weights != 0, ratio, 0.0).sum()
        kl = self.kl_decay * aux["kl"] + (1 - self.kl_decay) * jnp.maximum(total / count, 0.0)
        return jax.lax.stop_gradient(kl)

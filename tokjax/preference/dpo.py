"""Direct preference optimisation, with a weight for every token.

Reference: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (arXiv
2305.18290), equation 7; label smoothing from "A Note on DPO with Noisy Preferences" (Mitchell
2023); IPO from "A General Theoretical Paradigm to Understand Learning from Human Preferences"
(arXiv 2310.12036), equation 17; the hinge from "SLiC-HF" (arXiv 2305.10425). Weights that are not
1 make it cDPO ("Critical Tokens Matter", arXiv 2411.19943), whose released trainer compares
position by position (`reduce="position"`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.training.objective import Aux, Loss, PerToken, Ratio
from tokjax.training.reference import (
    LogRatios,
    init_reference,
    log_ratios,
    pair_sides,
    sample_sums,
    whole_pairs,
)

Kind = Literal["sigmoid", "ipo", "hinge"]


def pair_loss(
    margin: Float[Array, "*P"], beta: float, kind: Kind = "sigmoid", label_smoothing: float = 0.0
) -> Float[Array, "*P"]:
    """Returns the loss of pairs, by the log-ratio of the chosen minus that of the rejected answer.

    Args:
        margin: sum of log pi / pi_ref over the chosen answer minus that over the rejected one.
        beta: inverse temperature of the implicit reward.
        kind: "sigmoid" is DPO, -log sigma(beta margin); "ipo" is (margin - 1 / (2 beta))^2;
            "hinge" is max(0, 1 - beta margin).
        label_smoothing: probability that the label of a pair is wrong (sigmoid only).

    >>> round(float(pair_loss(jnp.float32(0.24), 0.1)), 6)
    0.681219
    """
    if kind == "ipo":
        return jnp.square(margin - 1 / (2 * beta))
    if kind == "hinge":
        return jax.nn.relu(1 - beta * margin)
    scaled = beta * margin
    right, wrong = jax.nn.log_sigmoid(scaled), jax.nn.log_sigmoid(-scaled)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


@register("objective", "dpo")
@dataclass(frozen=True)
class DPO(PerToken):
    """The loss of pairs of answers, averaged over pairs (or over positions).

    The reference is the model before this stage: with adapters the model without them, which costs
    no memory; else a copy of the parameters.
    """

    reads_pairs: ClassVar[bool] = True
    evaluates: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 4 / 3  # the reference's pass

    beta: float = 0.1  # inverse temperature of the implicit reward
    kind: Kind = "sigmoid"  # shape of the loss: DPO, IPO or SLiC's hinge
    label_smoothing: float = 0.0  # probability that a label is wrong (sigmoid only)
    # mean log-ratios of answers instead of sums, as IPO's authors use them
    per_token: bool = False
    sft_weight: float = 0.0  # of the chosen answers' mean negative log-likelihood beside the loss
    # one loss a pair, of sums over its answers; or one a position, of the two answers side by side
    reduce: Literal["pair", "position"] = "pair"

    def __post_init__(self):
        if not self.beta > 0:
            raise ConfigError(f"beta={self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5"
            )
        if self.label_smoothing and self.kind != "sigmoid":
            raise ConfigError(f"label_smoothing has no meaning for kind={self.kind!r}")
        if self.sft_weight < 0:
            raise ConfigError(f"sft_weight={self.sft_weight} must not be negative")

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns the reference."""
        return init_reference(model, params)

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the pairs of a batch that have two answers."""
        found = log_ratios(model, params, aux, batch)
        whole = whole_pairs(batch)
        count = whole.sum().astype(jnp.float32)
        sums = sample_sums(found.ratio, batch)
        if self.per_token:
            size = sample_sums(jnp.ones_like(batch.weights), batch)
            sums = sums / jnp.where(size > 0, size, 1.0)
        chosen, rejected = (jnp.where(whole, side, 0.0) for side in pair_sides(sums))
        losses = jnp.where(whole, self._of(chosen - rejected), 0.0)
        if self.reduce == "position":
            losses, weight = position_losses(found.ratio * jnp.abs(batch.weights), batch, self._of)
        else:
            weight = count
        total = losses.sum()
        metrics = reward_metrics(self.beta * chosen, self.beta * rejected, whole)
        if self.sft_weight:
            nll, share = _chosen_nll(found, batch)
            total += self.sft_weight * weight * nll / jnp.where(share > 0, share, 1.0)
            metrics["chosen_nll"] = (nll, share)
        return Loss(total, weight, metrics, aux)

    def _of(self, margin: Array) -> Array:
        return pair_loss(margin, self.beta, self.kind, self.label_smoothing)


def reward_metrics(
    chosen: Float[Array, "B P"], rejected: Float[Array, "B P"], whole: Array
) -> dict[str, Ratio]:
    """Returns means over pairs: implicit rewards, their margin, and how often it is positive."""
    count = whole.sum().astype(jnp.float32)
    margin = chosen - rejected
    return {
        "reward_accuracy": (jnp.where(whole, margin > 0, False).sum().astype(jnp.float32), count),
        "reward_margin": (jnp.where(whole, margin, 0.0).sum(), count),
        "chosen_reward": (chosen.sum(), count),
        "rejected_reward": (rejected.sum(), count),
    }


def position_losses(ratio: Float[Array, "B T"], batch: Batch, of) -> tuple[Array, Array]:
    """Returns the losses of weighted log-ratios compared position by position, and their number.

    The n-th counted target of the chosen answer is compared with the n-th of the rejected one;
    where one answer has ended its log-ratio is 0.
    """
    B, T = ratio.shape
    num = batch.example_id.shape[1]
    counted = batch.weights != 0
    whole = jnp.repeat(whole_pairs(batch), 2, axis=1)
    before = jnp.cumsum(counted, axis=1) - counted
    ids = jnp.arange(1, num + 1)
    begins = jnp.where(batch.segment_ids[:, :, None] == ids, before[:, :, None], T).min(axis=1)
    column = jnp.maximum(batch.segment_ids - 1, 0)
    place = before - jnp.take_along_axis(begins, column, axis=1)
    used = counted & jnp.take_along_axis(whole, column, axis=1)
    rows = jnp.arange(B)[:, None]
    place = jnp.where(used, place, T)  # beyond the end: dropped
    grid = jnp.zeros((B, num, T), ratio.dtype).at[rows, column, place].set(ratio, mode="drop")
    there = jnp.zeros((B, num, T), bool).at[rows, column, place].set(True, mode="drop")
    either = there[:, 0::2] | there[:, 1::2]
    losses = jnp.where(either, of(grid[:, 0::2] - grid[:, 1::2]), 0.0)
    return losses, either.sum().astype(jnp.float32)


def _chosen_nll(found: LogRatios, batch: Batch) -> Ratio:
    good = jnp.maximum(batch.weights, 0.0)
    return -(found.policy * good).sum(), good.sum()

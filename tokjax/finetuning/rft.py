"""RFT: the reasoning and the boilerplate of an answer weigh by how hard each still is.

Reference: "Disentangling Reasoning Tokens and Boilerplate Tokens For Language Model Fine-tuning"
(arXiv 2412.14780), the step that follows SHAD (see `tokjax.selection.shad`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.signals.packed import packed_means, packed_spread
from tokjax.training.objective import Aux, Ratio, WithoutState
from tokjax.training.passes import Stats


def group_weights(
    boilerplate: Float[Array, "*S"],
    reasoning: Float[Array, "*S"],
    has_boilerplate: Bool[Array, "*S"],
    has_reasoning: Bool[Array, "*S"],
    tau: float,
) -> Float[Array, "*S"]:
    """Returns w_r, the weight of the reasoning group's mean loss; the other's is 1 - w_r.

    w_r = e^(L_r / tau) / (e^(L_b / tau) + e^(L_r / tau)) where both groups exist; a group that is
    alone weighs 1.

    Args:
        boilerplate: L_b, mean loss of the boilerplate tokens, in nats.
        reasoning: L_r, mean loss of the reasoning tokens, in nats.
        has_boilerplate: whether there are any of the former.
        has_reasoning: whether there are any of the latter.
        tau: temperature, in nats.
    """
    both = jax.nn.sigmoid((reasoning - boilerplate) / tau)
    return jnp.where(has_boilerplate & has_reasoning, both, jnp.where(has_reasoning, 1.0, 0.0))


@register("weigher", "rft")
@dataclass(frozen=True)
class RFT(WithoutState):
    """Group weights by a softmax of the groups' current losses (equation 4 of the paper).

    The channel says which targets are reasoning (not 0); the others are boilerplate. Take it with
    `norm="sequence"`: the loss of a sample is then w_b L_b + w_r L_r; with `per="batch"` and
    `norm="token"` that of a micro-batch is. The weights are constants of the gradient.
    """

    # softmax temperature in nats; 2 to 5 are stable, towards 0 only the harder group is trained on
    tau: float = 2.5
    per: Literal["sample", "batch"] = "sample"  # whose means the weights are made of
    channel: str = "reasoning"  # name of the artifact's channel

    def __post_init__(self):
        if not self.tau > 0:
            raise ConfigError(f"tau={self.tau} must be above 0")

    @property
    def want(self) -> Collection[str]:
        """The targets' nll."""
        return ("nll",)

    def weights(
        self, stats: Stats, batch: Batch, aux: Aux, key: jax.Array
    ) -> tuple[Float[Array, "B T"], dict[str, Ratio]]:
        """Returns w_g n / n_g for each token of group g, where n_g is the group's weight of n.

        Raises:
            ConfigError: the data have no such channel.
        """
        if self.channel not in batch.channels:
            raise ConfigError(
                f"weigher 'rft' needs the channel {self.channel!r}, but the data have "
                f"{sorted(batch.channels) or 'none'}: make it by `python -m tokjax.select "
                f"--method=shad` and name the file in data.train.0.artifact"
            )
        num = batch.example_id.shape[1]
        size = jnp.abs(batch.weights)
        groups = [
            jnp.where(reasoning, size, 0.0)
            for reasoning in (batch.channels[self.channel] == 0, batch.channels[self.channel] != 0)
        ]
        found = [packed_means(stats["nll"], g, batch.segment_ids, num) for g in groups]
        if self.per == "batch":
            found = [_pooled(mean, weight) for mean, weight in found]
        (easy, n_easy), (hard, n_hard) = found
        w_hard = group_weights(easy, hard, n_easy > 0, n_hard > 0, self.tau)
        factors = jnp.zeros_like(batch.weights)
        for w, n, group in ((1 - w_hard, n_easy, groups[0]), (w_hard, n_hard, groups[1])):
            share = (n_easy + n_hard) / jnp.where(n > 0, n, 1.0)
            each = jnp.where(n > 0, w * share, 0.0)
            factors += jnp.where(group > 0, packed_spread(each, batch.segment_ids), 0.0)
        some = ((n_easy > 0) | (n_hard > 0)).astype(jnp.float32)
        return factors, {
            "reasoning_weight": ((w_hard * some).sum(), some.sum()),
            "reasoning_nll": ((stats["nll"] * groups[1]).sum(), groups[1].sum()),
            "boilerplate_nll": ((stats["nll"] * groups[0]).sum(), groups[0].sum()),
        }


def _pooled(mean: Array, weight: Array) -> tuple[Array, Array]:
    """Returns the mean and weight of all samples' tokens together, for every sample."""
    total = weight.sum()
    pooled = (mean * weight).sum() / jnp.where(total > 0, total, 1.0)
    return jnp.full_like(mean, pooled), jnp.full_like(weight, total)


def grouped_loss(nll: Float[Array, "T"], reasoning: Bool[Array, "T"], tau: float) -> Array:
    """Returns w_b L_b + w_r L_r of one answer, the weights being constants.

    >>> round(float(grouped_loss(jnp.array([0.2, 1.4]), jnp.array([False, True]), 1e6)), 3)
    0.8
    """
    segments = jnp.ones((1, nll.shape[0]), jnp.int32)
    means = [
        packed_means(nll[None], mask[None].astype(jnp.float32), segments, 1)
        for mask in (~reasoning, reasoning)
    ]
    (easy, n_easy), (hard, n_hard) = means
    w = jax.lax.stop_gradient(group_weights(easy, hard, n_easy > 0, n_hard > 0, tau))
    return ((1 - w) * easy + w * hard).sum()

"""DFT: every target weighs by how likely the model already finds it.

Reference: "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
Rectification" (arXiv 2508.05629).
"""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.training.objective import Aux, Ratio, WithoutState
from tokjax.training.passes import Stats


@register("weigher", "dft")
@dataclass(frozen=True)
class DFT(WithoutState):
    """The target's probability under the model, a constant of the gradient.

    The gradient of -p log p with p held is that of -p: the expected reward of one draw that is
    rewarded for being the target (see `tokjax.finetuning.one_token_rollout`, kappa 1).
    """

    @property
    def want(self) -> Collection[str]:
        """The targets' log-likelihood."""
        return ("logprob",)

    def weights(
        self, stats: Stats, batch: Batch, aux: Aux, key: jax.Array
    ) -> tuple[Float[Array, "B T"], dict[str, Ratio]]:
        """Returns each target's probability, and its mean."""
        probability, size = jnp.exp(stats["logprob"]), jnp.abs(batch.weights)
        return probability, {"probability": ((probability * size).sum(), size.sum())}

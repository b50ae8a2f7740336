"""Supervised fine-tuning in which a method says what every target weighs.

The data carry weights of their own (`Batch.weights`: 0 on prompts, any real number elsewhere). A
weigher multiplies them by what it finds in the model's own statistics of the targets; without one
this is plain SFT. Every method that is a weigher is a few lines in a file of its own.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.config import Choice, register
from tokjax.data.batch import Batch
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals import weighted_nll
from tokjax.signals.packed import packed_sums
from tokjax.training.objective import Aux, Loss, PerToken, Ratio, WithoutState
from tokjax.training.passes import Stats, forward, plain_nll, target_stats

Norm = Literal["token", "kept", "sequence"]


class Weigher(Protocol):
    """How much each target of a batch weighs, told from the model's statistics of it."""

    @property
    def want(self) -> Collection[str]:
        """Statistics of `token_stats` that the weights are made of."""
        ...

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns the weigher's initial state."""
        ...

    def weights(
        self, stats: Stats, batch: Batch, aux: Aux, key: jax.Array
    ) -> tuple[Float[Array, "B T"], dict[str, Ratio]]:
        """Returns what multiplies `batch.weights`, and metrics as (sum, weight).

        The statistics are constants; so are the weights.
        """
        ...


@register("weigher", "uniform")
@dataclass(frozen=True)
class Uniform(WithoutState):
    """Every target weighs what the data say: plain SFT."""

    @property
    def want(self) -> Collection[str]:
        """Nothing is needed."""
        return ()

    def weights(
        self, stats: Stats, batch: Batch, aux: Aux, key: jax.Array
    ) -> tuple[Float[Array, "B T"], dict[str, Ratio]]:
        """Returns ones."""
        return jnp.ones_like(batch.weights), {}


@register("objective", "sft")
@dataclass(frozen=True)
class SFT(PerToken):
    """Weighted negative log-likelihood of the targets, with weights by a method."""

    weigher: Annotated[Any, Choice("weigher")] = Uniform()  # what every target weighs
    # what the weighted sum is divided by: the data's weights; those of the targets that the method
    # keeps; or each sample's own weights, and then the number of samples
    norm: Norm = "token"

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns the weigher's state."""
        return self.weigher.init(key, model, params)

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the batch; see `loss_weights` for the norms."""
        out = forward(model, params, batch)
        head = model.head(params)
        stats = target_stats(out, head, batch, self.weigher.want)
        factors, metrics = self.weigher.weights(stats, batch, aux, key)
        weights, divisor = loss_weights(
            batch, jax.lax.stop_gradient(factors.astype(jnp.float32)), self.norm
        )
        total, nll = weighted_nll(out.x, head, batch.targets[..., None], weights[..., None])
        return Loss(total, divisor, {**plain_nll(nll[..., 0], batch), **metrics}, aux)


def loss_weights(
    batch: Batch, factors: Float[Array, "B T"], norm: Norm
) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """Returns what each target's loss is multiplied by, and what the sum is divided by.

    Args:
        batch: its weights w may be any real numbers.
        factors: f, the method's, beside them.
        norm: "token" gives (w f, sum |w|): factors below 1 make smaller steps. "kept" gives
            (w f, sum |w| over targets with f not 0): the mean over what is kept, where f is a mask.
            "sequence" gives each sample the mean of its losses weighted by w f, and divides by the
            number of samples that have any weight.
    """
    weights = batch.weights * factors
    if norm == "sequence":
        num = batch.example_id.shape[1]
        own = packed_sums(jnp.abs(weights), batch.segment_ids, num)
        inverse = jnp.where(own > 0, 1 / jnp.where(own > 0, own, 1.0), 0.0)
        ids = jnp.maximum(batch.segment_ids - 1, 0)
        return weights * jnp.take_along_axis(inverse, ids, axis=1), (own > 0).sum().astype(
            jnp.float32
        )
    counted = batch.weights if norm == "token" else jnp.where(factors == 0, 0.0, batch.weights)
    return weights, jnp.abs(counted).sum()

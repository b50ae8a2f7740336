"""What a model of characters predicts at each slot, and the loss of it in bits per byte."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.models.head import Head
from tokjax.signals import weighted_nll
from tokjax.training.objective import Loss


@struct.dataclass
class Slots:
    """Slots that predict, and what they are to predict.

    Attributes:
        x: what the output head reads.
        head: the output head.
        targets: the symbol that each slot is to predict.
        weights: of the targets; 0 leaves one out.
        weight: what the sum over all targets is divided by.
        metrics: further metrics, (sum, weight) by name.
    """

    x: Float[Array, "B N D"]
    head: Head
    targets: Int[Array, "B N 1"]
    weights: Float[Array, "B N 1"]
    weight: Float[Array, ""]
    metrics: dict[str, Any] = struct.field(default_factory=dict)


def scored(found: Slots, of_text: Bool[Array, "B N"], z_loss: float) -> Loss:
    """Returns the loss of all slots, with the metric `bits_per_byte`: all nats over the text alone.

    Args:
        found: what is predicted.
        of_text: which targets are bytes of text and no mark of an end.
        z_loss: coefficient of the squared log-sum-exp of the logits.
    """
    total, nll = weighted_nll(found.x, found.head, found.targets, found.weights, z_loss)
    # The NaN of an id that means nothing must not pass a weight of 0.
    sums = jnp.where(found.weights == 0, 0.0, jax.lax.stop_gradient(nll * found.weights))
    units = jnp.where(of_text, found.weights[..., 0], 0.0).sum()
    metrics = {
        "nll": (sums.sum(), found.weight),
        "bits_per_byte": (sums.sum() / math.log(2), units),
    }
    return Loss(total, found.weight, metrics | found.metrics)

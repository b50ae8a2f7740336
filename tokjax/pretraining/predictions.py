"""What a pre-training objective predicts, before it is scored.

An objective that offers `predictions` can be scored against other targets than its own hard ones:
`tokjax.pretraining.syntactic_smoothing` softens those of next tokens, of patches and of masked
tokens alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.signals import weighted_nll
from tokjax.signals.soft_targets import SoftTargets
from tokjax.training.objective import Aux, Loss


@struct.dataclass
class Predictions:
    """States that predict, and what they are to predict.

    Attributes:
        x: what the output head reads.
        head: the output head.
        targets: the ids that each position is to predict, K of them under one distribution.
        weights: of the targets; 0 leaves one out, whatever its id.
        weight: what the sum over all targets is divided by.
        metrics: further metrics, (sum, weight) by name.
        offsets: how many of the K targets have a metric of their own, `nll_offset_k`.
    """

    x: Float[Array, "B T D"]
    head: Any
    targets: Int[Array, "B T K"]
    weights: Float[Array, "B T K"]
    weight: Float[Array, ""]
    metrics: dict[str, Any] = struct.field(default_factory=dict)
    offsets: int = struct.field(pytree_node=False, default=0)


def scored(
    found: Predictions,
    z_loss: float = 0.0,
    aux: Aux = (),
    *,
    keep: Float[Array, "B T K"] | None = None,
    soft: SoftTargets | None = None,
) -> Loss:
    """Returns the loss of predictions; the metric `nll` is that of the hard targets.

    Args:
        found: the predictions.
        z_loss: coefficient of the squared log-sum-exp of the logits.
        aux: the objective's state after the micro-batch.
        keep: mass that each hard target keeps; all of it if None.
        soft: the rest of the target distributions, weighted already.
    """
    weights = found.weights if keep is None else found.weights * keep
    total, nll = weighted_nll(found.x, found.head, found.targets, weights, z_loss, soft=soft)
    # The NaN of an id that means nothing must not pass a weight of 0.
    sums = jnp.where(found.weights == 0, 0.0, jax.lax.stop_gradient(nll * found.weights))
    metrics = {"nll": (sums.sum(), found.weight)}
    for k in range(found.offsets):
        metrics[f"nll_offset_{k}"] = (sums[..., k].sum(), found.weights[..., k].sum())
    return Loss(total, found.weight, metrics | found.metrics, aux)

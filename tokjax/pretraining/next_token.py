"""Next-token prediction: the objective everything else is compared with."""

from dataclasses import dataclass

import jax

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals import weighted_nll
from tokjax.training.objective import Aux, Loss, PerToken, WithoutState


@register("objective", "next_token")
@dataclass(frozen=True)
class NextToken(PerToken, WithoutState):
    """Weighted negative log-likelihood of the next token, averaged over the weights."""

    z_loss: float = 0.0  # coefficient of the squared log-sum-exp of the logits

    def __post_init__(self):
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss} must not be negative")

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of w * nll and the sum of w over the batch."""
        out = model.backbone(
            params,
            model.embed(params, batch.tokens),
            positions=batch.positions,
            segments=batch.segment_ids,
        )
        total, nll = weighted_nll(
            out.x,
            model.head(params),
            batch.targets[..., None],
            batch.weights[..., None],
            self.z_loss,
        )
        weight = batch.weights.sum()
        return Loss(total, weight, {"nll": ((nll[..., 0] * batch.weights).sum(), weight)}, aux)

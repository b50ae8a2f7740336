"""Next-token prediction: the objective everything else is compared with."""

from dataclasses import dataclass

import jax

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.pretraining.predictions import Predictions, scored
from tokjax.training.objective import Aux, Loss, PerToken, WithoutState


@register("objective", "next_token")
@dataclass(frozen=True)
class NextToken(PerToken, WithoutState):
    """Weighted negative log-likelihood of the next token, averaged over the weights."""

    z_loss: float = 0.0  # coefficient of the squared log-sum-exp of the logits

    def __post_init__(self):
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss} must not be negative")

    def predictions(
        self, model: Transformer, params: Params, batch: Batch, key: jax.Array
    ) -> Predictions:
        """Returns what each position predicts: the token behind it."""
        out = model.backbone(
            params,
            model.embed(params, batch.tokens),
            positions=batch.positions,
            segments=batch.segment_ids,
        )
        return Predictions(
            x=out.x,
            head=model.head(params),
            targets=batch.targets[..., None],
            weights=batch.weights[..., None],
            weight=batch.weights.sum(),
        )

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of w * nll and the sum of w over the batch."""
        return scored(self.predictions(model, params, batch, key), self.z_loss, aux)

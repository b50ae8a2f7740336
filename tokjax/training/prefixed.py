"""Objectives of text behind continuous features: speech recognition, captions.

The projector is trained beside the model, as the objective's head `prefix`.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tokjax.data.batch import Batch
from tokjax.data.feature_batch import FeatureBatch
from tokjax.errors import ConfigError
from tokjax.models.feature_prefix import FeaturePrefix
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.models.views import Prefilled
from tokjax.training.objective import HEADS, Aux, Loss, Objective, of_model

PREFIX = "prefix"  # the projector among an objective's heads


@dataclass(frozen=True)
class Prefixed:
    """Another objective, on rows that begin with projected frames.

    The base reads the rows as ever; the vectors stand in the place of embeddings. It may be any
    that embeds the batch's tokens once and is without heads of its own. Batches are
    `tokjax.data.feature_batch.FeatureBatch`.
    """

    base: Objective  # what is minimised on these rows
    prefix: FeaturePrefix  # how frames become vectors

    def __post_init__(self):
        for name in ("init_heads", "frozen", "collector"):
            if hasattr(self.base, name):
                raise ConfigError(
                    f"base={type(self.base).__name__} has parameters, models or data of its own "
                    f"({name}), which do not go with a prefix: choose for example NextToken()"
                )
        if self.base.tokens_per_position != 1:
            raise ConfigError(
                f"base={type(self.base).__name__} reads several tokens at a position, but each "
                f"vector of a prefix has a position of its own"
            )
        if getattr(self.base, "bidirectional", False):
            raise ConfigError(
                f"base={type(self.base).__name__} restores tokens; a prefix goes before text that "
                f"is written"
            )

    @property
    def tokens_per_position(self) -> int:
        """One token, or vector, a position."""
        return 1

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the projector's parameters."""
        config = model.config
        return {PREFIX: self.prefix.init(key, config.d_model, config.param_dtype)}

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns the base's state."""
        return self.base.init(key, model, params)

    def advance(self, aux: Aux, progress: Float[Array, ""]) -> Aux:
        """Returns the base's state with how much of the training is done."""
        advance = getattr(self.base, "advance", None)
        return aux if advance is None else advance(aux, progress)

    def vectors(
        self, params: Params, frames: Float[Array, "B F C"], counts: Int[Array, "B"]
    ) -> Float[Array, "B P D"]:
        """Returns what stands in the place of embeddings.

        Args:
            params: the model's with the heads.
            frames: of each row, its own from the left.
            counts: how many frames are a row's own.
        """
        return self.prefix(params[HEADS][PREFIX], frames, counts)

    def view(self, model: Transformer, params: Params, batch: Batch) -> Prefilled:
        """Returns the model as one that reads the vectors of a batch.

        Raises:
            ConfigError: the batch has no frames, or the model cannot have a prefix.
        """
        if not isinstance(batch, FeatureBatch):
            raise ConfigError(
                "a prefix needs batches with frames: make them by "
                "tokjax.data.feature_batch.feature_batch"
            )
        if not model.config.causal:
            raise ConfigError("a prefix is for models that write text: set model.causal=True")
        vectors = self.vectors(params, batch.frames, batch.frame_counts)
        return Prefilled.of(model, vectors, batch.slots)

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the base's loss.

        Raises:
            ConfigError: as `view` and the base.
        """
        return self.base.loss(self.view(model, params, batch), of_model(params), aux, batch, key)

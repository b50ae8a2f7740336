"""Masked language modelling: a bidirectional encoder restores the tokens that were corrupted.

Reference: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", arXiv 1810.04805, section 3.1.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models.encoder import Encoder
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.pretraining.corruption import Corruption, corrupt, with_ids
from tokjax.pretraining.predictions import Predictions, scored
from tokjax.training.objective import Aux, Loss, Materials, PerToken, WithoutState


@register("objective", "masked_lm")
@dataclass(frozen=True)
class MaskedLM(PerToken, WithoutState):
    """Negative log-likelihood of the tokens chosen by the corruption, averaged over them.

    Needs `model.causal=False`. Held-out data are evaluated by the same loss, under a corruption
    that does not change between evaluations.
    """

    corruption: Corruption = Corruption()  # which tokens, and what stands in their place
    z_loss: float = 0.0  # coefficient of the squared log-sum-exp of the logits
    exempt: tuple[int, ...] | None = None  # ids never chosen; None: the tokenizer's special ones

    evaluates = True
    bidirectional = True

    def __post_init__(self):
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss} must not be negative")

    def prepared(self, materials: Materials) -> "MaskedLM":
        """Returns the objective with the ids that the tokenizer decides.

        Raises:
            ConfigError: there is no mask, and no id to spare for one.
        """
        tokenizer = materials.tokenizer
        model_ids = materials.model.config.vocabulary
        special = tokenizer.special_tokens
        spec = with_ids(self.corruption, tokenizer.vocab_size, special, model_ids)
        exempt = tuple(sorted(special.values())) if self.exempt is None else self.exempt
        return dataclasses.replace(self, corruption=spec, exempt=exempt)

    def predictions(
        self, model: Transformer, params: Params, batch: Batch, key: jax.Array
    ) -> Predictions:
        """Returns what each chosen position predicts: the token that was there.

        With a fixed count only the states of chosen positions are scored.

        Raises:
            ConfigError: the model is causal, or the mask's id is not known.
        """
        if not isinstance(model, Encoder):
            raise ConfigError(
                "objective 'masked_lm' needs a model that sees both sides: set model.causal=False"
            )
        weights = own_weights(batch)
        eligible = (weights != 0) & ~among(batch.tokens, self.exempt or ())
        found = corrupt(key, batch.tokens, eligible, self.corruption)
        out = model.backbone(
            params,
            model.embed(params, found.tokens),
            positions=batch.positions,
            segments=batch.segment_ids,
        )
        x, targets = out.x, batch.tokens
        weights = jnp.where(found.chosen, weights, 0.0)
        if self.corruption.count == "fixed":
            most = self.corruption.most(batch.tokens.shape[1])
            places = jnp.argsort(~found.chosen, axis=-1, stable=True)[:, :most]
            x = jnp.take_along_axis(x, places[..., None], axis=1)
            targets, weights = (jnp.take_along_axis(a, places, axis=1) for a in (targets, weights))
        if model.config.mlm_head is not None:
            x = model.mlm_hidden(params, x)
        eligible_count = eligible.sum().astype(jnp.float32)
        return Predictions(
            x=x,
            head=model.head(params),
            targets=targets[..., None],
            weights=weights[..., None],
            weight=weights.sum(),
            metrics={"chosen": (found.chosen.sum().astype(jnp.float32), eligible_count)},
        )

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of w * nll and the sum of w over the chosen tokens.

        Raises:
            ConfigError: as `predictions`.
        """
        return scored(self.predictions(model, params, batch, key), self.z_loss, aux)


def own_weights(batch: Batch) -> Float[Array, "B T"]:
    """Returns the weight of each token itself; a batch has those of the tokens behind.

    The first token of a segment is never a target and takes the weight of its successor, which is
    a recommendation of tokjax.
    """
    before = jnp.pad(batch.weights, ((0, 0), (1, 0)))[:, :-1]
    segments = batch.segment_ids
    first = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(segments > 0, jnp.where(first, batch.weights, before), 0.0)


def among(tokens: Int[Array, "B T"], ids: tuple[int, ...]) -> Bool[Array, "B T"]:
    """Returns which tokens are some of the ids."""
    if not ids:
        return jnp.zeros(tokens.shape, bool)
    return jnp.isin(tokens, jnp.asarray(ids, tokens.dtype))

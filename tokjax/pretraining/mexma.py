"""MEXMA: sentence vectors of two languages, aligned, and taught by unmasking each other's tokens.

Reference: "MEXMA: Token-level objectives improve sentence representations" (arXiv 2409.12737), and
its released code.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.models.encoder import Encoder
from tokjax.models.head import Head
from tokjax.models.parameters import Params
from tokjax.models.stack import StackConfig, init_stack, run_stack
from tokjax.models.transformer import Transformer
from tokjax.pretraining.corruption import Corrupted, Corruption, corrupt, with_ids
from tokjax.pretraining.koleo import koleo, unit_vectors
from tokjax.pretraining.masked_lm import among, own_weights
from tokjax.signals import weighted_nll
from tokjax.training.objective import HEADS, Aux, Loss, Materials, PerToken, Ratio, WithoutState
from tokjax.training.passes import forward

_CONTEXTS = ("other", "own", "unrelated")
_STOPS = ("none", "sentence", "tokens", "all")


@register("objective", "mexma")
@dataclass(frozen=True)
class Mexma(PerToken, WithoutState):
    """Squared distance of translations, unmasking across languages, and KoLeo; a mean over pairs.

    Records are of the kind "translation", and the model is an encoder (`model.causal=False`). The
    vector of a sentence is the final state of its first token, which is never masked: begin
    sequences with the BOS id. A pair of translations shares a row, its two texts as segments, so
    that one pass over a batch encodes both languages; there is one over the clean texts and one
    over the masked ones. KoLeo's neighbours are those of the micro-batch.
    """

    reads_translations: ClassVar[bool] = True
    evaluates: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 2.0  # two passes; the head's blocks are not counted

    # of the texts to be restored
    corruption: Corruption = Corruption(rate=0.4, masked=0.8, random=0.1)
    head: StackConfig = StackConfig(n_layers=6)  # the blocks that unmask; as wide as the states
    alignment_weight: float = 1.0  # weight of the squared distance between translations
    unmasking_weight: float = 1.0  # weight of the masked tokens' negative log-likelihood
    koleo_weight: float = 0.01  # weight of KoLeo; 0 lets vectors collapse
    # the sentence vector that the head reads beside a text's tokens: of its translation; of the
    # text itself (an ablation); of another pair in the batch (a control)
    context: Literal["other", "own", "unrelated"] = "other"
    # what the unmasking loss does not change in the encoder: nothing is left out; the sentence
    # vector; the masked texts' states; both, and the table of the vocabulary
    stop: Literal["none", "sentence", "tokens", "all"] = "none"
    exempt: tuple[int, ...] | None = None  # ids never masked; None: the tokenizer's special ones

    def __post_init__(self):
        for name, choices in (("context", _CONTEXTS), ("stop", _STOPS)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")
        for name in ("alignment_weight", "unmasking_weight", "koleo_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.head.d_model is not None:
            raise ConfigError(
                f"head.d_model={self.head.d_model} must be None: the head reads the encoder's "
                f"states and is scored against its table"
            )

    def prepared(self, materials: Materials) -> "Mexma":
        """Returns the objective with the ids that the tokenizer decides.

        Raises:
            ConfigError: there is no mask and no id to spare for one.
        """
        tokenizer = materials.tokenizer
        special = tokenizer.special_tokens
        model_ids = materials.model.config.vocabulary
        spec = with_ids(self.corruption, tokenizer.vocab_size, special, model_ids)
        exempt = tuple(sorted(special.values())) if self.exempt is None else self.exempt
        return dataclasses.replace(self, corruption=spec, exempt=exempt)

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the parameters of the blocks that unmask, and the bias of the vocabulary."""
        bias = jnp.zeros((model.config.vocabulary,), jnp.dtype(model.config.param_dtype))
        return {"unmask": {"stack": init_stack(self.head, model.config, key), "bias": bias}}

    def corrupted(self, batch: Batch, key: jax.Array) -> Corrupted:
        """Returns the masked texts; the first token of each stays and is not chosen."""
        eligible = (own_weights(batch) != 0) & ~among(batch.tokens, self.exempt or ())
        return corrupt(key, batch.tokens, eligible & ~first_tokens(batch), self.corruption)

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the pairs of a batch.

        Raises:
            ConfigError: the model is causal, the batch holds no translations, or the mask's id is
                not known.
        """
        if not isinstance(model, Encoder):
            raise ConfigError(
                "objective 'mexma' needs a model that sees both sides: set model.causal=False"
            )
        if "side" not in batch.values:
            raise ConfigError(
                "objective 'mexma' needs texts with their translations: read records of kind "
                "'translation'"
            )
        return self.of_masked(model, params, batch, self.corrupted(batch, key), aux)

    def of_masked(
        self, model: Encoder, params: Params, batch: Batch, masked: Corrupted, aux: Aux = ()
    ) -> Loss:
        """Returns the loss of a batch with the given masked texts, as sums over pairs."""
        vectors = sentence_vectors(forward(model, params, batch).x, batch)
        there = (batch.example_id >= 0).reshape(-1, 2)[:, 0]
        pairs = vectors.reshape(-1, 2, vectors.shape[-1])
        count = there.sum().astype(jnp.float32)
        distances = jnp.square(pairs[:, 0] - pairs[:, 1]).mean(-1)
        distance = jnp.where(there, distances, 0.0).sum()
        spread = (koleo(pairs[:, 0], there) + koleo(pairs[:, 1], there)) / 2
        total = self.alignment_weight * distance + self.koleo_weight * count * spread
        metrics: dict[str, Ratio] = {
            "alignment": (distance, count),
            "koleo": (count * spread, count),
            **_cosines(jax.lax.stop_gradient(pairs), there),
        }
        if self.unmasking_weight:
            unmasked, found = self._unmasked(model, params, batch, masked, pairs, there)
            total += self.unmasking_weight * count * unmasked
            metrics |= found
        return Loss(total, count, metrics, aux)

    def _unmasked(
        self,
        model: Encoder,
        params: Params,
        batch: Batch,
        masked: Corrupted,
        pairs: Float[Array, "P 2 D"],
        there: Bool[Array, "P"],
    ) -> tuple[Float[Array, ""], dict[str, Ratio]]:
        """Returns the mean over both languages of their masked tokens' mean nll, and metrics."""
        out = model.backbone(
            params,
            model.embed(params, masked.tokens),
            positions=batch.positions,
            segments=batch.segment_ids,
        )
        states, context = out.x, self._context(pairs, there)
        context = context.reshape(*batch.example_id.shape, -1)
        if self.stop in ("sentence", "all"):
            context = jax.lax.stop_gradient(context)
        if self.stop in ("tokens", "all"):
            states = jax.lax.stop_gradient(states)
        x = self.unmask_states(model, params, states, context, batch)
        head = self.output_head(model, params)
        own = jnp.where(masked.chosen, own_weights(batch), 0.0)
        second = (batch.segment_ids - 1) % 2 == 1
        sides = [jnp.where(second == side, own, 0.0) for side in (False, True)]
        sizes = [side.sum() for side in sides]
        # A side of which nothing is masked adds nothing.
        weights = sum(
            (s / jnp.where(n > 0, n, 1.0) for s, n in zip(sides, sizes, strict=True)),
            start=jnp.zeros_like(own),
        )
        targets, given = batch.tokens, 0.5 * weights
        if self.corruption.count == "fixed":
            most = self.corruption.most(own.shape[1])
            places = jnp.argsort(~masked.chosen, axis=-1, stable=True)[:, :most]
            x = jnp.take_along_axis(x, places[..., None], axis=1)
            targets, given, own = (
                jnp.take_along_axis(a, places, axis=1) for a in (targets, given, own)
            )
        total, nll = weighted_nll(x, head, targets[..., None], given[..., None])
        sums = jnp.where(own == 0, 0.0, nll[..., 0] * own).sum()
        return total, {"nll": (sums, own.sum())}

    def _context(
        self, pairs: Float[Array, "P 2 D"], there: Bool[Array, "P"]
    ) -> Float[Array, "P 2 D"]:
        """Returns the sentence vector that goes with each text."""
        if self.context == "own":
            return pairs
        others = pairs[:, ::-1]
        return others if self.context == "other" else others[_following(there)]

    def unmask_states(
        self,
        model: Encoder,
        params: Params,
        states: Float[Array, "B T D"],
        context: Float[Array, "B S D"],
        batch: Batch,
    ) -> Float[Array, "B T D"]:
        """Returns what the output head reads: masked texts' states with vectors for first tokens.

        Args:
            model: the encoder.
            params: its parameters and the heads.
            states: of the masked texts; those of first tokens are not read.
            context: a sentence vector for each segment.
            batch: whose segments they are.
        """
        shape = batch.segment_ids.shape
        at = jnp.broadcast_to(jnp.maximum(batch.segment_ids - 1, 0)[..., None], (*shape, 1))
        given = jnp.take_along_axis(context, at, axis=1).astype(states.dtype)
        x = jnp.where(first_tokens(batch)[..., None], given, states)
        return run_stack(
            self.head, model.config, params[HEADS]["unmask"]["stack"], x, batch.segment_ids
        )

    def output_head(self, model: Encoder, params: Params) -> Head:
        """Returns the model's output head with a bias of the objective's own."""
        head = dataclasses.replace(model.head(params), bias=None)
        if self.stop == "all":
            head = jax.lax.stop_gradient(head)
        return dataclasses.replace(head, bias=params[HEADS]["unmask"]["bias"])


def first_tokens(batch: Batch) -> Bool[Array, "B T"]:
    """Returns which tokens are the first of their segment."""
    segments = batch.segment_ids
    before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    return (segments > 0) & (segments != before)


def sentence_vectors(x: Float[Array, "B T D"], batch: Batch) -> Float[Array, "B S D"]:
    """Returns the float32 state of each segment's first token, zeros where there is no segment."""
    S = batch.example_id.shape[1]
    own = batch.segment_ids[:, None, :] == jnp.arange(1, S + 1)[:, None]
    places = own.argmax(-1)
    found = jnp.take_along_axis(x, places[..., None], axis=1).astype(jnp.float32)
    return jnp.where(own.any(-1)[..., None], found, 0.0)


def _following(there: Bool[Array, "P"]) -> Int[Array, "P"]:
    """Returns another pair for each that is there: the next one, and for the last one the first."""
    order = jnp.argsort(~there, stable=True)
    place = jnp.cumsum(there) - 1
    return order[(place + 1) % jnp.maximum(there.sum(), 1)]


def _cosines(pairs: Float[Array, "P 2 D"], there: Bool[Array, "P"]) -> dict[str, Ratio]:
    """Returns mean cosines of translations and of unrelated sentences; both 1 in a collapse."""
    unit = unit_vectors(pairs)
    count = there.sum().astype(jnp.float32)
    found = {}
    for name, other in (("cosine", unit), ("unrelated_cosine", unit[_following(there)])):
        products = (unit[:, 0] * other[:, 1]).sum(-1)
        found[name] = (jnp.where(there, products, 0.0).sum(), count)
    return found

"""LayerCake: the intact model against passes that cannot see punctuation or concepts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.contrast.branches import Branches
from tokjax.decoding.contrast.combine import (
    IMPOSSIBLE,
    SCORED,
    as_column,
    log_probabilities,
    plausible,
    restrict,
    weighted_sum,
)
from tokjax.decoding.contrast.settings import number, of_rows, share_of_best
from tokjax.decoding.predictors import StepOutput
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.errors import ConfigError
from tokjax.models.cache import Cache
from tokjax.models.edits import Edits, Suppression
from tokjax.models.transformer import Transformer

SUPPRESSED = -100.0  # what suppressed attention scores become
OFF = 2.0  # a threshold that no attention mass exceeds


def layercake_scores(
    intact: Float[Array, "*B V"],
    damaged: Sequence[Float[Array, "*B V"]],
    alpha: Any = 0.0,
    plausibility: Any = 0.1,
    *,
    renormalize: bool = False,
    sentinel: float = IMPOSSIBLE,
) -> Float[Array, "*B V"]:
    """Returns the mean over damaged passes of (1 + alpha) intact - damaged, where plausible.

    Args:
        intact: log-probabilities of the intact pass.
        damaged: log-probabilities of each damaged pass.
        alpha: further weight of the intact pass.
        plausibility: least probability over that of the likeliest, by the intact pass.
        renormalize: take the log-softmax of each contrast before the mean (an option of the
            reference code). With it, a further constant a row.
        sentinel: what implausible tokens get; see `combine.restrict`.

    Reference: Zhu et al., "LayerCake", arXiv 2507.04404.
    """
    weight = 1.0 + jnp.asarray(alpha, jnp.float32)
    contrasts = [weighted_sum([intact, each], [weight, -1.0]) for each in damaged]
    if renormalize:
        contrasts = [log_probabilities(each) for each in contrasts]
    mean = sum(contrasts[1:], contrasts[0]) / len(contrasts)
    return restrict(mean, plausible(intact, plausibility), sentinel)


def layercake_options(
    intact: Float[Array, "*B V"],
    damaged: Sequence[Float[Array, "*B V"]],
    options: Int[Array, "N"],
    alpha: Any = 0.0,
) -> Float[Array, "*B N"]:
    """Returns the contrast of probabilities over a few option letters, as in four-way questions.

    The reference code scores these so: softmax over the letters' logits alone, and
    (1 + alpha) p_intact - p_damaged in probabilities, not their logarithms; here averaged over the
    damaged passes.

    Reference: Zhu et al., "LayerCake", arXiv 2507.04404 (its development code).
    """
    among = lambda logp: jax.nn.softmax(logp[..., options], axis=-1)  # noqa: E731
    harmed = jnp.stack([among(each) for each in damaged]).mean(0)
    return (1.0 + as_column(jnp.asarray(alpha))) * among(intact) - harmed


@struct.dataclass
class LayerCakeParams:
    """What LayerCake decodes from.

    Attributes:
        model: parameters of the model.
        punctuation: which tokens of the prompts are punctuation.
        concept: which are concepts.
        punctuation_threshold: least attention, in each layer, for which a token is suppressed in
            the punctuation pass; above 1 leaves the layer alone.
        concept_threshold: least attention to all concepts, in each layer, for which they are
            suppressed in the concept pass; above 1 leaves the layer alone.
        alpha: further weight of the intact pass.
        plausibility: least probability of a token over that of the likeliest, by the intact pass.
        new_punctuation: which ids are punctuation where they are generated; None: none.
        new_concept: which ids are concepts where they are generated; None: none.
    """

    model: Any
    punctuation: Bool[Array, "B P"]
    concept: Bool[Array, "B P"]
    punctuation_threshold: Float[Array, "L"]
    concept_threshold: Float[Array, "L"]
    alpha: Float[Array, "*B"]
    plausibility: Float[Array, "*B"]
    new_punctuation: Bool[Array, "V"] | None = None
    new_concept: Bool[Array, "V"] | None = None


@struct.dataclass
class LayerCakeState:
    """What LayerCake carries from token to token.

    Attributes:
        cache: keys and values of the intact pass.
        punctuation: which places of each row hold punctuation.
        concept: which hold concepts.
    """

    cache: Cache
    punctuation: Bool[Array, "B S"]
    concept: Bool[Array, "B S"]


@dataclass(frozen=True)
class LayerCake:
    """The intact prediction against damaged ones, which see less of chosen tokens.

    Costs one forward pass of three queries a row and token (two with `single`); damaged are only
    the predicting rows, and their keys are not kept.

    Attributes:
        model: the model; see `Branches`.
        restrict_to_punctuation: the punctuation pass suppresses punctuation alone, as the paper
            says; else every token with enough attention, as the reference code does.
        single: one pass with both damages instead of two with one each.
        renormalize: see `layercake_scores`.
    """

    model: Transformer
    restrict_to_punctuation: bool = True
    single: bool = False
    renormalize: bool = False

    @property
    def _branches(self) -> Branches:
        return Branches(self.model, 2 if self.single else 3)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.config.vocabulary

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self.model.config.max_positions

    def check(self, params: LayerCakeParams, prompts: Prompts, limits: np.ndarray) -> None:
        """Refuses token classes that are not those of these prompts.

        Raises:
            ConfigError: they are of another number of rows, or too few.
        """
        del limits
        rows, longest = len(prompts.lengths), int(np.max(prompts.lengths))
        for name in ("punctuation", "concept"):
            shape = getattr(params, name).shape
            if shape[0] != rows or shape[1] < longest:
                raise ConfigError(
                    f"{name} {shape} must have a value for each token of {rows} prompts of up to "
                    f"{longest} tokens"
                )

    def prepare(self, params: LayerCakeParams) -> LayerCakeParams:
        """Returns the parameters with the model's in the form that it reads fastest."""
        plain = self._branches.plain.prepare(params.model)
        return params.replace(model=plain)  # type: ignore[attr-defined]

    def init(
        self, prepared: LayerCakeParams, prompts: Prompts, capacity: int
    ) -> tuple[LayerCakeState, StepOutput]:
        """Returns the state behind the prompts, and what is said of the first new token."""
        cache, last = self._branches.prefill(prepared.model, prompts, capacity)

        def by_place(mask: Bool[Array, "B P"]) -> Bool[Array, "B S"]:
            missing = max(0, cache.capacity - mask.shape[1])
            wide = jnp.pad(mask, ((0, 0), (0, missing)))[:, : cache.capacity]
            return wide & (jnp.arange(cache.capacity) < prompts.lengths[:, None])

        state = LayerCakeState(cache, by_place(prepared.punctuation), by_place(prepared.concept))
        return self._pass(prepared, state, last)

    def step(
        self, prepared: LayerCakeParams, state: LayerCakeState, tokens: Int[Array, "B"]
    ) -> tuple[LayerCakeState, StepOutput]:
        """Returns the state behind one more token a row, and what is said of the next one."""
        here = jnp.arange(state.cache.capacity) == state.cache.lengths[:, None]

        def extended(mask: Bool[Array, "B S"], of_ids: Bool[Array, "V"] | None):
            return mask if of_ids is None else jnp.where(here, of_ids[tokens][:, None], mask)

        state = state.replace(  # type: ignore[attr-defined]
            punctuation=extended(state.punctuation, prepared.new_punctuation),
            concept=extended(state.concept, prepared.new_concept),
        )
        return self._pass(prepared, state, tokens)

    def _pass(
        self, prepared: LayerCakeParams, state: LayerCakeState, tokens: Int[Array, "B"]
    ) -> tuple[LayerCakeState, StepOutput]:
        branches, cache = self._branches, state.cache
        punctuation = state.punctuation
        if not self.restrict_to_punctuation:
            punctuation = jnp.ones_like(punctuation)
        of = {"concept": 1, "punctuation": 1 if self.single else 2}
        edits = Edits(
            suppression=damages(
                prepared,
                concept=branches.columns(cache, state.concept, of["concept"]),
                punctuation=branches.columns(cache, punctuation, of["punctuation"]),
                concept_rows=jnp.arange(branches.count)[None] == of["concept"],
                punctuation_rows=jnp.arange(branches.count)[None] == of["punctuation"],
            )
        )
        cache, logits = branches.step(prepared.model, cache, tokens, edits)
        intact, *damaged = log_probabilities(logits)
        scores = layercake_scores(
            intact,
            damaged,
            of_rows(prepared.alpha, tokens.shape[0]),
            of_rows(prepared.plausibility, tokens.shape[0]),
            renormalize=self.renormalize,
        )
        return state.replace(cache=cache), StepOutput(scores)  # type: ignore[attr-defined]


def damages(
    params: LayerCakeParams,
    *,
    concept: Bool[Array, "B S"],
    punctuation: Bool[Array, "B S"],
    concept_rows: Bool[Array, "B T"],
    punctuation_rows: Bool[Array, "B T"],
) -> tuple[Suppression, Suppression]:
    """Returns the suppressions of the concept and of the punctuation pass.

    Args:
        params: for the thresholds.
        concept: keys that the concept pass may lose.
        punctuation: keys that the punctuation pass may lose.
        concept_rows: queries of the concept pass; the batch axis may be 1.
        punctuation_rows: queries of the punctuation pass; likewise.
    """
    layers = params.concept_threshold.shape[0]
    every = lambda mask: jnp.broadcast_to(mask, (layers, *mask.shape))  # noqa: E731
    score = jnp.full(layers, SUPPRESSED)
    return (
        Suppression(every(concept), every(concept_rows), params.concept_threshold, score, "row"),
        Suppression(
            every(punctuation),
            every(punctuation_rows),
            params.punctuation_threshold,
            score,
            "column",
        ),
    )


def layercake(
    model: Transformer,
    params: Any,
    *,
    punctuation: Sequence[Sequence[bool] | np.ndarray] | np.ndarray,
    concept: Sequence[Sequence[bool] | np.ndarray] | np.ndarray,
    punctuation_layers: tuple[int, int] | None = None,
    concept_layers: tuple[int, int] | None = None,
    punctuation_threshold: float = 0.1,
    concept_threshold: float = 0.05,
    alpha: Any = 1.0,
    plausibility: Any = 0.1,
    new_punctuation: Any = None,
    new_concept: Any = None,
    restrict_to_punctuation: bool = True,
    single: bool = False,
    renormalize: bool = False,
) -> tuple[LayerCake, LayerCakeParams]:
    """Returns LayerCake's predictor and its parameters, for `decode`.

    One pass cannot attend to punctuation in a few early layers, another not to concepts in middle
    ones; the logits are (1 + alpha) log p_intact - (log p_concept + log p_punctuation) / 2, where
    p_intact(x) is at least `plausibility` of its maximum, -inf elsewhere. In the concept pass, a
    layer in which the predicting row gives all concepts together more than `concept_threshold` of
    its attention (mean over heads) loses them all; in the punctuation pass, a layer loses each
    punctuation token with more than `punctuation_threshold`.

    Costs one forward pass of three queries a row and token. (The smoothing of attention over layers
    that the reference code has switched off is not here.)

    Args:
        model: the model.
        params: its parameters.
        punctuation: for each row's prompt tokens, whether they are punctuation: see
            `token_classes`.
        concept: likewise concepts.
        punctuation_layers: first and last layer (both included) of the punctuation pass. The
            reference scripts have (2, 3) or (1, 5) of 32; default L / 16 to 3 L / 32.
        concept_layers: of the concept pass; scripts have (4, 16) or (4, 20) of 32, (5, 20) of 40;
            default L / 8 to L / 2.
        punctuation_threshold: least attention; above 1 switches the pass off.
        concept_threshold: likewise.
        alpha: the scripts have 0 for TruthfulQA, 1 for MMLU, GSM8K and StrategyQA. With 0 all
            plausible tokens are equally good where nothing is damaged.
        plausibility: 0 excludes no token.
        new_punctuation: [V], which ids count as punctuation where they are generated; default none.
        new_concept: [V], likewise concepts.
        restrict_to_punctuation: False suppresses in the punctuation pass whatever token gets enough
            attention, as the reference code does.
        single: one pass with both damages.
        renormalize: see `layercake_scores`.

    Raises:
        ConfigError: a setting is impossible.

    Reference: Zhu et al., "LayerCake: Token-Aware Contrastive Decoding within Large Language Model
    Layers", arXiv 2507.04404. (Layer ranges and thresholds from its development code; the defaults
    for other depths are recommendations of tokjax.)
    """
    depth, vocabulary = model.config.n_layers, model.config.vocabulary
    early = (depth // 16, 3 * depth // 32) if punctuation_layers is None else punctuation_layers
    middle = (depth // 8, depth // 2) if concept_layers is None else concept_layers
    return LayerCake(model, restrict_to_punctuation, single, renormalize), LayerCakeParams(
        model=params,
        punctuation=_rows("punctuation", punctuation),
        concept=_rows("concept", concept),
        punctuation_threshold=layer_thresholds(depth, early, punctuation_threshold),
        concept_threshold=layer_thresholds(depth, middle, concept_threshold),
        alpha=number("alpha", alpha),
        plausibility=share_of_best(plausibility),
        new_punctuation=_of_ids("new_punctuation", new_punctuation, vocabulary),
        new_concept=_of_ids("new_concept", new_concept, vocabulary),
    )


def layer_thresholds(depth: int, layers: tuple[int, int], threshold: float) -> Any:
    """Returns the threshold in the layers from the first to the last given, `OFF` in the others.

    >>> layer_thresholds(4, (1, 2), 0.5).tolist()
    [2.0, 0.5, 0.5, 2.0]

    Raises:
        ConfigError: there are no such layers.
    """
    first, last = layers
    if not 0 <= first <= last < depth:
        raise ConfigError(f"layers {layers} must be a first and a last of 0 to {depth - 1}")
    within = (np.arange(depth) >= first) & (np.arange(depth) <= last)
    return np.where(within, threshold, OFF).astype(np.float32)


def _rows(name: str, mask: Any) -> Any:
    """Returns ragged rows as one array, as wide as the prompts' bucket."""
    if not len(mask) or any(np.ndim(row) != 1 for row in mask):
        raise ConfigError(f"{name} needs one value for each token of each prompt")
    padded = np.zeros((len(mask), bucket(max(len(row) for row in mask))), bool)
    for b, row in enumerate(mask):
        padded[b, : len(row)] = row
    return padded


def _of_ids(name: str, mask: Any, vocabulary: int) -> Any:
    if mask is None:
        return None
    if np.shape(mask) != (vocabulary,):
        raise ConfigError(f"{name} {np.shape(mask)} must have a value for each of {vocabulary} ids")
    return np.asarray(mask, bool)


def score_answers(
    predictor: LayerCake,
    params: LayerCakeParams,
    texts: Prompts,
    starts: Int[Array, "B"],
) -> Float[Array, "B T V"]:
    """Returns the scores of given answers: at t what is said of token t + 1, -1000 if implausible.

    All rows that predict answer tokens are damaged at once, so that later ones read the states of
    damaged earlier ones: scores differ from those of generation. Costs one forward pass of three
    rows (two with `single`) for each.

    Args:
        predictor: from `layercake`.
        params: from `layercake`; the classes of all tokens, of answers too.
        texts: prompts and answers.
        starts: where each row's answer begins.
    """
    return _score_answers(predictor, params, texts, starts)


@partial(jax.jit, static_argnums=0)
def _score_answers(predictor: LayerCake, params: LayerCakeParams, texts: Prompts, starts):
    tokens, at = texts.tokens, jnp.arange(texts.tokens.shape[1])
    B, T = tokens.shape
    copies = 2 if predictor.single else 3
    branch = jnp.repeat(jnp.arange(copies), B)[:, None]
    answering = (at >= starts[:, None] - 1) & (at < texts.lengths[:, None])
    answering = jnp.tile(answering, (copies, 1))

    def stacked(mask: Array) -> Array:
        wide = jnp.pad(mask, ((0, 0), (0, max(0, T - mask.shape[1]))))[:, :T]
        return jnp.tile(wide, (copies, 1))

    punctuation = stacked(params.punctuation)
    if not predictor.restrict_to_punctuation:
        punctuation = jnp.ones_like(punctuation)
    edits = Edits(
        suppression=damages(
            params,
            concept=stacked(params.concept),
            punctuation=punctuation,
            concept_rows=answering & (branch == 1),
            punctuation_rows=answering & (branch == copies - 1),
        )
    )
    logits = predictor.model(params.model, jnp.tile(tokens, (copies, 1)), edits=edits)[0]
    intact, *damaged = log_probabilities(logits).reshape(copies, B, T, -1)
    per_row = lambda value: value[:, None] if jnp.ndim(value) else value  # noqa: E731
    return layercake_scores(
        intact,
        damaged,
        per_row(params.alpha),
        per_row(params.plausibility),
        renormalize=predictor.renormalize,
        sentinel=SCORED,
    )

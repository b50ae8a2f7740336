"""TRIM: examples whose token states agree with those that a target task's salient tokens have.

From a few examples of the target, each token id gets a fingerprint: the mean of its normalised
last-layer states, weighted by saliency, which comes from attention. A candidate's token scores the
cosine of its state with the fingerprint of its id; an id that the target lacks borrows that of the
nearest id by input embedding, times `lam`. Forward passes only.

Reference: "TRIM: Token-wise Attention-Derived Saliency for Data-Efficient Instruction Tuning",
arXiv 2510.07118. How saliency is scaled, how many layers count and lam are a recommendation of
tokjax: the paper's values are not known.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.config import register
from tokjax.errors import ConfigError, DataError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.selection.rows import Rows, Scope
from tokjax.selection.scoring import Found, RowScorer, Target
from tokjax.signals.attention import attention_saliency, head_mean, visible_pairs
from tokjax.signals.hidden import cosine, l2_norm

_LEAST_NORM = 1e-6  # of a sum of weighted directions; below it they cancel
_EMBEDDINGS = 8192  # compared with the fingerprints' ids at a time


@struct.dataclass
class Fingerprints:
    """What states a target task has its tokens in.

    Attributes:
        ids: the token ids that have one, ascending.
        vectors: of length 1.
    """

    ids: Int[Array, "C"]
    vectors: Float[Array, "C D"]


@struct.dataclass
class TokenClasses:
    """Which fingerprint every id of the vocabulary is compared with.

    Attributes:
        vectors: the fingerprints.
        place: number of the fingerprint of each id.
        factor: of the cosine: 1 for an id's own fingerprint, `lam` for a borrowed one.
    """

    vectors: Float[Array, "C D"]
    place: Int[Array, "V"]
    factor: Float[Array, "V"]


def fingerprints(
    ids: Int[np.ndarray, "M"], states: Float[np.ndarray, "M D"], saliency: Float[np.ndarray, "M"]
) -> Fingerprints:
    """Returns the fingerprint of each id: the direction of sum saliency * state / |state|.

    An id whose saliencies are all 0, or whose directions cancel, has none.

    Args:
        ids: of all tokens in scope of the target's examples.
        states: of these tokens.
        saliency: of these tokens.

    Reference: TRIM, arXiv 2510.07118.
    """
    known, place = np.unique(np.asarray(ids), return_inverse=True)
    states = np.asarray(states, np.float64)
    lengths = np.linalg.norm(states, axis=-1, keepdims=True)
    directions = states / np.where(lengths > 0, lengths, 1.0)
    sums = np.zeros((len(known), states.shape[-1]))
    np.add.at(sums, place, np.asarray(saliency, np.float64)[:, None] * directions)
    norms = np.linalg.norm(sums, axis=-1)
    present = norms > _LEAST_NORM
    vectors = sums[present] / norms[present, None]
    return Fingerprints(jnp.asarray(known[present], jnp.int32), jnp.asarray(vectors, jnp.float32))


def token_classes(found: Fingerprints, embedding: Float[Array, "V D"], lam: float) -> TokenClasses:
    """Returns which fingerprint every id is compared with, and the factor of the cosine.

    Args:
        found: at least one fingerprint.
        embedding: input embeddings, by whose cosine the nearest id is found.
        lam: factor where a fingerprint is borrowed.
    """
    V = embedding.shape[0]
    place = _nearest(embedding, found.ids).at[found.ids].set(jnp.arange(len(found.ids)))
    factor = jnp.full(V, lam, jnp.float32).at[found.ids].set(1.0)
    return TokenClasses(found.vectors, place, factor)


@jax.jit
def _nearest(embedding: Float[Array, "V D"], ids: Int[Array, "C"]) -> Int[Array, "V"]:
    """Returns for each embedding the number of the likest among those of `ids`."""
    V = embedding.shape[0]

    def unit(x):
        x = x.astype(jnp.float32)
        return x / jnp.maximum(l2_norm(x), 1e-8)[..., None]

    those = unit(embedding[ids])
    blocks = jnp.pad(embedding, ((0, -V % min(V, _EMBEDDINGS)), (0, 0)))
    blocks = blocks.reshape(-1, min(V, _EMBEDDINGS), embedding.shape[1])
    found = jax.lax.map(lambda block: jnp.argmax(unit(block) @ those.T, axis=-1), blocks)
    return found.reshape(-1)[:V].astype(jnp.int32)


def token_scores(
    states: Float[Array, "*B T D"], ids: Int[Array, "*B T"], classes: TokenClasses
) -> Float[Array, "*B T"]:
    """Returns how well each token's state agrees with its id's fingerprint.

    Reference: TRIM, arXiv 2510.07118.
    """
    return classes.factor[ids] * cosine(states, classes.vectors[classes.place[ids]])


def sample_scores(
    scores: Float[Array, "*B T"], scope: Bool[Array, "*B T"], mean_weight: float = 0.5
) -> Float[Array, "*B"]:
    """Returns each example's score: a mix of the mean and the maximum of its tokens in scope.

    Without a token in scope it is -inf.
    """
    count = scope.sum(-1)
    mean = jnp.where(scope, scores, 0.0).sum(-1) / jnp.maximum(count, 1)
    largest = jnp.where(scope, scores, -jnp.inf).max(-1)
    mixed = mean_weight * mean + (1 - mean_weight) * jnp.where(count > 0, largest, 0.0)
    return jnp.where(count > 0, mixed, -jnp.inf)


@register("selector", "trim")
@dataclass(frozen=True)
class Trim:
    """TRIM (arXiv 2510.07118): agreement of token states with a target's fingerprints."""

    needs_target: ClassVar[bool] = True
    memory: ClassVar[int] = 1

    # how many of the last layers give the attention; None: half of all, at least one
    layers: int | None = None
    lam: float = 0.5  # factor of a token's score where its id does not occur in the target, (0, 1]
    row_weight: float = 0.5  # share of how sharply a token attends; the rest: how much it receives
    mean_weight: float = 0.5  # share of the mean over tokens in an example's score; rest: the max
    norm: Literal["visible", "none"] = "visible"  # scaling of both kinds of saliency
    saliency: Literal["attention", "uniform"] = "attention"  # uniform: every token weighs 1
    scope: Scope = "response"  # tokens that count: those with a weight in training, others, all
    end: bool = False  # whether the end token counts: its state is one that training never reads
    exclude: tuple[int, ...] = ()  # ids that never count

    def __post_init__(self):
        if self.layers is not None and self.layers < 1:
            raise ConfigError(f"layers={self.layers} must be at least 1")
        if not 0 < self.lam <= 1:
            raise ConfigError(f"lam={self.lam} must lie in (0, 1]")
        for name in ("row_weight", "mean_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie within 0 and 1")

    def prepare(self, model: Transformer, params: Params, target: Target | None) -> RowScorer:
        """Returns what scores rows by the fingerprints of a target.

        Raises:
            ConfigError: the model has fewer layers than are asked for.
            DataError: no token of the target counts.
        """
        assert target is not None  # as `needs_target` says
        return self.scorer(model, params, self.fingerprints(model, params, target))

    def fingerprints(self, model: Transformer, params: Params, target: Target) -> Fingerprints:
        """Returns the fingerprints of a target's examples.

        Raises:
            ConfigError: the model has fewer layers than are asked for.
            DataError: no token of the target counts.
        """
        n_layers = model.config.n_layers
        layers = max(1, n_layers // 2) if self.layers is None else self.layers
        if layers > n_layers:
            raise ConfigError(f"layers={layers}, but the model has {n_layers}")
        uniform = self.saliency == "uniform"
        ids, states, saliency = [], [], []
        # Attention of all layers [L, B, T, T] is what a pass holds: few rows at a time.
        for rows in target.batches(memory=1 if uniform else max(1, n_layers // 4)):
            scope = rows.scope(self.scope, self.exclude, end=self.end)
            if not scope.any():
                continue
            settings = None if uniform else (layers, self.row_weight, self.norm)
            x, alpha = _salient(model, params, rows.tokens, rows.real, scope, settings)
            ids.append(rows.tokens[scope])
            states.append(np.asarray(x, np.float32)[scope])
            saliency.append(np.asarray(alpha)[scope])
        if not ids:
            raise DataError(
                f"no token of the target counts (scope={self.scope!r}): with kind='response' or "
                f"'messages' the responses do; for plain text choose scope='all'"
            )
        found = fingerprints(*map(np.concatenate, (ids, states, saliency)))
        if not len(found.ids):
            raise DataError("no token of the target has any saliency: give more examples")
        return found

    def scorer(self, model: Transformer, params: Params, found: Fingerprints) -> RowScorer:
        """Returns what scores rows by given fingerprints."""
        classes = token_classes(found, params["embedding"], self.lam)

        def score(rows: Rows) -> Found:
            scope = rows.scope(self.scope, self.exclude, end=self.end)
            scores, tokens = jax.device_get(
                _scored(model, params, rows.tokens, scope, classes, self.mean_weight)
            )
            return scores, {"trim": tokens}

        return score


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def _salient(model, params, tokens, real, scope, settings):
    """Returns the last states [B T D] and the saliency [B T] of tokens in scope."""
    capture = {} if settings is None else {"attn_probs": head_mean}
    out = model.backbone(params, model.embed(params, tokens), capture=capture)
    if settings is None:
        return out.x, scope.astype(jnp.float32)
    layers, row_weight, norm = settings
    attention = out.captured["attn_probs"][-layers:].mean(0)
    return out.x, attention_saliency(attention, visible_pairs(real), scope, row_weight, norm)


@functools.partial(jax.jit, static_argnames="model")
def _scored(model, params, tokens, scope, classes, mean_weight):
    """Returns the scores of rows [B] and of their tokens [B T], 0 where they do not count."""
    x = model.backbone(params, model.embed(params, tokens)).x
    scores = token_scores(x, tokens, classes)
    return sample_scores(scores, scope, mean_weight), jnp.where(scope, scores, 0.0)

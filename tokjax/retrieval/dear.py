"""DeAR, first stage: a model with a scalar head scores passages, taught by labels and a teacher.

Reference: "DeAR: Dual-Stage Document Reranking with Reasoning Agents via LLM Distillation" (arXiv
2508.16998), section 3, and its released code. A large cross-encoder scores the passages of every
query beforehand (`python -m tokjax.rerank --stage=pointwise`); the student learns from labels and,
by a divergence at a temperature, from the teacher's scores.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.scalar_head import init_scalar_head, scalar_head
from tokjax.models.transformer import Transformer
from tokjax.retrieval import losses
from tokjax.training.objective import HEADS, Aux, Loss, PerToken, Ratio, WithoutState
from tokjax.training.passes import forward

_MAIN = ("softmax_ce", "ranknet", "ranknet_softmax_ce", "listnet", "lambdarank")
_RELEVANCE = ("binary", "labels", "teacher")


@register("objective", "dear")
@dataclass(frozen=True)
class DeAR(PerToken, WithoutState):
    """(1 - alpha) ranking loss + alpha divergence from the teacher, a mean over queries.

    Records are of the kind "ranking". The score of a passage is read by a linear head from the
    hidden state of the last token of its sequence. Which loss the paper's numbers are of is not
    said in its code; the default is the mixture that its abstract names.
    """

    reads_rankings: ClassVar[bool] = True
    evaluates: ClassVar[bool] = True

    # the loss beside the teacher's divergence; ranknet_softmax_ce is half of each
    main: Literal["softmax_ce", "ranknet", "ranknet_softmax_ce", "listnet", "lambdarank"] = (
        "ranknet_softmax_ce"
    )
    # what ranknet, listnet and lambdarank go by: 1 where a label is above 0, the labels as they
    # are, or the teacher's scores (lambdarank: scaled to 0 to 1 within a query)
    relevance: Literal["binary", "labels", "teacher"] = "binary"
    hard: bool = False  # ranknet: the better of two passages is so with probability 1
    alpha: float = 0.1  # share of the divergence from the teacher, 0 to 1; 0 needs no scores
    temperature: float = 2.0  # of the divergence

    def __post_init__(self):
        for name, choices in (("main", _MAIN), ("relevance", _RELEVANCE)):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha} must lie within 0 and 1")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature} must be above 0")
        if self.hard and "ranknet" not in self.main:
            raise ConfigError(f"hard is for ranknet; main={self.main!r} has no pairs of that kind")

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the head that reads the score."""
        return {"score": init_scalar_head(key, model.config.d_model)}

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over the queries of a batch.

        Raises:
            ConfigError: the batch holds no rankings, or a teacher is asked for and there are no
                scores of one.
        """
        self._check(batch)
        return self.of_scores(passage_scores(model, params, batch), batch, aux)

    def of_scores(self, scores: Float[Array, "B S"], batch: Batch, aux: Aux = ()) -> Loss:
        """Returns the loss of scores of a batch's segments, as sums over queries."""
        scores = grouped(scores, batch)
        labels = grouped(batch.values["label"], batch)
        teacher = grouped(batch.values["score"], batch) if "score" in batch.values else None
        there = grouped(batch.example_id, batch)[..., 0] >= 0
        count = there.sum().astype(jnp.float32)
        main = jnp.where(there, self._main(scores, labels, teacher), 0.0).sum()
        total = (1 - self.alpha) * main
        best = jnp.take_along_axis(labels, scores.argmax(-1)[..., None], axis=-1)[..., 0]
        first = there & (best == labels.max(-1))
        metrics: dict[str, Ratio] = {
            "main": (main, count),
            "top1": (first.sum().astype(jnp.float32), count),
        }
        if teacher is not None:
            kl = losses.distillation_kl(scores, teacher, self.temperature)
            kl = jnp.where(there, kl, 0.0).sum()
            total += self.alpha * kl
            metrics["kl"] = (kl, count)
        return Loss(total, count, metrics, aux)

    def _check(self, batch: Batch) -> None:
        if "label" not in batch.values:
            raise ConfigError(
                "objective 'dear' needs queries with passages: read records of kind 'ranking'"
            )
        if (self.alpha or self.relevance == "teacher") and "score" not in batch.values:
            raise ConfigError(
                "objective 'dear' needs a teacher's scores of the passages (alpha is not 0, or "
                "relevance is 'teacher'), and the records have none: write them by `python -m "
                "tokjax.rerank --stage=pointwise --model=TEACHER`, or set alpha=0"
            )

    def _main(self, scores: Array, labels: Array, teacher: Array | None) -> Array:
        relevance = labels
        if self.relevance == "binary":
            relevance = (labels > 0).astype(jnp.float32)
        elif teacher is not None and self.relevance == "teacher":
            relevance = jax.lax.stop_gradient(teacher)
        if self.main == "softmax_ce":
            return losses.softmax_ce(scores, labels)
        if self.main == "listnet":
            return losses.listnet(scores, relevance)
        if self.main == "lambdarank":
            if self.relevance == "teacher":
                relevance = _unit(relevance)
            return losses.lambdarank(scores, relevance)
        pairs = losses.ranknet(scores, relevance, hard=self.hard)
        if self.main == "ranknet":
            return pairs
        return 0.5 * pairs + 0.5 * losses.softmax_ce(scores, labels)


def _unit(values: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
    """Returns values scaled so that a query's run from 0 to 1: gains of 2^score could be any."""
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    return (values - low) / jnp.where(high > low, high - low, 1.0)


def passage_scores(model: Transformer, params: Params, batch: Batch) -> Float[Array, "B S"]:
    """Returns the score of each segment, read from the last token of its inputs."""
    x = forward(model, params, batch).x
    S, T = batch.example_id.shape[1], batch.tokens.shape[1]
    own = batch.segment_ids[:, None, :] == jnp.arange(1, S + 1)[:, None]
    last = jnp.where(own, jnp.arange(T), 0).max(-1)
    return read_scores(params[HEADS], jnp.take_along_axis(x, last[..., None], axis=1))


def read_scores(heads: Any, x: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Returns the scores that the objective's head reads from hidden states."""
    return scalar_head(heads["score"], x)[..., 0]


def grouped(values: Float[Array, "B S"] | Array, batch: Batch) -> Array:
    """Returns values of segments [B S] by query, [B S/N N] with N passages each."""
    return values.reshape(values.shape[0], -1, batch.group)

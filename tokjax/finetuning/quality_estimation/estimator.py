"""The model of quality estimation: an encoder, a tag for each word, a score for the sentence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.prompts import bucket
from tokjax.errors import ConfigError, DataError
from tokjax.models.encoder import Encoder, pool

OK, BAD = 0, 1
_NO_TAG = -1


@dataclass(frozen=True)
class Example:
    """A translation as the encoder reads it: the hypothesis, then the source.

    Attributes:
        tokens: ids.
        hypothesis: number of the leading tokens that are the hypothesis (with the marks around
            it).
        words: position of each word's first token.
        bad: which words are bad; None where nobody knows.
        score: of the sentence; None where nobody knows.
    """

    tokens: Sequence[int]
    hypothesis: int
    words: Sequence[int]
    bad: Sequence[bool] | None = None
    score: float | None = None


@struct.dataclass
class QEBatch:
    """Examples of one width.

    Attributes:
        tokens: ids.
        mask: where there are tokens.
        hypothesis: where they are the hypothesis's.
        words: position of each word's first token.
        tags: of the words: 0 OK, 1 BAD, -1 none.
        scores: targets in 0 to 1; NaN where there is none.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    hypothesis: Bool[Array, "B T"]
    words: Int[Array, "B W"]
    tags: Int[Array, "B W"]
    scores: Float[Array, "B"]


@dataclass(frozen=True)
class ScoreScale:
    """Brings scores, which are unbounded below, into 0 to 1, where the model predicts them.

    Attributes:
        kind: "clip" takes what is below 0 for 0; "logistic" is 1 / (1 + exp(-z)) of the z-score.
        mean: of the training scores ("logistic").
        deviation: their standard deviation.
    """

    kind: Literal["clip", "logistic"] = "clip"
    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self):
        if self.kind not in ("clip", "logistic") or not self.deviation > 0:
            raise ConfigError(
                f"kind={self.kind!r} must be 'clip' or 'logistic', deviation={self.deviation} "
                f"above 0"
            )

    @classmethod
    def of(
        cls, scores: Sequence[float], kind: Literal["clip", "logistic"] = "clip"
    ) -> "ScoreScale":
        """Returns the scale of training scores, which their validation and test scores share."""
        if kind == "clip" or not len(scores):
            return cls(kind)
        return cls(kind, float(np.mean(scores)), float(np.std(scores)) or 1.0)

    def __call__(self, scores: Any) -> Any:
        """Returns scores in 0 to 1."""
        scores = np.asarray(scores, np.float64)
        if self.kind == "clip":
            return np.clip(scores, 0.0, 1.0)
        return 1.0 / (1.0 + np.exp(-(scores - self.mean) / self.deviation))


@dataclass(frozen=True)
class QualityEstimator:
    """An encoder with two heads; its parameters are {"encoder", "tags", "score"}.

    Attributes:
        encoder: of hypothesis and source together.
    """

    encoder: Encoder

    def init(self, key: jax.Array, encoder: Any = None) -> dict[str, Any]:
        """Returns parameters: new heads beside the encoder's given ones, or new ones too."""
        of_encoder, *of_heads = jax.random.split(key, 3)
        D, heads = self.encoder.config.d_model, {}
        for name, own, fan_in, fan_out in zip(
            ("tags", "score"), of_heads, (D, 2 * D), (2, 1), strict=True
        ):
            weight = jax.random.normal(own, (fan_in, fan_out)) * fan_in**-0.5
            heads[name] = {"weight": weight, "bias": jnp.zeros(fan_out)}
        return {"encoder": self.encoder.init(of_encoder) if encoder is None else encoder, **heads}

    def __call__(
        self, params: Any, batch: QEBatch
    ) -> tuple[Float[Array, "B W 2"], Float[Array, "B"]]:
        """Returns logits of each word's tags (OK, BAD), and scores in 0 to 1.

        A word is read at its first token, the sentence as the mean of the hypothesis's states and
        the row's first state.
        """
        logits, score = self._outputs(params, batch)
        return logits, jax.nn.sigmoid(score)

    def loss(
        self, params: Any, batch: QEBatch, ok_weight: Any = 1.0, score_weight: Any = 1.0
    ) -> Float[Array, ""]:
        """Returns the weighted nll of the tags, a word's mean, and the scores' mean squared error.

        Words and sentences without a target do not count.

        Args:
            params: of the model.
            batch: of examples.
            ok_weight: of OK words, where BAD words weigh 1.
            score_weight: of the squared error beside the nll.
        """
        logits, scores = self(params, batch)
        known = batch.tags != _NO_TAG
        logp = jax.nn.log_softmax(logits, axis=-1)
        tags = jnp.maximum(batch.tags, 0)
        nll = -jnp.take_along_axis(logp, tags[..., None], axis=-1)[..., 0]
        nll *= known * jnp.where(tags == OK, ok_weight, 1.0)
        scored = jnp.isfinite(batch.scores)
        error = jnp.square(scores - jnp.where(scored, batch.scores, 0.0)) * scored
        of_tags = nll.sum() / jnp.maximum(known.sum(), 1)
        return of_tags + score_weight * error.sum() / jnp.maximum(scored.sum(), 1)

    def _outputs(self, params: Any, batch: QEBatch) -> tuple[Array, Array]:
        x = self.encoder.encode(params["encoder"], batch.tokens, batch.mask).x.astype(jnp.float32)
        words = jnp.take_along_axis(x, batch.words[..., None], axis=1)
        sentence = [pool(x, batch.hypothesis), pool(x, batch.mask, "first")]
        score = _linear(params["score"], jnp.concatenate(sentence, axis=-1))
        return _linear(params["tags"], words), score[..., 0]

    def check(self, examples: Sequence[Example]) -> None:
        """Raises where examples do not fit the encoder or themselves.

        Raises:
            DataError: there is none; ids or places are impossible; there are too many tokens.
        """
        if not examples:
            raise DataError("there are no examples")
        config = self.encoder.config
        for at, each in enumerate(examples):
            T = len(each.tokens)
            if not 0 < each.hypothesis <= T <= config.max_positions:
                raise DataError(
                    f"example {at} has {T} tokens, {each.hypothesis} of the hypothesis; there must "
                    f"be some of it, and at most max_positions={config.max_positions} altogether"
                )
            if min(each.tokens) < 0 or max(each.tokens) >= config.vocabulary:
                raise DataError(
                    f"example {at} has ids {min(each.tokens)} to {max(each.tokens)}, the model's "
                    f"are 0 to {config.vocabulary - 1}: was it made with another tokenizer?"
                )
            if not len(each.words) or not 0 <= min(each.words) <= max(each.words) < each.hypothesis:
                raise DataError(
                    f"example {at}: words {list(each.words)} must lie in the hypothesis"
                )
            if each.bad is not None and len(each.bad) != len(each.words):
                raise DataError(f"example {at} has {len(each.bad)} tags of {len(each.words)} words")


def qe_batch(examples: Sequence[Example], scale: ScoreScale, rows: int | None = None) -> QEBatch:
    """Returns examples as arrays of a bucket's sizes; missing rows have no targets.

    Args:
        examples: one or more.
        scale: of the scores.
        rows: of the batch; default as many as there are examples.
    """
    B = len(examples) if rows is None else rows
    T = bucket(max(len(each.tokens) for each in examples))
    W = bucket(max(len(each.words) for each in examples))
    tokens, lengths = np.zeros((B, T), np.int32), np.ones(B, np.int32)
    hypothesis, words = np.ones(B, np.int32), np.zeros((B, W), np.int32)
    tags, scores = np.full((B, W), _NO_TAG, np.int32), np.full(B, np.nan, np.float32)
    for b, each in enumerate(examples):
        tokens[b, : len(each.tokens)], lengths[b] = each.tokens, len(each.tokens)
        hypothesis[b], words[b, : len(each.words)] = each.hypothesis, each.words
        if each.bad is not None:
            tags[b, : len(each.words)] = each.bad
        if each.score is not None:
            scores[b] = scale(each.score)
    at = np.arange(T)[None]
    mask, of_hypothesis = at < lengths[:, None], at < hypothesis[:, None]
    return QEBatch(tokens, mask, of_hypothesis, words, tags, scores)  # type: ignore[arg-type]


def qe_example(
    words: Sequence[str],
    source: Sequence[int],
    pieces: Any,
    *,
    before: Sequence[int] = (),
    between: Sequence[int] = (),
    after: Sequence[int] = (),
    bad: Sequence[bool] | None = None,
    end_bad: bool | None = None,
    score: float | None = None,
) -> Example:
    """Returns an example of a hypothesis's words and a source.

    Args:
        words: of the hypothesis.
        source: ids of the encoder's vocabulary.
        pieces: word -> its ids of the encoder's vocabulary.
        before: ids at the beginning (XLM-R: `<s>`).
        between: ids behind the hypothesis (XLM-R: `</s></s>`).
        after: ids at the end (XLM-R: `</s>`).
        bad: which words are bad.
        end_bad: whether something is missing, a tag of its own at the first id of `between`;
            None leaves it out.
        score: of the sentence.

    Raises:
        DataError: a word has no ids, or there is no `between` to carry a tag.
    """
    tokens, places = list(before), []
    for word in words:
        ids = list(pieces(word))
        if not ids:
            raise DataError(f"the word {word!r} has no tokens")
        places.append(len(tokens))
        tokens += ids
    hypothesis = len(tokens)
    if end_bad is not None:
        if not between:
            raise DataError("end_bad is a tag of the id behind the hypothesis: give between")
        places.append(hypothesis)
        hypothesis += 1
        bad = None if bad is None else [*bad, end_bad]
    return Example([*tokens, *between, *source, *after], hypothesis, places, bad, score)


def _linear(head: Any, x: Array) -> Array:
    return x @ head["weight"] + head["bias"]

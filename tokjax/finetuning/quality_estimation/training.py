"""Training a quality estimator, and asking it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tokjax.errors import ConfigError
from tokjax.finetuning.quality_estimation.estimator import (
    Example,
    QEBatch,
    QualityEstimator,
    ScoreScale,
    qe_batch,
)
from tokjax.finetuning.quality_estimation.metrics import score_metrics, tag_metrics
from tokjax.models.digests import digest
from tokjax.training.fitting import FitState, adam_step, begin, fit, orders
from tokjax.training.optimizers import Constant


@dataclass(frozen=True, eq=False)
class TrainedEstimator:
    """What training returns.

    Attributes:
        estimator: the model.
        params: of it.
        scale: of the scores; keep it for whatever is trained or tested later.
        losses: of each step.
    """

    estimator: QualityEstimator
    params: dict[str, Any] = field(repr=False)
    scale: ScoreScale
    losses: Float[np.ndarray, "N"] = field(repr=False)


@dataclass(frozen=True)
class Prediction:
    """What an estimator says of an example.

    Attributes:
        bad: probability of each word to be bad.
        score: in 0 to 1, on the scale of the training.
    """

    bad: Float[np.ndarray, "W"]
    score: float


def balanced_ok_weight(examples: Sequence[Example], factor: float = 2.0) -> float:
    """Returns `factor` times the number of BAD words over that of OK words, 1 without either.

    Reference: arXiv 2502.19941, the authors' script.
    """
    tags = np.concatenate([np.asarray(e.bad, bool) for e in examples if e.bad is not None] or [[]])
    bad, ok = tags.sum(), (tags == 0).sum()
    return float(factor * bad / ok) if bad and ok else 1.0


def train_estimator(
    estimator: QualityEstimator,
    examples: Sequence[Example],
    *,
    scale: ScoreScale | None = None,
    ok_weight: float | None = None,
    score_weight: float = 1.0,
    batch_size: int = 16,
    epochs: int = 1,
    peak_lr: float = 1e-6,
    warmup_share: float = 0.05,
    seed: int = 0,
    start: Mapping[str, Any] | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_steps: int = 500,
    progress: bool = True,
) -> TrainedEstimator:
    """Returns an estimator trained on examples: encoder and heads together, with Adam.

    Gradients are clipped to norm 1; the rate is constant behind a warm-up. Train on synthetic
    examples first, then on real ones from there, with the first training's scale. One program is
    compiled for each bucket of lengths.

    Args:
        estimator: what to train.
        examples: with tags, a score, or both.
        scale: of the scores; default the clipped one.
        ok_weight: of OK words, where BAD words weigh 1; default `balanced_ok_weight(examples)`.
        score_weight: of the score's squared error beside the mean nll of the words' tags.
        batch_size: examples a step.
        epochs: passes over the examples, each in another order.
        peak_lr: learning rate; the default is the authors' for fine-tuning a large encoder.
        warmup_share: share of the steps on which the rate rises.
        seed: of new parameters and the order.
        start: parameters to go on from: of an encoder with heads, or {"encoder": ...} alone.
        checkpoint: file that the training goes on from where it is there, with the same numbers
            as without a stop.
        checkpoint_steps: steps between its writes.
        progress: whether to show it.

    Raises:
        ConfigError: a setting is impossible, or the checkpoint is of another training.
        DataError: examples do not fit the model.
        NonFiniteError: a loss was not finite.
        CheckpointError: the checkpoint is damaged.
        StorageError: it cannot be read or written.
    """
    if min(batch_size, epochs, checkpoint_steps) < 1:
        raise ConfigError(
            f"batch_size={batch_size}, epochs={epochs} and checkpoint_steps={checkpoint_steps} "
            f"must be at least 1"
        )
    if not peak_lr > 0 or not 0 <= warmup_share <= 1:
        raise ConfigError(
            f"peak_lr={peak_lr} must be positive and warmup_share={warmup_share} between 0 and 1"
        )
    estimator.check(examples)
    scale = ScoreScale() if scale is None else scale
    ok_weight = balanced_ok_weight(examples) if ok_weight is None else ok_weight
    if not ok_weight > 0 or not score_weight >= 0:
        raise ConfigError(
            f"ok_weight={ok_weight} must be above 0 and score_weight={score_weight} 0 or more"
        )
    weights = jnp.float32(ok_weight), jnp.float32(score_weight)
    batch_size = min(batch_size, len(examples))
    steps = epochs * -(-len(examples) // batch_size)
    schedule = Constant(warmup_steps=int(np.ceil(warmup_share * steps)))
    given = dict(start or {})
    if set(given) != {"encoder", "tags", "score"}:
        given = estimator.init(jax.random.key(seed), given.get("encoder")) | given
    order = list(orders(len(examples), batch_size, epochs, seed))

    def identity() -> dict[str, Any]:
        return {
            "estimator": repr(estimator),
            "scale": asdict(scale),
            "ok_weight": ok_weight,
            "score_weight": score_weight,
            "data": digest(*(array for each in examples for array in _arrays(each))),
            "start": digest(*jax.tree.leaves(given)),
            "batch_size": batch_size,
            "epochs": epochs,
            "peak_lr": peak_lr,
            "warmup_share": warmup_share,
            "seed": seed,
        }

    def update(state: FitState, step: int) -> tuple[FitState, Any]:
        rate = peak_lr * schedule.factor(jnp.float32(step), steps)
        batch = qe_batch([examples[i] for i in order[step]], scale, batch_size)
        return _update(estimator, state, batch, weights, rate)

    params, losses = fit(
        update,
        begin(given),
        steps,
        checkpoint=checkpoint,
        identity=identity,
        checkpoint_steps=checkpoint_steps,
        progress=progress,
    )
    return TrainedEstimator(estimator, params, scale, losses)


def predict(
    trained: TrainedEstimator, examples: Sequence[Example], *, batch_size: int = 32
) -> list[Prediction]:
    """Returns what an estimator says of each example.

    Raises:
        DataError: examples do not fit the model.
    """
    trained.estimator.check(examples)
    found, rows = [], min(batch_size, len(examples))
    for first in range(0, len(examples), rows):
        part = examples[first : first + rows]
        batch = qe_batch(part, trained.scale, rows)
        bad, scores = jax.device_get(_predict(trained.estimator, trained.params, batch))
        found += [
            Prediction(own[: len(each.words)], float(score))
            for each, own, score in zip(part, bad, scores, strict=False)
        ]
    return found


def evaluate_estimator(
    trained: TrainedEstimator,
    examples: Sequence[Example],
    *,
    threshold: float = 0.5,
    batch_size: int = 32,
) -> dict[str, float]:
    """Returns `tag_metrics` of the tagged words and `score_metrics` of the scored sentences.

    Args:
        trained: the estimator.
        examples: with tags, scores or both.
        threshold: probability from which on a word is called bad.
        batch_size: examples a pass.

    Raises:
        DataError: examples do not fit the model, or there is too little to compare.
    """
    said, metrics = predict(trained, examples, batch_size=batch_size), {}
    tagged = [(e.bad, p.bad) for e, p in zip(examples, said, strict=True) if e.bad is not None]
    if tagged:
        bad, probabilities = (np.concatenate(each) for each in zip(*tagged, strict=True))
        metrics |= tag_metrics(bad.astype(bool), probabilities >= threshold)
    scored = [
        (e.score, p.score) for e, p in zip(examples, said, strict=True) if e.score is not None
    ]
    if scored:
        metrics |= score_metrics(*zip(*scored, strict=True))
    return metrics


def _arrays(example: Example) -> tuple[Any, ...]:
    """Returns all that an example says."""
    bad, score = example.bad, example.score
    tags = np.zeros(0, bool) if bad is None else np.asarray(bad, bool)
    value = np.float64(np.nan if score is None else score)
    return np.array(example.tokens), np.array([example.hypothesis, *example.words]), tags, value


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update(estimator, state: FitState, batch: QEBatch, weights, rate):
    """Returns the next state and the loss before it."""
    return adam_step(state, rate, lambda params: estimator.loss(params, batch, *weights))


@partial(jax.jit, static_argnums=0)
def _predict(estimator, params, batch: QEBatch):
    """Returns each word's probability to be bad, and the scores."""
    logits, scores = estimator(params, batch)
    return jax.nn.softmax(logits, axis=-1)[..., 1], scores

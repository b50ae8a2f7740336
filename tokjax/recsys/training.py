"""Training a recommender, asking it, and measuring it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.constrained.on_trie import Recommended
from tokjax.decoding.constrained.on_trie import recommend as search
from tokjax.decoding.predictors import Conditioned
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError, DataError
from tokjax.evaluation.recommendations import hits
from tokjax.models.digests import digest
from tokjax.recsys.codes import PAD, ItemCodes
from tokjax.recsys.interactions import Histories
from tokjax.recsys.recommender import Recommender, RecommenderConfig
from tokjax.training.fitting import FitState, adam_step, begin, fit
from tokjax.training.optimizers import Cosine


@dataclass(frozen=True)
class FitConfig:
    """How a recommender is trained; the defaults are DiscRec's."""

    epochs: int = 200  # most passes over the training histories
    patience: int = 20  # epochs without a lower validation loss, behind which training ends
    batch_size: int = 256  # histories a step
    peak_lr: float = 5e-4  # learning rate at the top of a cosine
    warmup_share: float = 0.01  # share of the steps on which it rises
    weight_decay: float = 0.01  # times the learning rate, each step
    seed: int = 0  # of parameters, order and dropout

    def __post_init__(self):
        for name in ("epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.peak_lr > 0 or not 0 <= self.warmup_share <= 1 or not self.weight_decay >= 0:
            raise ConfigError(
                f"peak_lr={self.peak_lr} must be positive, warmup_share={self.warmup_share} "
                f"between 0 and 1, weight_decay={self.weight_decay} 0 or more"
            )


@dataclass(frozen=True, eq=False)
class TrainedRecommender:
    """What training returns.

    Attributes:
        model: the recommender.
        params: of the epoch of lowest validation loss.
        codes: of the catalogue.
        losses: of each step.
        validation: loss of the best epoch.
    """

    model: Recommender
    params: dict[str, Any] = field(repr=False)
    codes: ItemCodes
    losses: Float[np.ndarray, "N"] = field(repr=False)
    validation: float


@struct.dataclass
class _Run:
    """The state of training: of the fit, and of the best epoch so far."""

    fit: FitState
    best: Any
    lowest: Float[Array, ""]
    waited: Int[Array, ""]

    @property
    def weights(self) -> Any:
        """What training returns."""
        return {"params": self.best, "lowest": self.lowest}


def train_recommender(
    config: RecommenderConfig | Recommender,
    codes: ItemCodes,
    train: Histories,
    validation: Histories,
    fit_config: FitConfig | None = None,
    *,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> TrainedRecommender:
    """Returns a recommender trained on histories, as it was at its lowest validation loss.

    Args:
        config: of the model, or a model.
        codes: of the catalogue.
        train: what it learns.
        validation: what is looked at behind each epoch.
        fit_config: how.
        checkpoint: file that the training goes on from where it is there, with the same numbers
            as without a stop; it is written behind each epoch.
        progress: whether to show it.

    Raises:
        ConfigError: the checkpoint is of another training.
        DataError: a history has an item without codes, or there is none.
        NonFiniteError: a loss was not finite.
    """
    told = FitConfig() if fit_config is None else fit_config
    model = config if isinstance(config, Recommender) else config.model(codes)
    if not len(train) or not len(validation):
        raise DataError("there are no histories to train on, or none to validate by")
    batch = min(told.batch_size, len(train))
    per_epoch = -(-len(train) // batch)
    steps = told.epochs * per_epoch
    schedule = Cosine(warmup_steps=int(np.ceil(told.warmup_share * steps)), final_factor=0.0)
    inputs = codes.histories(train.items, model.padding)
    answers = codes.answers(train.targets)
    held_out = _batches(codes, model, validation, batch)
    keys = jax.random.key(told.seed)

    @lru_cache(1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([told.seed, epoch]).permutation(len(train))

    def identity() -> dict[str, Any]:
        parts = (train.items, train.targets, validation.items, validation.targets, codes.codes)
        return {"model": repr(model), "fit": repr(told), "data": digest(*parts)}

    def update(run: _Run, step: int) -> tuple[_Run, Any]:
        epoch, at = divmod(step, per_epoch)
        rows = order(epoch)[at * batch : (at + 1) * batch]
        weight = np.arange(batch) < len(rows)
        rows = np.concatenate([rows, np.zeros(batch - len(rows), rows.dtype)])
        rate = told.peak_lr * schedule.factor(jnp.float32(step), steps)
        key = jax.random.fold_in(keys, step)
        given = inputs[rows], answers[rows], weight
        state, loss = _update(model, told.weight_decay, run.fit, *given, key, rate)
        run = run.replace(fit=state)  # type: ignore[attr-defined]
        if at + 1 == per_epoch:
            sums = [_sum(model, state.weights, *each) for each in held_out]
            run = _watched(run, sum(sums) / len(validation))
        return run, loss

    def until(run: _Run, step: int) -> bool:
        return step % per_epoch == 0 and int(run.waited) >= told.patience

    start = jax.jit(model.init)(jax.random.fold_in(keys, steps))
    begun = _Run(begin(start), start, jnp.float32(jnp.inf), jnp.int32(0))
    found, losses = fit(
        update,  # type: ignore[arg-type]
        begun,  # type: ignore[arg-type]
        steps,
        identity=identity,
        checkpoint=checkpoint,
        checkpoint_steps=per_epoch,
        progress=progress,
        until=until,
    )
    return TrainedRecommender(model, found["params"], codes, losses, float(found["lowest"]))


def recommend(
    trained: TrainedRecommender,
    histories: Sequence[Sequence[int]] | Int[np.ndarray, "N H"],
    *,
    k: int = 10,
    beams: int = 20,
    batch_size: int = 64,
) -> Recommended:
    """Returns the items of largest probability that a beam search among all codes finds.

    Args:
        trained: a recommender.
        histories: numbers of the items that were taken, the latest last; -1 is nothing.
        k: items for each.
        beams: at least k.
        batch_size: histories at a time.

    Raises:
        ConfigError: there are more items asked for than beams.
        DataError: there is no history, or an item has no codes.
    """
    if not 1 <= k <= beams:
        raise ConfigError(f"k={k} items must be 1 to beams={beams}")
    items = _array(histories)
    if not len(items):
        raise DataError("there is no history to recommend for")
    codes, model = trained.codes, trained.model
    rows, found = min(batch_size, len(items)), []
    for first in range(0, len(items), rows):
        part = items[first : first + rows]
        filled = np.concatenate([part, np.full((rows - len(part), part.shape[1]), -1)])
        memory = _encode(model, trained.params, codes.histories(filled, model.padding))
        found.append(
            search(
                model.predictor,
                Conditioned(trained.params, memory),
                Prompts.of([[PAD]] * rows),
                codes.trie,
                k=k,
                beams=beams,
            )
        )
    ranked, scores = (
        np.concatenate([getattr(each, name) for each in found])[: len(items)]
        for name in ("items", "scores")
    )
    return Recommended(ranked, scores)


def evaluate_recommender(
    trained: TrainedRecommender,
    test: Histories,
    *,
    at: Sequence[int] = (5, 10),
    beams: int = 20,
    batch_size: int = 64,
) -> dict[str, Float[np.ndarray, "N"]]:
    """Returns recall@k and ndcg@k of each history; their means are the metrics.

    Args:
        trained: a recommender.
        test: histories with what was taken then.
        at: the k.
        beams: of the search.
        batch_size: histories at a time.
    """
    ranked = recommend(trained, test.items, k=max(at), beams=beams, batch_size=batch_size).items
    values = {}
    for k in at:
        values[f"recall@{k}"], values[f"ndcg@{k}"] = hits(ranked, test.targets, k)
    return values


def _array(histories: Any) -> Int[np.ndarray, "N H"]:
    if isinstance(histories, np.ndarray):
        return histories
    longest = max(map(len, histories), default=0)
    found = np.full((len(histories), max(longest, 1)), -1, np.int32)
    for row, items in enumerate(histories):
        found[row, found.shape[1] - len(items) :] = items
    return found


def _batches(codes: ItemCodes, model: Recommender, part: Histories, size: int) -> list[tuple]:
    """Returns (histories, answers, weights) of batches that are all of one size."""
    found = []
    for first in range(0, len(part), size):
        rows = np.arange(first, first + size)
        weight, rows = rows < len(part), np.minimum(rows, len(part) - 1)
        some = part[rows]
        given = codes.histories(some.items, model.padding), codes.answers(some.targets)
        found.append((*given, weight))
    return found


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _update(
    model: Recommender,
    decay: float,
    state: FitState,
    histories: Int[Array, "B S"],
    answers: Int[Array, "B T"],
    weight: Bool[Array, "B"],
    key: jax.Array,
    rate: Float[Array, ""],
):
    """Returns the next state and the loss before it."""

    def loss(params: Any) -> Float[Array, ""]:
        each = model.losses(params, histories, answers, key)
        return (weight * each).sum() / weight.sum()

    return adam_step(state, rate, loss, decay)


@partial(jax.jit, static_argnums=0)
def _sum(model, params, histories, answers, weight):
    """Returns the sum of the losses of a batch."""
    return (weight * model.losses(params, histories, answers)).sum()


@jax.jit
def _watched(run: _Run, loss: Float[Array, ""]) -> _Run:
    """Returns the state with its best epoch, given the present one's validation loss."""
    better = loss < run.lowest
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), run.fit.weights, run.best)
    waited = jnp.where(better, 0, run.waited + 1)
    return _Run(run.fit, best, jnp.minimum(run.lowest, loss), waited)


@partial(jax.jit, static_argnums=0)
def _encode(model: Recommender, params: Any, histories: Int[Array, "B S"]):
    return model.encode(params, histories)

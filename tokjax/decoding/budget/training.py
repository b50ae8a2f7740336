"""Training a length predictor on a frozen language model, and judging it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.decoding.budget.batches import (
    Rows,
    StateBatch,
    TraceBatch,
    label_rows,
    state_batch,
    trace_batch,
)
from tokjax.decoding.budget.gamma import gamma_nll
from tokjax.decoding.budget.predictor import LengthPredictor
from tokjax.errors import ConfigError
from tokjax.models.digests import digest, sampled_digest
from tokjax.models.transformer import Transformer
from tokjax.training.fitting import FitState, adam_step, begin, fit, orders
from tokjax.training.optimizers import Constant

_STORED_AT_ONCE = 16  # traces a pass of the model, where its states are stored


@dataclass(frozen=True, eq=False)
class TrainedPredictor:
    """What training returns.

    Attributes:
        params: of the predictor.
        losses: mean negative log-likelihood of each step's labels, in nats.
    """

    params: dict[str, Any] = field(repr=False)
    losses: Float[np.ndarray, "N"]


def train_predictor(
    model: Transformer,
    params: Any,
    predictor: LengthPredictor,
    rows: Rows,
    *,
    think_start: int,
    think_end: int,
    batch_size: int = 1,
    epochs: int = 1,
    peak_lr: float = 1e-4,
    warmup_share: float = 0.05,
    max_length: int = 8192,
    seed: int = 0,
    start: Mapping[str, Any] | None = None,
    remaining: Rows | None = None,
    store_states: bool = False,
    checkpoint: Path | str | None = None,
    checkpoint_steps: int = 500,
    progress: bool = True,
) -> TrainedPredictor:
    """Returns a predictor of the remaining thinking length, trained beside the frozen model.

    Labels are the tokens from `<think>` to `</think>`; the predictor reads the hidden states right
    before a label and says a Gamma for that label alone. Adam at a constant rate behind a warm-up;
    the same arguments give the same numbers. One program is compiled for each bucket of lengths.
    Costs a forward pass of the model a step, and of the predictor at every position: with
    `encoder` that is one pass over L + 2 vectors for each token.

    Args:
        model: the language model.
        params: its parameters; nothing changes them.
        predictor: what to train.
        rows: ids of prompt, thinking and answer each; see `concise` for short ones.
        think_start: id of `<think>`.
        think_end: id of `</think>`.
        batch_size: rows a step.
        epochs: passes over the rows, each in another order.
        peak_lr: learning rate behind the warm-up.
        warmup_share: share of the steps on which the rate rises.
        max_length: longer rows are cut; their lengths count what is cut off.
        seed: of the initial parameters and the order.
        start: parameters to go on from, instead of initial ones.
        remaining: for each row, tokens of thinking left at each of its tokens, itself included,
            and 0 where there is no label; None counts them. Shuffled ones make a control.
        store_states: compute the model's states once and keep them in host memory, 4 S D bytes a
            label (S is 1 for `linear`, layers + 1 for `encoder`), so that a step costs the
            predictor alone. The same up to rounding.
        checkpoint: file that the training goes on from where it is there, with the same numbers
            as without a stop; it is written every `checkpoint_steps` steps and at the end. The
            model is recognised by a few values of each of its arrays.
        checkpoint_steps: see `checkpoint`.
        progress: whether to show it.

    Raises:
        ConfigError: the predictor was made for another model, a setting is impossible, or the
            checkpoint is of a training that was told something else.
        DataError: no row has closed thinking, or an id is not in the vocabulary.
        NonFiniteError: a loss was not finite.
        CheckpointError: the checkpoint is damaged.
        StorageError: it cannot be read or written.

    Reference: Li et al., "Steering LLM Thinking with Budget Guidance", arXiv 2506.13752; Adam's
    constants and the clipping of gradients are the recommendation of tokjax.
    """
    predictor.check(model.config)
    if min(batch_size, epochs, checkpoint_steps) < 1:
        raise ConfigError(
            f"batch_size={batch_size}, epochs={epochs} and checkpoint_steps={checkpoint_steps} "
            f"must be at least 1"
        )
    if not peak_lr > 0 or not 0 <= warmup_share <= 1:
        raise ConfigError(
            f"peak_lr={peak_lr} must be positive and warmup_share={warmup_share} between 0 and 1"
        )
    traces = label_rows(model, rows, think_start, think_end, max_length, remaining)
    batch_size = min(batch_size, len(traces))
    steps = epochs * -(-len(traces) // batch_size)
    schedule = Constant(warmup_steps=int(np.ceil(warmup_share * steps)))
    given = predictor.init(jax.random.key(seed)) if start is None else dict(start)

    def identity() -> dict[str, Any]:
        return {
            "predictor": asdict(predictor),
            "data": digest(*(array for trace in traces for array in trace)),
            "model": sampled_digest(params),
            "start": None if start is None else digest(*jax.tree.leaves(given)),
            "batch_size": batch_size,
            "epochs": epochs,
            "peak_lr": peak_lr,
            "warmup_share": warmup_share,
            "seed": seed,
            "store_states": store_states,
        }

    stored = cache(lambda: _stored(model, predictor, params, traces))
    order = list(orders(len(traces), batch_size, epochs, seed))

    def update(state: FitState, step: int) -> tuple[FitState, Any]:
        rate = peak_lr * schedule.factor(jnp.float32(step), steps)
        if store_states:
            return _update_stored(
                predictor, state, state_batch([stored()[i] for i in order[step]]), rate
            )
        batch = trace_batch([traces[i] for i in order[step]], batch_size)
        return _update(model, predictor, params, state, batch, rate)

    weights, losses = fit(
        update,
        begin(given),
        steps,
        checkpoint=checkpoint,
        identity=identity,
        checkpoint_steps=checkpoint_steps,
        progress=progress,
    )
    return TrainedPredictor(weights, losses)


def _stored(model, predictor, params, traces: list) -> list[StateBatch]:
    """Returns the labels of each trace and the states before them, on the host."""
    found = []
    for first in range(0, len(traces), _STORED_AT_ONCE):
        part = traces[first : first + _STORED_AT_ONCE]
        states = np.asarray(
            _states(model, predictor, params, trace_batch(part, _STORED_AT_ONCE).tokens)
        )
        for own, (ids, left) in zip(states, part, strict=False):
            at = np.flatnonzero(left[1:])  # nothing is read before the first token
            found.append(StateBatch(own[at], ids[at + 1], left[at + 1]))
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _states(model, predictor, params, tokens):
    """Returns what the predictor reads before each token from the second on, [B, T - 1, S, D]."""
    frozen = jax.lax.stop_gradient(params)
    out = model.backbone(frozen, model.embed(frozen, tokens[:, :-1]), capture={*predictor.capture})
    return jax.lax.stop_gradient(predictor.states(out))


def _gammas(model, predictor, params, weights, tokens):
    """Returns shape and rate of the Gamma for each token from the second on, [B, T - 1]."""
    states = _states(model, predictor, params, tokens)
    B, T = states.shape[:2]
    flat = states.reshape(B * T, *states.shape[2:])
    alpha, rate = predictor.of_tokens(weights, flat, tokens[:, 1:].reshape(-1))
    return alpha.reshape(B, T), rate.reshape(B, T)


def _summed(model, predictor, params, weights, batch: TraceBatch):
    """Returns the sum of the labels' negative log-likelihoods and their number."""
    gammas = _gammas(model, predictor, params, weights, batch.tokens)
    return _nll_sum(gammas, batch.remaining[:, 1:])


def _nll_sum(gammas, remaining):
    nll = gamma_nll(remaining.astype(jnp.float32), *gammas)
    return jnp.where(remaining > 0, nll, 0.0).sum(), (remaining > 0).sum()


def _mean(summed):
    total, count = summed
    return total / jnp.maximum(count, 1)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _update(model, predictor, params, state: FitState, batch: TraceBatch, rate):
    """Returns the next state and the loss before it."""
    return adam_step(state, rate, lambda w: _mean(_summed(model, predictor, params, w, batch)))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update_stored(predictor, state: FitState, batch: StateBatch, rate):
    """Returns the next state and the loss before it."""

    def loss(weights):
        gammas = predictor.of_tokens(weights, batch.states, batch.tokens)
        return _mean(_nll_sum(gammas, batch.remaining))

    return adam_step(state, rate, loss)


def evaluate_predictor(
    model: Transformer,
    params: Any,
    predictor: LengthPredictor,
    weights: Mapping[str, Any],
    rows: Rows,
    *,
    think_start: int,
    think_end: int,
    batch_size: int = 8,
    max_length: int = 8192,
) -> float:
    """Returns the mean negative log-likelihood of the remaining lengths of held-out traces.

    In nats a label. `fit_gamma` gives what a constant would reach: the mean of `gamma_nll` with it.

    Args, Raises: see `train_predictor`.
    """
    predictor.check(model.config)
    traces = label_rows(model, rows, think_start, think_end, max_length)
    size = min(batch_size, len(traces))
    totals = [
        _evaluate(
            model, predictor, params, weights, trace_batch(traces[first : first + size], size)
        )
        for first in range(0, len(traces), size)
    ]
    total, count = np.sum(np.asarray(jax.device_get(totals), np.float64), axis=0)
    return float(total / count)


def predicted_gammas(
    model: Transformer,
    params: Any,
    predictor: LengthPredictor,
    weights: Mapping[str, Any],
    tokens: Int[Array, "B T"],
) -> tuple[Float[Array, "B T-1"], Float[Array, "B T-1"]]:
    """Returns shape and rate of the Gamma predicted for each token from the second on.

    `mode_length` and `mean_length` turn them into tokens.
    """
    return _predicted(model, predictor, params, weights, jnp.asarray(tokens))


_evaluate = jax.jit(_summed, static_argnums=(0, 1))
_predicted = jax.jit(_gammas, static_argnums=(0, 1))

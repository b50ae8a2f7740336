"""The training step: accumulate sums, divide once, clip, update; and what it reports."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models.transformer import Transformer
from tokjax.training.objective import HEADS, Loss, Objective, of_model
from tokjax.training.optimizers import Schedule
from tokjax.training.state import TrainState, whole

Metrics = dict[str, Float[Array, ""]]


@dataclass(frozen=True)
class StepConfig:
    """What the step needs to know beside model, objective and optimiser."""

    peak_lr: float  # learning rate at the top of the schedule
    schedule: Schedule
    first_step: int  # step at which the stage begins; the schedule counts from here
    stage_steps: int  # length of the stage, for the schedule
    micro_batches: int = 1  # parts the batch is computed in, one after another
    clip_norm: float | None = None  # largest global norm of the gradient
    ema_decay: float | None = None  # decay of the moving average of the parameters


def make_train_step(
    model: Transformer,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the pure function (state, batch) -> (state, metrics).

    An update whose loss or gradient is not finite is left out: parameters and optimiser stay as
    they were, the step still counts and `finite` is 0. So is that of a batch without any weight,
    which would only decay the parameters; it counts as finite.
    """

    head_rate = getattr(objective, "head_rate", None)
    advance = getattr(objective, "advance", None)

    def clip(norm: Float[Array, ""]) -> Float[Array, ""] | float:
        if config.clip_norm is None:
            return 1.0
        return jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))

    def micro_step(params, frozen, aux, batch: Batch, key) -> tuple[Loss, dict]:
        def total(params):
            loss = objective.loss(model, whole(frozen, params), aux, batch, key)
            return loss.total.astype(jnp.float32), loss

        (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(params)
        # Sums over micro-batches and the norm are float32 also where the parameters are not.
        return loss, jax.tree.map(lambda g: g.astype(jnp.float32), gradient)

    def accumulate(params, frozen, aux, batch: Batch, key):
        k = config.micro_batches
        if k == 1:
            return micro_step(params, frozen, aux, batch, key)
        if batch.tokens.shape[0] % k:
            raise ConfigError(
                f"a batch of {batch.tokens.shape[0]} rows does not split into "
                f"micro_batches={k} equal parts"
            )
        # Row i goes to micro-batch i mod k, so each keeps its share of every device's rows.
        split = jax.tree.map(lambda a: a.reshape(-1, k, *a.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, k)
        shapes = jax.eval_shape(
            micro_step, params, frozen, aux, jax.tree.map(lambda a: a[0], split), keys[0]
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        start = (dataclasses.replace(zeros[0], aux=aux), zeros[1])

        def add(sums, part):
            loss, gradient = micro_step(params, frozen, sums[0].aux, *part)
            # The objective's state is carried on, not added up.
            before, now = (dataclasses.replace(each, aux=()) for each in (sums[0], loss))
            added = jax.tree.map(jnp.add, before, now)
            gradients = jax.tree.map(jnp.add, sums[1], gradient)
            return (dataclasses.replace(added, aux=loss.aux), gradients), None

        return jax.lax.scan(add, start, (split, keys))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        in_stage = (state.step - config.first_step).astype(jnp.float32)
        aux = state.aux
        if advance is not None:
            aux = advance(aux, in_stage / config.stage_steps)
        loss, gradient = accumulate(state.params, state.frozen, aux, batch, key)
        # What is frozen goes around the branch below, which might copy what passes through.
        frozen, state = state.frozen, dataclasses.replace(state, frozen=())
        # Signed weights may sum to a negative number; only an empty batch has nothing to divide.
        empty = loss.weight == 0
        inverse = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, loss.weight))
        # Heads with a rate of their own are clipped by themselves.
        parts = _head_parts(head_rate, gradient.get(HEADS, {}))
        apart = bool(parts)
        norm = optax.tree.norm(of_model(gradient) if apart else gradient) * jnp.abs(inverse)
        mean = loss.total * inverse
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        scale = inverse * clip(norm)
        head_scales = []
        for names, _ in parts:
            head_norm = optax.tree.norm([gradient[HEADS][n] for n in names]) * jnp.abs(inverse)
            finite &= jnp.isfinite(head_norm)
            head_scales.append(inverse * clip(head_norm))
        rate = config.peak_lr * config.schedule.factor(in_stage, config.stage_steps)

        def apply(state: TrainState) -> TrainState:
            scaled = jax.tree.map(lambda g: g * scale, gradient)
            if apart:
                scaled[HEADS] = {
                    name: jax.tree.map(lambda g, by=by: g * by, gradient[HEADS][name])
                    for (names, _), by in zip(parts, head_scales, strict=True)
                    for name in names
                }
            scaled = jax.tree.map(lambda g, p: g.astype(p.dtype), scaled, state.params)
            # optax raises floats to integer counts, which strict promotion would refuse.
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(scaled, state.opt_state, state.params)
            updates = jax.tree.map(
                lambda u: (u.astype(jnp.float32) * rate).astype(u.dtype), updates
            )
            if apart:
                updates[HEADS] = {
                    name: jax.tree.map(lambda u, by=by: u * by, updates[HEADS][name])
                    for names, by in parts
                    for name in names
                }
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if config.ema_decay is not None:
                wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
                ema = optax.incremental_update(wide, ema, 1 - config.ema_decay)
            return state.replace(  # type: ignore[attr-defined]
                params=params, opt_state=opt_state, ema=ema, aux=loss.aux
            )

        state = jax.lax.cond(finite & ~empty, apply, lambda state: state, state)
        metrics = {
            name: total / jnp.where(w == 0, 1.0, w) for name, (total, w) in loss.metrics.items()
        }
        metrics |= {
            "loss": mean,
            "grad_norm": norm,
            "learning_rate": rate,
            "target_weight": loss.weight,
            "finite": finite.astype(jnp.float32),
        }
        return dataclasses.replace(state, step=state.step + 1, frozen=frozen), metrics

    return train_step


def _head_parts(
    rate: float | Mapping[str, float] | None, heads: Mapping[str, Any]
) -> list[tuple[list[str], float]]:
    """Returns the heads that are clipped together, each part with its rate; [] without rates."""
    if rate is None or not heads:
        return []
    if isinstance(rate, Mapping):
        return [([name], rate[name]) for name in sorted(heads)]
    return [(sorted(heads), rate)]


@functools.cache
def make_eval_step(model: Transformer, objective: Objective):
    """Returns the compiled function (params, aux, batch) -> sums of loss, weight and metrics."""

    @jax.jit
    def eval_step(params, aux, batch: Batch):
        loss = objective.loss(model, params, aux, batch, jax.random.key(0))
        return {"loss": (loss.total, loss.weight), **loss.metrics}

    return eval_step

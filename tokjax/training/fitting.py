"""Fits of small trees of weights with Adam: outside a run, stopped and continued exactly."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tokjax import struct
from tokjax.errors import NonFiniteError
from tokjax.training.fit_state import read_state, write_state
from tokjax.training.progress import Progress

_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
_LATE = 2  # losses are read so many steps late, so that the device never waits for the host


@struct.dataclass
class FitState:
    """What a fit goes on from.

    Attributes:
        weights: what is fitted.
        optimizer: Adam's moments.
    """

    weights: Any
    optimizer: Any


def begin(weights: Any) -> FitState:
    """Returns the state before the first step."""
    return FitState(weights, _ADAM.init(weights))


def adam_step(
    state: FitState,
    rate: Float[Array, ""],
    loss: Callable[[Any], Float[Array, ""]],
    decay: float = 0.0,
) -> tuple[FitState, Float[Array, ""]]:
    """Returns the next state and the loss before it; gradients are clipped to norm 1.

    Args:
        state: before the step.
        rate: learning rate.
        loss: of weights; to be made smaller.
        decay: of all weights, times the learning rate (AdamW).
    """
    value, gradient = jax.value_and_grad(loss)(state.weights)
    change, optimizer = _ADAM.update(gradient, state.optimizer)
    if decay:
        change = jax.tree.map(lambda u, w: u + decay * w, change, state.weights)
    change = jax.tree.map(lambda u: -rate * u, change)
    return FitState(optax.apply_updates(state.weights, change), optimizer), value


def orders(count: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the examples of each step, by number: every epoch in another order."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for first in range(0, count, batch_size):
            yield order[first : first + batch_size]


def fit(
    update: Callable[[FitState, int], tuple[FitState, Float[Array, ""]]],
    state: FitState,
    steps: int,
    *,
    identity: Callable[[], Mapping[str, Any]],
    checkpoint: Path | str | None = None,
    checkpoint_steps: int = 500,
    progress: bool = True,
    until: Callable[[Any, int], bool] | None = None,
) -> tuple[Any, Float[np.ndarray, "N"]]:
    """Returns the fitted weights, and the loss before each step.

    Args:
        update: (state, number of the step) -> (next state, loss); it may take the state's memory.
        state: before the first step; its own memory is left alone.
        steps: how many to take.
        identity: what the fit is told, as plain values; asked for only beside a checkpoint.
        checkpoint: file that the fit goes on from where it is there, with the same numbers as
            without a stop; it is written every `checkpoint_steps` steps and at the end.
        checkpoint_steps: see `checkpoint`.
        progress: whether to show it.
        until: (state, number of steps so far) -> whether the fit ends early. It is asked behind
            each step, and first of a state from a checkpoint; to read the state waits for it.

    Raises:
        ConfigError: the checkpoint is of a fit that was told something else.
        NonFiniteError: a loss was not finite.
        CheckpointError: the checkpoint is damaged.
        StorageError: it cannot be read or written.
    """
    losses: list[Any] = []
    file = None if checkpoint is None else Path(checkpoint)
    told: Mapping[str, Any] = {}
    if file is not None:
        told = identity()
        state, losses = read_state(file, told, state) or (state, losses)
    first = len(losses)
    if first == steps or (until is not None and first and until(state, first)):
        return jax.tree.map(jnp.asarray, state.weights), np.array(losses)
    state = jax.tree.map(jnp.array, state)  # a copy: its memory is given to the next state
    with Progress(steps, enabled=progress) as shown:
        for step in range(first, steps):
            state, loss = update(state, step)
            losses.append(loss)
            known = step - _LATE
            if known >= first:
                losses[known] = _finite(losses[known], known)
            shown.update(step + 1, losses[known] if known >= first else None)
            ends = step + 1 == steps or (until is not None and until(state, step + 1))
            if file is not None and ((step + 1) % checkpoint_steps == 0 or ends):
                losses = [_finite(loss, at) for at, loss in enumerate(losses)]
                write_state(file, told, state, np.array(losses))
            if ends:
                break
    return state.weights, np.array([_finite(loss, step) for step, loss in enumerate(losses)])


def _finite(loss: Any, step: int) -> float:
    value = float(loss)
    if not np.isfinite(value):
        raise NonFiniteError(f"the loss of step {step} is {value}: lower peak_lr")
    return value

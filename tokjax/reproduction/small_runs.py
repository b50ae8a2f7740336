"""Tiny models trained within a comparison: steps, parameters kept, answers.

They take seconds, so there are no workdirs. The step is the library's own; programs are compiled
once for all seeds and learning rates.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from tokjax.data.batch import Batch
from tokjax.decoding import Prompts, categorical, decode, greedy, on_tokens
from tokjax.errors import ConfigError
from tokjax.models.transformer import Transformer
from tokjax.training.objective import Objective
from tokjax.training.optimizers import AdamW, Constant, Cosine
from tokjax.training.passes import forward
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step

OPTIMIZER = AdamW(weight_decay=0.0)
CLIP_NORM = 1.0


def fitted(
    model: Transformer,
    objective: Objective,
    params: Any,
    batches: Iterable[Batch],
    rates: float | Callable[[int], float],
    *,
    seed: int = 0,
    steps: int = 1,
    after_step: Callable[[int, Any], None] | None = None,
    with_aux: Callable[[Any], Any] | None = None,
) -> tuple[Any, dict[str, Float[np.ndarray, "N"]]]:
    """Returns the parameters behind a step on each batch, and the metrics of all steps.

    AdamW without weight decay, gradients clipped to norm 1.

    Args:
        model: without adapters.
        objective: of the training.
        params: to begin with; they stay as they are. None draws them by `seed`.
        batches: of one shape.
        rates: the learning rate, or the rate of each step, counted from 0.
        seed: of what the objective draws.
        steps: of the training, for objectives that change as it goes on.
        after_step: called with the number of steps done and the parameters.
        with_aux: what becomes of the objective's initial state, such as another value of what is
            swept there, which compiles nothing.

    Raises:
        ConfigError: a step's loss or gradient was not finite.
    """
    step = _step(model, objective, steps)
    state = _init(model, objective)(seed, params)
    if with_aux is not None:
        state = state.replace(aux=with_aux(state.aux))  # type: ignore[attr-defined]
    rate_of = rates if callable(rates) else lambda _: rates
    seen = []
    for number, batch in enumerate(batches):
        state, metrics = step(state, batch, jnp.float32(rate_of(number)))
        seen.append(metrics)
        if after_step is not None:
            after_step(number + 1, state.params)
    told: Mapping[str, Any] = {
        name: np.array([float(m[name]) for m in seen]) for name in (seen[0] if seen else {})
    }
    if seen and not told["finite"].all():
        raise ConfigError(f"step {int(told['finite'].argmin())} is not finite: lower the rate")
    return state.params, dict(told)


@functools.cache
def _step(model: Transformer, objective: Objective, steps: int) -> Callable[..., Any]:
    optimizer: optax.GradientTransformation = OPTIMIZER.build(model.config)

    @jax.jit
    def step(state, batch, rate):
        config = StepConfig(rate, Constant(), 0, steps, clip_norm=CLIP_NORM)
        return make_train_step(model, objective, optimizer, config)(state, batch)

    return step


@functools.cache
def _init(model: Transformer, objective: Objective) -> Callable[..., Any]:
    optimizer = OPTIMIZER.build(model.config)
    return jax.jit(
        lambda seed, params: init_state(model, objective, optimizer, seed, False, params)
    )


def kept(path: Path, model: Transformer, make: Callable[[], Any]) -> Any:
    """Returns parameters from a file, made and written if it is not there yet."""
    structure = jax.tree.structure(model.abstract_params())
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        leaves = {f"p{i}": np.asarray(a) for i, a in enumerate(jax.tree.leaves(make()))}
        # Another name first: a file that is there is whole.
        unfinished = path.with_suffix(".unfinished.npz")
        np.savez(unfinished, **leaves)  # type: ignore[arg-type]
        unfinished.rename(path)
    with np.load(path) as found:
        leaves = [jnp.asarray(found[f"p{i}"]) for i in range(len(found.files))]
    return jax.tree.unflatten(structure, leaves)


def cosine_rates(peak: float, steps: int, warmup: int | None = None) -> Callable[[int], float]:
    """Returns rates that rise linearly, then fall as a cosine to a tenth of the peak.

    Args:
        peak: the highest.
        steps: how many there are.
        warmup: steps of the rise; 5 % of all if None.
    """
    return _rates(peak, Cosine(steps // 20 if warmup is None else warmup), steps)


def constant_rates(peak: float, steps: int, warmup: int) -> Callable[[int], float]:
    """Returns rates that rise linearly, then stay."""
    return _rates(peak, Constant(warmup), steps)


def _rates(peak: float, schedule: Constant | Cosine, steps: int) -> Callable[[int], float]:
    factors = jax.vmap(lambda step: schedule.factor(step, steps))(jnp.arange(steps, dtype=float))
    return (peak * np.asarray(factors, float)).__getitem__


@functools.partial(jax.jit, static_argnums=0)
def log_probs(model: Transformer, params: Any, batch: Batch) -> Float[jax.Array, "B T V"]:
    """Returns the log-probability of every id at every place; for small vocabularies."""
    return jax.nn.log_softmax(model.unembed(params, forward(model, params, batch).x))


def continued(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    max_new_tokens: int,
    samples: int = 1,
    seed: int | None = None,
    rows: int = 1024,
) -> list[list[list[int]]]:
    """Returns the answers to each prompt, the end token included.

    Args:
        model: that answers.
        params: its parameters.
        prompts: of any lengths.
        end: id that ends an answer.
        max_new_tokens: of an answer.
        samples: answers to each prompt.
        seed: of draws at temperature 1; None answers greedily.
        rows: answers computed at a time; a last part is filled up with its first prompt.
    """
    size = max(1, min(rows // samples, len(prompts)))
    sampler = greedy() if seed is None else categorical()
    key = None if seed is None else jax.random.key(seed)
    found: list[list[list[int]]] = []
    for first in range(0, len(prompts), size):
        asked = [list(p) for p in prompts[first : first + size]]
        generation = decode(
            model,
            params,
            Prompts.of(asked + asked[:1] * (size - len(asked))),
            max_new_tokens=max_new_tokens,
            samples=samples,
            sampler=sampler,
            key=None if key is None else jax.random.fold_in(key, first),
            stop=on_tokens([end]),
        )
        answers = generation.rows()
        found += [answers[b * samples : (b + 1) * samples] for b in range(len(asked))]
    return found


def before(tokens: Sequence[int], end: int) -> list[int]:
    """Returns the ids before the first that ends an answer; all without one.

    >>> before([5, 7, 2], 2), before([5, 7], 2)
    ([5, 7], [5, 7])
    """
    tokens = list(map(int, tokens))
    return tokens[: tokens.index(end)] if end in tokens else tokens

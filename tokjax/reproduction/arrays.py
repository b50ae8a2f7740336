"""Comparisons of objectives on samples made in memory: batches, training, greedy answers.

An arm here is one objective among many of the same small model, seconds each. `tokjax.train` would
spend as long on files and checkpoints; the step is the same.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokjax.data.batch import Batch
from tokjax.decoding.engine import decode
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models.transformer import Transformer
from tokjax.training.optimizers import AdamW, Constant, Cosine
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step


@dataclass(frozen=True)
class Sample:
    """A text of ids, with values of each as a target.

    Attributes:
        tokens: ids.
        weights: of each in the loss; that of the first, which is no target, is not read.
        channels: further values by name, for `Batch.channels`.
    """

    tokens: Sequence[int]
    weights: Sequence[float]
    channels: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def answer(cls, prompt: Sequence[int], answer: Sequence[int]) -> "Sample":
        """Returns the sample of an answer that alone has weight."""
        return cls([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))


Row = Sample | Sequence[Sample]


def as_batch(rows: Sequence[Row], width: int) -> Batch:
    """Returns samples as a batch, one or several packed in a row.

    Raises:
        ConfigError: the samples of a row do not fit into it, or channels differ.
    """
    packed = [[row] if isinstance(row, Sample) else list(row) for row in rows]
    shape, names = (len(packed), width), set(packed[0][0].channels)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    values = {name: np.zeros(shape, np.float32) for name in (*sorted(names), "weights")}
    ids = np.full((len(packed), max(map(len, packed))), -1, np.int32)
    for r, row in enumerate(packed):
        begin = 0
        for s, sample in enumerate(row):
            n = len(sample.tokens) - 1
            at = slice(begin, begin + n)
            begin += n
            if begin > width or set(sample.channels) != names:
                raise ConfigError(
                    f"row {r} has {begin} places and the channels {sorted(sample.channels)}, but "
                    f"rows have {width} places and the first sample has {sorted(names)}"
                )
            tokens[r, at], targets[r, at] = sample.tokens[:-1], sample.tokens[1:]
            positions[r, at], segments[r, at] = np.arange(n), s + 1
            for name, own in {**sample.channels, "weights": sample.weights}.items():
                values[name][r, at] = own[1:]
            ids[r, s] = r
    weights = values.pop("weights")
    return Batch(tokens, targets, positions, segments, weights, ids, values)  # type: ignore[arg-type]


def epochs(rows: Sequence[Row], size: int, steps: int, width: int, seed: int) -> Iterable[Batch]:
    """Yields the batches of a number of steps; rows come in another order each time round."""
    every = as_batch(rows, width)
    rng, waiting = np.random.default_rng(seed), list[int]()
    for _ in range(steps):
        while len(waiting) < size:
            waiting += rng.permutation(len(rows)).tolist()
        chosen = np.array(waiting[:size])
        yield jax.tree.map(lambda values, chosen=chosen: values[chosen], every)
        del waiting[:size]


def tuned(
    model: Transformer,
    params: Any,
    objective: Any,
    batches: Iterable[Batch],
    *,
    steps: int,
    rate: float,
    cosine: bool = False,
    warmup: int = 20,
    seed: int = 0,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns trained parameters, and the metrics of every step.

    AdamW without weight decay, gradients clipped at norm 1.

    Args:
        model: what is trained.
        params: to begin with, which a frozen reference keeps; None draws them by `seed`.
        objective: the loss.
        batches: one for each step.
        steps: how many there are.
        rate: peak of the learning rate.
        cosine: let it fall to a tenth of the peak; else it stays.
        warmup: steps of linear rise.
        seed: of what the objective draws.
    """
    start, step = _compiled(model, objective, steps, rate, cosine, warmup)
    state, seen = start(seed, params), []
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append(metrics)
    return state.params, {name: np.array([float(m[name]) for m in seen]) for name in seen[0]}


@functools.cache
def _compiled(
    model: Transformer, objective: Any, steps: int, rate: float, cosine: bool, warmup: int
) -> tuple[Callable, Callable]:
    schedule = Cosine(warmup) if cosine else Constant(warmup)
    optimizer = AdamW(weight_decay=0.0).build(model.config)
    config = StepConfig(rate, schedule, 0, steps, clip_norm=1.0)

    def start(seed: int, params: Any) -> Any:
        return init_state(model, objective, optimizer, seed, False, params)

    return start, jax.jit(make_train_step(model, objective, optimizer, config))


def kept(path: Path, model: Transformer, make: Callable[[], Any]) -> Any:
    """Returns a model's parameters, from a file or made now and put there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(make())]
        np.savez(path, *leaves)  # type: ignore[arg-type]
    with np.load(path) as found:
        leaves = [jax.numpy.asarray(found[f"arr_{i}"]) for i in range(len(found.files))]
    return jax.tree.unflatten(jax.tree.structure(model.abstract_params()), leaves)


def answers(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    end: int,
    **settings: Any,
) -> list[list[int]]:
    """Returns what a model says to prompts, without the id that ends it.

    Args:
        model: that is asked.
        params: its parameters.
        prompts: of equal or different lengths.
        new_tokens: the answers' at most.
        end: id that ends an answer.
        settings: of `decode`; without them answers are greedy.
    """
    found = decode(model, params, Prompts.of(prompts), max_new_tokens=new_tokens, **settings)
    rows = [list(map(int, row)) for row in found.rows()]
    return [row[: row.index(end)] if end in row else row for row in rows]

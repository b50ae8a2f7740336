"""Tiny models trained within a comparison: examples as batches in memory, steps, parameters kept.

They take seconds, so there are no workdirs. The step is the library's own; programs are compiled
once for all seeds and learning rates.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from tokjax.data.batch import Batch
from tokjax.data.sources import make_key
from tokjax.data.store import StoreWriter, TokenStore
from tokjax.decoding import Prompts, categorical, decode, greedy, on_tokens
from tokjax.errors import ConfigError, DataError
from tokjax.models.transformer import Transformer
from tokjax.training.objective import Objective
from tokjax.training.optimizers import AdamW, Constant, Cosine
from tokjax.training.passes import forward
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step

OPTIMIZER = AdamW(weight_decay=0.0)
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Row:
    """One example: an answer behind its prompt, or a pair of them.

    Attributes:
        tokens: ids; of a pair the chosen sequence, then the rejected one.
        weights: of each token as a target, 0 on prompts.
        cut: where the rejected sequence begins; 0 where there is one sequence.
    """

    tokens: Sequence[int]
    weights: Sequence[float]
    cut: int = 0

    @classmethod
    def answer(cls, prompt: Sequence[int], answer: Sequence[int]) -> "Row":
        """Returns a row whose answer counts."""
        return cls([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))

    @classmethod
    def pair(cls, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> "Row":
        """Returns a pair; the rejected answer weighs below 0."""
        first, second = cls.answer(prompt, chosen), cls.answer(prompt, rejected)
        weights = [*first.weights, *(-w for w in second.weights)]
        return cls([*first.tokens, *second.tokens], weights, len(first.tokens))

    def times(self, factors: Sequence[float] | Float[np.ndarray, "n"]) -> "Row":
        """Returns the row with its weights multiplied."""
        weights = np.asarray(self.weights) * np.asarray(factors)
        return Row(self.tokens, weights.tolist(), self.cut)


def batch_of(rows: Sequence[Row], width: int) -> Batch:
    """Returns one example a row of a batch, filled up on the right.

    Args:
        rows: answers or pairs, not both.
        width: ids of a row at most; a batch has one place fewer.

    Raises:
        DataError: a row is longer, or the rows are of both sorts.
    """
    if len({row.cut > 0 for row in rows}) > 1:
        raise DataError("a batch holds single answers or pairs, not both")
    n = len(rows)
    tokens, weights = np.zeros((n, width), np.int32), np.zeros((n, width), np.float32)
    positions, segments = np.zeros((n, width), np.int32), np.zeros((n, width), np.int32)
    for b, row in enumerate(rows):
        size = len(row.tokens)
        if size > width:
            raise DataError(f"row {b} has {size} tokens, more than width={width}")
        place = np.arange(size)
        second = place >= row.cut if row.cut else np.zeros(size, bool)
        tokens[b, :size], weights[b, :size] = row.tokens, row.weights
        positions[b, :size] = np.where(second, place - row.cut, place)
        segments[b, :size] = 1 + second
    group = 2 if rows and rows[0].cut else 1
    same = segments[:, 1:] == segments[:, :-1]
    number = np.arange(n, dtype=np.int32)[:, None]
    return Batch(
        tokens=jnp.asarray(tokens[:, :-1]),
        targets=jnp.asarray(tokens[:, 1:]),
        positions=jnp.asarray(positions[:, :-1]),
        segment_ids=jnp.asarray(segments[:, :-1]),
        # Nothing predicts the first token of a sequence.
        weights=jnp.asarray(np.where(same, weights[:, 1:], 0.0)),
        example_id=jnp.asarray(np.repeat(number, group, axis=1)),
        group=group,
    )


def store_of(rows: Sequence[Row], folder: Path, *, vocab_size: int, end: int) -> TokenStore:
    """Returns a token store of rows, written if it is not there yet.

    Args:
        rows: answers or pairs, not both.
        folder: of the store.
        vocab_size: of the ids.
        end: id behind every answer.
    """
    if not folder.exists():
        with StoreWriter(folder, vocab_size=vocab_size, tokenizer={"after": [end]}) as writer:
            for number, row in enumerate(rows):
                key = make_key("row", str(number))
                cuts = (row.cut,) if row.cut else ()
                writer.add(row.tokens, row.weights, key=key, name=str(number), cuts=cuts)
    return TokenStore.open(folder)


def epochs(
    rows: Sequence[Row], width: int, *, size: int, count: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Yields the batches of some epochs, each in another order; a last small batch is left out.

    Raises:
        DataError: there are fewer rows than a batch has.
    """
    if len(rows) < size:
        raise DataError(f"{len(rows)} rows do not fill a batch of {size}")
    for _ in range(count):
        order = rng.permutation(len(rows))
        for first in range(0, len(rows) - size + 1, size):
            yield batch_of([rows[i] for i in order[first : first + size]], width)


def fitted(
    model: Transformer,
    objective: Objective,
    params: Any,
    batches: Iterable[Batch],
    rates: float | Callable[[int], float],
    *,
    seed: int = 0,
    after_step: Callable[[int, Any], None] | None = None,
) -> tuple[Any, dict[str, Float[np.ndarray, "N"]]]:
    """Returns the parameters behind a step on each batch, and the metrics of all steps.

    AdamW without weight decay, gradients clipped to norm 1.

    Args:
        model: without adapters.
        objective: of the training.
        params: to begin with; they stay as they are.
        batches: of one shape.
        rates: the learning rate, or the rate of each step, counted from 0.
        seed: of what the objective draws.
        after_step: called with the number of steps done and the parameters.

    Raises:
        ConfigError: a step's loss or gradient was not finite.
    """
    step = _step(model, objective)
    state = _init(model, objective)(seed, params)
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
def _step(model: Transformer, objective: Objective) -> Callable[..., Any]:
    optimizer: optax.GradientTransformation = OPTIMIZER.build(model.config)

    @jax.jit
    def step(state, batch, rate):
        config = StepConfig(rate, Constant(), 0, 1, clip_norm=CLIP_NORM)
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


def cosine_rates(peak: float, steps: int) -> Callable[[int], float]:
    """Returns the rates of a pre-training: up over 5 % of the steps, then down as a cosine."""
    schedule = Cosine(warmup_steps=steps // 20)
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

"""Running text for small models of characters: windows to train on, passages to be scored."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tokjax.data.batch import Batch
from tokjax.models.transformer import Transformer
from tokjax.signals import weighted_nll
from tokjax.training.objective import Objective

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def windows(ids: Sequence[int], length: int, rows: int, steps: int, seed: int) -> Iterator[Batch]:
    """Yields a batch for each step: windows of running text from random places, one a row.

    Args:
        ids: of the text.
        length: tokens of a row.
        rows: of a batch.
        steps: number of batches.
        seed: of the places.
    """
    text, rng = np.asarray(ids, np.int32), np.random.default_rng(seed)
    for _ in range(steps):
        starts = rng.integers(0, len(text) - length, rows)
        yield _batch([text[s : s + length + 1] for s in starts], length)


def passages(text: str, size: int, count: int) -> list[str]:
    """Returns consecutive pieces of a text, of about `size` characters, cut at white space.

    >>> passages("ab cd ef gh", 4, 2)
    ['ab cd', ' ef gh']
    """
    found, start = [], 0
    while len(found) < count and start < len(text):
        end = start + size
        while end < len(text) and not text[end].isspace():
            end += 1
        found.append(text[start:end])
        start = end
    return found


def perturbed(text: str, share: float, rng: np.random.Generator) -> str:
    """Returns a text some of whose letters are replaced, exchanged with the next, or change case.

    Args:
        text: what is changed.
        share: probability that a letter is.
        rng: random numbers.
    """
    letters = list(text)
    for i, letter in enumerate(letters):
        if not letter.isalpha() or rng.random() >= share:
            continue
        kind = rng.integers(3)
        if kind == 0:
            letters[i] = _LETTERS[rng.integers(len(_LETTERS))]
        elif kind == 1 and i + 1 < len(letters):
            letters[i], letters[i + 1] = letters[i + 1], letter
        else:
            letters[i] = letter.swapcase()
    return "".join(letters)


def nats_of_rows(
    model: Transformer,
    objective: Objective,
    params: Any,
    rows: Sequence[Sequence[int]],
    length: int,
    *,
    at_once: int = 25,
) -> tuple[Float[np.ndarray, "N"], dict[str, float]]:
    """Returns what each row costs in nats under an objective's predictions, and its metrics.

    Args:
        model: that is scored.
        objective: with `predictions`.
        params: of the model and the objective.
        rows: ids, the first of which is given.
        length: of the rows, filled up.
        at_once: rows of a batch.
    """
    found, sums = [], {}
    for first in range(0, len(rows), at_once):
        part = [np.asarray(row, np.int32) for row in rows[first : first + at_once]]
        size = len(part)
        part += part[:1] * (at_once - size)
        nats, metrics = _scored(model, objective, params, _batch(part, length))
        found.append(np.asarray(nats)[:size])
        for name, (total, weight) in metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + float(total), before[1] + float(weight)
    means = {name: total / (weight or 1.0) for name, (total, weight) in sums.items()}
    return np.concatenate(found), means


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scored(model: Transformer, objective: Any, params: Any, batch: Batch) -> Any:
    found = objective.predictions(model, params, batch, jax.random.key(0))
    nll = weighted_nll(found.x, found.head, found.targets, found.weights)[1]
    return jnp.where(found.weights == 0, 0.0, nll * found.weights).sum((1, 2)), found.metrics


def _batch(rows: Sequence[np.ndarray], length: int) -> Batch:
    shape = (len(rows), length)
    tokens, targets, real = (np.zeros(shape, np.int32) for _ in range(3))
    for b, row in enumerate(rows):
        if len(row) - 1 > length:
            raise ValueError(f"a row of {len(row)} tokens does not fit {length} slots")
        n = len(row) - 1
        tokens[b, :n], targets[b, :n], real[b, :n] = row[:-1], row[1:], 1
    return Batch(
        tokens=jnp.asarray(tokens),
        targets=jnp.asarray(targets),
        positions=jnp.broadcast_to(jnp.arange(length), shape),
        segment_ids=jnp.asarray(real),
        weights=jnp.asarray(real, jnp.float32),
        example_id=jnp.zeros((len(rows), 1), jnp.int32),
    )

"""Examples of tiny models, in memory: answers and pairs, as batches and as a store.

They take seconds to train on, so there are no files of texts between a task and its batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tokjax.data.batch import Batch
from tokjax.data.sources import make_key
from tokjax.data.store import StoreWriter, TokenStore
from tokjax.errors import DataError


@dataclass(frozen=True)
class Row:
    """One example: an answer behind its prompt, or a pair of them.

    Attributes:
        tokens: ids; of a pair the chosen sequence, then the rejected one.
        weights: of each token as a target, 0 on prompts; that of the first is not read.
        cut: where the rejected sequence begins; 0 where there is one sequence.
        channels: further values of each token as a target by name, for `Batch.channels`.
    """

    tokens: Sequence[int]
    weights: Sequence[float]
    cut: int = 0
    channels: Mapping[str, Sequence[float]] = field(default_factory=dict)

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
        return replace(self, weights=weights.tolist())


Packed = Row | Sequence[Row]


def batch_of(rows: Sequence[Packed], width: int) -> Batch:
    """Returns a batch, each row of which holds one example or some, filled up on the right.

    Args:
        rows: answers or pairs, not both; several answers lie one behind another.
        width: ids of a row at most; a batch has one place fewer. An example takes a place for
            each of its ids but the last.

    Raises:
        DataError: the examples of a row do not fit into it, they are of both sorts, or channels
            differ.
    """
    packed = [[row] if isinstance(row, Row) else list(row) for row in rows]
    every = [row for own in packed for row in own]
    if len({row.cut > 0 for row in every}) > 1:
        raise DataError("a batch holds single answers or pairs, not both")
    names = set(every[0].channels) if every else set()
    for row in every:
        if set(row.channels) != names:
            raise DataError(
                f"a row has the channels {sorted(row.channels)}, the first one {sorted(names)}"
            )
    group = 2 if every and every[0].cut else 1
    most = max((len(own) for own in packed), default=1)
    if group == 2 and most > 1:
        raise DataError("pairs are not packed: give one for each row of a batch")
    shape = (len(packed), width - 1)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    values = {name: np.zeros(shape, np.float32) for name in (*sorted(names), "weights")}
    number = np.full((len(packed), most * group), -1, np.int32)
    for b, own in enumerate(packed):
        places = sum(len(row.tokens) - 1 for row in own)
        if places > width - 1:
            size = places + 1
            raise DataError(f"row {b} has {size} tokens, more than width={width}")
        begin = 0
        for s, row in enumerate(own):
            size = len(row.tokens)
            at = slice(begin, begin + size - 1)
            begin += size - 1
            place = np.arange(size)
            second = place >= row.cut if row.cut else np.zeros(size, bool)
            position = np.where(second, place - row.cut, place)
            tokens[b, at], targets[b, at] = row.tokens[:-1], row.tokens[1:]
            positions[b, at], segments[b, at] = position[:-1], s + 1 + second[:-1]
            # Nothing predicts the first token of a sequence.
            predicted = second[1:] == second[:-1]
            for name, of_name in {**row.channels, "weights": row.weights}.items():
                values[name][b, at] = np.where(predicted, of_name[1:], 0.0)
            number[b, s : s + group] = b
    weights = values.pop("weights")
    arrays = (tokens, targets, positions, segments, weights, number, values)
    return Batch(*jax.tree.map(jnp.asarray, arrays), group=group)


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
    rows: Sequence[Packed], width: int, *, size: int, count: int, rng: np.random.Generator
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


def batches(
    rows: Sequence[Packed], width: int, *, size: int, steps: int, seed: int
) -> Iterator[Batch]:
    """Yields the batches of a number of steps; rows come in another order each time round."""
    # On the host: a step takes rows of all of them.
    every = jax.tree.map(np.asarray, batch_of(rows, width))
    rng, waiting = np.random.default_rng(seed), list[int]()
    for _ in range(steps):
        while len(waiting) < size:
            waiting += rng.permutation(len(rows)).tolist()
        chosen = np.array(waiting[:size])
        yield jax.tree.map(lambda values, chosen=chosen: values[chosen], every)
        del waiting[:size]

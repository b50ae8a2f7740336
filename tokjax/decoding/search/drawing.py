"""What searches over whole continuations share: drawing them in batches, scoring, counting cost."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from tokjax.decoding.engine import decode
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.samplers import Sampler, categorical
from tokjax.decoding.stops import Stop
from tokjax.decoding.transforms import Transform
from tokjax.errors import ConfigError, DataError

Ids = list[int]
# Of prompts and as many continuations, in one call: a reward model can run them as one batch.
Scorer = Callable[[Sequence[Ids], Sequence[Ids]], Sequence[float]]


@dataclass(frozen=True)
class Cost:
    """What a search has run.

    Attributes:
        tokens: new tokens written, kept or not.
        forwards: forward passes one behind the other, each over all rows: one over the prompts in
            every call of `decode`, and one for each of the longest row's new tokens but the last.
    """

    tokens: int = 0
    forwards: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.tokens + other.tokens, self.forwards + other.forwards)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Continuations, row by row.

    Attributes:
        tokens: ids of each.
        stopped: which their stop ended.
        logprobs: of each whole continuation, by the model at temperature 1.
        cost: of drawing them.
        confidences: of each, the mean probability of its tokens, by the model at temperature 1;
            None where what draws does not tell.
    """

    tokens: list[Ids]
    stopped: Bool[np.ndarray, "R"]
    logprobs: Float[np.ndarray, "R"]
    cost: Cost
    confidences: Float[np.ndarray, "R"] | None = None


@dataclass(frozen=True, eq=False)
class Generator:
    """Draws continuations: a model with the settings of `decode`.

    Attributes:
        model: a `Transformer`, or any `Predictor` whose parameters are not of single rows.
        params: its parameters; prepare them once (`decoding.prepare`) where the search makes
            many calls.
        max_new_tokens: most tokens of one draw.
        transform: of the logits; default none. One value for all rows.
        stop: what ends a draw besides; default nothing.
        sampler: default `categorical()`.
    """

    model: Any
    params: Any
    max_new_tokens: int
    transform: Transform | None = None
    stop: Stop | None = None
    sampler: Sampler = dataclasses.field(default_factory=categorical)

    def __call__(self, rows: Sequence[Ids], seeds: Sequence[int], *, samples: int = 1) -> Drawn:
        """Returns `samples` continuations of each row, each from a seed of its own.

        Raises:
            ConfigError: what `decode` refuses.
            DataError: an id is not in the model's vocabulary.
        """
        found = jax.device_get(
            decode(
                self.model,
                self.params,
                Prompts.of(rows),
                max_new_tokens=self.max_new_tokens,
                samples=samples,
                transform=self.transform,
                sampler=self.sampler,
                stop=self.stop,
                seeds=np.asarray(seeds, np.int64),
            )
        )
        return Drawn(
            tokens=found.rows(),
            stopped=found.stopped,
            logprobs=np.where(found.mask, found.logprobs, 0).sum(1, dtype=np.float64),
            cost=Cost(int(found.lengths.sum()), int(found.lengths.max())),
            confidences=np.where(found.mask, np.exp(found.logprobs), 0).sum(1, dtype=np.float64)
            / np.maximum(found.lengths, 1),
        )


def row_seed(*numbers: int) -> int:
    """Returns a seed for `decode` made of several numbers, such as seed, prompt, step and slot.

    >>> row_seed(0, 1) == row_seed(0, 1), row_seed(0, 1) == row_seed(1, 0)
    (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def lists(prompts: Prompts) -> list[Ids]:
    """Returns the prompts' own ids, row by row."""
    tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


def each(score: Callable[[Ids], float]) -> Scorer:
    """Returns the scorer that judges every continuation for itself, without its prompt."""
    return lambda prompts, continuations: [score(ids) for ids in continuations]


def scored(score: Scorer, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> np.ndarray:
    """Returns a scorer's numbers, checked; -inf is a number.

    Raises:
        DataError: they are too many, too few, or NaN.
    """
    found = np.asarray(score(prompts, continuations), np.float64)
    if found.shape != (len(continuations),):
        raise DataError(
            f"the scorer gave an array of shape {found.shape} for {len(continuations)} "
            f"continuations: it must return one number for each (see `each`)"
        )
    if np.isnan(found).any():
        at = int(np.isnan(found).argmax())
        raise DataError(f"the scorer gave NaN for continuation {at}, {continuations[at]}")
    return found


def at_least_one(**numbers: int) -> None:
    """Refuses counts below one.

    Raises:
        ConfigError: one is.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name}={number} must be at least 1")

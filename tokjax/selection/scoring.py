"""Scores of all examples of a store by any method of selection, and which examples they keep.

A method is a frozen dataclass of options registered under the kind "selector". It looks at the
target once (`prepare`) and then at rows of the pool, each on its own; so a pool is scored in
batches of one shape each, and a scoring that was stopped goes on with the examples that are left.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float64

from tokjax.errors import ConfigError, DataError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.selection.rows import Rows, Store, batches

Found = tuple[Float[np.ndarray, "B"], dict[str, Float[np.ndarray, "B T"]]]
RowScorer = Callable[[Rows], Found]

BATCH_TOKENS = 4096


class Selector(Protocol):
    """A method of selection.

    Attributes:
        needs_target: whether it compares with examples of a target task.
        memory: how many times the memory of a forward pass a row takes, roughly.
    """

    needs_target: ClassVar[bool]
    memory: ClassVar[int]

    def prepare(self, model: Transformer, params: Params, target: "Target | None") -> RowScorer:
        """Returns what scores rows: the higher the better, -inf without a token that counts.

        Besides the scores it may return values of each token, by name.

        Raises:
            DataError: the target has no token that counts.
        """
        ...


@runtime_checkable
class PoolSelector(Protocol):
    """A method that looks at the whole pool before it scores any row of it.

    What it says of tokens is what it is for, so that is always kept.

    Attributes:
        needs_target: False.
        memory: as of a `Selector`.
    """

    needs_target: ClassVar[bool]
    memory: ClassVar[int]

    def learn(
        self,
        model: Transformer,
        params: Params,
        pool: "Target",
        on_step: Callable[[int, int], None] | None = None,
    ) -> RowScorer:
        """Returns what scores rows; `on_step` is called with the steps done, and with all."""
        ...

    def summary(self, pool: "Target", channels: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Returns what the channels of the whole pool say, as plain values by name."""
        ...


@dataclass(frozen=True)
class Target:
    """Examples that a method looks at first: of the task that is to be learned, or the pool.

    Attributes:
        store: where they are.
        batch_tokens: places of a batch of them.
        max_tokens: of an example; what is behind is left out.
    """

    store: Store
    batch_tokens: int = BATCH_TOKENS
    max_tokens: int = 2048

    def batches(self, memory: int = 1) -> list[Rows]:
        """Returns all examples, in batches that take no more memory than `batch_tokens` say."""
        every = range(self.store.num_examples)
        size = max(1, self.batch_tokens // memory)
        return list(batches(self.store, every, batch_tokens=size, max_tokens=self.max_tokens))


@dataclass(frozen=True, eq=False)
class Scored:
    """What a method says of the examples of a store.

    Attributes:
        scores: the higher the better; -inf for an example without a token that counts, NaN for
            one that was not scored.
        channels: name -> for each example a value of each of its tokens, zeros behind
            `max_tokens`; None for one that was not scored.
    """

    scores: Float64[np.ndarray, "N"]
    channels: Mapping[str, list[Any]]


def score(
    selector: Selector | PoolSelector,
    model: Transformer,
    params: Params,
    pool: Store,
    target: Store | None = None,
    *,
    indices: Collection[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_tokens: int | None = None,
    channels: bool = False,
    on_batch: Callable[[Rows, Found], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Scored:
    """Returns the scores of the examples of a store.

    Args:
        selector: the method.
        model: the model that scores.
        params: its parameters.
        pool: examples to choose from.
        target: examples of the task, where the method needs them.
        indices: which examples to score; default all.
        batch_tokens: places of a batch, filling included.
        max_tokens: of an example; what is behind is left out. Default 2048, or the model's
            positions where they are fewer.
        channels: keep the values of tokens too.
        on_batch: called with every batch and what was found, in a fixed order.
        on_step: called with the steps done, and with all, by methods that learn from the pool.

    Raises:
        ConfigError: the method needs a target and there is none.
        DataError: the pool or the target has no examples, no token of the target counts, or a
            score is NaN.
    """
    if not pool.num_examples:
        raise DataError("the pool has no examples")
    longest = longest_example(model, max_tokens)
    compared = None
    if selector.needs_target:
        if target is None:
            raise ConfigError(
                f"{type(selector).__name__} compares with a target: give examples of the task"
            )
        if not target.num_examples:
            raise DataError("the target has no examples")
        compared = Target(target, batch_tokens, longest)
    if isinstance(selector, PoolSelector):
        scorer = selector.learn(model, params, Target(pool, batch_tokens, longest), on_step)
    else:
        scorer = selector.prepare(model, params, compared)
    scores = np.full(pool.num_examples, np.nan)
    kept: dict[str, list[Any]] = {}
    chosen = range(pool.num_examples) if indices is None else sorted(indices)
    size = max(1, batch_tokens // selector.memory)
    for rows in batches(pool, chosen, batch_tokens=size, max_tokens=longest):
        found = scorer(rows)
        wrong = rows.indices[np.isnan(found[0]) & (rows.indices >= 0)]
        if len(wrong):
            raise DataError(
                f"{pool.example_name(int(wrong[0]))} gets the score NaN: the model's numbers are "
                f"not finite there; try another dtype, or another checkpoint"
            )
        for b, i in enumerate(rows.indices):
            if i < 0:
                continue
            scores[i] = found[0][b]
            for name, values in found[1].items() if channels else ():
                own = np.zeros(int(pool.lengths[i]), np.float32)
                n = rows.lengths[b]
                own[:n] = values[b, :n]
                kept.setdefault(name, [None] * pool.num_examples)[i] = own
        if on_batch is not None:
            on_batch(rows, found)
    return Scored(scores, kept)


def longest_example(model: Transformer, max_tokens: int | None = None) -> int:
    """Returns how many tokens of an example are read."""
    return min(2048 if max_tokens is None else max_tokens, model.config.max_positions)


def parse_budget(text: str) -> tuple[Fraction, bool]:
    """Returns a number of examples or a share of them, and whether it is a share.

    Raises:
        ConfigError: it is neither, or keeps nothing, or is above 100 %.
    """
    share = text.strip().endswith("%")
    try:
        value = Fraction(text.strip()[:-1].strip()) / 100 if share else Fraction(int(text))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"budget {text!r} is neither a share of the pool, as 5%, nor a count, as 200"
        ) from None
    if value <= 0:
        raise ConfigError(f"budget {text!r} keeps nothing: it must be above 0")
    if share and value > 1:
        raise ConfigError(f"budget {text!r} is more than the whole pool: it is at most 100%")
    return value, share


def budget_count(budget: str, examples: int) -> int:
    """Returns how many of the examples a budget keeps: a share is rounded down.

    Args:
        budget: a share as "5%", or a count as "200".
        examples: of the pool.

    Raises:
        ConfigError: it is neither, or keeps nothing, or more than there are.

    >>> budget_count("5%", 4000), budget_count("12", 4000)
    (200, 12)
    """
    value, share = parse_budget(budget)
    count = int(value * examples) if share else int(value)
    if count > examples:
        raise ConfigError(f"budget {budget!r} is more than the pool's {examples} examples")
    if not count:
        raise ConfigError(f"budget {budget!r} of {examples} examples keeps none: raise it")
    return count


def keep_best(scores: Float64[np.ndarray, "N"], count: int) -> Bool[np.ndarray, "N"]:
    """Returns which examples have the `count` highest scores; of equals the earlier ones.

    Examples whose score is not finite are never kept, so fewer may be.

    >>> keep_best(np.array([1.0, 3.0, -np.inf, 3.0, 2.0]), 2).tolist()
    [False, True, False, True, False]
    """
    order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
    keep = np.zeros(len(scores), bool)
    keep[order[:count]] = True
    return keep & np.isfinite(scores)

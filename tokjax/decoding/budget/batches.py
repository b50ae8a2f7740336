"""What a length predictor is trained on: labels of traces, in batches of a few shapes."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.budget.traces import remaining_lengths
from tokjax.decoding.prompts import bucket
from tokjax.errors import DataError
from tokjax.models.transformer import Transformer

Rows = Sequence[Sequence[int]]


@struct.dataclass
class TraceBatch:
    """Traces of one width.

    Attributes:
        tokens: ids; what follows a row's own has no label.
        remaining: tokens of thinking left at each token, itself included; 0 where there is no
            label.
    """

    tokens: Int[Array, "B T"]
    remaining: Int[Array, "B T"]


@struct.dataclass
class StateBatch:
    """Labels, with the states that the predictor reads right before them.

    Attributes:
        states: of the frozen model.
        tokens: ids.
        remaining: as in `TraceBatch`.
    """

    states: Float[Array, "N S D"]
    tokens: Int[Array, "N"]
    remaining: Int[Array, "N"]


def label_rows(
    model: Transformer,
    rows: Rows,
    think_start: int,
    think_end: int,
    max_length: int,
    given: Rows | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (ids, remaining lengths) of each row with labels, cut to `max_length`.

    Args:
        model: the language model.
        rows: ids.
        think_start: id of `<think>`.
        think_end: id of `</think>`.
        max_length: tokens of a row that are kept, at most the model's positions.
        given: remaining lengths of each row, instead of those counted.

    Raises:
        DataError: no row is left, an id is not in the vocabulary, or given lengths do not fit.
    """
    if given is not None and [len(own) for own in given] != [len(row) for row in rows]:
        raise DataError("remaining lengths must be given for each token of each row")
    limit = min(max_length, model.config.max_positions)
    found = []
    for b, row in enumerate(rows):
        ids = np.asarray(row, np.int64)
        wrong = (ids < 0) | (ids >= model.config.vocabulary)
        if wrong.any():
            at = int(wrong.argmax())
            raise DataError(
                f"row {b} has id {ids[at]} at position {at}, but the model's ids are 0 to "
                f"{model.config.vocabulary - 1}: was it made with another tokenizer?"
            )
        if given is None:
            remaining = remaining_lengths(row, think_start, think_end)[:limit]
        else:
            remaining = np.asarray(given[b], np.int32)[:limit]
        if remaining[1:].any():  # nothing is read before the first token
            found.append((ids[:limit].astype(np.int32), remaining))
    if not found:
        raise DataError(
            f"none of {len(rows)} rows has thinking between the ids {think_start} and {think_end}"
        )
    return found


def trace_batch(traces: list, size: int) -> TraceBatch:
    """Returns traces in a bucket's width; missing rows have no labels."""
    width = bucket(max(len(ids) for ids, _ in traces))
    tokens, remaining = np.zeros((2, size, width), np.int32)
    for b, (ids, left) in enumerate(traces):
        tokens[b, : len(ids)], remaining[b, : len(left)] = ids, left
    return TraceBatch(tokens, remaining)  # type: ignore[arg-type]


def state_batch(stored: list[StateBatch]) -> StateBatch:
    """Returns the labels of several traces, filled up to a bucket's number."""
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *stored)
    missing = bucket(len(joined.tokens)) - len(joined.tokens)
    fill = lambda a: np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1))  # noqa: E731
    return jax.tree.map(fill, joined)

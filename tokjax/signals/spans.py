"""Spans of text and the tokens under them: from character ranges to ids, and values both ways.

The first half runs on the host, on the character range [start, end) that the tokenizer gives for
each token. The second half runs on the device, on an id per token: 0, 1, ... for the span a token
lies in, -1 for none. S is the number of spans.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import nearest
from tokjax.signals.segments import segment_counts, segment_extremes, segment_sums

Ranges = Sequence[tuple[int, int]]
Rule = Literal["any", "majority", "contained"]
RULES = ("any", "majority", "contained")
POOLINGS = ("mean", "sum", "max", "min", "first", "last")


def overlaps(offsets: Ranges, spans: Ranges) -> Int[np.ndarray, "N S"]:
    """Returns how many characters each token shares with each span."""
    tokens, others = _ranges(offsets), _ranges(spans)
    start = np.maximum(tokens[:, None, 0], others[None, :, 0])
    end = np.minimum(tokens[:, None, 1], others[None, :, 1])
    return np.maximum(end - start, 0)


def alignment_weights(offsets: Ranges, others: Ranges) -> Float[np.ndarray, "N M"]:
    """Returns which share of each token's characters lies in each token of another tokenization.

    Rows sum to 1 where the other tokenization has no gap; a token without characters has a row
    of zeros.

    Reference: "Joint-GCG: Unified Gradient-Based Poisoning Attacks on Retrieval-Augmented
    Generation Systems", arXiv 2506.06151 (gradient tokenization alignment).
    """
    lengths = np.diff(_ranges(offsets), axis=1)
    return overlaps(offsets, others) / np.maximum(lengths, 1)


def span_weights(offsets: Ranges, spans: Ranges) -> Float[np.ndarray, " N"]:
    """Returns which share of each token's characters some span covers; 0 for an empty token.

    Spans may overlap: a character covered twice counts once.
    """
    covered, lengths = _covered(offsets, spans)
    return covered / np.maximum(lengths, 1)


def span_mask(offsets: Ranges, spans: Ranges, rule: Rule = "any") -> Bool[np.ndarray, " N"]:
    """Returns which tokens lie in the spans.

    A token without characters lies in none; an empty span holds no token.

    Args:
        offsets: character range of each token.
        spans: character ranges.
        rule: `any` shared character, a `majority` (more than half) of the token's characters, or
            the token `contained` whole. Tokens that begin with a space are contained in a span
            of words only once the space is taken off (`without_spaces`).

    Raises:
        ValueError: another rule; a range that ends before it starts.

    >>> span_mask([(0, 3), (3, 7), (7, 9)], [(4, 9)], "contained").tolist()
    [False, False, True]
    """
    return _satisfies(rule, *_covered(offsets, spans))


def span_ids(offsets: Ranges, spans: Ranges, rule: Rule = "any") -> Int[np.ndarray, " N"]:
    """Returns the index of the span that each token lies in, -1 for none.

    Among several spans the token belongs to the one it shares most characters with, the first
    of equals.

    Raises:
        ValueError: another rule; a range that ends before it starts.
    """
    if len(spans) == 0:
        return np.full(len(offsets), -1, np.int32)
    shared = overlaps(offsets, spans)
    best = shared.argmax(1)
    lengths = np.diff(_ranges(offsets), axis=1)[:, 0]
    inside = _satisfies(rule, shared.max(1), lengths)
    return np.where(inside, best, -1).astype(np.int32)


def span_ranges(offsets: Ranges, spans: Ranges, rule: Rule = "any") -> list[tuple[int, int] | None]:
    """Returns for each span the range [first, last + 1) of its tokens, None when it has none.

    None rather than an empty range at 0: an unmatched span must not put anything on a token.

    Raises:
        ValueError: another rule; a range that ends before it starts.
    """
    lengths = np.diff(_ranges(offsets), axis=1)
    inside = _satisfies(rule, overlaps(offsets, spans), lengths)
    found = [np.flatnonzero(column) for column in inside.T]
    return [(int(i[0]), int(i[-1]) + 1) if i.size else None for i in found]


def without_spaces(offsets: Ranges, text: str) -> list[tuple[int, int]]:
    """Returns the ranges without the white space at their ends; tokens of nothing else stay.

    >>> without_spaces([(0, 2), (2, 6), (6, 7)], "So what ")
    [(0, 2), (3, 6), (6, 7)]
    """
    trimmed = []
    for start, end in offsets:
        piece = text[start:end]
        kept = piece.strip()
        if kept:
            start += len(piece) - len(piece.lstrip())
            end = start + len(kept)
        trimmed.append((start, end))
    return trimmed


def _ranges(pairs: Ranges) -> Int[np.ndarray, "N 2"]:
    found = np.asarray(pairs, np.int64).reshape(-1, 2)
    wrong = np.flatnonzero((found[:, 1] < found[:, 0]) | (found[:, 0] < 0))
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(f"range {i} is {tuple(found[i].tolist())}: need 0 <= start <= end")
    return found


def _covered(offsets: Ranges, spans: Ranges) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many characters of each token some span covers, and the tokens' lengths."""
    tokens, others = _ranges(offsets), _ranges(spans)
    size = int(max(tokens.max(initial=0), others.max(initial=0))) + 1
    changes = np.zeros(size, np.int64)
    np.add.at(changes, others[:, 0], 1)
    np.add.at(changes, others[:, 1], -1)
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.cumsum(changes) > 0)])
    return before[tokens[:, 1]] - before[tokens[:, 0]], tokens[:, 1] - tokens[:, 0]


def _satisfies(rule: Rule, shared: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    if rule == "any":
        return shared > 0
    if rule == "majority":
        return 2 * shared > lengths
    if rule == "contained":
        return (shared == lengths) & (lengths > 0)
    raise ValueError(f"unknown rule {rule!r}.{nearest(rule, RULES)}")


def ids_from_ends(ends: Int[Array, "*B C"], length: int) -> Int[Array, "*B T"]:
    """Returns the chunk of each position, where chunk c ends before position `ends[c]`.

    Chunk c covers [ends[c - 1], ends[c]), the first one begins at 0; -1 behind the last.

    Args:
        ends: ascending; filled up with -1.
        length: number of positions.

    Reference: "Shape it Up! Restoring LLM Safety during Finetuning", arXiv 2505.17196.
    """
    slots = jnp.arange(length)
    valid = ends >= 0
    passed = (valid[..., None, :] & (slots[:, None] >= ends[..., None, :])).sum(-1)
    return jnp.where(passed < valid.sum(-1, keepdims=True), passed, -1).astype(jnp.int32)


def span_sizes(ids: Int[Array, "*B T"], num: int) -> Int[Array, "*B S"]:
    """Returns how many tokens each span has: what tells an empty span from one that pools to 0."""
    flat, rows = _flat(ids, num)
    return segment_counts(flat, rows * num).reshape(*ids.shape[:-1], num)


def span_pool(
    values: Float[Array, "..."],
    ids: Int[Array, "*B T"],
    num: int,
    how: Literal["mean", "sum", "max", "min", "first", "last"] = "mean",
    empty: float = 0.0,
) -> Float[Array, "..."]:
    """Returns one float32 value [*B, S, *F] per span, pooled over its tokens.

    Args:
        values: [*B, T, *F], of each token, with any number of feature axes behind.
        ids: the span of each token, -1 for none.
        num: number of spans.
        how: mean, sum, max, min, or the value of the first or last token.
        empty: what a span without tokens gets.

    Raises:
        ValueError: another pooling; ids that do not fit the values.
    """
    if how not in POOLINGS:
        raise ValueError(f"unknown pooling {how!r}.{nearest(how, POOLINGS)}")
    if values.shape[: ids.ndim] != ids.shape:
        raise ValueError(f"values {values.shape} must lead with the axes of ids {ids.shape}")
    flat, rows = _flat(ids, num)
    features = values.shape[ids.ndim :]
    if ids.size == 0:
        return jnp.full((*ids.shape[:-1], num, *features), empty, jnp.float32)
    tokens = values.astype(jnp.float32).reshape(-1, *features)
    spans = rows * num
    sizes = segment_counts(flat, spans).reshape(-1, *(1,) * len(features))
    if how in ("mean", "sum"):
        found = segment_sums(tokens, flat, spans)
        found = found / jnp.maximum(sizes, 1).astype(jnp.float32) if how == "mean" else found
    elif how in ("max", "min"):
        found = segment_extremes(tokens, flat, spans)[how == "max"]
    else:
        found = tokens[_end_tokens(flat, spans, how)]
    found = jnp.where(sizes > 0, found, empty)
    return found.reshape(*ids.shape[:-1], num, *features)


def spread(
    values: Float[Array, "*B S"], ids: Int[Array, "*B T"], outside: float = 0.0
) -> Float[Array, "*B T"]:
    """Returns to each token the value of its span; `outside` to tokens of none.

    Args:
        values: one a span.
        ids: the span of each token; any id outside [0, S) is none.
        outside: value of the tokens of no span.
    """
    if values.shape[-1] == 0:
        return jnp.full(ids.shape, outside, values.dtype)
    inside = (ids >= 0) & (ids < values.shape[-1])
    found = jnp.take_along_axis(values, jnp.where(inside, ids, 0), axis=-1)
    return jnp.where(inside, found, jnp.asarray(outside, values.dtype))


def index_in_span(ids: Int[Array, "*B T"], num: int) -> Int[Array, "*B T"]:
    """Returns how many tokens of its span stand before each token; -1 for tokens of none.

    Reference: "First Hallucination Tokens Are Different from Conditional Ones", arXiv
    2507.20836, whose k it is: 0 for a span's first token.
    """
    same = ids[..., None] == jnp.arange(num)
    before = jnp.cumsum(same.astype(jnp.int32), axis=-2) - 1
    return jnp.where(same, before, 0).sum(-1) - (~same.any(-1)).astype(jnp.int32)


def _flat(ids: Int[Array, "*B T"], num: int) -> tuple[Int[Array, " N"], int]:
    """Returns ids that are distinct between rows, flattened, and the number of rows."""
    rows = ids.reshape(math.prod(ids.shape[:-1]), ids.shape[-1])
    own = (rows >= 0) & (rows < num)
    shifted = rows.astype(jnp.int32) + num * jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(own, shifted, -1).reshape(-1), rows.shape[0]


def _end_tokens(ids: Int[Array, " N"], num: int, which: str) -> Int[Array, " S"]:
    """Returns the position of each span's first or last token; some position for empty spans."""
    ids = jnp.where(ids < 0, num, ids)
    slots = jnp.arange(ids.shape[0], dtype=jnp.int32)
    if which == "last":
        return jnp.zeros(num, jnp.int32).at[ids].max(slots, mode="drop")
    return jnp.full(num, ids.shape[0] - 1, jnp.int32).at[ids].min(slots, mode="drop")

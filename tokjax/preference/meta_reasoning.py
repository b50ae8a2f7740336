"""MR-ALIGN: segments of thinking weigh by how typical their transitions are of good or bad traces.

Each segment of a trace carries one or two of fifteen states of reasoning. Matrices of transitions
between them are estimated by EM for good, bad and all traces; a segment's tokens weigh the ratio of
its transition's probability in traces of its own kind to that in all. The loss is the objective
"kto" on weights from here (the paper sets good_weight=1.0, bad_weight=1.5):

    fit = fit_polarities(labels, good)
    segments = [thinking_segments(tokenizer, store.tokens(i)) for i in range(store.num_examples)]
    weights = meta_reasoning_weights(store, labels, segments, fit)
    write_token_weights("transitions.parquet", store, weights, method="mr_align")

Reference: "MR-ALIGN: Meta-Reasoning Informed Factuality Alignment for Large Reasoning Models"
(arXiv 2510.24794).
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from tokjax.data.offsets import offsets_from_bytes
from tokjax.data.tokenizers import Tokenizer
from tokjax.errors import ConfigError, DataError
from tokjax.preference.token_weights import AnswerStore, counted_targets
from tokjax.signals.spans import span_ids

STATES = (
    "framing",
    "backtracking",
    "self_verification",
    "evaluation",
    "decomposition",
    "chaining",
    "causal_reasoning",
    "retrieval",
    "analogy",
    "synthesis",
    "comparison",
    "categorization",
    "case_analysis",
    "explanation",
    "summarization",
)
START = 0  # the states are numbered from 1, and the stop state is behind the last

Labels = Collection[int]  # states of one segment; empty where none is known
Step = tuple[tuple[int, ...], tuple[int, ...]]


def state_numbers(names: Iterable[str]) -> frozenset[int]:
    """Returns the numbers of named states.

    Raises:
        DataError: there is no such state.

    >>> sorted(state_numbers(["backtracking", "framing"]))
    [1, 2]
    """
    numbers = {name: number for number, name in enumerate(STATES, 1)}
    names = list(names)
    for name in names:
        if name not in numbers:
            raise DataError(f"unknown state {name!r}: the states are {', '.join(STATES)}")
    return frozenset(numbers[name] for name in names)


def merged_labels(
    first: Mapping[str, float], second: Mapping[str, float], confident: float = 7.0
) -> frozenset[str] | None:
    """Returns the labels that two annotators make together, None where a third has to decide.

    Equal proposals are accepted. Where they overlap, the common label stays and the surest of the
    others fills up to two, if its confidence is above a bound.

    Args:
        first: the labels of one annotator (at most two), and how sure it is of each, 0 to 10.
        second: those of the other.
        confident: what the confidence of a label that only one proposes must be above.

    >>> sorted(merged_labels({"retrieval": 9, "chaining": 8}, {"retrieval": 6, "analogy": 7}) or ())
    ['chaining', 'retrieval']
    """
    both = set(first) & set(second)
    if not both:
        return None
    single = {k: v for k, v in {**first, **second}.items() if k not in both and v > confident}
    surest = sorted(single, key=lambda label: (-single[label], label))
    return frozenset([*both, *surest[: max(2 - len(both), 0)]])


@dataclass(frozen=True, eq=False)
class Fit:
    """Transitions between states, estimated by EM. K is their number with start and stop.

    Attributes:
        matrix: probability of each state (column) behind each (row).
        log_likelihood: of the steps before the first iteration, and behind each, in nats.
    """

    matrix: Float64[np.ndarray, "K K"]
    log_likelihood: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Polarities:
    """Transitions of good traces, of bad ones and of all."""

    good: Float64[np.ndarray, "K K"]
    bad: Float64[np.ndarray, "K K"]
    every: Float64[np.ndarray, "K K"]


def transition_likelihood(
    matrix: Float64[np.ndarray, "K K"], before: Labels, after: Labels
) -> float:
    """Returns the mean of the matrix over the pairs of states of two segments."""
    return float(matrix[np.ix_(sorted(set(before)), sorted(set(after)))].mean())


def fit_transitions(
    traces: Sequence[Sequence[Labels]],
    num_states: int = len(STATES),
    *,
    smoothing: float = 0.6,
    iterations: int = 5,
    tol: float = 1e-6,
) -> Fit:
    """Returns the transitions between the states of traces' segments, start and stop included.

    A segment without labels is passed over: the state before it is followed by that behind it. No
    edge enters the start, and the stop is not left.

    Args:
        traces: for each trace the states of its segments, 1 to `num_states`.
        num_states: of segments.
        smoothing: pseudo-count of every allowed edge.
        iterations: of EM, at most.
        tol: largest change of an entry after which EM has converged.

    Raises:
        ConfigError: an option is impossible.
        DataError: a state is not within 1 and `num_states`.
    """
    if num_states < 1 or iterations < 0:
        raise ConfigError(
            f"num_states={num_states} must be at least 1 and iterations={iterations} at least 0"
        )
    for name, value in (("smoothing", smoothing), ("tol", tol)):
        if not value >= 0:
            raise ConfigError(f"{name}={value} must not be negative")
    steps = Counter(s for n, trace in enumerate(traces) for s in _steps(trace, num_states, n))
    allowed = np.ones((num_states + 2, num_states + 2), bool)
    allowed[:, START] = allowed[-1] = False
    allowed[-1, -1] = True
    uniform = allowed / allowed.sum(1, keepdims=True)
    matrix, found = uniform, [_log_likelihood(uniform, steps)]
    for _ in range(iterations):
        counts = np.where(allowed, smoothing, 0.0)
        for (before, after), number in steps.items():
            edges = np.ix_(before, after)
            # Labels share a segment evenly, which cancels here.
            counts[edges] += number * matrix[edges] / matrix[edges].sum()
        total = counts.sum(1, keepdims=True)
        new = np.where(total > 0, counts / np.where(total > 0, total, 1.0), uniform)
        new[-1] = uniform[-1]
        change, matrix = np.abs(new - matrix).max(), new
        found.append(_log_likelihood(matrix, steps))
        if change <= tol:
            break
    return Fit(matrix, tuple(found))


def fit_polarities(
    traces: Sequence[Sequence[Labels]],
    good: Sequence[bool] | Bool[np.ndarray, "N"],
    num_states: int = len(STATES),
    *,
    smoothing: float = 0.6,
    iterations: int = 5,
    tol: float = 1e-6,
) -> Polarities:
    """Returns the transitions of good traces, of bad ones and of all; see `fit_transitions`.

    Raises:
        ConfigError: an option is impossible.
        DataError: a state is out of range, or there is not one rating for each trace.
    """
    if len(traces) != len(good):
        raise DataError(f"{len(good)} ratings for {len(traces)} traces")
    parts = (
        [t for t, g in zip(traces, good, strict=True) if g],
        [t for t, g in zip(traces, good, strict=True) if not g],
        traces,
    )
    settings = {"smoothing": smoothing, "iterations": iterations, "tol": tol}
    return Polarities(*(fit_transitions(part, num_states, **settings).matrix for part in parts))  # type: ignore[arg-type]


def segment_weights(
    labels: Sequence[Labels],
    own: Float64[np.ndarray, "K K"],
    every: Float64[np.ndarray, "K K"],
    clip: float = math.e,
) -> Float64[np.ndarray, "S"]:
    """Returns the weight of each segment of a trace, within 1 / clip and clip.

    A segment without labels weighs 1, and the state before it is carried on (a recommendation of
    tokjax, as is 1 for a transition that both matrices exclude).

    Args:
        labels: states of each segment.
        own: transitions of traces of the same kind, good or bad.
        every: transitions of all traces.
        clip: largest weight, at least 1.

    Raises:
        ConfigError: clip is below 1.
        DataError: a state is out of range.
    """
    if not clip >= 1:
        raise ConfigError(f"clip={clip} must be at least 1")
    weights, before = np.ones(len(labels)), (START,)
    for s, found in enumerate(labels):
        if not len(found):
            continue
        after = _states(found, len(every) - 2, f"segment {s}")
        ours = transition_likelihood(own, before, after)
        theirs = transition_likelihood(every, before, after)
        if theirs > 0:
            weights[s] = np.clip(ours / theirs, 1 / clip, clip)
        elif ours > 0:
            weights[s] = clip
        before = after
    return weights


def thinking_segments(
    tokenizer: Tokenizer,
    ids: Sequence[int] | Int32[np.ndarray, "n"],
    tags: tuple[str, str] = ("<think>", "</think>"),
) -> Int32[np.ndarray, "n"]:
    """Returns the number of the segment of thinking that each token lies in, -1 for none.

    The thinking lies between the last opening tag and the closing one, and blank lines divide it;
    they end the segment before them. A tag belongs to what it precedes: the opening one to the
    first segment, the closing one to the answer, which is no segment. Thinking that is not closed
    goes on to the end.

    Args:
        tokenizer: of the ids.
        ids: of one sequence.
        tags: what opens and what closes the thinking.
    """
    ids = [int(token) for token in ids]
    # Special tokens have no bytes of their own, but tags may be special tokens.
    pieces = [
        tokenizer.token_bytes(token) or tokenizer.token_text(token).encode("utf-8", "replace")
        for token in ids
    ]
    data = b"".join(pieces)
    text = data.decode("utf-8", "replace")
    if text.encode() != data:  # broken off inside a character: places are counted in bytes
        text = data.decode("latin-1")
        pieces = [piece.decode("latin-1").encode() for piece in pieces]
        tags = tuple(tag.encode().decode("latin-1") for tag in tags)  # type: ignore[assignment]
    return span_ids(offsets_from_bytes(text, pieces), _thinking_ranges(text, tags))


def meta_reasoning_weights(
    store: AnswerStore,
    labels: Sequence[Sequence[Labels]],
    segments: Sequence[Int32[np.ndarray, "n"]],
    fit: Polarities,
    *,
    clip: float = math.e,
) -> list[Float32[np.ndarray, "n"]]:
    """Returns what multiplies the data's weights: those of segments at their tokens, 1 at others.

    Prompts get 0. Whether a trace is good is told by the sign of the data's weights.

    Args:
        store: rated traces.
        labels: of each example, the states of its segments.
        segments: of each example, the number of each token's segment, -1 for none (the answer).
        fit: transitions.
        clip: largest weight, and one over the smallest.

    Raises:
        ConfigError: clip is below 1.
        DataError: labels, segments and the store do not fit, or its examples are pairs.
    """
    if store.has_pairs:
        raise DataError("traces are rated one by one, but this store holds pairs: kind 'rated'")
    if not store.num_examples == len(labels) == len(segments):
        raise DataError(
            f"labels of {len(labels)} and segments of {len(segments)} examples for a store of "
            f"{store.num_examples}"
        )
    weights = []
    for i, (states, own) in enumerate(zip(labels, segments, strict=True)):
        name, ids = store.example_name(i), np.asarray(own)
        if ids.shape != (int(store.lengths[i]),):
            raise DataError(f"{name} has {store.lengths[i]} tokens, not the {ids.size} of segments")
        if ids.max(initial=-1) + 1 != len(states):
            raise DataError(
                f"{name} has {ids.max(initial=-1) + 1} segments and {len(states)} sets of labels"
            )
        good = np.sign(store.weights(i)).sum() > 0
        found = segment_weights(states, fit.good if good else fit.bad, fit.every, clip)
        spread = np.where(ids >= 0, np.append(found, 1.0)[ids], 1.0)
        weights.append(np.where(counted_targets(store, i), spread, 0).astype(np.float32))
    return weights


def _thinking_ranges(text: str, tags: tuple[str, str]) -> list[tuple[int, int]]:
    """Returns the character ranges of the segments of thinking, without gaps."""
    start = text.rfind(tags[0])
    if start < 0:
        return []
    close = text.find(tags[1], start)
    stop = len(text) if close < 0 else close
    inner = start + len(tags[0])
    blank = re.compile(r"\n[^\S\n]*\n\s*")
    ends = [match.end() for match in blank.finditer(text, inner, stop)]
    ranges, begin = [], start
    for end in [*ends, stop]:
        # Blank lines behind the opening tag divide nothing.
        if text[max(begin, inner) : end].strip():
            ranges.append((begin, end))
            begin = end
    return ranges


def _steps(trace: Sequence[Labels], num_states: int, number: int) -> Iterable[Step]:
    """Yields the transitions of a trace, from the start to the stop."""
    before = (START,)
    for s, labels in enumerate(trace):
        if len(labels):
            after = _states(labels, num_states, f"trace {number}, segment {s}")
            yield before, after
            before = after
    if before != (START,):
        yield before, (num_states + 1,)


def _states(labels: Labels, num_states: int, place: str) -> tuple[int, ...]:
    found = tuple(sorted({int(label) for label in labels}))
    if found[0] < 1 or found[-1] > num_states:
        raise DataError(f"{place}: states {list(found)} must lie within 1 and {num_states}")
    return found


def _log_likelihood(matrix: Float64[np.ndarray, "K K"], steps: Mapping[Step, int]) -> float:
    return sum(n * math.log(transition_likelihood(matrix, *step)) for step, n in steps.items())

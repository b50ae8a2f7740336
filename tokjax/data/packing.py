"""Packing: which pieces of which examples fill which rows.

An example of n stored tokens has n - 1 (input, target) pairs. A piece [a, b) of it covers the
inputs s[a:b] and the targets s[a+1:b+1], so cutting an example never loses a target. A plan
follows from the lengths alone; `plan_cache` keeps it beside the store.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int, Shaped

from tokjax.errors import ConfigError, DataError, nearest

MODES = ("best_fit", "concat", "none")
LONG_EXAMPLES = ("split", "error")


class Lengths(Protocol):
    """What packing needs to know of a token store."""

    @property
    def lengths(self) -> Shaped[np.ndarray, "N"]:
        """Stored tokens of each example."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of the contents."""
        ...

    def example_name(self, i: int) -> str:
        """A name for people."""
        ...


@dataclass(frozen=True)
class PackingConfig:
    """How examples become rows.

    Attributes:
        row_len: tokens of a row.
        align: pieces start at multiples of this many tokens; divides row_len.
        mode: 'best_fit' fills rows with whole examples as tightly as it can; 'concat' streams the
            examples in stored order and cuts them at row ends; 'none' gives each piece its own row.
        long_examples: what happens to an example with more than row_len pairs: 'split' cuts it
            into pieces of row_len, 'error' refuses it.
    """

    row_len: int
    align: int = 1
    mode: str = "best_fit"
    long_examples: str = "split"

    def __post_init__(self):
        if self.row_len < 1 or self.align < 1 or self.row_len % self.align:
            raise ConfigError(
                f"packing: rows of {self.row_len} tokens cannot hold pieces aligned to "
                f"{self.align}; both are at least 1 and the second divides the first"
            )
        if self.mode not in MODES:
            raise ConfigError(f"packing: unknown mode {self.mode!r}.{nearest(self.mode, MODES)}")
        if self.long_examples not in LONG_EXAMPLES:
            raise ConfigError(
                f"packing: unknown long_examples {self.long_examples!r}."
                f"{nearest(self.long_examples, LONG_EXAMPLES)}"
            )


@dataclass(frozen=True)
class PackingStats:
    """Facts about a plan, for the run's banner.

    Attributes:
        rows: rows of one epoch.
        pieces: pieces in them.
        examples: examples with at least one pair.
        short_examples: examples of fewer than two tokens, which have nothing to predict.
        cuts: places where an example was cut in two (every target is kept).
        tokens: targets of one epoch.
        max_segments: most pieces in one row.
        waste: fraction of the rows' places that is filling.
    """

    rows: int
    pieces: int
    examples: int
    short_examples: int
    cuts: int
    tokens: int
    max_segments: int
    waste: float


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Rows as lists of pieces, in compressed-row form; row r owns pieces row_offsets[r:r+2].

    Attributes:
        config: the options it was made with.
        stats: facts about it.
        row_offsets: first piece of each row, and the number of pieces at the end.
        example: example of each piece.
        start: first input token of each piece within its example.
        stop: one past its last input token.
        offset: where the piece begins within its row.
        short_examples: the examples that are in no row, having fewer than two tokens.
    """

    config: PackingConfig
    stats: PackingStats
    row_offsets: Int[np.ndarray, "R1"]
    example: Int[np.ndarray, "P"]
    start: Int[np.ndarray, "P"]
    stop: Int[np.ndarray, "P"]
    offset: Int[np.ndarray, "P"]
    short_examples: Int[np.ndarray, "E"]

    def pieces(self, row: int, window: slice | None = None) -> list[tuple[int, int, int, int]]:
        """Returns the (example, start, stop, offset) of a row's pieces, in their order.

        Args:
            row: row of the plan.
            window: a range of the row's places; pieces are cut to it, and offsets count from its
                beginning.
        """
        span = slice(int(self.row_offsets[row]), int(self.row_offsets[row + 1]))
        columns = (self.example[span], self.start[span], self.stop[span], self.offset[span])
        pieces = list(zip(*(c.tolist() for c in columns), strict=True))
        if window is None:
            return pieces
        cut = []
        for example, start, stop, offset in pieces:
            first = max(offset, window.start)
            last = min(offset + stop - start, window.stop)
            if first < last:
                begin = start + first - offset
                cut.append((example, begin, begin + last - first, first - window.start))
        return cut

    def window_facts(self, length: int) -> tuple[int, int]:
        """Returns what cutting every row into windows of `length` places does.

        Returns:
            The most pieces in one window, and the number of further cuts.
        """
        windows = self.config.row_len // length
        most, cuts, chunk = 0, 0, 1 << 20
        for first in range(0, self.stats.rows, chunk):
            last = min(first + chunk, self.stats.rows)
            bounds = np.asarray(self.row_offsets[first : last + 1], np.int64)
            span = slice(int(bounds[0]), int(bounds[-1]))
            row = np.repeat(np.arange(last - first), np.diff(bounds)) * windows
            offset = np.asarray(self.offset[span], np.int64)
            size = np.asarray(self.stop[span], np.int64) - self.start[span]
            low, high = row + offset // length, row + (offset + size - 1) // length
            cells = (last - first) * windows + 1
            change = np.bincount(low, minlength=cells) - np.bincount(high + 1, minlength=cells)
            most = max(most, int(np.cumsum(change).max()))
            cuts += int((high - low).sum())
        return most, cuts


def compute_plan(store: Lengths, config: PackingConfig) -> PackingPlan:
    """Returns the plan for a store.

    Raises:
        DataError: no example has two tokens, or one is too long under long_examples='error'.
    """
    lengths = np.asarray(store.lengths, np.int64)
    pairs = np.maximum(lengths - 1, 0)
    examples = np.flatnonzero(pairs)
    short = np.flatnonzero(pairs == 0)
    if not examples.size:
        raise DataError(
            f"none of the {len(lengths)} examples has two tokens: there is nothing to predict"
        )
    if config.long_examples == "error":
        _refuse_long(store, lengths, config)
    pieces = _PACKERS[config.mode](pairs[examples], config)
    pieces = dataclasses.replace(pieces, example=examples[pieces.example])
    order = np.lexsort((pieces.offset, pieces.row))
    pieces = _Pieces(*(getattr(pieces, f.name)[order] for f in dataclasses.fields(_Pieces)))
    rows = int(pieces.row[-1]) + 1
    per_row = np.bincount(pieces.row, minlength=rows)
    tokens = int(pairs.sum())
    stats = PackingStats(
        rows=rows,
        pieces=len(pieces.row),
        examples=len(examples),
        short_examples=len(short),
        cuts=len(pieces.row) - len(examples),
        tokens=tokens,
        max_segments=int(per_row.max()),
        waste=1.0 - tokens / (rows * config.row_len),
    )
    return PackingPlan(
        config=config,
        stats=stats,
        row_offsets=np.concatenate([[0], np.cumsum(per_row)]).astype(np.int64),
        example=_narrow(pieces.example),
        start=_narrow(pieces.start),
        stop=_narrow(pieces.stop),
        offset=_narrow(pieces.offset),
        short_examples=_narrow(short),
    )


def total_stats(plans: Sequence[PackingPlan]) -> PackingStats:
    """Returns the facts of several plans of one row length taken together."""
    total = {
        name: sum(getattr(plan.stats, name) for plan in plans)
        for name in ("rows", "pieces", "examples", "short_examples", "cuts", "tokens")
    }
    places = total["rows"] * plans[0].config.row_len
    most = max(plan.stats.max_segments for plan in plans)
    return PackingStats(**total, max_segments=most, waste=1.0 - total["tokens"] / places)


@dataclass(frozen=True)
class _Pieces:
    """Pieces in any order, one element each; `example` indexes the packed examples."""

    row: Int[np.ndarray, "P"]
    example: Int[np.ndarray, "P"]
    start: Int[np.ndarray, "P"]
    stop: Int[np.ndarray, "P"]
    offset: Int[np.ndarray, "P"]


def _concat(pairs: Int[np.ndarray, "E"], config: PackingConfig) -> _Pieces:
    """Returns the stream of examples cut at the row ends."""
    room = -(-pairs // config.align) * config.align
    begin = np.cumsum(room) - room
    first_row = begin // config.row_len
    count = (begin + pairs - 1) // config.row_len - first_row + 1
    example, number = _expand(count)
    row = first_row[example] + number
    low = np.maximum(begin[example], row * config.row_len)
    high = np.minimum(begin[example] + pairs[example], (row + 1) * config.row_len)
    return _Pieces(
        row, example, low - begin[example], high - begin[example], low - row * config.row_len
    )


def _one_each(pairs: Int[np.ndarray, "E"], config: PackingConfig) -> _Pieces:
    """Returns one piece a row, in stored order."""
    example, start, stop = _split(pairs, config.row_len)
    return _Pieces(np.arange(len(example)), example, start, stop, np.zeros_like(start))


def _best_fit(pairs: Int[np.ndarray, "E"], config: PackingConfig) -> _Pieces:
    """Returns best-fit-decreasing packing: largest first, each into the fullest row it fits.

    Rows are handled in groups of equal free room and pieces in groups of equal size, so the work
    grows with the number of distinct sizes and not with the number of pieces. Putting a piece of
    size u into the fullest row that takes it leaves that row, if it can take another, the fullest
    one again; so a row with room c takes c // u pieces of that size in one go.
    """
    example, start, stop = _split(pairs, config.row_len)
    units = -(-(stop - start) // config.align)
    capacity = config.row_len // config.align
    order = np.argsort(-units, kind="stable")
    sizes, counts = np.unique(units, return_counts=True)
    row = np.empty(len(units), np.int64)
    offset = np.empty(len(units), np.int64)
    groups: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # rows by free room
    occupied = np.zeros(capacity + 1, bool)
    opened, done = 0, 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            room = size + int(np.argmax(occupied[size:]))
            if not occupied[room]:
                fresh = -(-count // (capacity // size))
                groups[capacity].append(np.arange(opened, opened + fresh))
                occupied[capacity] = True
                opened += fresh
                room = capacity
            rows, each = groups[room].pop(), room // size
            taken = min(len(rows) * each, count)
            full, rest = divmod(taken, each)
            used = full + (rest > 0)
            slots = order[done : done + taken]
            row[slots] = np.repeat(rows[:used], each)[:taken]
            offset[slots] = capacity - room + size * (np.arange(taken) % each)
            for part, left in (
                (rows[:full], room - each * size),
                (rows[full:used], room - rest * size),
                (rows[used:], room),
            ):
                if len(part):
                    groups[left].append(part)
                    occupied[left] = True
            occupied[room] = bool(groups[room])
            done, count = done + taken, count - taken
    return _Pieces(row, example, start, stop, offset * config.align)


_PACKERS: dict[str, Callable[[np.ndarray, PackingConfig], _Pieces]] = {
    "best_fit": _best_fit,
    "concat": _concat,
    "none": _one_each,
}


def _expand(count: Int[np.ndarray, "E"]) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """Returns the owner and the number within its owner of each of count[0] + count[1] + ..."""
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) - (np.cumsum(count) - count)[owner]


def _split(
    pairs: Int[np.ndarray, "E"], row_len: int
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """Returns example, start and stop of pieces of at most row_len pairs."""
    example, number = _expand(-(-pairs // row_len))
    start = number * row_len
    return example, start, np.minimum(start + row_len, pairs[example])


def _refuse_long(store: Lengths, lengths: Int[np.ndarray, "N"], config: PackingConfig) -> None:
    long = np.flatnonzero(lengths - 1 > config.row_len)
    if not long.size:
        return
    shown = ", ".join(f"{store.example_name(int(i))} ({lengths[i]} tokens)" for i in long[:3])
    raise DataError(
        f"{len(long)} of {len(lengths)} examples are longer than a row, which holds "
        f"{config.row_len + 1} tokens of one example: {shown}"
        f"{', ...' if len(long) > 3 else ''}. Set long_examples='split' to cut them without "
        "losing a target, or a longer seq_len."
    )


def _narrow(values: np.ndarray) -> np.ndarray:
    """Returns int32 where the values fit: plans of many millions of pieces are kept mapped."""
    fits = not values.size or int(values.max()) <= np.iinfo(np.int32).max
    return values.astype(np.int32 if fits else np.int64)

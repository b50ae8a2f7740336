"""Batches by computed index: the batch of step n is a function of (configuration, seed, n) alone.

Nothing is read ahead of its turn and nothing is replayed: to resume at step n, ask for step n. Any
host can build any rows of any batch, so the data do not depend on how many hosts there are.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int32, Shaped

from tokjax.data.batch import Batch
from tokjax.data.mixing import Mixture
from tokjax.data.packing import PackingConfig, total_stats
from tokjax.data.plan_cache import plan_packing
from tokjax.data.shuffle import derive_seed, permute
from tokjax.errors import ConfigError, DataError


class Store(Protocol):
    """What the loaders read of a `tokjax.data.store.TokenStore`.

    A store that also has a `directory` keeps its packing plans in `directory / "packing"`.
    """

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        ...

    @property
    def lengths(self) -> Shaped[np.ndarray, "N"]:
        """Stored tokens of each example."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of the contents."""
        ...

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, "n"]:
        """Tokens [start, stop) of example i."""
        ...

    def weights(self, i: int, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "n"]:
        """Weights, as targets, of tokens [start, stop) of example i."""
        ...

    @property
    def sequences(self) -> int:
        """Sequences of each example, which stay in one row."""
        ...

    def cuts(self, i: int) -> tuple[int, ...]:
        """Where the second and further sequences of example i begin."""
        ...

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of what is known of each sequence."""
        ...

    def values(self, name: str, i: int) -> Float32[np.ndarray, "G"]:
        """A value of each sequence of example i."""
        ...

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of what is known of each token besides its weight."""
        ...

    def channel(
        self, name: str, i: int, start: int = 0, stop: int | None = None
    ) -> Float32[np.ndarray, "n"]:
        """Values of a channel, as targets, at tokens [start, stop) of example i."""
        ...

    def example_key(self, i: int) -> str:
        """A stable key."""
        ...

    def example_name(self, i: int) -> str:
        """A name for people."""
        ...


@dataclass(frozen=True)
class StageSlice:
    """A stretch of training with one shape of batch.

    Attributes:
        steps: number of steps, at least 1.
        tokens_per_position: tokens that the model takes as one position, at least 1; rows of the
            batch have seq_len * tokens_per_position tokens.
    """

    steps: int
    tokens_per_position: int = 1

    def __post_init__(self):
        if self.steps < 1 or self.tokens_per_position < 1:
            raise ConfigError(
                f"a stage needs at least 1 step and 1 token per position, got {self.steps} and "
                f"{self.tokens_per_position}"
            )


@dataclass(frozen=True)
class _Stage:
    """A stage with its place in the stream of plan rows."""

    first_step: int
    steps: int
    first_row: int  # place of its first plan row in the mixture
    windows: int  # batch rows cut from one plan row
    row_tokens: int  # tokens of a batch row
    segments: int  # most pieces in a batch row
    border_cuts: int  # cuts at window borders, in one epoch of every source


class _Rows:
    """The examples of several stores, packed, and rows of them turned into arrays."""

    def __init__(self, stores: Sequence[Store], config: PackingConfig):
        if not stores:
            raise ConfigError("a loader needs at least one token store")
        _check_tokenizers(stores)
        _check_groups(stores, config)
        self.stores = list(stores)
        self.channels = tuple(sorted({name for store in stores for name in store.channels}))
        self.sequences = stores[0].sequences  # of an example
        self.value_names = stores[0].value_names
        self.plans = [plan_packing(store, config, _plan_cache(store)) for store in stores]
        self.first_example = np.cumsum([0, *(store.num_examples for store in stores)])
        if self.first_example[-1] > np.iinfo(np.int32).max:
            raise DataError(
                f"{self.first_example[-1]} examples in all stores: example numbers are 32-bit, "
                "so at most 2147483647 can be read in one run"
            )

    def window_facts(self, length: int) -> tuple[int, int]:
        facts = [plan.window_facts(length) for plan in self.plans]
        most = self.sequences * max(most for most, _ in facts)
        return most, sum(cuts for _, cuts in facts)

    def build(
        self, rows: Sequence[tuple[int, int, slice] | None], segments: int, length: int
    ) -> Batch:
        """Returns the Batch of the given (source, plan row, window) rows; None is an empty row."""
        shape = (len(rows), length)
        # Any, because Batch is annotated with the device arrays that these become.
        make: Any = Batch
        batch = make(
            tokens=np.zeros(shape, np.int32),
            targets=np.zeros(shape, np.int32),
            positions=np.zeros(shape, np.int32),
            segment_ids=np.zeros(shape, np.int32),
            weights=np.zeros(shape, np.float32),
            example_id=np.full((len(rows), segments), -1, np.int32),
            channels={name: np.zeros(shape, np.float32) for name in self.channels},
            values={n: np.zeros((len(rows), segments), np.float32) for n in self.value_names},
            group=self.sequences,
        )
        for r, place in enumerate(rows):
            if place is None:
                continue
            source, row, window = place
            store = self.stores[source]
            used = 0
            for example, start, stop, offset in self.plans[source].pieces(row, window):
                span = slice(offset, offset + stop - start)
                sequence = store.tokens(example, start, stop + 1)
                batch.tokens[r, span] = sequence[:-1]
                batch.targets[r, span] = sequence[1:]
                batch.weights[r, span] = store.weights(example, start + 1, stop + 1)
                for name in store.channels:
                    values = store.channel(name, example, start + 1, stop + 1)
                    batch.channels[name][r, span] = values
                cuts = store.cuts(example)
                for name in self.value_names:
                    batch.values[name][r, used : used + len(cuts) + 1] = store.values(name, example)
                for first, last in _sequences(cuts, offset, start, stop):
                    batch.positions[r, first:last] = np.arange(last - first)
                    batch.segment_ids[r, first:last] = used + 1
                    batch.example_id[r, used] = self.first_example[source] + example
                    used += 1
                for cut in cuts:
                    # The end of one sequence does not predict the beginning of the next.
                    batch.weights[r, offset + cut - 1] = 0.0
        return batch

    def find(self, example_id: int) -> tuple[Store, int]:
        """Returns the store and the number within it of an example of a batch."""
        if not 0 <= example_id < self.first_example[-1]:
            raise IndexError(f"example {example_id} of {self.first_example[-1]}")
        source = int(np.searchsorted(self.first_example, example_id, side="right")) - 1
        return self.stores[source], int(example_id - self.first_example[source])


class Loader:
    """Training batches, each computed from its step.

    The examples of every store are packed into plan rows long enough for the coarsest stage; a
    stage with smaller rows cuts each plan row into windows and visits them in shuffled order. A
    piece that a window border cuts goes on as a segment of its own with positions from 0, and no
    target is lost. Each stage begins at the plan row after those of the stage before, so stages
    share no data until a source starts again.

    The order within a stage depends on nothing but the seed, except that a stage whose plan rows
    hold several windows is shuffled over its whole length: changing its `steps` reorders it.

    Args:
        stores: what to read, one or more.
        rates: share of rows of each store (see `Mixture`); None: all stores together, every row
            once per epoch.
        seq_len: positions of a batch row.
        batch_size: rows of a batch, over all hosts.
        seed: any integer.
        packing: 'best_fit', 'concat' or 'none'; see `PackingConfig`.
        long_examples: 'split' or 'error'; see `PackingConfig`.
        shuffle: False reads rows in plan order.
        stages: the stages in order, at least one.

    Raises:
        ConfigError: values that cannot be meant.
        DataError: a store without a single target, or too long an example under 'error'.
        StorageError: no room to keep a packing plan beside its store.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        rates: Sequence[float] | None,
        seq_len: int,
        batch_size: int,
        seed: int,
        packing: str = "best_fit",
        long_examples: str = "split",
        shuffle: bool = True,
        stages: Sequence[StageSlice],
    ):
        _check_sizes(seq_len, batch_size)
        if not stages:
            raise ConfigError("a loader needs at least one stage")
        factor = math.lcm(*(stage.tokens_per_position for stage in stages))
        config = _packing(stores, seq_len * factor, factor, packing, long_examples)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._rows = _Rows(stores, config)
        self._config = config
        counts = [plan.stats.rows for plan in self._rows.plans]
        self._mixture = Mixture(counts, rates, derive_seed(seed, "mixture"), shuffle)
        self._stages = self._lay_out(stages, seq_len)
        self.total_steps = sum(stage.steps for stage in stages)

    def _lay_out(self, stages: Sequence[StageSlice], seq_len: int) -> list[_Stage]:
        laid, step, row = [], 0, 0
        facts = {}
        for stage in stages:
            length = seq_len * stage.tokens_per_position
            if length not in facts:
                facts[length] = self._rows.window_facts(length)
            windows = self._config.row_len // length
            laid.append(_Stage(step, stage.steps, row, windows, length, *facts[length]))
            step += stage.steps
            row += -(-stage.steps * self.batch_size // windows)
        self._plan_rows = row
        return laid

    def _stage(self, step: int) -> _Stage:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is outside the run's {self.total_steps} steps")
        return next(s for s in reversed(self._stages) if s.first_step <= step)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the batches' channels."""
        return self._rows.channels

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of the batches' values of segments."""
        return self._rows.value_names

    @property
    def group(self) -> int:
        """Segments of an example."""
        return self._rows.sequences

    def shape(self, step: int) -> tuple[int, int, int]:
        """Returns (B, T, S) of the global batch of a step: the same throughout a stage."""
        stage = self._stage(step)
        return self.batch_size, stage.row_tokens, stage.segments

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Returns the batch of a step as NumPy arrays.

        Args:
            step: from 0 to total_steps - 1.
            rows: which rows of the global batch to build; None builds all.

        Raises:
            IndexError: a step or row outside the run.
        """
        stage = self._stage(step)
        wanted = _row_numbers(rows, self.batch_size)
        index = (step - stage.first_step) * self.batch_size + wanted
        if stage.windows > 1 and self.shuffle:
            # The windows of one plan row would be neighbours in the batch; they share documents.
            stream = derive_seed(self.seed, "windows", stage.first_row)
            index = permute(index, stage.steps * self.batch_size, stream)
        row, window = np.divmod(index, stage.windows)
        located = self._mixture.locate(stage.first_row + row)
        length = stage.row_tokens
        places = [
            (source, plan_row, slice(w * length, (w + 1) * length))
            for source, plan_row, w in zip(
                located.source.tolist(), located.row.tolist(), window.tolist(), strict=True
            )
        ]
        return self._rows.build(places, stage.segments, length)

    def example_key(self, example_id: int) -> str:
        """Returns the stable key of an example of a batch."""
        store, example = self._rows.find(example_id)
        return store.example_key(example)

    def example_name(self, example_id: int) -> str:
        """Returns the name, for people, of an example of a batch."""
        store, example = self._rows.find(example_id)
        return store.example_name(example)

    def describe(self) -> dict[str, Any]:
        """Returns the facts of the run's data.

        Returns:
            examples, short_examples (fewer than two tokens: in no row), tokens (targets), rows,
            pieces, cuts, max_segments and waste (see `PackingStats`) of one pass over all
            sources; row_tokens of a plan row; steps, rows_used (plan rows) and places_used (token
            places, filling included) of the run; epochs, the passes over the source most used;
            `sources`, a list of the same facts by source with its rate (None without rates) and
            epochs; and `stages`, a list of first_step, steps, row_tokens, max_segments,
            border_cuts (further cuts in one pass, because rows are shorter than plan rows) and
            unused_windows (windows of its last plan row that no batch takes).
        """
        plans, mixture = self._rows.plans, self._mixture
        epochs = mixture.epochs_before(self._plan_rows)
        weights = mixture.weights
        sources = [
            {
                **asdict(plan.stats),
                "rate": None if weights is None else weights[k] / sum(weights),
                "epochs": epochs[k],
            }
            for k, plan in enumerate(plans)
        ]
        stages = [
            {
                "first_step": s.first_step,
                "steps": s.steps,
                "row_tokens": s.row_tokens,
                "max_segments": s.segments,
                "border_cuts": s.border_cuts,
                "unused_windows": -s.steps * self.batch_size % s.windows,
            }
            for s in self._stages
        ]
        return {
            **asdict(total_stats(plans)),
            "row_tokens": self._config.row_len,
            "steps": self.total_steps,
            "rows_used": self._plan_rows,
            "places_used": sum(s.steps * self.batch_size * s.row_tokens for s in self._stages),
            "epochs": max(epochs),
            "sources": sources,
            "stages": stages,
        }


class EvalLoader:
    """Evaluation batches in plan order: every row exactly once.

    The last batch is filled up with empty rows: weight 0, segment 0, example_id -1.

    Args:
        stores: what to read, one or more, one after the other.
        seq_len: positions of a row.
        batch_size: rows of a batch, over all hosts.
        tokens_per_position: tokens the model takes as one position.
        packing: as for `Loader`; 'none' gives every example a row of its own.
        long_examples: as for `Loader`.

    Raises:
        ConfigError, DataError, StorageError: as for `Loader`.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        seq_len: int,
        batch_size: int,
        tokens_per_position: int = 1,
        packing: str = "best_fit",
        long_examples: str = "split",
    ):
        _check_sizes(seq_len, batch_size)
        length = seq_len * tokens_per_position
        config = _packing(stores, length, tokens_per_position, packing, long_examples)
        self.batch_size = batch_size
        self._rows = _Rows(stores, config)
        self._segments, _ = self._rows.window_facts(length)
        self._length = length
        self._first_row = np.cumsum([0, *(plan.stats.rows for plan in self._rows.plans)])

    def __len__(self) -> int:
        return -(-int(self._first_row[-1]) // self.batch_size)

    def shape(self, index: int) -> tuple[int, int, int]:
        """Returns (B, T, S) of the global batches, the same for every index."""
        del index
        return self.batch_size, self._length, self._segments

    def batch(self, index: int, rows: slice | None = None) -> Batch:
        """Returns batch `index`, or the given rows of it, as NumPy arrays.

        Raises:
            IndexError: a batch or row outside the data.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"evaluation batch {index} of {len(self)}")
        places: list[tuple[int, int, slice] | None] = []
        for row in (index * self.batch_size + _row_numbers(rows, self.batch_size)).tolist():
            source = int(np.searchsorted(self._first_row, row, side="right")) - 1
            if source == len(self._rows.stores):
                places.append(None)
            else:
                plan_row = row - int(self._first_row[source])
                places.append((source, plan_row, slice(0, self._length)))
        return self._rows.build(places, self._segments, self._length)

    def example_key(self, example_id: int) -> str:
        """Returns the stable key of an example of a batch."""
        store, example = self._rows.find(example_id)
        return store.example_key(example)

    def example_name(self, example_id: int) -> str:
        """Returns the name, for people, of an example of a batch."""
        store, example = self._rows.find(example_id)
        return store.example_name(example)

    def describe(self) -> dict[str, Any]:
        """Returns the facts of one pass: see `PackingStats`, and `batches`."""
        return {**asdict(total_stats(self._rows.plans)), "batches": len(self)}


def _packing(
    stores: Sequence[Store], row_len: int, align: int, mode: str, long_examples: str
) -> PackingConfig:
    """Returns how to pack; a group longer than a row is refused, for half of it says nothing."""
    groups = any(store.sequences > 1 for store in stores)
    return PackingConfig(row_len, align, mode, "error" if groups else long_examples)


def _sequences(cuts: tuple[int, ...], offset: int, start: int, stop: int) -> list[tuple[int, int]]:
    """Returns the places of a row that each sequence of a piece takes."""
    ends = [start, *cuts, stop]
    return [(offset + a - start, offset + b - start) for a, b in itertools.pairwise(ends)]


def _check_groups(stores: Sequence[Store], config: PackingConfig) -> None:
    """Refuses what would tear groups of sequences apart, and groups of several kinds."""
    kinds = {(store.sequences, store.value_names) for store in stores}
    if kinds == {(1, ())}:
        return
    if len(kinds) > 1:
        found = " and ".join(_described(*kind) for kind in sorted(kinds))
        raise ConfigError(f"data.train mixes {found}: train on examples of one kind")
    if config.align > 1:
        raise ConfigError("an objective that shortens sequences cannot read pairs or groups")
    if config.mode == "concat":
        raise ConfigError("data.packing='concat' cuts pairs and groups: take 'best_fit' or 'none'")


def _described(sequences: int, values: tuple[str, ...]) -> str:
    if "side" in values:
        return "translations"
    if values:
        return f"rankings of {sequences} passages with {' and '.join(values)}"
    return {1: "single examples", 2: "pairs of answers"}.get(
        sequences, f"groups of {sequences} sequences"
    )


def _check_sizes(seq_len: int, batch_size: int) -> None:
    if seq_len < 1 or batch_size < 1:
        raise ConfigError(
            f"seq_len and batch_size must be at least 1, got {seq_len} and {batch_size}"
        )


def _check_tokenizers(stores: Sequence[Store]) -> None:
    """Refuses stores whose ids mean different texts: nothing later would notice."""
    first = None
    for store in stores:
        manifest = getattr(store, "manifest", None)
        fingerprint = manifest["tokenizer"].get("fingerprint") if manifest else None
        if fingerprint is None:
            continue
        place = getattr(store, "directory", store)
        if first is None:
            first = (fingerprint, place)
        elif fingerprint != first[0]:
            raise DataError(
                f"the token stores {first[1]} and {place} were made with different tokenizers "
                f"({first[0][:12]} and {fingerprint[:12]}). Prepare all sources of a run with one."
            )


def _row_numbers(rows: slice | None, batch_size: int) -> np.ndarray:
    if rows is None:
        return np.arange(batch_size)
    start, stop = rows.start or 0, batch_size if rows.stop is None else rows.stop
    if not 0 <= start <= stop <= batch_size or rows.step not in (None, 1):
        raise IndexError(f"rows {rows.start}:{rows.stop}:{rows.step} of a batch of {batch_size}")
    return np.arange(start, stop)


def _plan_cache(store: Store) -> Path | None:
    directory = getattr(store, "directory", None)
    return None if directory is None else Path(directory) / "packing"

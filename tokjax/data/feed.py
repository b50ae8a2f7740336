"""From host batches to the device: a thread that works ahead, and global arrays by shard."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError

Item = TypeVar("Item")


class _Shelf:
    """What the worker thread and the consumer share. The worker holds this and not the iterator,
    so that an iterator nobody holds any more is collected and closes its thread.
    """

    def __init__(self, depth: int):
        self.depth = depth
        self.changed = threading.Condition()
        self.ready: deque[tuple[Any, BaseException | None]] = deque()
        self.finished = False  # the worker puts nothing more
        self.closed = False  # the consumer takes nothing more

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.ready.clear()
            self.changed.notify_all()


def _work(shelf: _Shelf, make: Callable[[int], Any], start: int, stop: int) -> None:
    entry = None
    try:
        for step in range(start, stop):
            with shelf.changed:
                # Waits for room before making, not after: at most `depth` items exist at once.
                shelf.changed.wait_for(lambda: shelf.closed or len(shelf.ready) < shelf.depth)
                if shelf.closed:
                    return
            item = make(step)
            with shelf.changed:
                if shelf.closed:
                    return
                shelf.ready.append((item, None))
                shelf.changed.notify_all()
            del item
    except BaseException as error:  # handed to the consumer, whatever it is
        entry = (None, error)
    finally:
        with shelf.changed:
            if entry is not None and not shelf.closed:
                shelf.ready.append(entry)
            shelf.finished = True
            shelf.changed.notify_all()


class Prefetch(Iterator[Item], Generic[Item]):
    """Items made ahead by one background thread, in order; see `prefetch`.

    Attributes:
        waited_s: seconds the consumer has waited for items so far.
    """

    def __init__(self, make: Callable[[int], Item], start: int, stop: int, depth: int):
        if depth < 0:
            raise ConfigError(f"prefetch depth must be at least 0, got {depth}")
        self.waited_s = 0.0
        self._make = make
        self._next, self._stop = start, stop
        self._shelf = _Shelf(depth)
        self._thread = None
        self._finalizer = weakref.finalize(self, self._shelf.close)
        if depth:
            self._thread = threading.Thread(
                target=_work, args=(self._shelf, make, start, stop), name="prefetch", daemon=True
            )
            self._thread.start()

    def __next__(self) -> Item:
        began = time.perf_counter()
        try:
            item, error = self._take()
        finally:
            self.waited_s += time.perf_counter() - began
        if error is None:
            return item
        self.close()
        if isinstance(error, StopIteration):
            # Passed on as it is, it would end the consumer's loop as if the data were over.
            raise RuntimeError("the function that makes batches raised StopIteration") from error
        raise error

    def _take(self) -> tuple[Any, BaseException | None]:
        shelf = self._shelf
        if shelf.closed or self._next >= self._stop:
            self.close()
            raise StopIteration
        self._next += 1
        if self._thread is None:
            try:
                return self._make(self._next - 1), None
            except Exception as error:
                return None, error
        with shelf.changed:
            shelf.changed.wait_for(lambda: shelf.ready or shelf.finished or shelf.closed)
            if not shelf.ready:
                raise StopIteration
            entry = shelf.ready.popleft()
            shelf.changed.notify_all()
            return entry

    def close(self) -> None:
        """Stops the thread, drops what it had made, and waits for it to end."""
        self._finalizer()
        if self._thread is not None and self._thread is not threading.current_thread():
            # Bounded, so that a read that hangs cannot also hang the way out; it is a daemon.
            self._thread.join(timeout=30)

    def __enter__(self) -> "Prefetch[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(
    loader_fn: Callable[[int], Any],
    start: int,
    stop: int,
    depth: int,
    put: Callable[[Any], Item] | None = None,
) -> Prefetch[Item]:
    """Returns an iterator over put(loader_fn(step)) for step in range(start, stop), made ahead.

    Both functions run in one background thread. Use it as a context manager, or call `close()`.
    An exception in either is raised to the consumer, with its own traceback, once the items before
    it have been taken.

    Args:
        loader_fn: makes the item of a step.
        start: first step.
        stop: one past the last step.
        depth: most items made and not yet taken; 0 makes each when it is asked for, in the
            caller's thread.
        put: applied to each item, usually the transfer to the device; None leaves items alone.

    Raises:
        ConfigError: a negative depth.
    """
    make = loader_fn if put is None else lambda step: put(loader_fn(step))
    return Prefetch(make, start, stop, depth)


def to_device(batch_fn: Callable[[slice], Batch], sharding: Sharding, batch_size: int) -> Batch:
    """Returns the global batch as jax.Arrays, of which this process builds only its own rows.

    Args:
        batch_fn: builds the given rows of the global batch as NumPy arrays; called once for each
            distinct range of rows that this process's devices hold.
        sharding: of the [B, T] arrays; those of segments [B, S] follow its first axis only.
        batch_size: rows of the global batch.

    Raises:
        ConfigError: the rows or tokens do not divide among the devices.
    """
    spec = sharding.spec if isinstance(sharding, NamedSharding) else None
    by_row = sharding
    if isinstance(sharding, NamedSharding) and spec is not None:
        by_row = NamedSharding(sharding.mesh, PartitionSpec(*spec[:1]))
    try:
        index_map = by_row.addressable_devices_indices_map((batch_size,))
    except ValueError as error:
        raise ConfigError(
            f"a batch of {batch_size} rows does not divide among the devices of {by_row}; choose "
            "a batch_size that is a multiple of their number"
        ) from error
    ranges = {_bounds(index[0], batch_size) for index in index_map.values() if index is not None}
    built = {bounds: batch_fn(slice(*bounds)) for bounds in sorted(ranges)}

    def place(*parts: np.ndarray, sharding: Sharding) -> jax.Array:
        local = dict(zip(built, parts, strict=True))
        shape = (batch_size, *parts[0].shape[1:])

        def shard(index: Any) -> np.ndarray:
            rows = local[_bounds(index[0], batch_size)]
            return rows[(slice(None), *index[1:])]

        try:
            return jax.make_array_from_callback(shape, sharding, shard)
        except ValueError as error:
            raise ConfigError(
                f"a batch of shape {shape} does not divide among the devices of {sharding}: {error}"
            ) from error

    first, *rest = built.values()
    leaves = [jax.tree_util.tree_flatten_with_path(part) for part in (first, *rest)]
    placed = [
        place(*(leaf for _, leaf in same), sharding=by_row if _by_row(same[0][0]) else sharding)
        for same in zip(*(found for found, _ in leaves), strict=True)
    ]
    return jax.tree.unflatten(leaves[0][1], placed)


def _by_row(path: Any) -> bool:
    return path[0].name in ("example_id", "values")


def _bounds(rows: slice, size: int) -> tuple[int, int]:
    start, stop, _ = rows.indices(size)
    return start, stop

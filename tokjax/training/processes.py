"""Agreement between the processes of one run: gathered values, and work that one does for all.

The functions of the main thread use JAX collectives: every process must call them, in the same
order. `barrier` goes through the coordination service instead, because a collective from a
background thread could meet the training step's in another order on another process and hang.
"""

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from tokjax.errors import CheckpointError, ConfigError, StorageError, TokjaxError

T = TypeVar("T")
_ERRORS: dict[str, type[TokjaxError]] = {
    cls.__name__: cls for cls in (CheckpointError, ConfigError, StorageError)
}


def gather(value: T) -> list[T]:
    """Returns the JSON value of every process, by process index, on every process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray([data.size], np.int32)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    sizes = sizes.reshape(-1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_first(action: Callable[[], T]) -> T:
    """Returns on every process what `action` returns (a JSON value) on process 0, where it runs.

    Raises:
        Exception: what the action raised, on every process; where it was not an error of
            tokjax, the other processes see a RuntimeError of the same text.
    """
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except Exception as caught:
            error = caught
    agree(error)
    return gather(result)[0]  # type: ignore[return-value]


def agree(error: BaseException | None) -> None:
    """Does nothing if no process has an error; else every process raises: its own, or the first's.

    Raises:
        BaseException: see above.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    others = gather(describe_error(error))
    if error is not None:
        raise error
    for process, description in enumerate(others):
        if description is not None:
            raise rebuild_error(description, process)


def barrier(key: str, timeout_s: float) -> None:
    """Returns when every process has come here with the same, never used key; any thread may.

    Raises:
        RuntimeError: a process did not come in time, or is gone.
    """
    if jax.process_count() == 1:
        return
    import orbax.checkpoint as ocp

    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=int(timeout_s * 1000))


def describe_error(error: BaseException | None) -> list[str] | None:
    """Returns an error as a JSON value, or None for None."""
    return None if error is None else [type(error).__name__, str(error)]


def rebuild_error(description: list[str], process: int) -> Exception:
    """Returns the error that `describe_error` described, saying which process had it."""
    name, text = description
    return _ERRORS.get(name, RuntimeError)(f"process {process}: {text}")

"""The working directory: made, proven writable, and locked against a second run."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from tokjax.errors import StorageError
from tokjax.files import storage_errors


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run; the lock goes with the process, however it ends.

    Raises:
        StorageError: it cannot be made or written, or another run is using it.
    """
    if jax.process_index() != 0:
        yield
        return
    with storage_errors(workdir, "create"):
        workdir.mkdir(parents=True, exist_ok=True)
    with storage_errors(workdir, "write in"):
        descriptor = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another run is using {workdir}; wait for it, or choose another --workdir"
            ) from None
        yield
    finally:
        os.close(descriptor)

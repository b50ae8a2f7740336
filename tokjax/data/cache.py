"""The cache directory, and files in it that are made once however many processes ask."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tokjax.errors import StorageError
from tokjax.files import cache_directory, storage_errors, write_atomically

__all__ = ["cache_directory", "cached_bytes", "exclusive", "storage_error", "write_file_atomically"]

_REMEDY = "Free space there, or name another directory with the environment variable TOKJAX_CACHE."


def storage_error(path: Path, error: OSError) -> StorageError:
    """Returns the StorageError that tells a person which path failed and what to do."""
    return StorageError(f"cannot write {path}: {error.strerror or error}. {_REMEDY}")


def write_file_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`: a reader sees the old or the new file, whole.

    The directory is made if needed.

    Raises:
      StorageError: the disk is full or the place is unwritable; the old file is untouched.
    """
    with storage_errors(path.parent, "create", _REMEDY):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data, _REMEDY)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock of `path` (a file beside it) while the block runs; other processes wait.

    The lock only saves work: writers replace files atomically, so where the file system has no
    locks (some network mounts, Windows) the block runs without one and is still correct. The
    kernel drops the lock of a process that dies.

    Raises:
      StorageError: the lock file cannot be created.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise storage_error(lock, error) from error
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def cached_bytes(path: Path, make: Callable[[], bytes], valid: Callable[[bytes], bool]) -> bytes:
    """Returns the content of `path`, made by `make` and kept there on first use.

    Args:
      path: the file in the cache.
      make: produces the content; called at most once on a machine, by the process that is first.
      valid: whether a content found there can be used; a damaged file is made anew.

    Raises:
      StorageError: the content could not be written.
    """
    found = _read(path)
    if found is not None and valid(found):
        return found
    with exclusive(path):
        found = _read(path)  # another process may have made it while this one waited
        if found is not None and valid(found):
            return found
        made = make()
        write_file_atomically(path, made)
        return made


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error

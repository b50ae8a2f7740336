"""Small files written so that a reader never meets half of one, and errors that name the path."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from tokjax.errors import StorageError

WORKDIR_REMEDY = "Free space or choose a writable workdir; everything written before is intact."


def cache_directory() -> Path:
    """Returns `$TOKJAX_CACHE`, or `~/.cache/tokjax`; the directory need not exist yet."""
    named = os.environ.get("TOKJAX_CACHE", "").strip()
    return Path(named).expanduser() if named else Path.home() / ".cache" / "tokjax"


@contextlib.contextmanager
def storage_errors(
    path: str | os.PathLike[str], doing: str = "write", remedy: str = WORKDIR_REMEDY
) -> Iterator[None]:
    """Turns an OSError inside the block into a StorageError naming `path`.

    Args:
        path: the file or directory the block works on.
        doing: the verb of the message, e.g. "write" or "create".
        remedy: what the reader of the message can do.

    Raises:
        StorageError: the disk is full, the path unwritable, or the like.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot {doing} {os.fspath(path)}: {reason}. {remedy}") from error


class AppendFile:
    """A file that only grows, by whole records: one that does not fit on the disk leaves no part.

    Records reach the operating system at once, so a killed process loses none of them.

    Args:
        path: the file, made when missing.

    Raises:
        StorageError: the file cannot be opened or written (also from every method).
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        with storage_errors(self.path):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (lives with self)
            self._size = self._file.tell()

    def append(self, record: bytes) -> None:
        """Writes all of `record`, or raises and leaves the file as it was."""
        with storage_errors(self.path):
            try:
                done = 0
                while done < len(record):  # a nearly full disk takes a part without an error
                    done += self._file.write(record[done:])
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size += len(record)

    def sync(self) -> None:
        """Makes everything written survive a power loss."""
        with storage_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()


def sync_directory(directory: Path) -> None:
    """Makes renames inside `directory` durable where the platform can (else does nothing)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: str | bytes, remedy: str = WORKDIR_REMEDY) -> None:
    """Replaces the file `path` by `content`: a reader sees the old or the new file, whole.

    Raises:
        StorageError: the new content could not be written; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with storage_errors(path, remedy=remedy):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    sync_directory(path.parent)


def set_aside(path: Path, label: str) -> Path:
    """Renames `path` to a free name `stem.label-n.suffix` beside it and returns that name.

    Raises:
        StorageError: the file cannot be renamed.
    """
    number = 1
    while (free := path.with_name(f"{path.stem}.{label}-{number}{path.suffix}")).exists():
        number += 1
    with storage_errors(path, "rename"):
        os.rename(path, free)
    return free

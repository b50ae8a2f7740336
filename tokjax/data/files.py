"""Input files: which ones a pattern means, what is in them, and whether they changed."""

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tokjax.data.cache import write_file_atomically
from tokjax.errors import ConfigError, DataError, StorageError, nearest

_REMEMBER_FROM = 1 << 26  # bytes from which the digest of a file is kept


def expand_files(patterns: Sequence[str]) -> list[str]:
    """Returns the files of paths and glob patterns, those of one pattern sorted, each once.

    Raises:
      ConfigError: a path does not exist or is a folder, or a pattern matches nothing.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if os.path.isfile(path):
            matches = [path]  # also a name that happens to contain brackets
        elif os.path.isdir(path):
            raise ConfigError(
                f"{pattern} is a folder; write {os.path.join(pattern, '*')} or the like"
            )
        elif os.path.exists(path):
            raise ConfigError(
                f"{pattern} is a pipe or device, which can be read only once: write it to a file"
            )
        elif glob.has_magic(path):
            matches = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
            if not matches:
                raise ConfigError(
                    f"the pattern {pattern!r} matches no file (looked from {os.getcwd()})"
                    f"{_nearby(path)}"
                )
        else:
            raise ConfigError(
                f"there is no file {pattern!r} (looked from {os.getcwd()}){_nearby(path)}"
            )
        for match in matches:
            found.setdefault(os.path.realpath(match), match)
    return list(found.values())


def _nearby(path: str) -> str:
    folder = Path(path).parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    if not folder.is_dir():
        return f": {folder} does not exist."
    names = [p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return "." + (nearest(Path(path).name, names) if names else f" {folder} holds no file.")


def numbered_lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line with its line feed) of a file, decompressed if it ends in .gz.

    A byte order mark is left out.

    Raises:
      DataError: the file cannot be read or decompressed to its end.
    """
    try:
        with open_bytes(file) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file, error) from error


def read_bytes(file: str) -> bytes:
    """Returns the content of a file, decompressed if it ends in .gz, without a byte order mark.

    Raises:
      DataError: the file cannot be read or decompressed to its end.
    """
    try:
        with open_bytes(file) as stream:
            return stream.read().removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file, error) from error


def open_bytes(file: str) -> IO[bytes]:
    """Returns a file opened for reading, decompressed if it ends in .gz."""
    return gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def unreadable(file: str, error: Exception) -> DataError:
    """Returns the error for a file that cannot be read as a whole."""
    refused = getattr(error, "strerror", None)  # else its content is not what it should be
    reason = (refused or str(error)).rstrip(".")
    remedy = "Check its permissions and disk" if refused else "Fetch or write it again"
    return DataError(f"cannot read {file}: {reason}. {remedy}.")


def file_digest(file: str, cache: Path) -> str:
    """Returns the SHA-256 (hex) of a file's bytes.

    The digest of a large file is remembered in `cache` and used again as long as the file's size,
    inode and both its time stamps (the second cannot be set back by a program) are the same.

    Raises:
      DataError: the file cannot be read.
    """
    try:
        facts = os.stat(file)
        stamp = [facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns]
        name = hashlib.sha256(os.path.realpath(file).encode()).hexdigest()[:32]
        memory = cache / "digests" / f"{name}.json"
        if facts.st_size >= _REMEMBER_FROM and (known := _remembered(memory, stamp)):
            return known
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(file, error) from error
    if facts.st_size >= _REMEMBER_FROM:
        try:
            content = {"file": os.path.realpath(file), "stamp": stamp, "sha256": digest}
            write_file_atomically(memory, json.dumps(content).encode())
        except StorageError:
            pass  # a cache that cannot be written only costs time
    return digest


def _remembered(memory: Path, stamp: list[int]) -> str | None:
    try:
        known = json.loads(memory.read_bytes())
        return known["sha256"] if known["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

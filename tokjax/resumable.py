"""Records that a command writes one after the other, so that the same command continues them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tokjax.errors import ConfigError, DataError
from tokjax.files import AppendFile, storage_errors

T = TypeVar("T")


def finished(out: Path, run: str, read: Callable[[Any], tuple[str, T]]) -> list[T]:
    """Returns what is told by the records of a file; a last line that was cut off is removed.

    Args:
        out: the file, one record a line; it need not exist.
        run: identity of what writes into it.
        read: record -> (identity of what wrote it, what is told).

    Raises:
        ConfigError: the file was written by another run.
        DataError: it holds something else.
    """
    if not out.exists():
        return []
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    told = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found, what = read(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{out}:{number} was not written by this command") from None
        if found != run:
            raise ConfigError(
                f"{out} was written with another model, prompts or settings: choose another --out"
            )
        told.append(what)
    if len(whole) < len(data):
        with open(out, "r+b") as file:
            file.truncate(len(whole))
    return told


def appended(out: Path) -> AppendFile:
    """Returns a file to append records to, in a folder that is made where it is missing.

    Raises:
        StorageError: either cannot be made.
    """
    with storage_errors(out.parent, "create"):
        out.parent.mkdir(parents=True, exist_ok=True)
    return AppendFile(out)

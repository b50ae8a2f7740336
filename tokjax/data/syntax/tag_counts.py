"""How often each token of a vocabulary occurs with each syntactic tag: the table, and its file."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from tokjax.errors import DataError
from tokjax.files import write_atomically

_REMEDY = "Free space or name a writable place."


@dataclass(frozen=True, eq=False)
class TagCounts:
    """A table of counts.

    Attributes:
        counts: occurrences of each token with each tag; not whole numbers where tags are uncertain.
        tags: names of the tags.
        special: tokens that stand for no text: they have no tag.
        meta: what made it, as plain values.
    """

    counts: Float64[np.ndarray, "V K"]
    tags: tuple[str, ...]
    special: Bool[np.ndarray, "V"]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.counts.ndim != 2 or self.counts.shape != (len(self.special), len(self.tags)):
            raise DataError(
                f"counts {self.counts.shape} must have a row for each of {len(self.special)} "
                f"tokens and a column for each of {len(self.tags)} tags"
            )
        if not np.isfinite(self.counts).all() or (self.counts < 0).any():
            raise DataError("counts of tags must be finite and not negative")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the numbers and the names of the tags."""
        found = hashlib.sha256(json.dumps(self.tags).encode())
        found.update(np.ascontiguousarray(self.counts, np.float64).tobytes())
        found.update(np.ascontiguousarray(self.special, bool).tobytes())
        return found.hexdigest()

    @property
    def covered(self) -> float:
        """Share of the tokens, special ones aside, that have a tag."""
        return float((self.counts.sum(-1) > 0)[~self.special].mean()) if self.special.size else 0.0


def to_bytes(table: TagCounts) -> bytes:
    """Returns a table as the content of a file, the same for equal tables."""
    told = {"tags": list(table.tags), "digest": table.digest, "meta": dict(table.meta)}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        counts=np.asarray(table.counts, np.float64),
        special=np.asarray(table.special, bool),
        told=np.frombuffer(json.dumps(told, sort_keys=True).encode(), np.uint8),
    )
    return buffer.getvalue()


def from_bytes(data: bytes, name: str) -> TagCounts:
    """Returns the table that a file holds.

    Raises:
        DataError: the content is damaged, or no such table.
    """
    try:
        with np.load(io.BytesIO(data)) as found:
            told = json.loads(found["told"].tobytes())
            table = TagCounts(found["counts"], tuple(told["tags"]), found["special"], told["meta"])
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} is damaged, or holds no counts of tags: {error}") from error
    if table.digest != told["digest"]:
        raise DataError(f"{name} is damaged: its numbers are not those that were written")
    return table


def write_tag_counts(path: str | os.PathLike, table: TagCounts) -> None:
    """Writes a table; a reader finds the old file, or the new one whole.

    Raises:
        StorageError: the file cannot be written.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), to_bytes(table), _REMEDY)


def read_tag_counts(path: str | os.PathLike) -> TagCounts:
    """Returns the table in a file.

    Raises:
        DataError: there is no such file, it is damaged, or it holds no such table.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"no counts of tags in {path}: {error.strerror or error}") from error
    return from_bytes(data, str(path))

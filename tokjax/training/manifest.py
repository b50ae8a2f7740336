"""What a checkpoint must contain, byte for byte: manifests of checksums, and the pointer file.

Orbax restores a file with a flipped byte as numbers that are silently wrong, and takes an empty
step directory for the latest checkpoint. So every step directory carries `manifest.json`: the size
and checksum of every other file, written last, and itself protected by a checksum. `pointer.json`
beside the step directories names the committed step and is replaced in one rename.
"""

import concurrent.futures
import datetime
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokjax.errors import CheckpointError, StorageError
from tokjax.files import write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
METADATA = "metadata.json"
POINTER = "pointer.json"

_CHUNK_BYTES = 1 << 22
_HASHING_THREADS = 8  # hashlib releases the interpreter lock, so threads do run side by side
_MAX_PROBLEMS = 20


class DamagedError(Exception):
    """A manifest or pointer that cannot be trusted; `str` of it says which file and why."""


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the BLAKE2b-256 checksum (hex) of one file."""

    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What one step directory holds.

    Attributes:
        step: the training step.
        serial: the count of commits in this checkpoint directory, which orders two saves also
            where a run was continued from an earlier step.
        created: UTC time of the commit, ISO 8601.
        files: path relative to the step directory, with "/", of every file but the manifest.
        leaves: dtype and shape of every leaf of the state, such as "float32[8,16]", by its path.
        identity: the configuration keys which a run must share to continue from here.
        metrics: the numbers given to `save`; not-finite ones are kept.
    """

    step: int
    serial: int
    created: str
    files: Mapping[str, FileRecord]
    leaves: Mapping[str, str] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(record.size for record in self.files.values())

    @property
    def digest(self) -> str:
        """The checksum of the manifest's content, which covers that of every file."""
        return _digest(self._document())

    def _document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "checksum": "blake2b-256",
            "step": self.step,
            "serial": self.serial,
            "created": self.created,
            "metrics": {name: _number_to_json(value) for name, value in self.metrics.items()},
            "identity": dict(self.identity),
            "leaves": dict(self.leaves),
            "files": {name: [record.size, record.digest] for name, record in self.files.items()},
        }

    def write(self, step_directory: Path) -> None:
        """Writes `manifest.json`, durably and in one rename.

        Raises:
            StorageError: it cannot be written.
        """
        document = {**self._document(), "digest": self.digest}
        write_atomically(step_directory / MANIFEST, json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, step_directory: Path) -> "Manifest":
        """Returns the manifest of a step directory, its own checksum verified.

        Raises:
            DamagedError: it is missing, unreadable or changed.
            CheckpointError: a newer tokjax wrote it.
            StorageError: the permissions do not allow reading it.
        """
        document = _read_document(step_directory / MANIFEST)
        try:
            return cls(
                step=int(document["step"]),
                serial=int(document["serial"]),
                created=str(document["created"]),
                files={name: FileRecord(*entry) for name, entry in document["files"].items()},
                leaves=document["leaves"],
                identity=document["identity"],
                metrics={name: float(value) for name, value in document["metrics"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(f"{MANIFEST} lacks or garbles {error}") from error


@dataclass(frozen=True)
class Pointer:
    """The committed step, its serial and its manifest's digest: the content of `pointer.json`."""

    step: int
    serial: int
    manifest: str

    def write(self, directory: Path) -> None:
        """Switches `pointer.json` to this step in one rename.

        Raises:
            StorageError: it cannot be written; the old pointer is untouched.
        """
        document = {
            "format": FORMAT,
            "step": self.step,
            "serial": self.serial,
            "manifest": self.manifest,
        }
        document["digest"] = _digest(document)
        write_atomically(directory / POINTER, json.dumps(document) + "\n")

    @classmethod
    def read(cls, directory: Path) -> "Pointer | None":
        """Returns the pointer of a checkpoint directory, or None where there is none.

        Raises:
            DamagedError: it is unreadable or changed.
            CheckpointError: a newer tokjax wrote it.
            StorageError: the permissions do not allow reading it.
        """
        if not (directory / POINTER).exists():
            return None
        document = _read_document(directory / POINTER)
        try:
            return cls(int(document["step"]), int(document["serial"]), str(document["manifest"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{POINTER} lacks or garbles {error}") from error


def now() -> str:
    """Returns the UTC time, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def list_files(directory: Path) -> dict[str, int]:
    """Returns the bytes of every file below `directory`, by relative path with "/", sorted."""
    found: dict[str, int] = {}
    for folder, _, names in os.walk(directory, onerror=_raise):
        for name in names:
            path = Path(folder, name)
            found[path.relative_to(directory).as_posix()] = path.lstat().st_size
    return dict(sorted(found.items()))


def share(sizes: Mapping[str, int], index: int, count: int) -> list[str]:
    """Returns the files that process `index` of `count` is to hash: equal bytes, as far as can be.

    Every process computes the same partition from the same sizes.
    """
    loads = [0] * count
    mine: list[str] = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        lightest = loads.index(min(loads))
        loads[lightest] += size + 4096  # opening a file costs, too
        if lightest == index:
            mine.append(name)
    return mine


def hash_files(
    directory: Path, names: Iterable[str], *, durable: bool = False
) -> dict[str, FileRecord]:
    """Returns size and checksum of each named file, read back from disk.

    Args:
        directory: what the names are relative to.
        names: the files, with "/".
        durable: also flush each file to the device, whoever wrote it.

    Raises:
        OSError: a file cannot be read.
    """
    names = list(names)

    def record(name: str) -> FileRecord:
        checksum = hashlib.blake2b(digest_size=32)
        size = 0
        with open(directory / name, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                checksum.update(chunk)
                size += len(chunk)
            if durable:
                os.fsync(file.fileno())
        return FileRecord(size, checksum.hexdigest())

    threads = max(1, min(_HASHING_THREADS, len(names)))
    with concurrent.futures.ThreadPoolExecutor(threads, "tokjax-hash") as pool:
        return dict(zip(names, pool.map(record, names), strict=True))


def listing_problems(directory: Path, manifest: Manifest) -> list[str]:
    """Returns what is missing, too many or of another size in a step directory; reads no content.

    Raises:
        StorageError: the permissions do not allow looking.
    """
    try:
        found = list_files(directory)
    except PermissionError as error:
        raise _not_permitted(error) from error
    except OSError as error:
        return [f"the directory cannot be listed: {error.strerror}"]
    found.pop(MANIFEST, None)
    problems = [f"{name} is missing" for name in manifest.files if name not in found]
    problems += [
        f"{name} has {found[name]} bytes, the manifest says {record.size}"
        for name, record in manifest.files.items()
        if name in found and found[name] != record.size
    ]
    return problems + [
        f"{name} was not written by the save" for name in found if name not in manifest.files
    ]


def content_problems(directory: Path, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """Returns the named files whose bytes are not those the manifest speaks of.

    Raises:
        StorageError: the permissions do not allow reading one.
    """
    problems = []

    def check(name: str) -> str | None:
        try:
            found = hash_files(directory, [name])[name]
        except PermissionError as error:
            raise _not_permitted(error) from error
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found == manifest.files[name]:
            return None
        return f"{name} does not have the bytes that were saved (its checksum differs)"

    threads = max(1, min(_HASHING_THREADS, len(names)))
    with concurrent.futures.ThreadPoolExecutor(threads, "tokjax-verify") as pool:
        problems = [problem for problem in pool.map(check, names) if problem]
    return problems


def shorten(problems: Sequence[str]) -> list[str]:
    """Returns the first problems and, where there are more than a screen holds, their number."""
    more = len(problems) - _MAX_PROBLEMS
    return [*problems[:_MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]


def _read_document(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not path.parent.exists():
            raise DamagedError("the directory is missing") from error
        if not any(path.parent.iterdir()):
            raise DamagedError("the directory is empty") from error
        raise DamagedError(f"{path.name} is missing") from error
    except PermissionError as error:
        raise _not_permitted(error) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path.name} cannot be read: {error}") from error
    try:
        document = json.loads(text)
        digest = document.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path.name} is no whole JSON document ({error})") from error
    if digest != _digest(document):
        raise DamagedError(f"{path.name} was changed (its checksum differs)")
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is of format {document.get('format')!r}, this tokjax reads format {FORMAT}: "
            "use the tokjax that wrote it"
        )
    return document


def _digest(document: Mapping[str, Any]) -> str:
    # allow_nan: a NaN would be no JSON, and other readers of the file would stop at it.
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _number_to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _not_permitted(error: OSError) -> StorageError:
    return StorageError(f"cannot read {error.filename}: {error.strerror}. Allow reading it.")


def _raise(error: OSError) -> None:
    raise error

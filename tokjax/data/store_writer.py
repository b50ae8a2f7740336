"""Writing a token store: all of it appears at once under its name, or nothing does."""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tokjax.data.cache import storage_error
from tokjax.data.store_format import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    VALUES,
    content_fingerprint,
    read_manifest,
)
from tokjax.errors import DataError

_BUFFERED_TOKENS = 1 << 20
_SURELY_DEAD_S = 86400.0  # a writer on another machine that wrote nothing for so long


class StoreWriter:
    """Writes a token store; use it as a context manager.

    Examples go into a directory beside `directory`, which takes its name when the block ends
    well: a reader sees no store or a whole one. When the block fails nothing stays behind. If
    another process has finished the same store meanwhile, that one stays.

        with StoreWriter(directory, vocab_size=256) as writer:
            writer.add([1, 2, 3], key=make_key("text", "abc"), name="letters.txt:1")

    Attributes:
      num_examples: examples added so far.
      num_tokens: tokens added so far.
      num_bytes: bytes of text of these examples, as far as `add` was told.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        vocab_size: int,
        tokenizer: Mapping[str, Any] | None = None,
        task: Mapping[str, Any] | None = None,
    ):
        """Prepares to write; nothing is created before the block is entered.

        Args:
          directory: the store's place; it must not exist.
          vocab_size: V; ids are 0 to V - 1.
          tokenizer: facts for the manifest, `fingerprint` above all.
          task: facts for the manifest on where the examples come from.
        """
        self.directory = Path(directory)
        self.num_examples = self.num_tokens = self.num_bytes = 0
        self._vocab_size = vocab_size
        self._tokenizer = {"fingerprint": None, **(tokenizer or {}), "vocab_size": vocab_size}
        self._task = dict(task or {})
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._unigram = np.zeros(vocab_size, np.int64)
        self._weighted_tokens = self._unweighted_examples = 0
        self._skipped: dict[str, int] = {}
        self._group: tuple[int, tuple[str, ...]] | None = None  # sequences, names of values
        self._first_skipped = ""
        self._temporary: Path | None = None
        self._columns: dict[str, _Column] = {}
        self._tokens: list[np.ndarray] = []
        self._weights: list[np.ndarray | None] = []
        self._cuts: list[tuple[int, ...]] = []
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in VALUES}
        self._keys: list[int] = []
        self._names: list[bytes] = []
        self._buffered = 0
        self._written = 0  # tokens in the files

    def __enter__(self) -> "StoreWriter":
        parent = self.directory.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            # Whose it is, so that others know when it may be removed.
            prefix = f".{self.directory.name}.{_host()}-{os.getpid()}."
            self._temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            os.chmod(self._temporary, 0o755)  # mkdtemp's 0700 would lock out other users
        except OSError as error:
            raise storage_error(parent, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        temporary = self._temporary
        assert temporary is not None
        try:
            if kind is None:
                self._finish(temporary)
        except OSError as failure:
            raise storage_error(temporary, failure) from failure
        finally:
            for column in self._columns.values():
                with contextlib.suppress(OSError):  # a full disk fails again when closing
                    column.file.close()
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)

    def add(
        self,
        tokens: Sequence[int] | np.ndarray,
        weights: Sequence[float] | np.ndarray | None = None,
        *,
        key: str,
        name: str,
        num_bytes: int = 0,
        cuts: Sequence[int] = (),
        values: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    ) -> None:
        """Appends an example.

        Args:
          tokens: its ids, begin and end tokens included; at least one.
          weights: weight of each token as a target; None: all 1.
          key: 16 hexadecimal digits, the same for the same record whatever the order; see
            `tokjax.data.sources.make_key`. Equal keys are told apart by `-1`, `-2`, ...
          name: where the example comes from, for people.
          num_bytes: length of its text in UTF-8.
          cuts: where the second and further sequences of a group begin; () of a single one.
          values: name ("label", "score", "side") -> a value of each sequence of a group.

        Raises:
          DataError: an id outside the vocabulary, a weight or value that is not finite, as many
            weights as tokens not given, or groups of several sizes or kinds in one store. The
            example is then not added.
          StorageError: the disk is full.
        """
        ids = np.asarray(tokens, np.int64)
        if ids.ndim != 1 or not ids.size:
            raise DataError(f"{name}: an example needs at least one token")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"{name}: the token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self._vocab_size} ids. Use the tokenizer that made the ids."
            )
        cuts = tuple(cuts)
        if not all(a < b for a, b in itertools.pairwise((0, *cuts, ids.size))):
            raise DataError(f"{name}: cuts={cuts} must rise and lie inside its {ids.size} tokens")
        group = self._checked_group(name, cuts, values or {})
        column = None
        if weights is not None:
            column = np.asarray(weights, "<f4")
            if column.shape != ids.shape:
                raise DataError(f"{name}: {column.size} weights for {ids.size} tokens")
            if not np.isfinite(column).all():
                raise DataError(f"{name}: a weight is not a finite number")
            if (column == 1).all():
                column = None
        try:
            number = int(key, 16) if len(key) == 16 else -1
        except ValueError:
            number = -1
        if number < 0:
            raise DataError(f"{name}: the key {key!r} is not 16 hexadecimal digits")
        targets = ids.size - 1
        weighted = targets if column is None else int(np.count_nonzero(column[1:]))
        self._weighted_tokens += weighted
        self._unweighted_examples += weighted == 0
        self._tokens.append(ids.astype(self._dtype))
        self._weights.append(column)
        self._cuts.append(cuts)
        self._group = group
        for value in group[1]:
            self._values[value].append(np.asarray((values or {})[value], "<f4"))
        self._keys.append(number)
        self._names.append(name.encode("utf-8", "replace"))
        self.num_examples += 1
        self.num_tokens += ids.size
        self.num_bytes += num_bytes
        self._buffered += ids.size
        if self._buffered >= _BUFFERED_TOKENS or len(self._keys) >= _BUFFERED_TOKENS // 16:
            self._write()

    def _checked_group(
        self, name: str, cuts: tuple[int, ...], values: Mapping[str, Any]
    ) -> tuple[int, tuple[str, ...]]:
        """Returns the number of sequences and the names of their values, those of all examples."""
        size = len(cuts) + 1
        for value, given in values.items():
            if np.shape(given) != (size,) or not np.isfinite(np.asarray(given, float)).all():
                raise DataError(
                    f"{name}: a {value} must be a finite number for each of {size} sequences"
                )
        group = size, tuple(v for v in VALUES if v in values)
        if self._group is None or group == self._group:
            return group
        if size != self._group[0]:
            raise DataError(
                f"{name} has {size} sequences (answers, or passages of a query), the examples "
                f"before it have {self._group[0]}: all groups of a data set must be of one size"
            )
        found, before = (" and ".join(g[1]) or "no value" for g in (group, self._group))
        raise DataError(
            f"{name} has {found} of each passage, the examples before it have {before}: give all "
            f"records of a data set the same"
        )

    def skip(self, name: str, reason: str, detail: str = "") -> None:
        """Counts and lists a record that was left out.

        Args:
          name: where it is.
          reason: why, in words that many records share: the manifest counts them.
          detail: what exactly is wrong with this one.

        Raises:
          StorageError: the disk is full.
        """
        self._first_skipped = self._first_skipped or ": ".join(filter(None, (name, reason, detail)))
        facts = {"name": name, "reason": reason, "detail": detail}
        line = json.dumps(facts, ensure_ascii=True) + "\n"
        self._append("skipped.jsonl", line.encode())
        self._skipped[reason] = self._skipped.get(reason, 0) + 1

    def _nothing(self) -> str:
        if not self._first_skipped:
            return f"no example for the token store {self.directory}: the source has no record."
        count = sum(self._skipped.values())
        return (
            f"no example for the token store {self.directory}: all {count:,} records are bad and "
            f"were left out. The first is {self._first_skipped}"
        )

    def _write(self) -> None:
        """Moves the buffers into the files."""
        lengths = np.array([ids.size for ids in self._tokens], "<i8")
        tokens = np.concatenate([*self._tokens, np.zeros(0, self._dtype)])
        self._unigram += np.bincount(tokens, minlength=self._vocab_size)
        self._append("tokens.bin", tokens)
        self._append("lengths.bin", lengths)
        if any(column is not None for column in self._weights):
            if "weights.bin" not in self._columns:
                self._backfill_weights()
            for ids, column in zip(self._tokens, self._weights, strict=True):
                self._append("weights.bin", np.ones(ids.size, "<f4") if column is None else column)
        elif "weights.bin" in self._columns:
            self._append("weights.bin", np.ones(tokens.size, "<f4"))
        if self._cuts and self._cuts[0]:
            self._append("cuts.bin", np.array(self._cuts, "<i8"))
        for value, rows in self._values.items():
            if rows:
                self._append(VALUES[value], np.concatenate(rows))
                rows.clear()
        self._append("keys.bin", np.array(self._keys, "<u8"))
        self._append("names.bin", b"".join(self._names))
        self._append("name_lengths.tmp", np.array([len(n) for n in self._names], "<i8"))
        self._written += tokens.size
        self._tokens, self._weights, self._keys, self._names = [], [], [], []
        self._cuts = []
        self._buffered = 0

    def _backfill_weights(self) -> None:
        for start in range(0, self._written, _BUFFERED_TOKENS):
            count = min(_BUFFERED_TOKENS, self._written - start)
            self._append("weights.bin", np.ones(count, "<f4"))
        self._append("weights.bin", b"")

    def _append(self, name: str, data: np.ndarray | bytes) -> None:
        assert self._temporary is not None, "use StoreWriter in a with statement"
        try:
            if name not in self._columns:
                self._columns[name] = _Column(self._temporary / name)
            self._columns[name].append(data)
        except OSError as error:
            raise storage_error(self._temporary / name, error) from error

    def _finish(self, temporary: Path) -> None:
        if not self.num_examples:
            raise DataError(self._nothing())
        self._write()
        self._append("unigram.bin", self._unigram.astype("<i8"))
        for column in self._columns.values():
            column.file.flush()
        for lengths, offsets in (
            ("lengths.bin", "offsets.bin"),
            ("name_lengths.tmp", "name_offsets.bin"),
        ):
            values = np.fromfile(temporary / lengths, "<i8")
            self._append(offsets, np.concatenate([[0], np.cumsum(values)]).astype("<i8"))
        self._columns.pop("name_lengths.tmp").file.close()
        (temporary / "name_lengths.tmp").unlink()
        repeats = count_repeats(np.fromfile(temporary / "keys.bin", "<u8"))
        if repeats.any():
            self._append("repeats.bin", repeats.astype("<u4"))
        for column in self._columns.values():
            column.finish()
        manifest = self._manifest(int(np.count_nonzero(repeats)))
        with open(temporary / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(temporary)
        self._publish(temporary, manifest)
        _sync_directory(self.directory.parent)

    def _manifest(self, repeated: int) -> dict[str, Any]:
        counts = {
            "examples": self.num_examples,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "weighted_targets": self._weighted_tokens,
            "examples_without_weight": self._unweighted_examples,
            "repeated_examples": repeated,
            "skipped": sum(self._skipped.values()),
        }
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "task": self._task,
            "tokenizer": self._tokenizer,
            "token_dtype": self._dtype.str,
            "counts": counts,
            "skipped": dict(sorted(self._skipped.items(), key=lambda item: -item[1])),
            "files": {name: column.facts() for name, column in sorted(self._columns.items())},
        }
        return {**manifest, "fingerprint": content_fingerprint(manifest)}

    def _publish(self, temporary: Path, manifest: dict[str, Any]) -> None:
        try:
            os.rename(temporary, self.directory)
        except OSError:
            # A directory that is not empty cannot be replaced: another process was first.
            if not self.directory.is_dir():
                raise
            if read_manifest(self.directory)["fingerprint"] != manifest["fingerprint"]:
                raise DataError(
                    f"{self.directory} exists and holds other examples. Remove it, or write to "
                    "another directory."
                ) from None


class _Column:
    """One growing file and its SHA-256."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")  # noqa: SIM115 - closed by the writer
        self._digest = hashlib.sha256()
        self._bytes = 0

    def append(self, data: np.ndarray | bytes) -> None:
        raw = memoryview(data).cast("B") if isinstance(data, bytes) else data.tobytes()
        self.file.write(raw)
        self._digest.update(raw)
        self._bytes += len(raw)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def facts(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def count_repeats(keys: np.ndarray) -> np.ndarray:
    """Returns for each key how many equal ones come before it.

    >>> count_repeats(np.array([7, 5, 7, 7])).tolist()
    [0, 0, 1, 2]
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.concatenate([starts, [keys.size]]))
    repeats = np.empty(keys.size, np.int64)
    repeats[order] = np.arange(keys.size) - np.repeat(starts, sizes)
    return repeats


def remove_unfinished(directory: Path) -> None:
    """Removes what killed writers of the store `directory` left beside it.

    A directory stays while its writer may be alive: where locks do not work, another machine may
    be making the same store.
    """
    for path in directory.parent.glob(f".{glob.escape(directory.name)}.*"):
        if path.is_dir() and _is_abandoned(path, directory.name):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path, name: str) -> bool:
    host, _, rest = path.name.removeprefix(f".{name}.").rpartition("-")
    process = rest.partition(".")[0]
    if host == _host() and process.isdigit():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # it lives, under another user
        return False
    times = [p.stat().st_mtime for p in (path, *path.iterdir()) if p.exists()]
    return time.time() - max(times) > _SURELY_DEAD_S


def _host() -> str:
    return socket.gethostname() or "localhost"


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

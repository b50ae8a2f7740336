"""Selection artifacts: what a method says of the examples of a pool, in one Parquet file.

A row is an example:

    key       string      its key, `TokenStore.example_key`; unique
    name      string      where it came from, for people
    score     float64     the higher, the better; null where there is none
    keep      bool        whether to train on it
    n_tokens  int32       its tokens in the store
    tokens/X  list<float> one value for each token, as a target, of the channel X, where there are
                          such; the first token is never a target and has a value all the same

The schema's metadata holds JSON under `tokjax`: the format, a digest of the contents, and what the
writer says of itself. Nothing here imports JAX.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from tokjax.errors import DataError, nearest
from tokjax.files import storage_errors, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

_METADATA = b"tokjax"
_FORMAT = 1
_CHANNEL = "tokens/"
_REMEDY = "Free space or name a writable place; an older file there is untouched."


@dataclass(frozen=True, eq=False, repr=False)
class Artifact:
    """What a file says of the examples of a pool. N is their number.

    Attributes:
        table: the rows.
        meta: what the writer said of itself: method, options, tokenizer, model, counts, ...
        path: of the file.
    """

    table: "pa.Table"
    meta: Mapping[str, Any]
    path: Path

    def __repr__(self) -> str:
        return (
            f"Artifact({self.path}, {len(self)} examples, {int(self.keep.sum())} kept, "
            f"channels {list(self.channels)})"
        )

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def keys(self) -> list[str]:
        """Key of each example."""
        return self.table.column("key").to_pylist()

    @cached_property
    def names(self) -> list[str]:
        """Name of each example, for people."""
        return self.table.column("name").to_pylist()

    @cached_property
    def rows(self) -> dict[str, int]:
        """Number of each key's row."""
        return {key: row for row, key in enumerate(self.keys)}

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the values of all columns and of `meta`."""
        return self.meta["digest"]

    @cached_property
    def scores(self) -> Float64[np.ndarray, "N"]:
        """Score of each example, NaN where there is none."""
        return _numbers(self.table.column("score"), np.float64)

    @cached_property
    def keep(self) -> Bool[np.ndarray, "N"]:
        """Which examples to train on."""
        return np.asarray(self.table.column("keep").to_numpy(), bool)

    @cached_property
    def n_tokens(self) -> Int32[np.ndarray, "N"]:
        """Tokens of each example."""
        return _numbers(self.table.column("n_tokens"), np.int32)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the values that each token has."""
        names = self.table.column_names
        return tuple(n.removeprefix(_CHANNEL) for n in names if n.startswith(_CHANNEL))

    def channel(self, name: str) -> Float32[np.ndarray, "M"]:
        """Returns the values of a channel, those of all examples one after the other.

        Those of example i lie in [starts[i], starts[i + 1]).

        Raises:
            DataError: there is no such channel.
        """
        if name not in self.channels:
            raise DataError(f"{self.path} has no channel {name!r}.{nearest(name, self.channels)}")
        if name not in self._flat:
            self._flat[name] = _flat(self.table.column(_CHANNEL + name))
        return self._flat[name]

    @cached_property
    def starts(self) -> Int64[np.ndarray, "N1"]:
        """Where the values of each example begin in a channel, and where those of the last end."""
        return np.concatenate([[0], np.cumsum(self.n_tokens, dtype=np.int64)])

    @cached_property
    def _flat(self) -> dict[str, np.ndarray]:
        return {}


def write_artifact(
    path: str | os.PathLike,
    *,
    keys: Sequence[str],
    names: Sequence[str],
    n_tokens: Sequence[int] | np.ndarray,
    scores: Sequence[float | None] | np.ndarray | None,
    keep: Sequence[bool] | np.ndarray,
    channels: Mapping[str, Sequence[Sequence[float] | np.ndarray]] | None = None,
    meta: Mapping[str, Any],
) -> None:
    """Writes an artifact; a reader finds the old file, or the new one whole.

    Args:
        path: of the file; its folder is made when missing.
        keys: of the examples, `TokenStore.example_key`.
        names: of the examples, for people.
        n_tokens: of each example in the store.
        scores: of the examples; None, NaN and infinities become null.
        keep: which examples to train on.
        channels: name -> for each example as many finite values as it has tokens.
        meta: what made it, as plain JSON values: method, options, tokenizer (its fingerprint),
            stores, model, versions, created, counts.

    Raises:
        DataError: lengths do not fit together, a key occurs twice, or a token's value is not
            finite.
        StorageError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    columns = _columns(path, keys, names, n_tokens, scores, keep, channels or {})
    told = {**json.loads(json.dumps(dict(meta))), "format": _FORMAT}
    told["digest"] = _digest(columns, told)
    text = json.dumps(told, sort_keys=True).encode()
    table = pa.table(columns).replace_schema_metadata({_METADATA: text})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    with storage_errors(path.parent, "create", _REMEDY):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue(), _REMEDY)


def read_artifact(path: str | os.PathLike) -> Artifact:
    """Returns the artifact in a file.

    Raises:
        DataError: there is no such file, it is damaged, or it is no artifact.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()))
        table.validate(full=True)
    except OSError as error:  # pyarrow's errors of damaged pages are OSErrors too
        reason = error.strerror or str(error)
        raise DataError(f"the selection {path} cannot be read: {reason}") from error
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} is no whole Parquet file: {error}") from error
    meta = _meta(path, table)
    types = _types(table.column_names)
    for name in table.column_names:
        if name not in types:
            raise DataError(f"{path} is no selection: column {name!r} is unknown")
    for name, kind in types.items():
        if name not in table.column_names or not table.schema.field(name).type.equals(kind):
            raise DataError(f"{path} is no selection: it has no column {name!r} of {kind}")
        if name != "score" and table.column(name).null_count:
            raise DataError(f"{path} is damaged: column {name!r} holds nulls")
    table = table.combine_chunks()
    artifact = Artifact(table, meta, path)
    if meta.get("digest") != _digest({n: table.column(n) for n in table.column_names}, meta):
        raise DataError(f"{path} is damaged: its contents are not those that were written")
    return artifact


def _meta(path: Path, table: "pa.Table") -> dict[str, Any]:
    try:
        meta = json.loads((table.schema.metadata or {})[_METADATA])
        known = meta["format"]
    except (KeyError, ValueError, TypeError):
        raise DataError(f"{path} is no selection: it was not written by tokjax") from None
    if known != _FORMAT:
        raise DataError(
            f"{path} has format {known}, this version reads {_FORMAT}: make the selection again"
        )
    return meta


def _types(names: Sequence[str]) -> dict[str, Any]:
    import pyarrow as pa

    kinds = {
        "key": pa.string(),
        "name": pa.string(),
        "score": pa.float64(),
        "keep": pa.bool_(),
        "n_tokens": pa.int32(),
    }
    return kinds | {n: pa.list_(pa.float32()) for n in names if n.startswith(_CHANNEL)}


def _columns(path, keys, names, n_tokens, scores, keep, channels) -> dict[str, "pa.Array"]:
    """Returns the columns of a file, checked."""
    import pyarrow as pa

    count = len(keys)
    given = {"names": names, "n_tokens": n_tokens, "keep": keep, **channels}
    given |= {} if scores is None else {"scores": scores}
    for name, values in given.items():
        if len(values) != count:
            raise DataError(f"{path}: {len(values)} {name} for {count} keys")
    if len(set(keys)) < count:
        twice = Counter(keys).most_common(1)[0][0]
        raise DataError(f"{path}: the key {twice!r} occurs twice; an example has one row")
    lengths = np.asarray(n_tokens, np.int64).reshape(count)
    if count and (lengths.min() < 0 or lengths.max() >= 2**31):
        raise DataError(f"{path}: n_tokens holds numbers from {lengths.min()} to {lengths.max()}")
    found = np.full(count, np.nan) if scores is None else np.asarray(list(scores), np.float64)
    columns = {
        "key": pa.array(list(keys), pa.string()),
        "name": pa.array(list(names), pa.string()),
        "score": pa.array(found, pa.float64(), mask=~np.isfinite(found)),
        "keep": pa.array(np.asarray(keep, bool), pa.bool_()),
        "n_tokens": pa.array(lengths.astype(np.int32), pa.int32()),
    }
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for name, values in channels.items():
        own = [np.asarray(v, np.float32).reshape(-1) for v in values]
        for i, (value, length) in enumerate(zip(own, lengths, strict=True)):
            if len(value) != length:
                raise DataError(
                    f"{path}: channel {name!r} has {len(value)} values for the {length} tokens of "
                    f"{names[i]}"
                )
            if not np.isfinite(value).all():
                raise DataError(f"{path}: channel {name!r} of {names[i]} holds NaN or infinity")
        flat = np.concatenate([np.zeros(0, np.float32), *own])
        if starts[-1] < 2**31:
            offsets = pa.array(starts.astype(np.int32))
            columns[_CHANNEL + name] = pa.ListArray.from_arrays(offsets, pa.array(flat))
        else:
            raise DataError(
                f"{path}: channel {name!r} has {starts[-1]} values; an artifact holds at most "
                f"{2**31 - 1}: select from parts of the pool"
            )
    return columns


def _digest(columns: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """Returns the SHA-256 (hex) of the values of columns, whatever their layout, and of `meta`."""
    said = {name: value for name, value in meta.items() if name != "digest"}
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(columns):
        column = columns[name]
        found.update(f"{name}\0{len(column)}\0".encode())
        if name in ("key", "name"):
            found.update(json.dumps(column.to_pylist()).encode())
        elif name.startswith(_CHANNEL):
            found.update(_flat(column).tobytes())
        elif name == "keep":
            found.update(np.asarray(column.to_numpy(zero_copy_only=False), bool).tobytes())
        else:
            kind = np.float64 if name == "score" else np.int32
            found.update(_numbers(column, kind).tobytes())
    return found.hexdigest()


def _numbers(column: Any, kind: Any) -> np.ndarray:
    """Returns a column of numbers, its nulls as NaN."""
    return np.asarray(column.to_numpy(zero_copy_only=False), kind)


def _flat(column: Any) -> np.ndarray:
    """Returns the values of a column of lists, one list after the other."""
    import pyarrow as pa

    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate([np.zeros(0, np.float32), *parts])

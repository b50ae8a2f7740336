"""Reading GGUF files: the metadata, and tensors one at a time, dequantised.

The header is read here rather than by `gguf.GGUFReader`, which makes several arrays for each piece
of a vocabulary (14 s for Gemma's 262,144 where this takes 0.3 s) and maps the whole file, so that
every page that was read counts as this process's own. What the quantisations mean is left to the
package.
"""

import functools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tokjax.errors import CheckpointError, ConfigError, nearest

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
# Types of metadata by their number in the file, as `struct` and NumPy write them.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
# Kinds of tensors that are numbers as they stand; all others are dequantised.
_PLAIN: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
}
_CHUNK = 1 << 20  # numbers that are dequantised at a time
_REQUIRED = object()


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor in a file.

    Attributes:
        file: where it lies.
        name: its name there.
        kind: the name of its quantisation, or of its numbers.
        shape: rows first, as NumPy has it (the file has them last).
        start: of its bytes, from the beginning of the file.
        end: behind its bytes.
    """

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> str:
        """What `read` returns, as safetensors call it; quantised ones become F32."""
        return self.kind if self.kind in _PLAIN else "F32"

    def read(self) -> np.ndarray:
        """Returns the tensor.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        if self.kind in _PLAIN:
            return self._bytes(self.start, self.end).view(_PLAIN[self.kind]).reshape(self.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.kind]
        width = self.shape[-1]
        rows = math.prod(self.shape[:-1])
        found = np.empty((rows, width), np.float32)
        row_bytes = (self.end - self.start) // max(rows, 1)
        step = max(1, _CHUNK // width)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            raw = self._bytes(self.start + first * row_bytes, self.start + last * row_bytes)
            found[first:last] = dequantize(raw.reshape(last - first, row_bytes), kind)
        return found.reshape(self.shape)

    def _bytes(self, start: int, end: int) -> np.ndarray:
        with open(self.file, "rb") as file:
            raw = np.fromfile(file, np.uint8, end - start, offset=start)
        if raw.size != end - start:
            raise CheckpointError(
                f"{self.file} ends inside the tensor {self.name!r}: it changed while being read"
            )
        return raw


@dataclass(frozen=True)
class GGUFFile:
    """What a file says of itself; see `read_gguf`.

    Attributes:
        path: of the file.
        metadata: values by key: numbers, strings, lists of either.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """Returns a value of the metadata.

        Args:
            key: its name.
            kind: the Python type, or types, that it must have.
            default: where there is no such key; without one, that is an error.

        Raises:
            ConfigError: there is no such key, or its value has another type.
        """
        if key not in self.metadata:
            if default is not _REQUIRED:
                return default
            raise ConfigError(
                f"{self.path} has no metadata key {key!r}.{nearest(key, self.metadata)}"
            )
        value = self.metadata[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.path}: the metadata key {key!r} is {_shown(value)}")
        return value


def read_gguf(path: Path) -> GGUFFile:
    """Returns the metadata and the tensors of a file; no tensor is read yet.

    Raises:
        CheckpointError: the file is missing, damaged, cut off, in several parts, or has a tensor
            of an unknown kind; it names the tensor.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise CheckpointError(f"{path} is no whole GGUF file: it has {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data, size).read()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


class _Header:
    """A file's header, read from front to back."""

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size, self.at = path, data, size, 0
        self.place = "header"  # what is being read, for messages

    def read(self) -> GGUFFile:
        if self.data[:4] != _MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file: it begins with {self.data[:4]!r}")
        self.at = 4
        version = self._number("<I")
        if version not in _VERSIONS:
            what = "big-endian" if not version & 0xFFFF else f"of version {version}"
            raise CheckpointError(
                f"{self.path} is {what}; read are little-endian files of the versions 2 and 3"
            )
        n_tensors, n_values = self._number("<Q"), self._number("<Q")
        metadata = {}
        for i in range(n_values):
            self.place = f"metadata key {i + 1} of {n_values}"
            key = self._string()
            self.place = f"metadata key {key!r}"
            metadata[key] = self._value(self._number("<I"))
        if metadata.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{self.path} is one of {metadata['split.count']} parts: merge them to one file "
                f"first (llama-gguf-split --merge)"
            )
        described = {}
        for i in range(n_tensors):
            self.place = f"description of tensor {i + 1} of {n_tensors}"
            name = self._string()
            shape = tuple(self._number("<Q") for _ in range(self._number("<I")))[::-1]
            if name in described:
                raise CheckpointError(f"{self.path} describes the tensor {name!r} twice")
            described[name] = (shape, self._number("<I"), self._number("<Q"))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path} is damaged: its alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {name: self._tensor(name, start, *values) for name, values in described.items()}
        return GGUFFile(self.path, metadata, tensors)

    def _tensor(
        self, name: str, first: int, shape: tuple[int, ...], number: int, offset: int
    ) -> GGUFTensor:
        kind, block, size = _kind(number) or (None, 1, 1)
        if kind is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is quantised in a way (number {number}) that the "
                f"installed package gguf cannot undo: take a file of another quantisation"
            )
        count = math.prod(shape)
        if not shape or shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(shape)} does not consist of whole "
                f"blocks of {block}, as {kind} has them"
            )
        start = first + offset
        end = start + count // block * size
        if end > self.size:
            raise CheckpointError(
                f"{self.path} is cut off: tensor {name!r} should end at byte {end}, the file has "
                f"{self.size}"
            )
        return GGUFTensor(self.path, name, kind, shape, start, end)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._number("<I"), self._number("<Q")
            if inner in _SCALARS:
                dtype = np.dtype(f"<{_SCALARS[inner]}")
                return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()
            if inner == _STRING:
                return [self._string() for _ in range(count)]
            kind = inner
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path} is damaged: the {self.place} has the unknown type {kind}"
            )
        return self._number(f"<{_SCALARS[kind]}")

    def _string(self) -> str:
        raw = self._take(self._number("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self.path} is damaged: the {self.place} has a string that is no UTF-8"
            ) from None

    def _number(self, form: str) -> Any:
        try:
            (value,) = struct.unpack_from(form, self.data, self.at)
        except struct.error:
            raise self._cut_off() from None
        self.at += struct.calcsize(form)
        return value

    def _take(self, count: int) -> bytes:
        if self.at + count > self.size:
            raise self._cut_off()
        raw = self.data[self.at : self.at + count]
        self.at += count
        return raw

    def _cut_off(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is cut off or damaged: it ends inside the {self.place}, at byte "
            f"{self.size}"
        )


@functools.cache
def _kind(number: int) -> tuple[str, int, int] | None:
    """Returns (name, numbers in a block, bytes of a block) of a kind that can be read."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
        if kind.name not in _PLAIN:
            dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return kind.name, block, size


def _shown(value: Any) -> str:
    text = repr(value)
    kind = type(value).__name__
    return f"a {kind}, {text[:60]}{'...' if len(text) > 60 else ''}"

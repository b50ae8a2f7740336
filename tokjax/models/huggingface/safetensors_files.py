"""Reading and writing safetensors checkpoints, one tensor at a time.

The library maps whole files into memory, and every page that was read counts as this process's own;
reading just a tensor's bytes keeps the peak at the parameters themselves plus one tensor.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tokjax.errors import CheckpointError
from tokjax.files import storage_errors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """One tensor in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes, from the beginning of the file
    end: int

    def read(self) -> np.ndarray:
        """Returns the tensor.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        dtype = np.dtype(_DTYPES[self.dtype])
        with open(self.file, "rb") as file:
            flat = np.fromfile(file, dtype, math.prod(self.shape), offset=self.start)
        if flat.size != math.prod(self.shape):
            raise CheckpointError(f"{self.file} ends inside a tensor: it changed while being read")
        return flat.reshape(self.shape)


def find_tensors(folder: Path) -> dict[str, Entry]:
    """Returns every tensor of a checkpoint: one safetensors file, or a folder with one or more.

    Only headers are read; that the files hold what their headers say is checked.

    Raises:
        CheckpointError: there is no such file, or it is damaged, or shards and index disagree.
    """
    if folder.is_file():
        return _header(folder)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return _header(others[0])
    if others:
        raise CheckpointError(
            f"{folder} has {len(others)} safetensors files and no {INDEX}, which says what lies "
            f"where"
        )
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{folder} has only {pickles[0]}, a pickle, which can run code when it is opened: "
            f"convert it to safetensors"
        )
    raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}")


def _sharded(folder: Path) -> dict[str, Entry]:
    path = folder / INDEX
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is damaged: it has no readable 'weight_map'") from None
    found: dict[str, Entry] = {}
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{path} names a file outside its folder: {name!r}")
        if not (folder / name).is_file():
            first = next(tensor for tensor, file in places.items() if file == name)
            raise CheckpointError(
                f"{folder / name} is missing: {path.name} says {first!r} is in it"
            )
        held = _header(folder / name)
        for tensor, file in places.items():
            if file == name and tensor not in held:
                raise CheckpointError(
                    f"{folder / name} has no tensor {tensor!r}: {path.name} says so"
                )
        unlisted = [tensor for tensor in held if places.get(tensor) != name]
        if unlisted:
            raise CheckpointError(
                f"{folder / name} has the tensor {unlisted[0]!r}, which {path.name} does not list "
                f"there"
            )
        found |= held
    return found


def _header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if len(first) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path} is no whole safetensors file: it has {size} bytes, its header alone "
                f"needs {8 + length}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: value for name, value in header.items() if name != "__metadata__"}
        described = {
            name: (value["dtype"], tuple(value["shape"]), *value["data_offsets"])
            for name, value in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} has a damaged header: it is no safetensors file") from None
    found = {}
    for name, (dtype, shape, start, end) in described.items():
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has the dtype {dtype}, which is not read"
            )
        expected = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if end - start != expected:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {list(shape)} and {dtype} should take "
                f"{expected} bytes, its header gives it {end - start}"
            )
        if 8 + length + end > size:
            raise CheckpointError(
                f"{path} is cut off: tensor {name!r} should end at byte {8 + length + end}, the "
                f"file has {size}"
            )
        found[name] = Entry(path, dtype, shape, 8 + length + start, 8 + length + end)
    return found


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], Any]],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes tensors as one safetensors file, or as shards with an index.

    Args:
        folder: where; its files are made anew.
        shapes: name -> (shape, dtype) of every tensor.
        read: returns a tensor by name; called shard by shard.
        max_shard_bytes: a new shard begins where one would grow beyond this.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    shards = list(_shards(shapes, max_shard_bytes))
    places = {}
    for i, names in enumerate(shards):
        name = SINGLE
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(names, name)
        tensors = {n: np.ascontiguousarray(read(n)) for n in names}
        with storage_errors(folder / name):
            try:
                save_file(tensors, folder / name, {"format": "pt"})
            except SafetensorError as error:  # the library wraps the system's error in its own
                raise OSError(str(error)) from error
    if len(shards) > 1:
        total = sum(_bytes(*described) for described in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        with storage_errors(folder / INDEX):
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(shapes: Mapping[str, Any], limit: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, described in shapes.items():
        own = _bytes(*described)
        if names and size + own > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize

"""TensorBoard scalar events, written without TensorFlow, torch or a background thread.

The event file is a sequence of framed protocol buffers. Scalars need four fields of them, so they
are encoded here: the usual writer packages import torch where it is installed (seconds), and hand
events to a thread through a bounded queue, which blocks for ever once that thread has died of a
full disk. Here a full disk is an error in the caller.

Reference: TensorFlow's `event.proto`, `summary.proto` and the TFRecord framing (length, masked
CRC-32C of the length, data, masked CRC-32C of the data).
"""

import functools
import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tokjax.files import AppendFile, storage_errors

_FILES = itertools.count()


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli, bit-reversed
        table.append(byte)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C checksum of `data`.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    number &= 0xFFFFFFFFFFFFFFFF  # negative int64 travel as their two's complement
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _event(wall_time: float, step: int, body: bytes) -> bytes:
    event = b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + body
    length = struct.pack("<Q", len(event))
    return length + _masked_crc(length) + event + _masked_crc(event)


class ScalarEvents:
    """Appends scalars to a new event file in `directory`.

    Args:
        directory: the TensorBoard log directory, made when missing.
        hide_from_step: events of earlier files at this step or later are hidden by TensorBoard,
            as they belong to work that is done again; None hides nothing.

    Raises:
        StorageError: the directory or file cannot be written (also from every method).
    """

    def __init__(self, directory: Path, *, hide_from_step: int | None = None):
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}"
        with storage_errors(directory, "create"):
            directory.mkdir(parents=True, exist_ok=True)
        self._file = AppendFile(directory / f"{name}.{os.getpid()}.{next(_FILES)}")
        records = _event(now, 0, _message(3, b"brain.Event:2"))
        if hide_from_step is not None:
            records += _event(now, hide_from_step, _message(7, b"\x08\x01"))  # session start
        self._file.append(records)

    def write(self, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        """Appends one event with all `scalars` at `step`; survives the death of the process."""
        summary = b"".join(
            _message(1, _message(1, tag.encode()) + b"\x15" + _float32(value))
            for tag, value in scalars.items()
        )
        self._file.append(_event(wall_time, step, _message(5, summary)))

    def sync(self) -> None:
        """Makes everything written survive a power loss."""
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:  # a finite float64 beyond float32's range
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))

"""TensorBoard event files, written directly.

TensorBoard's own writer costs 0.15 s to import once torch is there (several seconds where TensorFlow is installed, which it then
imports), a thread, and about 0.15 ms of interpreter time per row for a checksum in pure Python: too much for runs that last
seconds. The format is small: records of `length, crc(length), data, crc(data)`, the data an `Event` message of
tensorboard/compat/proto/event.proto. The tests read the files back with TensorBoard's own reader, which checks the checksums.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_POLYNOMIAL = np.uint32(0x82F63B78)  # CRC-32C (Castagnoli), reflected: RFC 3720, appendix B.4


class Crc32c:
    """CRC-32C of short messages by table look-up and one XOR reduction.

    The checksum is linear: that of a message is the XOR of what each byte contributes, which depends only on the byte and its
    distance from the end. Row k of the table holds the contributions at distance k.
    """

    def __init__(self) -> None:
        row = np.arange(256, dtype=np.uint32)
        for _ in range(8):
            row = np.where(row & np.uint32(1), (row >> np.uint32(1)) ^ _POLYNOMIAL, row >> np.uint32(1)).astype(np.uint32)
        self._table = row[None]
        self._offsets = np.zeros(1, np.intp)  # where each byte's row begins in the flat table, for a message as long as the table

    def __call__(self, message: bytes) -> int:
        n = len(message)  # at least 4
        if n > len(self._table):
            self._grow(max(n, 2 * len(self._table)))
        data = np.frombuffer(message, np.uint8).astype(np.intp)
        data[:4] ^= 0xFF  # the same as starting from the state 0xFFFFFFFF
        data += self._offsets[-n:]
        return int(np.bitwise_xor.reduce(self._table.reshape(-1)[data])) ^ 0xFFFFFFFF

    def _grow(self, n: int) -> None:
        first = self._table[0]
        rows = list(self._table)
        while len(rows) < n:  # one more zero byte behind
            rows.append((rows[-1] >> np.uint32(8)) ^ first[rows[-1] & np.uint32(0xFF)])
        self._table = np.stack(rows)
        self._offsets = np.arange((n - 1) * 256, -1, -256, dtype=np.intp)


_crc32c = Crc32c()


def _masked(crc: int) -> bytes:
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)  # TFRecord's masking


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a message."""
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


class EventFile:
    """One event file of a run. Each row reaches the operating system before `scalars` returns: a killed process loses none."""

    def __init__(self, folder: str | Path, first_step: int | None = None) -> None:
        """With `first_step`, TensorBoard forgets what earlier files of the folder say of that step and later ones."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._heads: dict[str, bytes] = {}
        self._lengths: dict[int, bytes] = {}  # a record's first two parts, by its length
        # Readers take files in order of name, so a resumed run's file must sort behind the earlier ones, even within a second.
        stamps = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*") if path.name.split(".")[3].isdigit()]
        stamp = max([int(time.time()), *(last + 1 for last in stamps)])
        self.path = folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = open(self.path, "wb", buffering=0)
        self._write(_field(3, b"brain.Event:2"), None)
        if first_step is not None:
            self._write(_field(7, b"\x08\x01"), first_step)  # SessionLog, status START

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event with these values."""
        parts = []
        for tag, value in values.items():
            head = self._heads.get(tag)
            if head is None:  # Summary.Value: 1 the tag, 2 the value, always 5 bytes
                body = _field(1, tag.encode())
                head = self._heads[tag] = b"\x0a" + _varint(len(body) + 5) + body + b"\x15"
            try:
                parts.append(head + struct.pack("<f", value))
            except OverflowError:
                parts.append(head + struct.pack("<f", float("inf") if value > 0 else float("-inf")))
        self._write(_field(5, b"".join(parts)), step)

    def sync(self) -> None:
        """Everything so far is on the disk when this returns."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, what: bytes, step: int | None) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + (b"" if step is None else b"\x10" + _varint(step)) + what
        frame = self._lengths.get(len(event))
        if frame is None:
            length = struct.pack("<Q", len(event))
            frame = self._lengths[len(event)] = length + _masked(_crc32c(length))
        self._file.write(frame + event + _masked(_crc32c(event)))

"""TFRecord files by position: framing, checksums, and the index that makes record `i` one read.

A record is `uint64 length | uint32 masked crc32c(length) | bytes | uint32 masked crc32c(bytes)`, little
endian (tensorflow/core/lib/io/record_writer). The index is the text that `tfrecord2idx` writes and DALI
reads: a line `offset size` a record, both in bytes and both counting the 16 bytes of framing.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import threading
from collections.abc import Iterable, Iterator

import google_crc32c
import numpy as np
from etils import epath

HEADER_BYTES = 12
FRAMING_BYTES = 16


class DamagedRecordError(ValueError):
    """A record whose checksum does not fit its bytes, or that ends before its length says."""


def masked_crc(data: bytes | memoryview) -> int:
    crc = google_crc32c.value(bytes(data) if isinstance(data, memoryview) else data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame_record(payload: bytes) -> bytes:
    """The bytes of one record in a file, framing included."""
    length = struct.pack('<Q', len(payload))
    return b''.join((length, struct.pack('<I', masked_crc(length)), payload, struct.pack('<I', masked_crc(payload))))


def check_record(header: bytes, payload: bytes, footer: bytes, size: int, where: str) -> bytes:
    """The payload of a record of `size` framed bytes; raises `DamagedRecordError` naming `where`."""
    if len(header) + len(payload) + len(footer) != size or size < FRAMING_BYTES:
        raise DamagedRecordError(f'{where}: the record is cut short.')
    (length,) = struct.unpack_from('<Q', header)
    (length_crc,) = struct.unpack_from('<I', header, 8)
    if length_crc != masked_crc(header[:8]) or length != len(payload):
        raise DamagedRecordError(f'{where}: the length of the record is damaged.')
    if struct.unpack('<I', footer)[0] != masked_crc(payload):
        raise DamagedRecordError(f'{where}: the checksum of the record does not fit its bytes.')
    return payload


def unframe_record(framed: bytes, where: str) -> bytes:
    """The payload of one framed record; raises `DamagedRecordError` naming `where`."""
    return check_record(framed[:HEADER_BYTES], framed[HEADER_BYTES:-4], framed[-4:], len(framed), where)


def scan_records(path: epath.PathLike) -> Iterator[tuple[int, int, bytes]]:
    """Walks a file from front to back: (offset, framed size, payload) of each record, checked."""
    offset = 0
    with epath.Path(path).open('rb') as file:
        while header := file.read(HEADER_BYTES):
            where = f'{path} at byte {offset}'
            if len(header) < HEADER_BYTES or struct.unpack_from('<I', header, 8)[0] != masked_crc(header[:8]):
                raise DamagedRecordError(f'{where}: the length of the record is damaged.')
            size = struct.unpack_from('<Q', header)[0] + FRAMING_BYTES
            yield offset, size, unframe_record(header + file.read(size - HEADER_BYTES), where)
            offset += size


def format_index(sizes: Iterable[int]) -> str:
    """The index text of records of these framed sizes, lying one after the other."""
    lines, offset = [], 0
    for size in sizes:
        lines.append(f'{offset} {size}\n')
        offset += size
    return ''.join(lines)


def parse_index(text: str, where: str) -> np.ndarray:
    """int64 [records 2]: offset and framed size of each record."""
    try:
        index = np.array(text.split(), np.int64).reshape(-1, 2)
    except ValueError as error:
        raise ValueError(f'{where} is no index: it wants a line "offset size" for each record.') from error
    ends = index[:, 0] + index[:, 1]
    if len(index) and (index[0, 0] != 0 or (index[1:, 0] != ends[:-1]).any()):
        raise ValueError(f'{where}: its records do not lie one after the other; write the index anew.')
    return index


def read_index(path: epath.PathLike) -> np.ndarray:
    return parse_index(epath.Path(path).read_text(), os.fspath(path))


def scan_index(path: epath.PathLike) -> np.ndarray:
    """int64 [records 2] of a file without an index, from its framing alone: the payloads are not read."""
    file = TFRecordFile(path, np.zeros((0, 2), np.int64))
    num_bytes = epath.Path(path).stat().length
    rows, offset = [], 0
    while offset < num_bytes:
        header = file.pread(offset, HEADER_BYTES)
        if len(header) < HEADER_BYTES or struct.unpack_from('<I', header, 8)[0] != masked_crc(header[:8]):
            raise DamagedRecordError(f'{path} at byte {offset}: the length of the record is damaged.')
        size = struct.unpack_from('<Q', header)[0] + FRAMING_BYTES
        if offset + size > num_bytes:
            raise DamagedRecordError(f'{path} at byte {offset}: the record ends behind the file.')
        rows.append((offset, size))
        offset += size
    return np.array(rows, np.int64).reshape(-1, 2)


class TFRecordFile:
    """Random access to the records of one file. Safe to share between threads; pickles without its descriptor."""

    def __init__(self, path: epath.PathLike, index: np.ndarray):
        self.path = os.fspath(path)
        self.index = index
        self._local = '://' not in self.path
        self._fd: int | None = None
        self._opening = threading.Lock()

    def __reduce__(self):
        return TFRecordFile, (self.path, self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __del__(self, close=os.close):  # As a default, since `os` may be gone when the program ends.
        if self._fd is not None:
            close(self._fd)

    def _descriptor(self) -> int:
        if self._fd is None:
            with self._opening:
                if self._fd is None:
                    self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return self._fd

    def pread(self, offset: int, size: int) -> bytes:
        if self._local:
            return os.pread(self._descriptor(), size, offset)
        with epath.Path(self.path).open('rb') as file:
            file.seek(offset)
            return file.read(size)

    def where(self, i: int) -> str:
        return f'{self.path} at byte {int(self.index[i, 0])} (record {i})'

    def __getitem__(self, i: int) -> bytes:
        offset, size = (int(x) for x in self.index[i])
        if not self._local:
            return unframe_record(self.pread(offset, size), where=self.where(i))
        # Three reads, so that the payload is read where it stays; cutting it out would copy megabytes.
        fd = self._descriptor()
        try:
            header = os.pread(fd, HEADER_BYTES, offset)
            payload = os.pread(fd, max(0, size - FRAMING_BYTES), offset + HEADER_BYTES)
            footer = os.pread(fd, 4, offset + size - 4)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedRecordError(f'{self.where(i)}: the disk cannot read it ({error}).') from error
        return check_record(header, payload, footer, size, where=self.where(i))

    def framing_digest(self) -> str:
        """sha256 over every record's length and checksums: finds an exchanged or cut file in 16 bytes a record.

        It does not read the payloads: a flipped bit in one is found by its checksum when it is read.
        """
        digest = hashlib.sha256()
        if len(self.index):
            digest.update(self.pread(0, HEADER_BYTES))
        for end in self.index.sum(axis=1):
            # The checksum at the end of a record and the header of the next one lie side by side.
            digest.update(self.pread(int(end) - 4, FRAMING_BYTES))
        return digest.hexdigest()

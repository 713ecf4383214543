"""The memory that batches are computed into: one slot a batch, handed to the consumer without a copy.

Where several processes share slots they lie in an anonymous file (memfd): it is not bounded by /dev/shm, which is
64 MB in many containers, has no name that could be left behind, and goes when the last process does. Where the
system has none, an unlinked file in /dev/shm serves, whose size is checked first.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

_ALIGNMENT = 64  # Of arrays in a slot; jax on CPU takes arrays so aligned without a copy.
_SHM = Path('/dev/shm')

Span = tuple[int, int]  # Offset and size in bytes, within a slot.


def slot_bytes(make_arrays: Callable[[Callable], Any]) -> int:
    """Size of a slot for the arrays that `make_arrays(empty)` makes by empty(shape, dtype)."""
    sizes: list[int] = []

    def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        sizes.append(_num_bytes(shape, dtype))
        return np.broadcast_to(np.empty((), dtype), shape)

    make_arrays(empty)
    return _round_up(sum(_round_up(size, _ALIGNMENT) for size in sizes), mmap.PAGESIZE)


class Slot:
    """Memory for the arrays of one batch, made one behind the other."""

    def __init__(self, memory: np.ndarray):
        self._memory = memory
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array in the slot; elsewhere, once it is full."""
        size = _num_bytes(shape, dtype)
        at = self._used
        if at + size > len(self._memory):
            return np.empty(shape, dtype)
        self._used += _round_up(size, _ALIGNMENT)
        return self._memory[at : at + size].view(dtype).reshape(shape)

    def pickle(self, element: Any) -> tuple[bytes, list[Span]]:
        """An element, and where the bytes of its arrays lie; only those outside the slot are copied."""
        spans: list[Span] = []
        begin = self._memory.ctypes.data

        def stays(buffer: pickle.PickleBuffer) -> bool:
            raw = np.frombuffer(buffer.raw(), np.uint8)
            at = raw.ctypes.data - begin
            inside = 0 <= at and at + len(raw) <= len(self._memory)
            if inside:
                spans.append((at, len(raw)))
            return not inside

        return pickle.dumps(element, protocol=5, buffer_callback=stays), spans


def unpickle(element: bytes, spans: list[Span], memory: np.ndarray) -> Any:
    """The element whose arrays lie at `spans` of `memory`; they look into it."""
    return pickle.loads(element, buffers=[memory[at : at + size] for at, size in spans])


def lend(memory: mmap.mmap, offset: int, size: int, give_back: Callable, *arguments: Any) -> np.ndarray:
    """The bytes at `offset`; `give_back(*arguments)` is called when the last view of them is gone."""
    # A new array for each loan: all that is cut from it refers to it, whoever holds it, jax included.
    lent = np.frombuffer(memory, np.uint8, count=size, offset=offset)
    weakref.finalize(lent, give_back, *arguments).atexit = False
    return lent


def _num_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def make_shared_file(num_bytes: int) -> int:
    """The descriptor of a nameless file in memory; checked to have room, since running out later is a SIGBUS."""
    found = available_memory()
    if found is not None and found < num_bytes:
        raise ValueError(
            f'the loader needs {num_bytes:,} bytes of memory to hand batches over and this machine has {found:,} '
            f'available: use fewer workers (num_workers) or a smaller batch_size.'
        )
    if hasattr(os, 'memfd_create'):
        try:
            fd = os.memfd_create('avmae_jax-batches', os.MFD_CLOEXEC)
            os.ftruncate(fd, num_bytes)
            return fd
        except OSError as error:
            logging.info('No anonymous memory (%s); batches go through %s.', error, _SHM)
    folder = _SHM if _SHM.is_dir() else Path(tempfile.gettempdir())
    status = os.statvfs(folder)
    found = status.f_bavail * status.f_frsize
    if found < num_bytes:
        raise ValueError(
            f'the loader needs {num_bytes:,} bytes of shared memory and {folder} has {found:,}: enlarge it (docker run '
            f'--shm-size=...; an emptyDir of medium Memory), use fewer workers (num_workers) or a smaller batch_size.'
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return os.dup(file.fileno())


def available_memory() -> int | None:
    """Bytes that can be had without swapping, by the machine and by the limit of its container; None if unknown."""
    found = []
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable:')]
        limit = Path('/sys/fs/cgroup/memory.max').read_text().strip()
        found += [int(limit)] if limit.isdigit() else []
    except OSError:
        pass
    return min(found, default=None)

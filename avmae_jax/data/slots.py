"""The memory that batches are computed into: one slot a batch, handed to the consumer without a copy.

Where several processes share slots they lie in an anonymous file (memfd): it is not bounded by /dev/shm, which is
64 MB in many containers, has no name that could be left behind, and goes when the last process does. Where the
system has none, an unlinked file in /dev/shm serves, whose size is checked first.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging

from avmae_jax.data.views import ArraySpec
from avmae_jax.structs import Batch

_ALIGNMENT = 64  # Of arrays in a slot; jax on CPU takes arrays so aligned without a copy.
_SHM = Path('/dev/shm')

Rows = dict[str, np.ndarray]
Damaged = list[tuple[int, str]]  # (record, where and why)


@runtime_checkable
class Batches(Protocol):
    """A sequence of batches that can be computed into given memory; pickles."""

    clips_per_host: int

    @property
    def num_records(self) -> int: ...

    def layout(self) -> dict[str, ArraySpec]: ...

    def fill(self, step: int, rows: Rows, run: Callable) -> Damaged: ...

    def as_batch(self, rows: Rows) -> Batch: ...

    def describe(self, step: int) -> str: ...


class Slots:
    """Where the arrays of a batch lie within one piece of memory, and the loans of such pieces."""

    def __init__(self, layout: dict[str, ArraySpec]):
        self.places: dict[str, tuple[int, ArraySpec]] = {}
        self.num_bytes = 0
        for name, spec in layout.items():
            self.places[name] = (self.num_bytes, spec)
            size = int(np.prod(spec.shape)) * spec.dtype.itemsize
            self.num_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = -(-self.num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE

    def arrays(self, slot: np.ndarray) -> Rows:
        """The arrays of a batch as views of the bytes of a slot."""
        found = {}
        for name, (at, spec) in self.places.items():
            size = int(np.prod(spec.shape)) * spec.dtype.itemsize
            found[name] = slot[at : at + size].view(spec.dtype).reshape(spec.shape)
        return found

    def lend(self, memory: mmap.mmap, offset: int, give_back: Callable, *arguments: Any) -> Rows:
        """The arrays at `offset`; `give_back(*arguments)` is called when the last view of any of them is gone."""
        # A new array for each loan: all that is cut from it refers to it, whoever holds it, jax included.
        slot = np.frombuffer(memory, np.uint8, count=self.num_bytes, offset=offset)
        weakref.finalize(slot, give_back, *arguments).atexit = False
        return self.arrays(slot)


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

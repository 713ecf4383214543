"""Elements of a grain dataset computed ahead of time by worker processes, into shared memory.

A worker is a fresh interpreter, `python -m avmae_jax.data.workers`, not a fork: a process that runs jax must not
be forked, and a fresh one can be kept free of jax and TensorFlow (2.4 s and 530 MB each). Worker w of W computes
the steps first + w, first + w + W, ... whole, in threads, straight into its slots of one shared memory; what a
transformation makes elsewhere goes through a pipe. The parent hands the slots out in the order of steps without
copying them, and a slot goes back to its worker when the last array that looks into it is gone; a consumer that
holds on to many batches gets copies instead.
"""

from __future__ import annotations

import collections
import gc
import mmap
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
from absl import logging

from avmae_jax.data.slots import Slot, lend, make_shared_file, unpickle
from avmae_jax.data.threads import ThreadMap, compute
from avmae_jax.data.workbench import Damaged


class LoaderError(RuntimeError):
    """The loader cannot go on: a worker died or failed, or nothing has arrived for too long."""


class StalledError(LoaderError):
    """Nothing has arrived for too long; it may be otherwise when tried again."""


class TooManyDamagedError(ValueError):
    """More records are damaged than the run accepts."""


MAX_DEFAULT_WORKERS = 16  # Each holds two batches; with two threads, 16 feed eight of the largest accelerators.


def default_num_workers(num_threads: int) -> int:
    """Workers for the cores that this process may use, two of them left to the step; 0 where there are no more."""
    spare = usable_cores() - 2
    # On two cores, threads of this process cost less than processes.
    return min(MAX_DEFAULT_WORKERS, -(-spare // num_threads)) if spare > 0 else 0


def usable_cores() -> int:
    """Cores by the affinity of this process and the limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
        return cores if quota == 'max' else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


class _Job(NamedTuple):
    """What a worker is told, besides the descriptors on its command line."""

    dataset: Any  # A grain.MapDataset; importing grain here, before jax is kept out, would import jax.
    steps: range
    num_workers: int
    num_threads: int
    num_slots: int
    slot_bytes: int
    offset: int  # Of the slots in the shared file, behind this job.
    parent: int


class _Worker(NamedTuple):
    process: subprocess.Popen
    messages: multiprocessing.connection.Connection  # From the worker: what it has finished.
    returns: socket.socket  # To the worker: one byte, the number of a slot that is free again.


class Processes:
    """Worker processes, and the slots they fill."""

    def __init__(self, dataset: Any, steps: range, num_bytes: int, num_workers: int, num_threads: int):
        self._slot_bytes = num_bytes
        # One to fill while the other is in use; with one worker a loop still holds a batch when it asks for the next.
        self._num_slots = 2 if num_workers > 1 else 3
        self._lent: list[set[int]] = [set() for _ in range(num_workers)]
        self._ready: dict[int, tuple] = {}
        self._workers: list[_Worker] = []
        job = _Job(dataset, steps, num_workers, num_threads, self._num_slots, num_bytes, 0, os.getpid())
        # As grain does for its workers: plain pickle knows neither lambdas nor the classes of a notebook.
        size = len(cloudpickle.dumps(job)) + 64  # The offset, once known, makes it a few bytes longer.
        offset = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        job_bytes = cloudpickle.dumps(job._replace(offset=offset))
        file_bytes = offset + num_workers * self._num_slots * num_bytes
        fd = make_shared_file(file_bytes)
        try:
            self._memory = mmap.mmap(fd, file_bytes)
            self._memory[: len(job_bytes)] = job_bytes
            self._offset = offset
            for index in range(num_workers):
                self._workers.append(_start_worker(index, fd))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(fd)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def get(self, position: int, timeout: int | float) -> tuple[Any, Damaged] | None:
        deadline = time.monotonic() + timeout
        while position not in self._ready:
            left = deadline - time.monotonic()
            connections = [worker.messages for worker in self._workers]
            arrived = multiprocessing.connection.wait(connections, timeout=max(0.0, left))
            if not arrived:
                return None
            for index, connection in enumerate(connections):
                if connection in arrived:
                    self._receive(index)
        slot, element, spans, damaged = self._ready.pop(position)
        return unpickle(element, spans, self._take(position % len(self._workers), slot)), damaged

    def _receive(self, index: int) -> None:
        try:
            kind, position, *content = self._workers[index].messages.recv()
        except (EOFError, OSError):
            raise LoaderError(self._obituary(index)) from None
        if kind == 'ready':
            self._ready[position] = tuple(content)
        elif kind == TooManyDamagedError.__name__:
            raise TooManyDamagedError(content[0])
        else:
            raise LoaderError(f'loader worker {index} failed:\n{content[1]}')

    def _take(self, worker: int, slot: int) -> np.ndarray:
        at = self._offset + (worker * self._num_slots + slot) * self._slot_bytes
        returns = self._workers[worker].returns
        if len(self._lent[worker]) < self._num_slots - 1:
            self._lent[worker].add(slot)
            return lend(self._memory, at, self._slot_bytes, self._end_loan, self._lent, worker, returns, slot)
        # The worker would be left without a slot: the consumer keeps many batches.
        copy = np.frombuffer(self._memory, np.uint8, count=self._slot_bytes, offset=at).copy()
        _return_slot(returns, slot)
        return copy

    @staticmethod
    def _end_loan(lent: list[set[int]], worker: int, returns: socket.socket, slot: int) -> None:
        # Any thread may come here at any moment, when it happens to collect the last view: no locks, single steps only.
        lent[worker].discard(slot)
        _return_slot(returns, slot)

    def _obituary(self, index: int) -> str:
        """How a worker ended."""
        process = self._workers[index].process
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return f'loader worker {index} (pid {process.pid}) closed its pipe but goes on running.'
        if code >= 0:
            return f'loader worker {index} (pid {process.pid}) ended with exit code {code}; its error is printed above.'
        hints = {
            signal.SIGKILL: 'often the system when memory runs out: use fewer workers (num_workers)',
            signal.SIGBUS: 'often a file that became shorter while it was read, or shared memory that ran out',
            signal.SIGSEGV: 'a bug in a decoder: note the step and the records around it',
        }
        name = signal.Signals(-code).name
        hint = hints.get(signal.Signals(-code), 'by whom is not known here')
        return f'loader worker {index} (pid {process.pid}) was killed by signal {-code} ({name}): {hint}.'

    def describe(self, position: int) -> str:
        index = position % len(self._workers)
        pid = self._workers[index].process.pid
        states = {'D': 'waiting for a disk', 'T': 'stopped by a signal', 'S': 'sleeping', 'R': 'running'}
        try:
            state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
        except OSError:
            state = 'unknown'
        return f'loader worker {index} (pid {pid}, {states.get(state, "state " + state)})'

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()  # It holds nothing that would have to be put in order.
            worker.messages.close()
            worker.returns.close()
        for worker in self._workers:
            try:
                worker.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                logging.warning('Loader worker %d does not end; it hangs in a read.', worker.process.pid)
        self._workers = []


def _return_slot(returns: socket.socket, slot: int) -> None:
    try:
        returns.send(bytes([slot]))
    except OSError:
        pass  # The worker is gone, and so is the need.


def _start_worker(index: int, shared_fd: int) -> _Worker:
    messages, their_messages = multiprocessing.connection.Pipe(duplex=False)
    returns, their_returns = socket.socketpair()
    with their_messages, their_returns:
        fds = (shared_fd, their_messages.fileno(), their_returns.fileno())
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(dict.fromkeys([root, *(entry for entry in sys.path if entry)]))
        environment = {
            **os.environ,
            'PYTHONPATH': path,
            # glibc would return the memory of each decoded clip to the system and fetch it anew: 6-18 % of the time.
            'MALLOC_MMAP_THRESHOLD_': str(1 << 30),
            'MALLOC_TRIM_THRESHOLD_': str(1 << 32),
            'MALLOC_TOP_PAD_': str(1 << 26),
            'OMP_NUM_THREADS': '1',
            'OPENBLAS_NUM_THREADS': '1',
        }
        # -P: the current folder is not searched for modules, unless it was before.
        command = [sys.executable, '-P', '-m', 'avmae_jax.data.workers', str(index), *map(str, fds)]
        process = subprocess.Popen(command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL)
    return _Worker(process, messages, returns)


def work(index: int, shared_fd: int, messages_fd: int, returns_fd: int) -> None:
    """The life of a worker: fills its slots with its steps, until there are no more or the parent is gone."""
    # An interrupt at the terminal, or a cluster's SIGTERM to all processes, is for the parent to deal with: it may
    # want further batches until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    messages = multiprocessing.connection.Connection(messages_fd, readable=False)
    returns = socket.socket(fileno=returns_fd)
    memory = mmap.mmap(shared_fd, 0)
    os.close(shared_fd)
    try:
        try:
            job: _Job = pickle.loads(memory)
            gc.freeze()  # The collector need not look again and again at all that grain has loaded.
            _fill_slots(index, job, memory, messages, returns)
        except (BrokenPipeError, ConnectionError):
            return  # The parent has closed the stream.
        except BaseException as error:
            messages.send((type(error).__name__, -1, str(error), traceback.format_exc()))
    except (BrokenPipeError, ConnectionError):
        return


def _fill_slots(index: int, job: _Job, memory: mmap.mmap, messages, returns: socket.socket) -> None:
    first = job.offset + index * job.num_slots * job.slot_bytes
    free = collections.deque(range(job.num_slots))
    run = ThreadMap(job.num_threads)
    for position in range(index, len(job.steps), job.num_workers):
        while not free:
            free.extend(_receive_slots(returns, job.parent))
        number = free.popleft()
        at = first + number * job.slot_bytes
        slot = Slot(np.frombuffer(memory, np.uint8, count=job.slot_bytes, offset=at))
        element, damaged = compute(job.dataset, job.steps[position], slot, run)
        messages.send(('ready', position, number, *slot.pickle(element), damaged))
        del element, slot
    while True:  # The parent still reads from the slots; the end of the stream ends this process.
        _receive_slots(returns, job.parent)


def _receive_slots(returns: socket.socket, parent: int) -> bytes:
    returns.settimeout(5)
    while True:
        try:
            received = returns.recv(64)
        except TimeoutError:
            if os.getppid() == parent:
                continue
            received = b''
        if not received:
            raise ConnectionError('the parent is gone')
        return received


if __name__ == '__main__':
    # grain imports jax where it finds it, does without where not, and warns of that.
    sys.modules['jax'] = None  # type: ignore[assignment]
    logging.set_verbosity(logging.ERROR)
    work(*map(int, sys.argv[1:]))

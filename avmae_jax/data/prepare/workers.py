"""Processes that go through rows and may be killed at any one: by the time limit, by a decoder, by the kernel.

Decoders are C code that can hang or crash, and nothing inside a process can stop that. So each worker is
a process of its own, started as `python -m avmae_jax.data.prepare.workers` (not through multiprocessing,
which would run the caller's main module again), and the parent holds the clock. When a worker dies, another
takes its task over at the next row; the row it died of is lost, and its task says what that means.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from avmae_jax.data.prepare import clips, decode

START_SECONDS = 120.0  # To import what a worker needs, on the slowest disk we have met.


class Task(Protocol):
    """Rows to go through in order. Pickled to a worker; `shards.ShardTask` is the usual one."""

    rows: list[clips.ClipRow]
    settings: clips.Settings

    def work(self, done: list, report: Callable[[Any], None], starting: Callable[[], None]) -> None:
        """Goes on behind the `done` results of an earlier process; calls `starting` and `report` for each row."""

    def lost(self, row: clips.ClipRow, reason: str, detail: str) -> Any:
        """The result of a row whose process died."""


class _Worker:
    """One process with what it is doing."""

    def __init__(self, memory_gb: float, lock_fd: int | None):
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        root = str(Path(__file__).resolve().parents[3])
        environment['PYTHONPATH'] = os.pathsep.join([root, *filter(None, [environment.get('PYTHONPATH')])])
        # One thread each: there is a worker for every core.
        environment.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
        environment['OPENCV_IO_MAX_IMAGE_PIXELS'] = str(decode.MAX_PIXELS)
        self._errors = tempfile.TemporaryFile()
        command = [sys.executable, '-m', 'avmae_jax.data.prepare.workers', str(theirs.fileno()), str(memory_gb)]
        # The lock of the folder is inherited: it stays held until the last worker of a killed job is gone.
        fds = (theirs.fileno(),) + ((lock_fd,) if lock_fd is not None else ())
        self.process = subprocess.Popen(
            command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL, stderr=self._errors, stdout=self._errors
        )
        theirs.close()
        self.channel: connection.Connection = connection.Connection(ours.detach())
        self.task: Any = None  # A Task; None while idle.
        self.done: list[Any] = []
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS
        self.tried_again: set[int] = set()

    def give(self, task: Any, done: list[Any], tried_again: set[int]) -> None:
        self.task, self.done, self.tried_again = task, done, tried_again
        self.deadline = time.monotonic() + START_SECONDS
        self.channel.send((task, done))

    def words(self) -> str:
        """The end of what it wrote before it died."""
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        return self._errors.read().decode(errors='replace').strip()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()
        self._errors.close()


def run_tasks(
    tasks: Iterable[Any],
    num_workers: int,
    on_row: Callable[[Any, Any], None],
    lock_fd: int | None = None,
    on_task: Callable[[Any], None] = lambda task: None,
) -> None:
    """Runs all tasks with so many processes. Returns when all are done.

    Args:
      on_row: hears of every row, as (task, result).
      on_task: hears of every task that is through.
    """
    waiting: deque = deque((task, [], set()) for task in tasks)
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task for worker in workers):
            while len(workers) < min(num_workers, len(waiting) + sum(worker.task is not None for worker in workers)):
                workers.append(_Worker(_memory_gb(waiting, workers), lock_fd))
            for worker in workers:
                if worker.ready and worker.task is None and waiting:
                    worker.give(*waiting.popleft())
            now = time.monotonic()
            busy = [worker for worker in workers if worker.task is not None or not worker.ready]
            pause = min([worker.deadline - now for worker in busy] + [1.0])
            connection.wait([worker.channel for worker in workers], timeout=max(pause, 0.0))
            for worker in list(workers):
                ended = _listen(worker, on_row, on_task)
                late = not ended and (worker.task is not None or not worker.ready)
                if late and time.monotonic() > worker.deadline:
                    ended = 'timeout'
                if ended:
                    workers.remove(worker)
                    _bury(worker, ended, waiting, on_row)
    finally:
        for worker in workers:
            worker.end()


def _memory_gb(waiting: deque, workers: list[_Worker]) -> float:
    for task in [entry[0] for entry in waiting] + [worker.task for worker in workers]:
        if task is not None:
            return task.settings.memory_gb
    raise AssertionError('a worker is started only when there is work')


def _listen(worker: _Worker, on_row: Callable[[Any, Any], None], on_task: Callable[[Any], None]) -> str:
    """Takes in what the worker has said; returns 'crash' when it is dead."""
    try:
        while worker.channel.poll():
            kind, value = worker.channel.recv()
            if kind == 'ready':
                worker.ready = True
            elif kind == 'start':
                assert worker.task is not None
                worker.deadline = time.monotonic() + worker.task.settings.timeout_seconds
            elif kind == 'row':
                assert worker.task is not None
                worker.done.append(value)
                worker.deadline = time.monotonic() + START_SECONDS
                on_row(worker.task, value)
            elif kind == 'finished':
                task, worker.task = worker.task, None
                on_task(task)
            elif kind == 'os_error':
                raise OSError(*value)  # The disk is full, or its folder is gone.
            elif kind == 'error':
                raise RuntimeError(f'a worker of prepare failed (this is an error of ours, not of a file):\n{value}')
    except (EOFError, ConnectionError, pickle.UnpicklingError):
        return 'crash'
    return ''


def _bury(worker: _Worker, reason: str, waiting: deque, on_row: Callable[[Any, Any], None]) -> None:
    """The clip that a worker died of becomes a failure (a crash only the second time); its shard goes on."""
    # A process that was killed for the memory of another is innocent: hence the second try.
    started = worker.ready
    worker.process.kill()
    code = worker.process.wait()
    words = worker.words()
    worker.end()
    if not started:
        raise RuntimeError(f'a worker of prepare could not start ({reason}, exit status {code}):\n{words}')
    if worker.task is None:
        return
    task, done, tried_again = worker.task, worker.done, worker.tried_again
    at = len(done)
    if at < len(task.rows) and (reason == 'timeout' or at in tried_again):
        if reason == 'timeout':
            detail = f'killed after {task.settings.timeout_seconds:g} s'
        else:
            detail = f'the process died of {_signal_name(code)}'
        done.append(task.lost(task.rows[at], reason, detail))
        on_row(task, done[-1])
    elif at in tried_again:
        raise RuntimeError(f'{task!s:.200} could not be finished, twice (exit status {code}):\n{words}')
    waiting.appendleft((task, done, tried_again | {at}))


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f'exit status {code}'
    except ValueError:
        return f'signal {-code}'


# -- Inside the worker --


def _work(channel: connection.Connection) -> None:
    import traceback

    channel.send(('ready', None))
    while True:
        task, done = channel.recv()
        try:
            task.work(
                done, report=lambda row: channel.send(('row', row)), starting=lambda: channel.send(('start', None))
            )
        except ConnectionError:
            raise
        except OSError as error:  # Not of a medium: those are results.
            channel.send(('os_error', (error.errno, error.strerror, str(error.filename or ''))))
            return
        except Exception:  # Whatever it is, the parent shall hear of it.
            channel.send(('error', traceback.format_exc()))
            return
        channel.send(('finished', None))


def _die_with_parent() -> None:
    """Linux: a worker that hangs in a decoder when its parent is killed would hold the folder's lock for ever."""
    parent_death_signal = 1  # PR_SET_PDEATHSIG
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def main(argv: list[str]) -> None:
    import cv2

    fd, memory_gb = int(argv[1]), float(argv[2])
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us.
    cv2.setNumThreads(0)
    limit = int(memory_gb * 2**30)
    # A picture of 60,000 x 60,000 shall meet a MemoryError here, not the machine's out-of-memory killer.
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _work(connection.Connection(fd))
    except (EOFError, ConnectionError):
        pass  # The parent is gone or has no more work.


def lock_folder(path: Path, output: str, wait_seconds: float = 15.0) -> Any:
    """An exclusive lock on a file, as long as the returned file is open; waits for a killed job's workers to go."""
    file = open(path, 'w')
    until = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > until:
                file.close()
                raise ValueError(f'{output} is being written by another run of prepare.') from None
            time.sleep(0.2)


if __name__ == '__main__':
    main(sys.argv)

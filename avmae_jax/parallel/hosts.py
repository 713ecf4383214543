"""What several processes do together: start up, hand in their rows, agree that it is time to stop."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging as python_logging
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

# A cluster that jax recognises by itself, and the variable that says it has more than one process.
CLUSTER_VARIABLES = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'TPU_WORKER_HOSTNAMES', 'JAX_COORDINATOR_ADDRESS')
# What jax sets, as it is imported, on a machine with TPU chips. Whether they are part of a slice or of several, the
# environment of a Cloud TPU VM does not say, but its metadata, which jax then asks.
ON_TPU = 'TPU_ML_PLATFORM'

SLOW_SECONDS = 1800.0  # Of the watchdog, for what is no step. To compile the largest models takes minutes.
_TELL_SECONDS = 10.0

# glibc's malloc.h: option number -> value in bytes.
_MALLOPT = {-1: 2**31 - 1, -2: 1 << 26, -3: 1 << 30}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD.


def keep_freed_memory() -> None:
    """Has this process keep memory that it frees; call before arrays are made.

    glibc gives large buffers back to the system and gets them anew, zeroed page by page, in every step: a fifth of
    the CPU time of a small step on CPU. Elsewhere than glibc nothing happens. See mallopt(3).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        for option, value in _MALLOPT.items():
            libc.mallopt(option, value)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 100,
) -> None:
    """Joins the processes of this job; call before the first use of a device.

    A single process joins a job of one: only a process of a job learns of SIGTERM in time to save.
    Without arguments the cluster is recognised (Slurm, Open MPI, Cloud TPU); without one this is the only process.

    Args:
      heartbeat_seconds: the others of a process that was not heard of for so long end.
    """
    if heartbeat_seconds < 1:
        raise ValueError(f'heartbeat_seconds={heartbeat_seconds} must be at least 1.')
    more: dict[str, Any] = {'heartbeat_timeout_seconds': int(heartbeat_seconds)}
    if coordinator is not None or num_processes is not None or process_id is not None:
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError(
                f'--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: '
                'give all three or none.'
            )
        jax.distributed.initialize(
            coordinator, num_processes, process_id, cluster_detection_method='deactivate', **more
        )
    elif ON_TPU in os.environ or any(_several(os.environ.get(name)) for name in CLUSTER_VARIABLES):
        jax.distributed.initialize(**more)
    else:
        # One process has nobody to talk to, and gloo wants the host's own name to resolve, which it may not.
        jax.config.update('jax_cpu_collectives_implementation', None)
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        jax.distributed.initialize(
            f'127.0.0.1:{port}',
            1,
            0,
            cluster_detection_method='deactivate',
            coordinator_bind_address=f'127.0.0.1:{port}',
            **more,
        )


def _several(value: str | None) -> bool:
    """Whether the value of one of CLUSTER_VARIABLES tells of more than one process."""
    if not value:
        return False
    return int(value) > 1 if value.isdigit() else ',' in value or ':' in value


def preempted(step: int) -> bool:
    """True on every process at the same step, once any of them got SIGTERM; call before every step."""
    return multihost_utils.reached_preemption_sync_point(step)


def broadcast(value: int) -> int:
    """The value that process 0 has, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def global_batch(rows: Any, sharding: NamedSharding) -> Any:
    """One array over all hosts from the rows that each host holds; the transfer runs while this returns."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)


def global_array(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """One array over all hosts from values that each of them holds whole; nothing is sent between hosts."""
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def is_lost_process(error: BaseException) -> bool:
    """Whether an error, or what caused it, tells of the other processes and devices and not of what people gave."""
    while error.__cause__ is not None:
        error = error.__cause__
    # Collectives of CPUs raise a ValueError when a connection breaks.
    return isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and 'Gloo' in str(error))


def leave(code: int, last_words: str = '') -> None:
    """Ends this process of a job at once, for a failure that the others may not share; returns in a job of one.

    An orderly end waits for the other processes, and these wait for this one in the middle of a step.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        if last_words:
            logging.error('%s', last_words)
        python_logging.shutdown()
        os._exit(code)


class Prefetch:
    """Keeps one batch ahead on the device, and knows for how long the device had nothing to do.

    A thread draws host rows and starts their transfer; drawing waits for decoding, so it must not hold up the
    thread that dispatches steps. Iterating gives (host rows, device batch).

    Attributes:
      wait_seconds: time in which the next batch was not there although the step before it had finished. Waiting
        while the device is still busy costs nothing and does not count.
    """

    def __init__(self, rows: Iterable[Any], sharding: NamedSharding, depth: int = 1):
        self.wait_seconds = 0.0
        self._rows = iter(rows)
        self._sharding = sharding
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._busy: Callable[[], bool] = lambda: False
        self._thread = threading.Thread(target=self._fill, name='prefetch', daemon=True)
        self._thread.start()

    def busy_while(self, busy: Callable[[], bool]) -> None:
        """Tells how to find out whether the device still works on what was last dispatched."""
        self._busy = busy

    def _fill(self) -> None:
        try:
            for rows in self._rows:
                self._put('batch', (rows, global_batch(rows, self._sharding)))
                if self._closed.is_set():
                    return
            self._put('end', None)
        except Exception as error:  # Whatever stopped the stream is raised where the batch was wanted.
            self._put('error', error)

    def _put(self, kind: str, value: Any) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put((kind, value), timeout=0.1)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self

    def __next__(self) -> tuple[Any, Any]:
        before = time.monotonic()
        while True:
            try:
                kind, value = self._queue.get(timeout=0.002)
                break
            except queue.Empty:
                now = time.monotonic()
                if not self._busy():
                    self.wait_seconds += now - before
                before = now
        if kind == 'error':
            raise value
        if kind == 'end':
            raise StopIteration
        return value

    def close(self) -> None:
        """Stops the thread; the stream it draws from is the caller's to close."""
        self._closed.set()
        self._thread.join(timeout=10)
        if self._thread.is_alive():
            logging.warning('The input stream did not stop within 10 s.')


class Watchdog:
    """Ends a process that achieves nothing for too long, with the stacks of all its threads.

    A stuck process (not a dead one) keeps the others of its job waiting past every heartbeat of jax.distributed. All of
    them wait, so the watchdogs of all of them end the job.

    A thread of Python watches. Where another one holds the interpreter's lock and never gives it back, a timer in C
    (faulthandler) ends the process somewhat later; it knows no exit code but 1.

    Args:
      seconds: within which a step must follow the one before; 0 watches nothing.
      code: to exit with.
      slow_seconds: for what is no step, if that is longer: start, compiling, the first step, evaluation, saving.
    """

    def __init__(self, seconds: int | float, code: int, slow_seconds: int | float = SLOW_SECONDS):
        if seconds < 0:
            raise ValueError(f'watchdog_seconds={seconds} must be at least 0, which watches nothing.')
        self.seconds = seconds
        self.slow_seconds = max(seconds, slow_seconds)
        self._code = code
        self._limit = self.slow_seconds
        self._since = time.monotonic()
        self._deadline = self._since + self._limit
        self._closed = threading.Event()
        if seconds > 0:
            self._arm_fallback()
            threading.Thread(target=self._watch, name='watchdog', daemon=True).start()

    def progress(self, *, slow: bool = False) -> None:
        """Call when something was achieved; `slow` says that what comes next is no step."""
        if self.seconds == 0:
            return
        limit, before = self.slow_seconds if slow else self.seconds, self._limit
        self._since, self._limit = time.monotonic(), limit
        self._deadline = self._since + limit  # The only thing that the other thread decides by.
        if limit != before or self._since - self._armed > limit / 100:
            self._arm_fallback()

    def close(self) -> None:
        self._closed.set()
        if self.seconds > 0:
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _arm_fallback(self) -> None:
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(1.1 * self._limit + 2 * _TELL_SECONDS, exit=True)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.seconds / 10)):
            if time.monotonic() > self._deadline:
                # What the process hangs in may be the terminal or the log: telling must not keep it from ending.
                telling = threading.Thread(target=self._tell, daemon=True)
                telling.start()
                telling.join(_TELL_SECONDS)
                os._exit(self._code)

    def _tell(self) -> None:
        with tempfile.TemporaryFile() as file:  # faulthandler keeps the lock of the interpreter while it writes.
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            os.write(2, file.read())
        logging.error(
            'Stuck: process %d of %s got nothing done for %.0f s (parallel.watchdog_seconds=%g; %g where no step is '
            'due). Above is what its threads were doing. If it only needs longer, raise the setting; if not, the same '
            'command goes on from the last checkpoint.',
            os.getpid(), socket.gethostname(), time.monotonic() - self._since, self.seconds, self.slow_seconds,
        )  # fmt: skip
        python_logging.shutdown()

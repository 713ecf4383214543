"""What several processes do together: start up, hand in their rows, agree that it is time to stop."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging as python_logging
import os
import queue
import socket
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


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of this job; call before the first use of a device.

    A single process joins a job of one: only a process of a job learns of SIGTERM in time to save.
    Without arguments the cluster is recognised (Slurm, Open MPI, Cloud TPU); without one this is the only process.
    """
    if coordinator is not None or num_processes is not None or process_id is not None:
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError(
                f'--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: '
                'give all three or none.'
            )
        jax.distributed.initialize(coordinator, num_processes, process_id, cluster_detection_method='deactivate')
    elif ON_TPU in os.environ or any(_several(os.environ.get(name)) for name in CLUSTER_VARIABLES):
        jax.distributed.initialize()
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


def leave(code: int) -> None:
    """Ends this process of a job at once, for a failure that the others may not share; returns in a job of one.

    An orderly end waits for the other processes, and these wait for this one in the middle of a step.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
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
    """Ends a process that makes no progress, with the stacks of its threads.

    A stuck process (not a dead one) keeps the others of its job waiting past every heartbeat of jax.distributed.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._armed = 0.0

    def progress(self) -> None:
        """Call when something was achieved."""
        now = time.monotonic()
        if self.seconds > 0 and now - self._armed > self.seconds / 100:
            faulthandler.dump_traceback_later(self.seconds, exit=True)
            self._armed = now

    def close(self) -> None:
        if self.seconds > 0:
            faulthandler.cancel_dump_traceback_later()

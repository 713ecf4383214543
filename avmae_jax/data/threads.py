"""Elements of a grain dataset computed ahead of time by threads of this process; decoders run without the lock."""

from __future__ import annotations

import collections
import concurrent.futures
import mmap
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

from avmae_jax.data import workbench
from avmae_jax.data.slots import Slot, lend
from avmae_jax.data.workbench import Damaged

_AHEAD = 2  # Batches that are prepared in advance.


class ThreadMap:
    """`map` over threads that never keep a process from ending, unlike those of concurrent.futures."""

    def __init__(self, num_threads: int):
        self._num_threads = num_threads
        self._cancelled = False
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(num_threads):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, item = task
            try:
                if self._cancelled:
                    raise concurrent.futures.CancelledError
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)
            del task, future, function, item

    def __call__(self, function: Callable, items: Iterable) -> list:
        futures: list[concurrent.futures.Future] = []
        for item in items:
            futures.append(concurrent.futures.Future())
            self._tasks.put((futures[-1], function, item))
        return [future.result() for future in futures]

    def cancel(self) -> None:
        """From now on everything is answered at once, by an error."""
        self._cancelled = True

    def close(self) -> None:
        for _ in range(self._num_threads):
            self._tasks.put(None)


def compute(dataset: Any, step: int, slot: Slot, run: Callable) -> tuple[Any, Damaged]:
    """Element `step`, its arrays in the slot, and the damaged records that were passed over on the way."""
    damaged: Damaged = []
    with workbench.lend(workbench.Workbench(slot.empty, run, damaged.append)):
        return dataset[step], damaged


class Threads:
    """Computes batches in this process, a few ahead of the consumer.

    Their memory is used again when the consumer has dropped it: fresh memory costs 3 ms a clip in page faults.
    """

    def __init__(self, dataset: Any, steps: range, num_bytes: int, num_threads: int):
        self._ready: queue.Queue = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._run = ThreadMap(num_threads)
        arguments = (dataset, steps, num_bytes, self._run, self._ready, self._stopped)
        self._thread = threading.Thread(target=self._produce, args=arguments, daemon=True)
        self._thread.start()

    @staticmethod
    def _produce(
        dataset: Any,
        steps: range,
        num_bytes: int,
        run: ThreadMap,
        ready: queue.Queue,
        stopped: threading.Event,
    ) -> None:
        free: collections.deque[mmap.mmap] = collections.deque(maxlen=_AHEAD + 2)
        for step in steps:
            try:
                memory = free.pop() if free else mmap.mmap(-1, num_bytes)
                slot = Slot(lend(memory, 0, num_bytes, free.append, memory))
                found: Any = compute(dataset, step, slot, run)
                del slot
            except BaseException as error:
                found = error
            while not stopped.is_set():
                try:
                    ready.put(found, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if stopped.is_set() or isinstance(found, BaseException):
                return
            del found, memory

    def get(self, position: int, timeout: int | float) -> tuple[Any, Damaged] | None:
        try:
            found = self._ready.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        return found

    def describe(self, position: int) -> str:
        return 'the threads of this process'

    def close(self) -> None:
        self._stopped.set()
        self._run.cancel()
        self._thread.join(timeout=2)  # It ends with the clips at hand, unless the disk hangs.
        self._run.close()

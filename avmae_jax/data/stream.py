"""The batches of a run, in order and ahead of time: what training and evaluation iterate over."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import grain
from absl import logging

from avmae_jax.data.mixing import Mixture, Place
from avmae_jax.data.slots import slot_bytes
from avmae_jax.data.threads import Threads
from avmae_jax.data.workbench import Damaged
from avmae_jax.data.workers import LoaderError, Processes, StalledError, TooManyDamagedError
from avmae_jax.structs import Batch


@runtime_checkable
class MakeBatch(Protocol):
    """A grain transformation from the clips of a step to its batch; see `data/batches.py`."""

    source: Mixture

    def map(self, places: Sequence[Place]) -> Batch: ...

    def empty(self, num_clips: int, make: Callable) -> Batch: ...


class Stream:
    """Elements `steps` of the dataset `places.map(make_batch)` in order. Close it, or use it in a `with` statement.

    Attributes:
      source: the datasets that the batches are of.
      wait_seconds: time that the consumer has spent waiting for batches so far.
      step: the step of the next batch.
      stall_seconds: without a batch for that long, the stream stops.
      num_damaged: different damaged records met so far, on this host.
    """

    def __init__(
        self,
        places: grain.MapDataset[list[Place]],
        make_batch: MakeBatch,
        steps: range,
        num_workers: int,
        num_threads: int,
        max_damaged_ratio: int | float,
        stall_seconds: int | float,
    ):
        if num_workers < 0 or num_threads < 1:
            raise ValueError(
                f'num_workers must be at least 0 and num_threads at least 1; got {num_workers} and {num_threads}.'
            )
        if not 0 <= max_damaged_ratio <= 1:
            raise ValueError(f'max_damaged_ratio must lie in [0, 1]; got {max_damaged_ratio}.')
        self.source = make_batch.source
        self.wait_seconds = 0.0
        self._places = places
        self._steps = steps
        self._position = 0
        self._max_damaged_ratio = max_damaged_ratio
        self.stall_seconds = stall_seconds
        self._damaged: set[int] = set()
        self._loader: Threads | Processes | None = None
        self._clips_per_step = len(places[0]) if len(steps) else 0
        dataset = places.map(make_batch)
        num_bytes = slot_bytes(functools.partial(make_batch.empty, self._clips_per_step))
        num_workers = min(num_workers, len(steps))
        if num_workers:
            self._loader = Processes(dataset, steps, num_bytes, num_workers, num_threads)
        else:
            self._loader = Threads(dataset, steps, num_bytes, num_threads)
        # Also when the stream is forgotten, or the program ends.
        self._close_loader = weakref.finalize(self, self._loader.close)

    @property
    def step(self) -> int:
        return self._steps.start + self._position

    @property
    def num_damaged(self) -> int:
        return len(self._damaged)

    @property
    def worker_pids(self) -> list[int]:
        return self._loader.pids if isinstance(self._loader, Processes) else []

    def __iter__(self) -> Stream:
        return self

    def __len__(self) -> int:
        return len(self._steps)

    def __next__(self) -> Batch:
        if self._position == len(self._steps):
            self.close()
            raise StopIteration
        if self._loader is None:
            raise LoaderError('this stream has been closed.')
        began = time.monotonic()
        try:
            found = self._loader.get(self._position, self.stall_seconds)
            if found is None:
                raise StalledError(
                    f'no batch for {self.stall_seconds:.0f} s (stall_seconds): waiting for step {self.step} from '
                    f'{self._loader.describe(self._position)}, which reads {self._describe_files()}. Is the '
                    f'disk or the network there?'
                )
            batch, damaged = found
            self._count_damaged(damaged)
        except OSError as error:  # Such as a file that is gone.
            self.close()
            raise LoaderError(
                f'the data cannot be read any more: {error}. Step {self.step} reads {self._describe_files()}.'
            ) from error
        except BaseException:
            self.close()
            raise
        self._position += 1
        self.wait_seconds += time.monotonic() - began
        return batch

    def _describe_files(self) -> str:
        """Those that the next step is read from, for people."""
        records = [place.record for place in self._places[self.step] if place.record < len(self.source)]
        where = sorted({self.source.where(record).partition(' at byte')[0] for record in records})
        return ', '.join(where[:3]) + (f' and {len(where) - 3} more files' if len(where) > 3 else '')

    def _count_damaged(self, damaged: Damaged) -> None:
        for record, reason in damaged:
            if record not in self._damaged:
                self._damaged.add(record)
                logging.warning('Passed over damaged record %d: %s', record, reason)
        num_records = len(self.source)
        num_read = min((self._position + 1) * self._clips_per_step, num_records)
        # Judged over a thousand records at least, so that two bad ones at the start do not stop a long run.
        accepted = max(1, int(self._max_damaged_ratio * max(num_read, min(num_records, 1000))))
        if len(self._damaged) > accepted:
            raise TooManyDamagedError(
                f'{len(self._damaged)} different damaged records among {num_read} read; max_damaged_ratio='
                f'{self._max_damaged_ratio} accepts {accepted}. The last: {damaged[-1][1]}. Verify the dataset '
                f'(python -m avmae_jax.inspect), copy it again, or raise max_damaged_ratio.'
            )

    def close(self) -> None:
        self._loader = None
        self._close_loader()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

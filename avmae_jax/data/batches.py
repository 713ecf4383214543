"""Batches of a run: this host's rows of step s, as a pure function of (seed, s).

    train_stream(...)   steps of an endless shuffled stream; the data position of a run is its step, one integer
    eval_stream(...)    every record exactly once over all hosts; the last batch is filled with rows of weight 0

Both iterate over a `TrainBatches` or an `EvalBatches`: sequences whose element s is the batch of step s. Being
pure sequences, they serve any loader as they are; `grain.MapDataset.source(batches)` works, for one.
`data/stream.py` computes their elements ahead of time, in threads or processes.

Which clip lies where, for H hosts and V views a clip: global batch s holds the clips at places
[s * C, (s + 1) * C) of the stream, with C = batch_size / V; the V views of a clip are adjacent rows; host h holds
rows [h * batch_size / H, (h + 1) * batch_size / H).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from avmae_jax.data import sampling
from avmae_jax.data.mixing import Mixture, Place
from avmae_jax.data.slots import Damaged, Rows
from avmae_jax.data.sources import Source
from avmae_jax.data.stream import Stream
from avmae_jax.data.tfrecord import DamagedRecordError
from avmae_jax.data.views import ArraySpec, SoundFormat, View
from avmae_jax.data.workers import TooManyDamagedError
from avmae_jax.structs import Batch, Clip, Modality

MAX_DAMAGED_RUN = 100  # Damaged records in a row: no longer bit rot, but a lost disk or the wrong reader.


def train_stream(
    source: Source | Mixture,
    view: View,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
    views_per_clip: int = 1,
    num_workers: int = 0,
    num_threads: int = 2,
    max_damaged_ratio: int | float = 0.01,
    stall_seconds: int | float = 300.0,
) -> Stream:
    """This host's batches of steps start_step, start_step + 1, ...

    Args:
      batch_size: rows over all hosts; a clip gives `views_per_clip` of them.
      start_step: the first step; a run that goes on passes the step it goes on with.
      num_steps: the step to stop before, counted from the beginning of the run; None for an endless stream.
      num_workers: processes that prepare whole batches; 0 works in threads of this process.
      num_threads: that prepare the clips of a batch, in each process.
      max_damaged_ratio: share of damaged records above which the stream stops; one is always accepted.
      stall_seconds: without a batch for that long, the stream stops and says what it waited for.
    """
    batches = TrainBatches(source, view, batch_size, seed, num_steps, host_index, host_count, views_per_clip)
    steps = range(start_step, len(batches))
    return Stream(batches, steps, num_workers, num_threads, max_damaged_ratio, stall_seconds)


def eval_stream(
    source: Source | Mixture,
    view: View,
    batch_size: int,
    num_clips: int = 1,
    host_index: int = 0,
    host_count: int = 1,
    num_workers: int = 0,
    num_threads: int = 2,
    max_damaged_ratio: int | float = 0.01,
    stall_seconds: int | float = 300.0,
) -> Stream:
    """This host's batches of one pass over all records, in their stored order.

    A record gives num_clips * view.eval_crops adjacent rows (moments first, then crops of a moment), which all
    carry its number in `record`; `batch_size` counts rows over all hosts. Padding has weight 0 and record -1; a
    damaged record keeps its number and has weight 0.
    """
    batches = EvalBatches(source, view, batch_size, num_clips, host_index, host_count)
    steps = range(len(batches))
    return Stream(batches, steps, num_workers, num_threads, max_damaged_ratio, stall_seconds)


class _Batches:
    """What training and evaluation share: the layout of this host's rows, and filling those of one clip."""

    def __init__(
        self,
        source: Source | Mixture,
        view: View,
        batch_size: int,
        rows_per_clip: int,
        host_index: int,
        host_count: int,
    ):
        if not 0 <= host_index < host_count:
            raise ValueError(f'host_index must lie in [0, host_count={host_count}); got {host_index}.')
        if batch_size <= 0 or batch_size % (host_count * rows_per_clip):
            raise ValueError(
                f'batch_size must be a multiple of hosts * rows a clip = {host_count} * {rows_per_clip}; '
                f'got {batch_size}.'
            )
        self.source = source if isinstance(source, Mixture) else Mixture([source])
        self.view = view
        self.rows_per_clip = rows_per_clip
        self.num_rows = batch_size // host_count
        self.clips_per_host = self.num_rows // rows_per_clip  # A step, on this host.
        self.clips_per_step = batch_size // rows_per_clip  # On all hosts.
        self.first_clip = host_index * self.clips_per_host
        self.sound = SoundFormat(self.source.sample_rate, self.source.spectrogram_shape)
        stored = {modality for one in self.source.sources for modality in one.info.modalities}
        for modality in view.parts:
            if modality not in stored and not (modality != 'audio' and stored & {'video', 'image'}):
                raise ValueError(
                    f'the view asks for {modality} and {[one.info.name for one in self.source.sources]} hold '
                    f'{sorted(stored)} only.'
                )
        self.labels = self.source.labels

    def layout(self) -> dict[str, ArraySpec]:
        """Name, shape and dtype of this host's arrays of a step."""
        rows = (self.num_rows,)
        found = {}
        for modality, (shape, dtype) in self.view.layout(self.sound).items():
            found[f'media/{modality}'] = ArraySpec(rows + shape, dtype)
            found[f'present/{modality}'] = ArraySpec(rows, np.dtype(bool))
        for head, classes in self.labels.items():
            found[f'labels/{head}'] = ArraySpec((*rows, len(classes.names)), np.dtype(np.float32))
        found['record'] = ArraySpec(rows, np.dtype(np.int32))
        found['seed'] = ArraySpec((*rows, 2), np.dtype(np.uint32))
        found['weight'] = ArraySpec(rows, np.dtype(np.float32))
        found['damaged'] = ArraySpec(rows, np.dtype(np.int32))
        return found

    def __len__(self) -> int:
        raise NotImplementedError

    def fill(self, step: int, rows: Rows, run: Callable = map) -> Damaged:
        """Writes the rows of a step; `run` is a map over its clips. Returns (record, reason) of damaged ones."""
        raise NotImplementedError

    def __getitem__(self, step: Any) -> Batch:
        step = int(step)
        if not 0 <= step < len(self):
            raise IndexError(f'step {step} of {len(self)}')
        rows = {name: np.empty(shape, dtype) for name, (shape, dtype) in self.layout().items()}
        self.fill(step, rows)
        return self.as_batch(rows)

    @property
    def num_records(self) -> int:
        return len(self.source)

    @staticmethod
    def as_batch(rows: Rows) -> Batch:
        """The arrays of `layout` as a Batch."""

        def group(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): array for name, array in rows.items() if name.startswith(prefix)}

        return Batch(
            media=group('media/'),
            present=group('present/'),
            labels=group('labels/'),
            record=rows['record'],
            seed=rows['seed'],
            weight=rows['weight'],
            damaged=rows['damaged'],
        )

    def records(self, step: int) -> list[int]:
        """The records that this host is to read for a step, were none of them damaged."""
        raise NotImplementedError

    def describe(self, step: int) -> str:
        """Which files this host reads for a step, for people."""
        where = sorted({self.source.where(record).partition(' at byte')[0] for record in self.records(step)})
        return ', '.join(where[:3]) + (f' and {len(where) - 3} more files' if len(where) > 3 else '')

    def _write_clip(self, at: slice, record: int, rows: Rows, write: Callable) -> None:
        """The rows `at` of one clip; raises DamagedRecordError.

        Args:
          write: (clip, media of the rows) -> modality -> present.
        """
        media = [
            {modality: rows[f'media/{modality}'][row] for modality in self.view.parts}
            for row in range(at.start, at.stop)
        ]
        clip = self.source[record]
        for modality, has in write(clip, media).items():
            rows[f'present/{modality}'][at] = has
        for head, classes in self.labels.items():
            indices = clip.labels.get(head, [])
            if any(not 0 <= index < len(classes.names) for index in indices):
                raise DamagedRecordError(f'label {indices} of {head!r}, which has {len(classes.names)} classes')
            labels = np.zeros(len(classes.names), np.float32)
            labels[indices] = 1.0
            rows[f'labels/{head}'][at] = labels
        rows['record'][at] = record
        rows['weight'][at] = 1.0
        rows['damaged'][at] = 0

    def _blame(self, record: int, error: Exception) -> tuple[int, str]:
        where = self.source.where(record)
        return record, str(error) if str(error).startswith(where) else f'{where}: {error}'


class TrainBatches(_Batches):
    """Element s is this host's batch of step s of an endless, shuffled stream."""

    def __init__(
        self,
        source: Source | Mixture,
        view: View,
        batch_size: int,
        seed: int,
        num_steps: int | None = None,
        host_index: int = 0,
        host_count: int = 1,
        views_per_clip: int = 1,
    ):
        super().__init__(source, view, batch_size, views_per_clip, host_index, host_count)
        if not 0 <= seed < 1 << 63:
            raise ValueError(f'seed must lie in [0, 2**63); got {seed}.')
        self.seed = seed
        self.num_steps = num_steps

    def __len__(self) -> int:
        return (1 << 62) // self.clips_per_step if self.num_steps is None else self.num_steps

    def fill(self, step: int, rows: Rows, run: Callable = map) -> Damaged:
        places = self._places(step)

        def fill_clip(k: int) -> Damaged:
            return self._fill_clip(k, *places[k], rows)

        return [entry for damaged in run(fill_clip, range(self.clips_per_host)) for entry in damaged]

    def _fill_clip(self, k: int, epoch: int, record: int, rows: Rows) -> Damaged:
        """The views of the k-th clip, from `record` or from the first readable one after it."""
        at = slice(k * self.rows_per_clip, (k + 1) * self.rows_per_clip)
        damaged: Damaged = []
        while True:
            draws = [sampling.Draws(self.seed, epoch, record, view) for view in range(self.rows_per_clip)]

            def write(clip, media, draws=draws):
                return self.view.write_train(clip, draws, media, self.sound)

            try:
                self._write_clip(at, record, rows, write)
                break
            except DamagedRecordError as error:
                damaged.append(self._blame(record, error))
            if len(damaged) >= min(MAX_DAMAGED_RUN, len(self.source)):
                raise TooManyDamagedError(f'{len(damaged)} records in a row cannot be read; the last: {damaged[-1][1]}')
            record = self.source.next_record(record)
        rows['seed'][at] = [draw.device_seed for draw in draws]
        rows['damaged'][at] = len(damaged)
        return damaged

    def records(self, step: int) -> list[int]:
        return [place.record for place in self._places(step)]

    def _places(self, step: int) -> list[Place]:
        first = step * self.clips_per_step + self.first_clip
        return self.source.places(range(first, first + self.clips_per_host), self.seed)


class EvalBatches(_Batches):
    """Element s is this host's batch s of one pass over all records, in their stored order."""

    def __init__(
        self,
        source: Source | Mixture,
        view: View,
        batch_size: int,
        num_clips: int = 1,
        host_index: int = 0,
        host_count: int = 1,
    ):
        if num_clips < 1:
            raise ValueError(f'num_clips must be at least 1; got {num_clips}.')
        super().__init__(source, view, batch_size, num_clips * view.eval_crops, host_index, host_count)
        self.moments = num_clips

    def __len__(self) -> int:
        return -(-len(self.source) // self.clips_per_step)

    def fill(self, step: int, rows: Rows, run: Callable = map) -> Damaged:
        first = step * self.clips_per_step + self.first_clip

        def fill_clip(k: int) -> Damaged:
            at = slice(k * self.rows_per_clip, (k + 1) * self.rows_per_clip)
            record = first + k
            reason = None
            if record < len(self.source):
                rows['seed'][at] = [sampling.Draws(0, 0, record, row).device_seed for row in range(self.rows_per_clip)]
                try:
                    self._write_clip(at, record, rows, self._write)
                    return []
                except DamagedRecordError as error:
                    reason = self._blame(record, error)
            # No other record takes the place of a damaged one, or that other would count twice.
            for array in rows.values():
                array[at] = 0
            rows['record'][at] = record if reason else -1
            rows['damaged'][at] = 1 if reason else 0
            return [reason] if reason else []

        return [entry for damaged in run(fill_clip, range(self.clips_per_host)) for entry in damaged]

    def _write(self, clip: Clip, media: Sequence[Mapping[Modality, np.ndarray]]) -> dict[Modality, bool]:
        return self.view.write_eval(clip, self.moments, media, self.sound)

    def records(self, step: int) -> list[int]:
        first = step * self.clips_per_step + self.first_clip
        return list(range(first, min(first + self.clips_per_host, len(self.source))))

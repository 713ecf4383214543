"""Batches of a run: grain datasets whose element s is this host's rows of step s, a pure function of (seed, s).

    train_dataset(...)  steps of an endless shuffled stream; the data position of a run is its step, one integer
    eval_dataset(...)   every record exactly once over all hosts; the last batch is filled with rows of weight 0
    train_stream(...), eval_stream(...)     the same, computed ahead of time in worker processes or threads

grain composes them:

    grain.MapDataset.range(num_places)              places in the stream of clips, over all hosts
        .map(which record lies there)
        .batch(clips of one host)[host::hosts]      this host's
        .map(MakeTrainBatch(...))                   read, decode, crop: a Batch

and whoever wants other transformations behind, or grain's own loaders, goes on from there. Reading, decoding and
cropping are one transformation, since each row is written to where it stays, and since damage may show as late as in
the last frame of a clip, when another record must take its place. `data/stream.py` runs a dataset ahead of time.

Which clip lies where, for H hosts and V views a clip: global batch s holds the clips at places
[s * C, (s + 1) * C) of the stream, with C = batch_size / V; the V views of a clip are adjacent rows; host h holds
rows [h * batch_size / H, (h + 1) * batch_size / H).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np

from avmae_jax.data import sampling, workbench
from avmae_jax.data.mixing import Mixture, Place
from avmae_jax.data.sources import Source
from avmae_jax.data.stream import Stream
from avmae_jax.data.tfrecord import DamagedRecordError
from avmae_jax.data.views import SoundFormat, View
from avmae_jax.data.workbench import Damaged
from avmae_jax.data.workers import TooManyDamagedError
from avmae_jax.structs import Batch, Clip, Modality

MAX_DAMAGED_RUN = 100  # Damaged records in a row: no longer bit rot, but a lost disk or the wrong reader.
_ENDLESS = 1 << 52  # Places: 140 years at a million clips a second, and whole numbers that floating point holds.


def train_dataset(
    source: Source | Mixture,
    view: View,
    batch_size: int,
    seed: int,
    num_steps: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
    views_per_clip: int = 1,
) -> grain.MapDataset[Batch]:
    """This host's batches of training.

    Args:
      batch_size: rows over all hosts; a clip gives `views_per_clip` of them.
      num_steps: the step to stop before, counted from the beginning of the run; None for an endless stream.
    """
    places, make_batch = _train(source, view, batch_size, seed, num_steps, host_index, host_count, views_per_clip)
    return places.map(make_batch)


def eval_dataset(
    source: Source | Mixture,
    view: View,
    batch_size: int,
    num_clips: int = 1,
    host_index: int = 0,
    host_count: int = 1,
) -> grain.MapDataset[Batch]:
    """This host's batches of one pass over all records, in their stored order.

    A record gives num_clips * view.eval_crops adjacent rows (moments first, then crops of a moment), which all
    carry its number in `record`; `batch_size` counts rows over all hosts. Padding has weight 0 and record -1; a
    damaged record keeps its number and has weight 0.
    """
    places, make_batch = _eval(source, view, batch_size, num_clips, host_index, host_count)
    return places.map(make_batch)


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
    """The batches of `train_dataset` for steps start_step, start_step + 1, ...

    Args:
      start_step: the first step; a run that goes on passes the step it goes on with.
      num_workers: processes that prepare whole batches; 0 works in threads of this process.
      num_threads: that prepare the clips of a batch, in each process.
      max_damaged_ratio: share of damaged records above which the stream stops; one is always accepted.
      stall_seconds: without a batch for that long, the stream stops and says what it waited for.
    """
    places, make_batch = _train(source, view, batch_size, seed, num_steps, host_index, host_count, views_per_clip)
    steps = range(start_step, len(places))
    return Stream(places, make_batch, steps, num_workers, num_threads, max_damaged_ratio, stall_seconds)


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
    """The batches of `eval_dataset`; the other arguments are those of `train_stream`."""
    places, make_batch = _eval(source, view, batch_size, num_clips, host_index, host_count)
    steps = range(len(places))
    return Stream(places, make_batch, steps, num_workers, num_threads, max_damaged_ratio, stall_seconds)


# -- From the settings to the clips of a step --


def _train(source, view, batch_size, seed, num_steps, host_index, host_count, views_per_clip):
    """(places: element s is this host's clips of step s, what makes a batch of them)."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f'seed must lie in [0, 2**63); got {seed}.')
    make_batch = MakeTrainBatch(source, view, seed, views_per_clip)
    clips_per_step = _check_batch_size(batch_size, views_per_clip, host_index, host_count)
    num_places = (_ENDLESS // clips_per_step if num_steps is None else num_steps) * clips_per_step
    places = grain.MapDataset.range(num_places).map(functools.partial(make_batch.source.place, seed=seed))
    return _of_host(places, clips_per_step, host_index, host_count), make_batch


def _eval(source, view, batch_size, num_clips, host_index, host_count):
    if num_clips < 1:
        raise ValueError(f'num_clips must be at least 1; got {num_clips}.')
    make_batch = MakeEvalBatch(source, view, num_clips)
    clips_per_step = _check_batch_size(batch_size, make_batch.rows_per_clip, host_index, host_count)
    num_steps = -(-len(make_batch.source) // clips_per_step)
    places = grain.MapDataset.range(num_steps * clips_per_step).map(functools.partial(Place, 0))
    return _of_host(places, clips_per_step, host_index, host_count), make_batch


def _check_batch_size(batch_size: int, rows_per_clip: int, host_index: int, host_count: int) -> int:
    """Clips of a step, over all hosts."""
    if not 0 <= host_index < host_count:
        raise ValueError(f'host_index must lie in [0, host_count={host_count}); got {host_index}.')
    if batch_size <= 0 or batch_size % (host_count * rows_per_clip):
        raise ValueError(
            f'batch_size must be a multiple of hosts * rows a clip = {host_count} * {rows_per_clip}; got {batch_size}.'
        )
    return batch_size // rows_per_clip


def _of_host(places: grain.MapDataset[Place], clips_per_step: int, host_index: int, host_count: int):
    return places.batch(clips_per_step // host_count, batch_fn=list)[host_index::host_count]


# -- From the clips of a step to its batch --


class _MakeBatch(grain.transforms.Map):
    """What training and evaluation share: the arrays of a batch, and filling the rows of one clip.

    Attributes:
      source: the datasets that places refer to.
    """

    def __init__(self, source: Source | Mixture, view: View, rows_per_clip: int):
        self.source = source if isinstance(source, Mixture) else Mixture([source])
        self.view = view
        self.rows_per_clip = rows_per_clip
        self.sound = SoundFormat(self.source.sample_rate, self.source.spectrogram_shape)
        stored = {modality for one in self.source.sources for modality in one.info.modalities}
        for modality in view.parts:
            if modality not in stored and not (modality != 'audio' and stored & {'video', 'image'}):
                raise ValueError(
                    f'the view asks for {modality} and {[one.info.name for one in self.source.sources]} hold '
                    f'{sorted(stored)} only.'
                )
        self.labels = self.source.labels

    def empty(self, num_clips: int, make: Callable = np.empty) -> Batch:
        """A batch that has yet to be filled; its arrays are those that `make(shape, dtype)` gives."""
        num_rows = num_clips * self.rows_per_clip
        layout = self.view.layout(self.sound)
        return Batch(
            media={modality: make((num_rows, *shape), dtype) for modality, (shape, dtype) in layout.items()},
            present={modality: make((num_rows,), np.dtype(bool)) for modality in layout},
            labels={
                head: make((num_rows, len(classes.names)), np.dtype(np.float32))
                for head, classes in self.labels.items()
            },
            record=make((num_rows,), np.dtype(np.int32)),
            seed=make((num_rows, 2), np.dtype(np.uint32)),
            weight=make((num_rows,), np.dtype(np.float32)),
            damaged=make((num_rows,), np.dtype(np.int32)),
        )

    def map(self, places: Sequence[Place]) -> Batch:
        bench = workbench.current()
        batch = self.empty(len(places), bench.empty)

        def fill(k: int) -> Damaged:
            at = slice(k * self.rows_per_clip, (k + 1) * self.rows_per_clip)
            return self.fill_clip(batch, at, *places[k])

        for damaged in bench.run(fill, range(len(places))):
            for entry in damaged:
                bench.report(entry)
        return batch

    def fill_clip(self, batch: Batch, at: slice, epoch: int, record: int) -> Damaged:
        """Writes the rows of one clip; returns (record, where and why) of the damaged ones that were met."""
        raise NotImplementedError

    def _write_clip(self, batch: Batch, at: slice, record: int, write: Callable) -> None:
        """The rows `at` from a record; raises DamagedRecordError.

        Args:
          write: (clip, media of the rows) -> modality -> present.
        """
        media = [
            {modality: batch.media[modality][row] for modality in self.view.parts} for row in range(at.start, at.stop)
        ]
        clip = self.source[record]
        for modality, has in write(clip, media).items():
            batch.present[modality][at] = has
        for head, classes in self.labels.items():
            indices = clip.labels.get(head, [])
            if any(not 0 <= index < len(classes.names) for index in indices):
                raise DamagedRecordError(f'label {indices} of {head!r}, which has {len(classes.names)} classes')
            labels = np.zeros(len(classes.names), np.float32)
            labels[indices] = 1.0
            batch.labels[head][at] = labels
        batch.record[at] = record
        batch.weight[at] = 1.0
        batch.damaged[at] = 0

    def _blame(self, record: int, error: Exception) -> tuple[int, str]:
        where = self.source.where(record)
        return record, str(error) if str(error).startswith(where) else f'{where}: {error}'


class MakeTrainBatch(_MakeBatch):
    """Random views of each clip; the next record in place of a damaged one."""

    def __init__(self, source: Source | Mixture, view: View, seed: int, views_per_clip: int):
        super().__init__(source, view, views_per_clip)
        self.seed = seed

    def fill_clip(self, batch: Batch, at: slice, epoch: int, record: int) -> Damaged:
        damaged: Damaged = []
        while True:
            draws = [sampling.Draws(self.seed, epoch, record, view) for view in range(self.rows_per_clip)]

            def write(clip, media, draws=draws):
                return self.view.write_train(clip, draws, media, self.sound)

            try:
                self._write_clip(batch, at, record, write)
                break
            except DamagedRecordError as error:
                damaged.append(self._blame(record, error))
            if len(damaged) >= min(MAX_DAMAGED_RUN, len(self.source)):
                raise TooManyDamagedError(f'{len(damaged)} records in a row cannot be read; the last: {damaged[-1][1]}')
            record = self.source.next_record(record)
        batch.seed[at] = [draw.device_seed for draw in draws]
        batch.damaged[at] = len(damaged)
        return damaged


class MakeEvalBatch(_MakeBatch):
    """Fixed moments and crops of each clip; rows of weight 0 in place of a damaged one and behind the last one."""

    def __init__(self, source: Source | Mixture, view: View, num_clips: int):
        super().__init__(source, view, num_clips * view.eval_crops)
        self.moments = num_clips

    def fill_clip(self, batch: Batch, at: slice, epoch: int, record: int) -> Damaged:
        damaged: Damaged = []
        if record < len(self.source):
            batch.seed[at] = [sampling.Draws(0, epoch, record, row).device_seed for row in range(self.rows_per_clip)]
            try:
                self._write_clip(batch, at, record, self._write)
                return []
            except DamagedRecordError as error:
                damaged = [self._blame(record, error)]
        # No other record takes the place of a damaged one, or that other would count twice.
        for arrays in (batch.media, batch.present, batch.labels):
            for array in arrays.values():
                array[at] = 0
        batch.seed[at] = 0
        batch.weight[at] = 0
        batch.record[at] = record if damaged else -1
        batch.damaged[at] = len(damaged)
        return damaged

    def _write(self, clip: Clip, media: Sequence[Mapping[Modality, np.ndarray]]) -> dict[Modality, bool]:
        return self.view.write_eval(clip, self.moments, media, self.sound)

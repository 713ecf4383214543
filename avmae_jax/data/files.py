"""Plain media files as clips: each becomes what `prepare` would have made of it for the dataset at hand.

A model has seen frames of one rate, size and JPEG quality, and sound of one rate. So files go through the code of
`data/prepare`, with the settings that `dataset.json` tells, into a temporary folder of records: in processes of their
own, since a decoder may hang or crash, and read from there like any prepared clip, to the bit.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from avmae_jax.data import schema, sources, tfrecord
from avmae_jax.data.prepare import clips, shards, workers
from avmae_jax.data.prepare.clips import Failure
from avmae_jax.data.prepare.sound import SAMPLE_RATE
from avmae_jax.data.schema import DatasetInfo
from avmae_jax.data.workers import usable_cores
from avmae_jax.progress import progress
from avmae_jax.structs import Clip, Modality

SPLIT = 'files'
MAX_SECONDS = 3600.0  # A file is one clip, however long; of a film, the first hour.
TIMEOUT_SECONDS = 1800.0  # To decode that hour on one slow core.


class FilesSource:
    """The clips of media files, in the order given, as `open_files` leaves them.

    A clip's id is the path of its file; it has no labels.

    Attributes:
      rows: of the clips that can be read, in order.
      paths: of their files, one a clip; bytes that are no text are escaped, so that it can be printed.
      failures: of the files left out (outcome 'skipped'), and of those that are not whole: 'filled' where a modality
        is not there, 'kept' otherwise. `describe` makes lines of them.
    """

    split = SPLIT
    spectrogram_shape: tuple[int, int] | None = None

    def __init__(
        self,
        records: sources.ShardedSource,
        numbers: Sequence[int],
        rows: Sequence[clips.ClipRow],
        failures: Sequence[Failure],
    ):
        self.info = records.info
        self.rows = tuple(rows)
        self.paths = tuple(clips.printable(row.path) for row in rows)
        self.failures = tuple(failures)
        self._records = records
        self._numbers = tuple(numbers)  # Of the record of each clip.

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Clip:
        return self._records[self._numbers[index]]

    def where(self, index: int) -> str:
        return self.paths[index]


@contextlib.contextmanager
def open_files(
    paths: Sequence[str | os.PathLike[str]],
    info: DatasetInfo,
    modalities: Collection[Modality] | None = None,
    num_workers: int | None = None,
) -> Iterator[FilesSource]:
    """Prepares the files; their clips can be read until the block ends. Look at `failures`: none may be left.

    Where a file lacks picture or sound and the dataset has both, the missing one is filled and flagged absent, as
    with prepare's `--missing_video=fill`. Silence counts as no sound, as it does by prepare's default.

    Args:
      info: of the dataset that the model was trained on.
      modalities: those that the model looks at; a file that has none of them is a failure. None: those of `info`.
      num_workers: processes; None: one a core, if there is a file for each.
    """
    if not paths:
        raise ValueError('no files are given: --files a.mp4 b.wav')
    rows = [clips.ClipRow(clips.printable(str(path)), str(path), 0.0, None, {}) for path in paths]
    with open_clips(rows, info, modalities, num_workers) as source:
        yield source


@contextlib.contextmanager
def open_clips(
    rows: Sequence[clips.ClipRow],
    info: DatasetInfo,
    modalities: Collection[Modality] | None = None,
    num_workers: int | None = None,
    on_clip: Callable[[], Any] | None = None,
) -> Iterator[FilesSource]:
    """The same for spans of files.

    Args:
      on_clip: called for each clip that was read, or could not be; without it a progress bar is shown.
    """
    modalities = tuple(info.modalities if modalities is None else modalities)
    settings = settings_of(info)
    if not any(_has(dict.fromkeys(info.modalities, True), modality) for modality in modalities):
        raise ValueError(f'the model takes {sorted(modalities)} and clips of {info.name} hold {list(info.modalities)}.')
    num_workers = min(len(rows), usable_cores() if num_workers is None else num_workers)
    with tempfile.TemporaryDirectory(prefix='avmae-files-') as folder:
        tasks, done = _prepare(Path(folder), rows, settings, num_workers, on_clip)
        yield _source(Path(folder), tasks, done, info, modalities)


def settings_of(info: DatasetInfo) -> clips.Settings:
    """The settings of `prepare` that a dataset's clips were made with, for whole files, nothing left out."""
    media, audible = info.media, 'audio' in info.modalities
    pictured = bool({'video', 'image'} & set(info.modalities))
    if (audible and media.sample_rate != SAMPLE_RATE) or (pictured and not (media.codec and media.jpeg_quality)):
        raise ValueError(
            f'{info.name} was not written by `python -m avmae_jax.prepare` (SequenceExamples with stored log-mels, or '
            'a tfds dataset), and how its clips were made of files is not known: give clips of the same kind with '
            '--config.data.path=DATASET in place of --files.'
        )
    picture: dict[str, Any] = {}
    if pictured:
        picture = {'codec': media.codec, 'short_side': media.short_side, 'jpeg_quality': media.jpeg_quality}
        picture |= {'gop': media.gop} | ({'fps': media.fps} if 'video' in info.modalities else {})
    return clips.Settings(
        modalities=tuple(info.modalities),
        max_seconds=MAX_SECONDS,
        timeout_seconds=TIMEOUT_SECONDS,
        missing_video='fill',
        missing_audio='fill',
        **picture,
    )


def describe(failure: Failure) -> str:
    """One line for people."""
    outcome = {'skipped': 'not scored', 'filled': 'scored without it', 'kept': 'scored as far as it goes'}
    meaning = clips.REASONS[failure.reason].meaning
    detail = f' ({failure.detail})' if failure.detail else ''
    return f'{failure.path}: {outcome[failure.outcome]}: {meaning}{detail}'


def _prepare(
    folder: Path,
    rows: Sequence[clips.ClipRow],
    settings: clips.Settings,
    num_workers: int,
    on_clip: Callable[[], Any] | None,
) -> tuple[list[shards.ShardTask], list[shards.RowDone]]:
    """Shards of the files in their order, and what became of each."""
    (folder / shards.STATE_FOLDER).mkdir()
    # More shards than processes, so that one long file does not leave the others idle.
    parts = shards.deal(len(rows), min(len(rows), 4 * num_workers))
    tasks = [
        shards.ShardTask(os.fspath(folder), f'part-{i}', SPLIT, [rows[j] for j in part], settings, measure=False)
        for i, part in enumerate(parts)
    ]
    done: dict[str, list[shards.RowDone]] = {task.file: [] for task in tasks}
    with contextlib.ExitStack() as stack:
        update = on_clip or stack.enter_context(progress(len(rows), what='reading', unit='files')).update

        def on_row(task: shards.ShardTask, row: shards.RowDone) -> None:
            done[task.file].append(row)
            update()

        workers.run_tasks(tasks, num_workers, on_row)
    return tasks, [row for task in tasks for row in done[task.file]]


def _source(
    folder: Path,
    tasks: Sequence[shards.ShardTask],
    done: Sequence[shards.RowDone],
    info: DatasetInfo,
    modalities: Collection[Modality],
) -> FilesSource:
    written = [
        tfrecord.TFRecordFile(folder / task.file, tfrecord.read_index(folder / f'{task.file}.index')) for task in tasks
    ]
    numbers: list[int] = []
    useful_rows: list[clips.ClipRow] = []
    failures: list[Failure] = []
    number = 0
    for row, result in zip([row for task in tasks for row in task.rows], done, strict=True):
        useful = any(_has(result.has, modality) for modality in modalities)
        if useful:
            numbers.append(number)
            useful_rows.append(row)
            failures += result.failures
        else:
            # What was filled for the dataset is all that this model would have looked at.
            failures += [f._replace(outcome='skipped') if f.outcome == 'filled' else f for f in result.failures]
        number += result.num_bytes > 0
    return FilesSource(sources.ShardedSource(written, schema.read_clip, info, SPLIT), numbers, useful_rows, failures)


def _has(has: Mapping[Modality, bool], modality: Modality) -> bool:
    """A picture is a picture: a model of images is shown a frame of a video."""
    if modality == 'audio':
        return has.get('audio', False)
    return has.get('video', False) or has.get('image', False)

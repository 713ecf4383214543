"""Records -> shards that appear whole or not at all, and what a second run needs to do only what is missing.

A shard is written under a temporary name in `DIR/.prepare`, closed, flushed to disk and renamed. Its side
file `DIR/.prepare/<shard>.json`, written last, holds its digests, its failures and its sums: with all side
files there, `dataset.json` follows from them alone, however often the job was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from avmae_jax.data import schema, tfrecord
from avmae_jax.data.prepare import decode
from avmae_jax.data.prepare.clips import ClipResult, ClipRow, Failure, Settings, make_clip, printable
from avmae_jax.data.prepare.statistics import Sums

STATE_FOLDER = '.prepare'


class RowDone(NamedTuple):
    """What is known of a row once its bytes lie in the temporary file (`num_bytes` 0: it was skipped)."""

    num_bytes: int
    failures: list[Failure]
    sums: Sums
    has: dict[str, bool]
    seconds: float = 0.0


class ShardTask(NamedTuple):
    """One shard to write: `rows` in the order of its records. A task of `workers.run_tasks`."""

    folder: str
    file: str
    split: str
    rows: list[ClipRow]
    settings: Settings
    measure: bool

    def work(
        self, done: list[RowDone], report: Callable[[RowDone], None], starting: Callable[[], None] = lambda: None
    ) -> None:
        """Writes the shard and its side file.

        Args:
          done: what an earlier process had finished of it; its bytes are in the temporary file.
          report: called after each row, so that a successor can go on from there if this process is killed.
          starting: called before each row; the clock of its time limit starts.
        """
        temporary = Path(self.folder) / STATE_FOLDER / f'{self.file}.partial'
        done = list(done)
        with open(temporary, 'r+b' if done else 'wb') as file:
            file.truncate(sum(row.num_bytes for row in done))
            file.seek(0, os.SEEK_END)
            for row in self.rows[len(done) :]:
                starting()
                result: ClipResult = make_clip(row, self.settings, self.split, self.measure)
                framed = tfrecord.frame_record(result.record) if result.record is not None else b''
                file.write(framed)
                file.flush()  # To the kernel: a killed process must not take it along.
                done.append(RowDone(len(framed), result.failures, result.sums, result.has, result.seconds))
                report(done[-1])
            os.fsync(file.fileno())
        _finish(self, temporary, done)

    def lost(self, row: ClipRow, reason: str, detail: str) -> RowDone:
        """The result of a row whose process died."""
        failure = Failure(self.split, row.id, printable(row.path), reason, 'skipped', detail)
        return RowDone(0, [failure], Sums(), {})


class ProbeTask(NamedTuple):
    """Asks the headers of files how long they are; None where that cannot be known."""

    rows: list[ClipRow]
    settings: Settings

    def work(
        self,
        done: list[float | None],
        report: Callable[[float | None], None],
        starting: Callable[[], None] = lambda: None,
    ) -> None:
        for row in self.rows[len(done) :]:
            starting()
            try:
                report(decode.probe_seconds(row.path))
            except decode.MediaError:
                report(None)  # Its shard will say what is wrong with it.

    def lost(self, row: ClipRow, reason: str, detail: str) -> None:
        return None


def shard_name(name: str, split: str, index: int, count: int) -> str:
    """As tensorflow_datasets wants them, so that it finds them."""
    return f'{name}-{split}.tfrecord-{index:05d}-of-{count:05d}'


def deal(num_rows: int, num_shards: int) -> list[range]:
    """Row numbers for each shard: whole runs of the (shuffled) list, as even as can be."""
    cuts = [num_rows * i // num_shards for i in range(num_shards + 1)]
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Any]:
    """A file for writing that appears under its name only when the block ended well."""
    temporary = path.parent / f'{path.name}.tmp'
    with open(temporary, 'wb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())


def _finish(task: ShardTask, temporary: Path, done: list[RowDone]) -> None:
    folder = Path(task.folder)
    sums, sizes = Sums(), []
    modalities: set[str] = set()
    for row in done:
        if row.num_bytes:
            sizes.append(row.num_bytes)
            sums.add(row.sums)
            modalities |= {name for name, has in row.has.items() if has}
    index_text = tfrecord.format_index(sizes)
    write_text(folder / f'{task.file}.index', index_text)
    index = tfrecord.read_index(folder / f'{task.file}.index')
    with open(temporary, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    info = schema.ShardInfo(
        file=task.file,
        num_records=len(sizes),
        num_bytes=sum(sizes),
        sha256=digest,
        framing_sha256=tfrecord.TFRecordFile(temporary, index).framing_digest(),
        index_sha256=hashlib.sha256(index_text.encode()).hexdigest(),
    )
    os.replace(temporary, folder / task.file)
    side = {
        'info': dataclasses.asdict(info),
        'failures': [list(failure) for row in done for failure in row.failures],
        'sums': sums.to_json(),
        'modalities': sorted(modalities),
        'longest_seconds': max((row.seconds for row in done), default=0.0),
    }
    write_text(folder / STATE_FOLDER / f'{task.file}.json', json.dumps(side) + '\n')


class ShardDone(NamedTuple):
    """The side file of a finished shard."""

    info: schema.ShardInfo
    failures: list[Failure]
    sums: Sums
    modalities: list[str]
    longest_seconds: float


def read_done(folder: Path, file: str) -> ShardDone | None:
    """What the side file says, if it is there and the shard beside it is the one it speaks of."""
    try:
        done = parse_done((folder / STATE_FOLDER / f'{file}.json').read_text())
        index = tfrecord.read_index(folder / f'{file}.index')
        if (folder / file).stat().st_size != done.info.num_bytes or len(index) != done.info.num_records:
            return None
        if tfrecord.TFRecordFile(folder / file, index).framing_digest() != done.info.framing_sha256:
            return None
        return done
    except (OSError, ValueError, KeyError, TypeError):
        return None


def parse_done(text: str) -> ShardDone:
    """The content of a side file; raises ValueError, KeyError or TypeError when it is none."""
    side = json.loads(text)
    failures = [Failure(*failure) for failure in side['failures']]
    info, sums = schema.ShardInfo(**side['info']), Sums(**side['sums'])
    return ShardDone(info, failures, sums, side['modalities'], float(side['longest_seconds']))


# -- The same folder for tensorflow_datasets, whose files are written here by hand: importing it takes seconds. --


def _tensor(dtype: str, encoding: str = 'none', shape: tuple[int, ...] = ()) -> dict[str, Any]:
    dimensions = {'dimensions': [str(side) for side in shape]} if shape else {}
    return {
        'pythonClassName': 'tensorflow_datasets.core.features.tensor_feature.Tensor',
        'tensor': {'dtype': dtype, 'encoding': encoding, 'shape': dimensions},
    }


def _sequence(feature: dict[str, Any]) -> dict[str, Any]:
    return {
        'pythonClassName': 'tensorflow_datasets.core.features.sequence_feature.Sequence',
        'sequence': {'feature': feature, 'length': '-1'},
    }


def _features_dict(features: dict[str, Any]) -> dict[str, Any]:
    return {
        'featuresDict': {'features': features},
        'pythonClassName': 'tensorflow_datasets.core.features.features_dict.FeaturesDict',
    }


def tfds_features(labels: dict[str, schema.LabelSet]) -> dict[str, Any]:
    """features.json: the fields of `schema.write_clip` in tensorflow_datasets' words."""
    features = {
        'id': {'pythonClassName': 'tensorflow_datasets.core.features.text_feature.Text', 'text': {}},
        'frames': _sequence(_tensor('string')),
        'h264': _tensor('string'),
        'num_frames': _tensor('int64'),
        'fps': _tensor('float32'),
        'waveform': _tensor('int16', encoding='bytes', shape=(-1,)),
        'sample_rate': _tensor('int64'),
        'duration': _tensor('float32'),
        'has_video': _tensor('int64'),
        'has_audio': _tensor('int64'),
    }
    if labels:
        heads = {
            head: _sequence(
                {
                    'classLabel': {'numClasses': str(len(labels[head].names))},
                    'pythonClassName': 'tensorflow_datasets.core.features.class_label_feature.ClassLabel',
                }
            )
            for head in sorted(labels)
        }
        features['label'] = _features_dict(heads)
    return _features_dict(features)


def write_tfds_metadata(folder: Path, info: schema.DatasetInfo) -> None:
    """What `tfds.builder_from_directory(folder)` reads."""
    described = {
        'description': f'{info.name}, prepared by avmae_jax from media files.',
        'fileFormat': 'tfrecord',
        'name': info.name,
        'splits': [
            {
                'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
                'name': split,
                'numBytes': str(sum(shard.num_bytes for shard in shards)),
                'shardLengths': [str(shard.num_records) for shard in shards],
            }
            for split, shards in info.splits.items()
        ],
        'version': '1.0.0',
    }
    for head, labels in info.labels.items():
        write_text(folder / f'label-{head}.labels.txt', '\n'.join(labels.names) + '\n')
    write_text(folder / 'features.json', json.dumps(tfds_features(dict(info.labels)), indent=1, sort_keys=True) + '\n')
    write_text(folder / 'dataset_info.json', json.dumps(described, indent=1, sort_keys=True) + '\n')

"""Image datasets that tensorflow_datasets has prepared, opened by name and read without TensorFlow.

Only their metadata go through tensorflow_datasets, in the process that opens them; records are read by our own
TFRecord reader or by array_record, so that loader workers need neither.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

from array_record.python import array_record_module
from etils import epath

from avmae_jax.data import schema, tfrecord
from avmae_jax.data.schema import DatasetInfo, LabelSet, MediaSettings, ShardInfo
from avmae_jax.data.sources import RecordFile, ShardedSource, any_index, check_splits, split_parts
from avmae_jax.structs import Clip

_ID_FEATURES = ('id', 'tfds_id', 'file_name', 'filename', 'image/filename')


def open_tfds(name: str, split: str, data_dir: epath.PathLike | None) -> ShardedSource:
    """The images of a split (or several, as 'train+test') of 'NAME', 'NAME/CONFIG' or 'NAME/CONFIG:VERSION'."""
    builder = _find_builder(name, data_dir)
    check_splits(f'tfds:{name}', split, builder.info.splits)
    image, labels = _find_features(name, builder.info.features)
    file_format = builder.info.file_format.value
    if file_format not in _FILES:
        raise ValueError(
            f'tfds:{name} is stored as {file_format}; {sorted(_FILES)} can be read: prepare it again with '
            f'`tfds build --file_format=array_record`.'
        )
    found = [builder.info.splits[part] for part in split_parts(split)]
    files: list[RecordFile] = [_FILES[file_format](path) for part in found for path in part.filepaths]
    for file, length in zip(files, [length for part in found for length in part.shard_lengths], strict=True):
        if len(file) != length:
            raise ValueError(
                f'{file.path} should hold {length} records and holds {len(file)}: prepare tfds:{name} anew.'
            )
    info = DatasetInfo(
        name=builder.info.full_name,
        modalities=('image',),
        media=MediaSettings(
            codec='jpeg', fps=0.0, short_side=0, jpeg_quality=0, sample_rate=0, clip_seconds=None, gop=0
        ),
        splits={
            part: tuple(
                ShardInfo(os.path.basename(path), length, epath.Path(path).stat().length, '', '', '')
                for path, length in zip(there.filepaths, there.shard_lengths, strict=True)
            )
            for part, there in builder.info.splits.items()
        },
        labels=labels,
        statistics={},
    )
    return ShardedSource(files, functools.partial(parse_image, image=image, labels=tuple(labels)), info, split)


def _find_builder(name: str, data_dir: epath.PathLike | None):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    try:
        return read_only_builder.builder_from_files(name, **({'data_dir': data_dir} if data_dir else {}))
    except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f'tensorflow_datasets has prepared no {name!r} under {data_dir or tfds.core.constants.DATA_DIR}: prepare '
            f'it with `tfds build`, or pass data_dir.'
        ) from error


def _find_features(name: str, features: Any) -> tuple[str, dict[str, LabelSet]]:
    """The feature that holds the picture, and those that are classes."""
    import tensorflow_datasets as tfds

    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if not images or (len(images) > 1 and 'image' not in images):
        raise ValueError(f'tfds:{name} should have one image feature, and has {images} of {sorted(features)}.')
    labels = {}
    for key, feature in features.items():
        multi = isinstance(feature, tfds.features.Sequence)
        one = feature.feature if multi else feature
        if isinstance(one, tfds.features.ClassLabel):
            labels[key] = LabelSet(names=tuple(one.names), multi=multi)
    return 'image' if 'image' in images else images[0], labels


def parse_image(record: bytes, image: str, labels: tuple[str, ...]) -> Clip:
    """A clip of one frame from an Example of tfds; the picture may be JPEG or PNG."""
    try:
        found = schema.read_example(record)
        names = [found[key][0] for key in _ID_FEATURES if found.get(key) and isinstance(found[key][0], bytes)]
        return Clip(
            id=names[0].decode() if names else '',
            frames=found[image],
            h264=b'',
            num_frames=1,
            fps=0.0,
            waveform=None,
            spectrogram=None,
            sample_rate=0,
            duration=0.0,
            has={'image': True},
            # tfds writes -1 where a split has no labels.
            labels={head: [index for index in found.get(head, []) if index >= 0] for head in labels},
        )
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f'not an Example with the feature {image!r}: {error!r}') from error


class ArrayRecordFile:
    """Random access to the records of one ArrayRecord file, which checks its own checksums."""

    def __init__(self, path: epath.PathLike):
        self.path = os.fspath(path)
        self._opening = threading.Lock()
        self._reader = None
        self._num_records = self._open().num_records()

    def __getstate__(self):
        return {'path': self.path, '_num_records': self._num_records}

    def __setstate__(self, state):
        self.__dict__.update(state, _opening=threading.Lock(), _reader=None)

    def _open(self):
        with self._opening:
            if self._reader is None:
                # No read-ahead: with a shuffled order it reads what nobody asks for.
                self._reader = array_record_module.ArrayRecordReader(self.path, 'readahead_buffer_size:0')
            return self._reader

    def __len__(self) -> int:
        return self._num_records

    def where(self, i: int) -> str:
        return f'{self.path} (record {i})'

    def __getitem__(self, i: int) -> bytes:
        try:
            return self._open().read([i])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise tfrecord.DamagedRecordError(f'{self.where(i)}: {error}') from error


_FILES: dict[str, Callable[[epath.PathLike], RecordFile]] = {
    'tfrecord': lambda path: tfrecord.TFRecordFile(path, any_index(epath.Path(path))),
    'array_record': ArrayRecordFile,
}

"""Stored clips by number: prepared shards, the SequenceExamples of the public reference, tfds datasets.

`open_source` finds out what lies at a path, checks it against what its preparation wrote down (counts, sizes,
digests), and gives random access to record `i` over all shards. Every record's checksum is verified whenever
it is read.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import os
import resource
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from absl import logging
from etils import epath

from avmae_jax.data import schema, tfrecord
from avmae_jax.data.schema import DatasetInfo, LabelSet, MediaSettings, ShardInfo
from avmae_jax.structs import Clip

VERIFY = ('size', 'framing', 'full')
_THREADS = 16  # At start-up; the checks wait for the disk, not for the CPU.


@runtime_checkable
class Source(Protocol):
    """Random access to the stored clips of one split.

    Attributes:
      spectrogram_shape: (time bins a second, mel bins) where records hold a log-mel in place of sound, or None.
    """

    info: DatasetInfo
    split: str
    spectrogram_shape: tuple[int, int] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip:
        """Raises `DamagedRecordError` (a ValueError) for a record that cannot be read."""
        ...

    def where(self, index: int) -> str:
        """File and byte offset of a record, for people."""
        ...


@dataclasses.dataclass(frozen=True)
class Legacy:
    """What SequenceExamples do not say of themselves.

    Attributes:
      spectrogram_shape: (time bins a second, mel bins) of the stored log-mel.
      fps: frames a second, where the record does not say.
      num_classes: of the label; None leaves labels out.
    """

    spectrogram_shape: tuple[int, int] = (100, 128)
    fps: int | float = 25.0
    num_classes: int | None = None


@runtime_checkable
class RecordFile(Protocol):
    """Random access to the records of one file; raises `DamagedRecordError`. Pickles, and is shared by threads."""

    path: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> bytes: ...

    def where(self, i: int) -> str: ...


class ShardedSource:
    """Files of records as one sequence of clips."""

    def __init__(
        self,
        files: Sequence[RecordFile],
        parse: Callable[[bytes], Clip],
        info: DatasetInfo,
        split: str,
        spectrogram_shape: tuple[int, int] | None = None,
    ):
        self.files = list(files)
        self.parse = parse
        self.info = info
        self.split = split
        self.spectrogram_shape = spectrogram_shape
        self._starts = [0, *itertools.accumulate(len(file) for file in self.files)]

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, index: int) -> tuple[RecordFile, int]:
        """The file of a record, and its number within it."""
        if not 0 <= index < len(self):
            raise IndexError(f'record {index} of {len(self)}')
        shard = bisect.bisect_right(self._starts, index) - 1
        return self.files[shard], index - self._starts[shard]

    def __getitem__(self, index: int) -> Clip:
        file, i = self.locate(index)
        try:
            clip = self.parse(file[i])
            # Records of others may have no id; people need a name for what they are shown.
            return clip if clip.id else clip._replace(id=f'{os.path.basename(file.path)}:{i}')
        except tfrecord.DamagedRecordError:
            raise
        except ValueError as error:
            raise tfrecord.DamagedRecordError(f'{file.where(i)}: {error}') from error

    def where(self, index: int) -> str:
        file, i = self.locate(index)
        return file.where(i)


def open_source(
    path: epath.PathLike,
    split: str = 'train',
    verify: str | None = None,
    legacy: Legacy | None = None,
    data_dir: epath.PathLike | None = None,
) -> Source:
    """The clips of one split of a dataset, checked.

    Args:
      path: a folder that `prepare` wrote; a folder, file or glob of SequenceExample TFRecords (with `legacy`);
        or 'tfds:NAME', 'tfds:NAME/CONFIG', for what tensorflow_datasets prepared under `data_dir`.
      split: one, or several joined by '+' ('fold2+fold3'), whose records follow one another. Of a legacy folder: what
        the names of its files must contain; '' takes all.
      verify: 'size' compares counts, sizes and index digests; 'framing' also every record's stored checksums
        (16 bytes read a record); 'full' every byte. None: 'framing' on disks and 'size' on object stores.
      legacy: how to read SequenceExamples.
      data_dir: of tensorflow_datasets; None is its default.
    """
    if verify not in (None, *VERIFY):
        raise ValueError(f'verify must be one of {VERIFY}; got {verify!r}.')
    name = os.fspath(path)
    if name.startswith('tfds:'):
        from avmae_jax.data import tfds_source  # Imports tensorflow_datasets, which only these datasets need.

        return tfds_source.open_tfds(name.removeprefix('tfds:'), split, data_dir)
    if verify is None:
        verify = 'size' if '://' in name else 'framing'
    if legacy is not None:
        return _open_legacy(name, split, legacy)
    if not epath.Path(name).is_dir():
        raise ValueError(
            f'{name} is no folder. A dataset is a folder written by `python -m avmae_jax.prepare`, "tfds:NAME", or '
            f'SequenceExample TFRecords, whose settings go into `legacy`.'
        )
    info = schema.read_info(name)
    check_splits(name, split, info.splits)
    return open_prepared(name, info, split, verify)


def split_parts(split: str) -> list[str]:
    """'fold2+fold3' -> the splits that it joins."""
    parts = split.split('+')
    if len(set(parts)) < len(parts):
        raise ValueError(f'{split!r} names a split twice.')
    return parts


def check_splits(dataset: str, split: str, there: Collection[str]) -> None:
    """Refuses a split, one or several joined by '+', that a dataset does not have."""
    for part in split_parts(split):
        if part not in there:
            raise ValueError(f'{dataset} has no split {part!r}; it has {sorted(there)}.')


def open_prepared(path: epath.PathLike, info: DatasetInfo, split: str, verify: str) -> ShardedSource:
    """The shards of a split, each checked against what `dataset.json` says of it; lists all that is wrong."""
    shards = [shard for part in split_parts(split) for shard in info.splits[part]]
    allow_open_files(len(shards))
    check = functools.partial(_open_shard, epath.Path(path), verify=verify)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        opened = list(pool.map(check, shards))
    wrong = [found for found in opened if isinstance(found, str)]
    if wrong:
        more = f'\n  ... and {len(wrong) - 10} more' if len(wrong) > 10 else ''
        raise ValueError(
            f'{len(wrong)} of {len(shards)} shards of {path}, split {split!r}, are not as they were prepared. Copy '
            f'them again, or prepare them again:\n  ' + '\n  '.join(wrong[:10]) + more
        )
    files = [found for found in opened if not isinstance(found, str)]
    return ShardedSource(files, schema.read_clip, info, split)


def _open_shard(folder: epath.Path, shard: ShardInfo, verify: str) -> tfrecord.TFRecordFile | str:
    """The file of a shard, or what is wrong with it."""
    path = folder / shard.file
    index_path = folder / (shard.file + '.index')
    try:
        num_bytes = path.stat().length
    except FileNotFoundError:
        return f'{path} is missing.'
    if num_bytes != shard.num_bytes:
        return f'{path} should have {shard.num_bytes} bytes and has {num_bytes}.'
    try:
        text = index_path.read_bytes()
    except FileNotFoundError:
        return f'{index_path} is missing.'
    found = hashlib.sha256(text).hexdigest()
    if found != shard.index_sha256:
        return f'{index_path} should have sha256 {shard.index_sha256} and has {found}.'
    try:
        index = tfrecord.parse_index(text.decode(), str(index_path))
    except ValueError as error:
        return str(error)
    if len(index) != shard.num_records:
        return f'{index_path} should list {shard.num_records} records and lists {len(index)}.'
    if index[:, 1].sum() != num_bytes:
        return f'{index_path} covers {index[:, 1].sum()} bytes of a shard of {num_bytes}.'
    file = tfrecord.TFRecordFile(path, index)
    if verify == 'framing' and (found := file.framing_digest()) != shard.framing_sha256:
        return f'{path} should have the framing digest {shard.framing_sha256} and has {found}.'
    if verify == 'full' and (found := _file_digest(path)) != shard.sha256:
        return f'{path} should have sha256 {shard.sha256} and has {found}.'
    return file


def _file_digest(path: epath.Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, often 1024, to hold one descriptor a shard."""
    wanted = count + 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ValueError(
            f'{count} shards need {wanted} open files and this machine allows {hard}: raise the limit '
            f'(ulimit -Hn), or prepare fewer, larger shards.'
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_labels(source: Source, head: str = 'label') -> list[list[int]]:
    """The class indices of every clip, in order; none for a clip without labels, or whose record is damaged.

    Of prepared shards a few hundred bytes a record are read, without checking its checksum. Of other sources all of
    every record is read.
    """
    files = source.files if isinstance(source, ShardedSource) and source.parse is schema.read_clip else None

    def of_file(file: tfrecord.TFRecordFile) -> list[list[int]]:
        found = []
        for offset, size in file.index.tolist():
            payload = (offset + tfrecord.HEADER_BYTES, size - tfrecord.FRAMING_BYTES)
            found.append(_or_none(functools.partial(schema.read_labels, file.pread, *payload)).get(head, []))
        return found

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        if files is not None and all(isinstance(file, tfrecord.TFRecordFile) for file in files):
            return [indices for part in pool.map(of_file, files) for indices in part]
        return list(pool.map(lambda i: _or_none(lambda: source[i].labels).get(head, []), range(len(source))))


def _or_none(read: Callable[[], dict[str, list[int]]]) -> dict[str, list[int]]:
    try:
        return read()
    except ValueError:
        return {}


# -- SequenceExamples, as the public reference trains from --


def _open_legacy(pattern: str, split: str, legacy: Legacy) -> ShardedSource:
    paths = _legacy_files(pattern, split)
    allow_open_files(len(paths))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        files = list(pool.map(lambda path: tfrecord.TFRecordFile(path, any_index(path)), paths))
    parse = functools.partial(
        schema.parse_sequence_example, spectrogram_shape=legacy.spectrogram_shape, fps=float(legacy.fps)
    )
    shards = tuple(
        ShardInfo(os.path.basename(file.path), len(file), int(file.index[:, 1].sum()), '', '', '') for file in files
    )
    labels = {}
    if legacy.num_classes is not None:
        labels['label'] = LabelSet(names=tuple(str(i) for i in range(legacy.num_classes)), multi=True)
    first = _first_readable(files, parse)
    info = DatasetInfo(
        name=pattern,
        modalities=tuple(sorted(modality for modality, has in first.has.items() if has)),
        media=MediaSettings(
            codec='jpeg', fps=first.fps, short_side=0, jpeg_quality=0, sample_rate=0, clip_seconds=None, gop=0
        ),
        splits={split: shards},
        labels=labels,
        statistics={},
    )
    return ShardedSource(files, parse, info, split, spectrogram_shape=legacy.spectrogram_shape)


def _legacy_files(pattern: str, split: str) -> list[epath.Path]:
    path = epath.Path(pattern)
    found: Iterable[epath.Path]
    if path.is_dir():
        found = path.glob('*tfrecord*')
    elif path.exists():
        found = [path]
    else:
        found = epath.Path(os.path.dirname(pattern)).glob(os.path.basename(pattern))
    files = sorted(file for file in found if not file.name.endswith('.index'))
    chosen: list[epath.Path] = []
    for part in split_parts(split) if path.is_dir() else ['']:
        of_part = [file for file in files if part in file.name]
        if not of_part:
            raise ValueError(
                f'{pattern} holds no TFRecord files' + (f' whose names contain {part!r}.' if part else '.')
            )
        chosen += of_part
    return list(dict.fromkeys(chosen))


def any_index(path: epath.Path) -> np.ndarray:
    """The index beside a file where it fits; else made by walking the file, and left beside it where allowed."""
    beside = path.parent / (path.name + '.index')
    if beside.exists():
        index = tfrecord.read_index(beside)
        if index[:, 1].sum() == path.stat().length:
            return index
        logging.warning('%s does not fit its file; the records are counted anew.', beside)
    index = tfrecord.scan_index(path)
    try:
        beside.write_text(tfrecord.format_index(index[:, 1].tolist()))
    except OSError as error:
        logging.info('No index is left beside %s: %s', path, error)
    return index


def _first_readable(files: Sequence[tfrecord.TFRecordFile], parse: Callable[[bytes], Clip]) -> Clip:
    """A clip that can be read, or the error of the first one."""
    first_error = None
    for file in files:
        for i in range(min(len(file), 10)):
            try:
                return parse(file[i])
            except ValueError as error:
                first_error = first_error or error
    raise ValueError(f'none of the first records of {files[0].path} can be read: {first_error}')

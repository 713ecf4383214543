"""The fields of a stored clip and their bytes: the only file that knows the wire format.

A record is a `tf.train.Example`, written and read here without TensorFlow or protobuf classes, so that a
record costs a walk over its bytes and no copy. `tensorflow_datasets` reads the same bytes through the
`features.json` that `data/prepare/shards.py` writes beside them. The SequenceExamples of DMVR, which the
public reference trains from, are read (never written) by `parse_sequence_example`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from avmae_jax.settings import check_kinds, kinds_of
from avmae_jax.structs import Clip

FORMAT_VERSION = 1
INFO_FILE = 'dataset.json'
CODECS = ('jpeg', 'h264')

# -- The wire: the little of protobuf that an Example needs. A field is (number << 3 | type), type 2 is bytes. --


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError('a number longer than 64 bits')


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, value) of a message; bytes come as views of `data`."""
    at, end = 0, len(data)
    while at < end:
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 2:
            size, at = _read_varint(data, at)
            value: Any = data[at : at + size]
            if at + size > end:
                raise ValueError('a field that ends behind its message')
            at += size
        elif wire == 0:
            value, at = _read_varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value = data[at : at + size]
            at += size
        else:
            raise ValueError(f'wire type {wire}')
        yield number, wire, value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


class BytesList(Sequence):
    """The entries of a bytes_list where they lie in the record; each is copied out when it is asked for.

    A record holds a hundred frames of which a window wants sixteen.
    """

    def __init__(self, data: memoryview):
        self._data = data
        self._spans: list[tuple[int, int]] = []
        at, end = 0, len(data)
        while at < end:
            if data[at] != 10:  # Field 1 of type bytes, the only one there is.
                raise ValueError(f'field key {data[at]} in a list of bytes')
            size, at = _read_varint(data, at + 1)
            self._spans.append((at, at + size))
            at += size
        if at > end:
            raise ValueError('a field that ends behind its message')

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [bytes(self._data[start:end]) for start, end in self._spans[index]]
        start, end = self._spans[index]
        return bytes(self._data[start:end])

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __reduce__(self):
        return list, (list(self),)


def _parse_feature(data: memoryview) -> BytesList | np.ndarray | list[int]:
    """A Feature: bytes_list = 1 (lazily), float_list = 2 (float32 array), int64_list = 3 (ints)."""
    for kind, _, values in _fields(data):
        if kind == 1:
            return BytesList(values)
        packed = b''.join(bytes(value) for _, wire, value in _fields(values) if wire in (2, 5))
        if kind == 2:
            return np.frombuffer(packed, '<f4')
        numbers: list[int] = []
        for _, wire, value in _fields(values):
            if wire == 0:
                numbers.append(_signed(value))
            else:
                at = 0
                while at < len(value):
                    number, at = _read_varint(value, at)
                    numbers.append(_signed(number))
        return numbers
    return []


def _parse_feature_map(data: memoryview, parse=_parse_feature) -> dict[str, Any]:
    """Features / FeatureLists: a map field 1 of entries (key = 1, value = 2)."""
    found = {}
    for _, _, entry in _fields(data):
        key, value = '', memoryview(b'')
        for number, _, part in _fields(entry):
            if number == 1:
                key = bytes(part).decode()
            else:
                value = part
        found[key] = parse(value)
    return found


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _feature(values: Sequence[Any], kind: type) -> bytes:
    # An empty list keeps its kind: tensorflow_datasets refuses a Feature without one.
    if kind is bytes:
        return _bytes_field(1, b''.join(_bytes_field(1, value) for value in values))
    if kind is float:
        return _bytes_field(2, _bytes_field(1, struct.pack(f'<{len(values)}f', *values)) if len(values) else b'')
    return _bytes_field(3, _bytes_field(1, b''.join(_varint(int(value)) for value in values)) if len(values) else b'')


def write_example(fields: Mapping[str, Sequence], empty_kinds: Mapping[str, type] | None = None) -> bytes:
    """A serialised tf.train.Example; fields in the order of their names, so that equal input gives equal bytes.

    Args:
      fields: name -> values, all bytes, all float or all int.
      empty_kinds: name -> bytes, float or int, for fields whose list may be empty; int where none is named.
    """

    def kind(name: str) -> type:
        if len(fields[name]):
            return type(fields[name][0])
        return (empty_kinds or {}).get(name, int)

    entries = b''.join(
        _bytes_field(1, _bytes_field(1, name.encode()) + _bytes_field(2, _feature(fields[name], kind(name))))
        for name in sorted(fields)
    )
    return _bytes_field(1, entries)


def read_example(record: bytes) -> dict[str, Any]:
    """The features of a serialised tf.train.Example; lists of bytes refer to `record`."""
    found: dict[str, Any] = {}
    for number, _, features in _fields(memoryview(record)):
        if number == 1:
            found.update(_parse_feature_map(features))
    return found


# -- Our records --


def write_clip(clip: Clip) -> bytes:
    """One record. Labels go to `label/<head>`; sound as the bytes of little-endian int16."""
    if clip.spectrogram is not None:
        raise ValueError(f'{clip.id}: stored spectrograms are read from legacy records but never written.')
    waveform = np.zeros(0, np.int16) if clip.waveform is None else clip.waveform
    if waveform.dtype != np.int16:
        raise ValueError(f'{clip.id}: sound is stored as int16, got {waveform.dtype}.')
    fields: dict[str, Sequence] = {
        'id': [clip.id.encode()],
        'frames': list(clip.frames),
        'h264': [clip.h264],
        'num_frames': [clip.num_frames],
        'fps': [float(clip.fps)],
        'waveform': [waveform.astype('<i2').tobytes()],
        'sample_rate': [clip.sample_rate],
        'duration': [float(clip.duration)],
        'has_video': [int(clip.has.get('video', clip.has.get('image', False)))],
        'has_audio': [int(clip.has.get('audio', False))],
    }
    for head, indices in clip.labels.items():
        fields[f'label/{head}'] = [int(i) for i in indices]
    return write_example(fields, empty_kinds={'frames': bytes})


def read_clip(record: bytes) -> Clip:
    """The clip of one record. Nothing is decoded; raises ValueError for bytes that are no clip."""
    try:
        found = read_example(record)
        waveform = np.frombuffer(found['waveform'][0], '<i2')
        num_frames, sample_rate = found['num_frames'][0], found['sample_rate'][0]
        return Clip(
            id=found['id'][0].decode(),
            frames=found['frames'] or [],
            h264=found['h264'][0],
            num_frames=num_frames,
            fps=float(found['fps'][0]),
            waveform=waveform if len(waveform) else None,
            spectrogram=None,
            sample_rate=sample_rate,
            duration=float(found['duration'][0]),
            has={'video': bool(found['has_video'][0]), 'audio': bool(found['has_audio'][0])},
            labels={name[6:]: list(value) for name, value in found.items() if name.startswith('label/')},
        )
    except (IndexError, KeyError, ValueError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f'not a clip record of format {FORMAT_VERSION}: {error!r}') from error


def read_labels(pread: Callable[[int, int], bytes], start: int, size: int) -> dict[str, list[int]]:
    """The labels of one of our records without its media: of every other field only the beginning is read.

    Args:
      pread: (offset, bytes) -> what the file holds there.
      start, size: of the record, without its framing.
    """
    labels = {}
    try:
        peek = memoryview(pread(start, 32))
        _, at = _read_varint(peek, 0)
        _, at = _read_varint(peek, at)  # The length of all fields.
        place = start + at
        while place < start + size:
            # A field is a message of a name and values, as in `write_example`.
            peek = memoryview(pread(place, 256))
            _, at = _read_varint(peek, 0)
            length, at = _read_varint(peek, at)
            place += at
            _, at = _read_varint(peek, at)
            name_length, at = _read_varint(peek, at)
            if bytes(peek[at : at + min(name_length, 6)]) == b'label/':
                entry = {number: value for number, _, value in _fields(memoryview(pread(place, length)))}
                labels[bytes(entry[1]).decode()[6:]] = list(_parse_feature(entry[2]))
            place += length
    except (IndexError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f'not a clip record of format {FORMAT_VERSION}: {error!r}') from error
    return labels


def parse_sequence_example(record: bytes, spectrogram_shape: tuple[int, int], fps: float) -> Clip:
    """A DMVR SequenceExample as Scenic's loaders read it: 25 fps JPEG frames, log-mel by the second.

    Args:
      spectrogram_shape: (time bins a second, mel bins) of each entry of 'melspec/feature/floats'.
      fps: of the frames, where the record does not say.
    """
    context: dict[str, Any] = {}
    lists: dict[str, list] = {}

    def parse_list(data: memoryview) -> list:
        return [_parse_feature(feature) for _, _, feature in _fields(data)]

    try:
        for number, _, part in _fields(memoryview(record)):
            if number == 1:
                context = _parse_feature_map(part)
            elif number == 2:
                lists = _parse_feature_map(part, parse_list)
        frames = [entry[0] for entry in lists.get('image/encoded', [])]
        seconds = lists.get('melspec/feature/floats', [])
        spectrogram = np.concatenate([np.reshape(x, spectrogram_shape) for x in seconds]) if seconds else None
        rate = context.get('image/frame_rate') or [fps]
        duration = len(frames) / float(rate[0]) if frames else float(len(seconds))
        media_id = context.get('clip/media_id') or [b'']
        return Clip(
            id=media_id[0].decode(),
            frames=frames,
            h264=b'',
            num_frames=len(frames),
            fps=float(rate[0]),
            waveform=None,
            spectrogram=spectrogram,
            sample_rate=0,
            duration=duration,
            has={'video': bool(frames), 'audio': spectrogram is not None},
            labels={'label': list(context.get('clip/label/index', []))},
        )
    except (IndexError, KeyError, ValueError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f'not a SequenceExample with {spectrogram_shape} log-mels a second: {error!r}') from error


# -- What a dataset folder says of itself --


@dataclasses.dataclass(frozen=True)
class MediaSettings:
    """How the media of a dataset were stored; `codec` None means there is no picture."""

    codec: str | None
    fps: float
    short_side: int
    jpeg_quality: int
    sample_rate: int
    clip_seconds: float | None  # None: whole files, of any length.
    gop: int


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    file: str
    num_records: int
    num_bytes: int
    sha256: str  # Of the whole file.
    framing_sha256: str  # TFRecordFile.framing_digest: cheap enough for every start.
    index_sha256: str


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """The classes of one head; `multi` when a clip may have several."""

    names: tuple[str, ...]
    multi: bool

    @property
    def digest(self) -> str:
        return hashlib.sha256('\n'.join(self.names).encode()).hexdigest()


def unnamed_classes(count: int) -> tuple[str, ...]:
    """The names of classes of whom nothing but their number is known."""
    return tuple(f'class {i}' for i in range(count))


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json`: what training needs to know of a dataset before it opens a shard.

    Attributes:
      modalities: those that at least one clip has, sorted.
      splits: split -> its shards in order.
      labels: head -> its classes; {} without labels.
      statistics: 'video'/'image' -> {'mean': [3], 'std': [3]} of RGB in [0, 1]; 'audio' -> convention ->
        {'mean', 'std'} of the log-mel; measured on the first split over all its clips.
      longest_seconds: of the longest clip; None where nobody measured.
    """

    name: str
    modalities: tuple[str, ...]
    media: MediaSettings
    splits: Mapping[str, tuple[ShardInfo, ...]]
    labels: Mapping[str, LabelSet]
    statistics: Mapping[str, Any]
    longest_seconds: float | None = None
    format_version: int = FORMAT_VERSION

    @property
    def clip_seconds(self) -> float | None:
        """How long clips are at most: as measured, or as long files were to be cut; None where that is not known."""
        return self.media.clip_seconds if self.longest_seconds is None else self.longest_seconds

    def num_records(self, split: str) -> int:
        return sum(shard.num_records for shard in self.splits[split])

    def digest(self) -> str:
        """One value for the content: changes with any shard, label or setting."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        tree = dataclasses.asdict(self)
        if self.longest_seconds is None:
            del tree['longest_seconds']  # Folders prepared before it was measured keep their digest.
        for head, labels in self.labels.items():
            tree['labels'][head]['digest'] = labels.digest
        return json.dumps(tree, indent=1, sort_keys=True) + '\n'

    @classmethod
    def from_json(cls, text: str) -> DatasetInfo:
        tree = json.loads(text)
        version = tree.get('format_version') if isinstance(tree, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f'format_version is {version!r}; this version reads {FORMAT_VERSION}: prepare again.')
        check_kinds('dataset', tree, {**kinds_of(cls), 'labels': dict[str, dict], 'splits': dict[str, list[dict]]})
        check_kinds('media', tree['media'], kinds_of(MediaSettings))
        for shard in (shard for shards in tree['splits'].values() for shard in shards):
            check_kinds('splits', shard, kinds_of(ShardInfo))
        labels = {}
        for head, entry in tree['labels'].items():
            check_kinds(f'labels.{head}', entry, {'names': list[str], 'multi': bool})
            labels[head] = LabelSet(names=tuple(entry['names']), multi=entry['multi'])
            if labels[head].digest != entry['digest']:
                raise ValueError(f'the names of label head {head!r} do not fit their digest.')
        return cls(
            name=tree['name'],
            modalities=tuple(tree['modalities']),
            media=MediaSettings(**tree['media']),
            splits={name: tuple(ShardInfo(**shard) for shard in shards) for name, shards in tree['splits'].items()},
            labels=labels,
            statistics=tree['statistics'],
            longest_seconds=float(tree['longest_seconds']) if 'longest_seconds' in tree else None,
        )


def read_info(path: epath.PathLike) -> DatasetInfo:
    """`dataset.json` of a prepared folder; errors name the file and what to do."""
    file = epath.Path(path) / INFO_FILE
    if not file.exists():
        raise ValueError(f'{path} has no {INFO_FILE}: it is not a folder that `python -m avmae_jax.prepare` finished.')
    try:
        return DatasetInfo.from_json(file.read_text())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{file} cannot be read: {error}') from error

"""What stored clips are, in words, and whether they are still what was written.

Training stops at the first thing that is wrong (`sources.py`); this goes through all of it and names each file,
byte and record, for people who want to know what to copy again.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from avmae_jax.data import schema, tfrecord
from avmae_jax.data.schema import DatasetInfo, ShardInfo
from avmae_jax.structs import Clip

FAILURES_FILE = 'failures.csv'
CHECKS = ('none', 'framing', 'full')


class Inspection(NamedTuple):
    """Attributes: lines: what is there, (what, value); faults: what is wrong, each naming its file."""

    lines: list[tuple[str, str]]
    faults: list[str]


@dataclasses.dataclass
class Tally:
    """What the records of a split add up to, read one by one."""

    clips: int = 0
    seconds: float = 0.0
    without: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    labels: dict[str, collections.Counter] = dataclasses.field(default_factory=dict)

    def add(self, clip: Clip) -> None:
        self.clips += 1
        self.seconds += clip.duration
        self.without.update(modality for modality, has in clip.has.items() if not has)
        for head, indices in clip.labels.items():
            self.labels.setdefault(head, collections.Counter()).update(indices)


# -- Records of any kind --


def parse_any(record: bytes, mel_bins: int) -> tuple[str, Clip | None, dict[str, str]]:
    """(kind, the clip if it is one, its fields in words) of a record; kind says what it is.

    Args:
      mel_bins: of a stored log-mel, which a SequenceExample does not tell.
    """
    try:
        return 'clip', schema.read_clip(record), {}
    except ValueError:
        pass
    for bins in (mel_bins, 1):  # 1 always fits: the rest of the record is worth showing without the log-mel.
        try:
            clip = schema.parse_sequence_example(record, spectrogram_shape=(-1, bins), fps=25.0)
        except ValueError:
            continue
        if clip.frames or clip.spectrogram is not None:
            note = {} if bins == mel_bins else {'log-mel': f'not in rows of {mel_bins}: give its --mel_bins'}
            return 'SequenceExample', clip if bins == mel_bins else clip._replace(spectrogram=None), note
    try:
        fields = schema.read_example(record)
    except (ValueError, IndexError):
        fields = {}
    if fields:
        return 'Example', None, {name: _describe_feature(value) for name, value in sorted(fields.items())}
    return 'unknown', None, {'bytes': f'{len(record):,}'}


def _describe_feature(value: Sequence | np.ndarray) -> str:
    if len(value) and isinstance(value[0], bytes):
        return f'{len(value)} x bytes, the first of {len(value[0]):,}'
    kind = 'float' if isinstance(value, np.ndarray) else 'int'
    shown = ', '.join(f'{x:g}' for x in value[:4])
    return f'{len(value)} x {kind}: {shown}{", ..." if len(value) > 4 else ""}'


def describe_clip(clip: Clip) -> str:
    """One line: id, picture, sound, labels."""
    parts = [clip.id or '(no id)', f'{clip.duration:.2f} s']
    if clip.num_frames:
        kind = 'h264' if clip.h264 else 'images'
        parts.append(f'{clip.num_frames} frames ({kind}, {clip.fps:g} fps)' if clip.fps else 'an image')
    if clip.waveform is not None:
        parts.append(f'{len(clip.waveform):,} samples at {clip.sample_rate:,} Hz')
    if clip.spectrogram is not None:
        parts.append('log-mel {} x {}'.format(*clip.spectrogram.shape))
    parts += [f'{head} {indices}' for head, indices in clip.labels.items()]
    return ', '.join(parts)


def walk(path: epath.Path) -> Iterator[tuple[int, bytes | str]]:
    """(offset, payload or what is wrong with it); goes on behind a record whose bytes are damaged."""
    num_bytes, offset = path.stat().length, 0
    file = tfrecord.TFRecordFile(path, np.zeros((0, 2), np.int64))
    while offset < num_bytes:
        header = file.pread(offset, tfrecord.HEADER_BYTES)
        length = int.from_bytes(header[:8], 'little')
        size = length + tfrecord.FRAMING_BYTES
        if len(header) < tfrecord.HEADER_BYTES or int.from_bytes(header[8:], 'little') != tfrecord.masked_crc(
            header[:8]
        ):
            # Where the next record begins is not known either.
            yield offset, f'{path} at byte {offset}: the length of the record is damaged; what follows cannot be read.'
            return
        if offset + size > num_bytes:
            yield offset, f'{path} at byte {offset}: the file ends {offset + size - num_bytes:,} bytes too early.'
            return
        try:
            yield offset, tfrecord.unframe_record(file.pread(offset, size), where=f'{path} at byte {offset}')
        except tfrecord.DamagedRecordError as error:
            yield offset, str(error)
        offset += size


# -- One file --


def inspect_shard(path: epath.Path, mel_bins: int, tick: Callable[[int], object] = lambda count: None) -> Inspection:
    """A TFRecord file by itself: every record is read and checked, and the index beside it, if there is one.

    Args:
      tick: told how many more records are through.
    """
    faults: list[str] = []
    rows: list[tuple[int, int]] = []
    kinds: collections.Counter = collections.Counter()
    tally, first = Tally(), ''
    fields: dict[str, str] = {}
    for offset, payload in walk(path):
        if isinstance(payload, str):
            faults.append(payload)
            continue
        rows.append((offset, len(payload) + tfrecord.FRAMING_BYTES))
        tick(1)
        kind, clip, found = parse_any(payload, mel_bins)
        kinds[kind] += 1
        fields = fields or found
        if clip is not None:
            tally.add(clip)
            first = first or describe_clip(clip)
        elif kind == 'unknown':
            faults.append(f'{path} at byte {offset}: whole by its checksum, but no Example of any kind.')
    lines = [('records', ', '.join(f'{count:,} of kind {kind}' for kind, count in kinds.items()) or 'none')]
    lines += [('', f'first: {first}')] if first else []
    lines += [('', f'{name}: {text}') for name, text in fields.items()]
    lines += _describe_tally('file', tally, {})
    index = path.parent / f'{path.name}.index'
    if index.exists():
        try:
            listed = tfrecord.read_index(index)
            if not faults and not np.array_equal(listed, np.array(rows, np.int64).reshape(-1, 2)):
                faults.append(f'{index} lists {len(listed)} records that are not those of its file ({len(rows)}).')
        except ValueError as error:
            faults.append(str(error))
    info_file = path.parent / schema.INFO_FILE
    if info_file.exists():
        lines.append(('part of', str(path.parent)))
        try:
            shards = {shard.file: shard for split in schema.read_info(path.parent).splits.values() for shard in split}
            if path.name not in shards:
                faults.append(f'{info_file} does not name {path.name}.')
            else:
                faults += _check_bytes(path, shards[path.name])
        except ValueError as error:
            faults.append(str(error))
    return Inspection(lines, faults)


def _file_sha256(path: epath.Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _check_bytes(path: epath.Path, shard: ShardInfo) -> list[str]:
    found = _file_sha256(path)
    return [] if found == shard.sha256 else [f'{path} should have sha256 {shard.sha256} and has {found}.']


# -- A prepared folder --


def inspect_dataset(folder: epath.Path, check: str, tick: Callable[[int], object] = lambda count: None) -> Inspection:
    """A folder that `prepare` wrote.

    Args:
      check: 'none'; 'framing' for sizes, indexes and the checksums' digest (16 bytes read a record); 'full' for
        the digest of every shard and the checksum and fields of every record besides.
    """
    assert check in CHECKS, check
    info = schema.read_info(folder)
    faults: list[str] = []
    lines = _describe_info(info)
    tallies: dict[str, Tally] = {}
    if check != 'none':
        for split, shards in info.splits.items():
            tallies[split] = Tally()
            ids: collections.Counter = collections.Counter()
            for shard in shards:
                faults += _check_shard(folder, shard, info, check, tallies[split], ids)
                tick(shard.num_records)
            twice = [name for name, count in ids.items() if count > 1]
            if twice:
                faults.append(
                    f'{folder}, split {split!r}: {len(twice)} ids occur more than once, such as {twice[0]!r}.'
                )
            if check == 'full':
                lines += _describe_tally(split, tallies[split], info.labels)
    lines += _describe_failures(folder)
    for name in ('features.json', 'dataset_info.json'):
        if not (folder / name).exists():
            faults.append(f'{folder / name} is missing: tensorflow_datasets cannot open the folder.')
    named = {shard.file for shards in info.splits.values() for shard in shards}
    stray = [path.name for path in folder.glob('*.tfrecord*') if path.name.removesuffix('.index') not in named]
    if stray:
        lines.append(('not listed', f'{len(stray)} files that {schema.INFO_FILE} does not name, such as {min(stray)}'))
    return Inspection(lines, faults)


def _check_shard(
    folder: epath.Path, shard: ShardInfo, info: DatasetInfo, check: str, tally: Tally, ids: collections.Counter
) -> list[str]:
    """All that is wrong with one shard."""
    path, index_path = folder / shard.file, folder / f'{shard.file}.index'
    if not path.exists():
        return [f'{path} is missing.']
    faults = []
    num_bytes = path.stat().length
    if num_bytes != shard.num_bytes:
        faults.append(f'{path} should have {shard.num_bytes:,} bytes and has {num_bytes:,}.')
    try:
        text = index_path.read_bytes()
        if (found := hashlib.sha256(text).hexdigest()) != shard.index_sha256:
            faults.append(f'{index_path} should have sha256 {shard.index_sha256} and has {found}.')
        index = tfrecord.parse_index(text.decode(errors='replace'), os.fspath(index_path))
        if len(index) != shard.num_records:
            faults.append(f'{index_path} should list {shard.num_records} records and lists {len(index)}.')
        elif index[:, 1].sum() == num_bytes:
            found = tfrecord.TFRecordFile(path, index).framing_digest()
            if found != shard.framing_sha256:
                faults.append(f'{path} should have the framing digest {shard.framing_sha256} and has {found}.')
    except FileNotFoundError:
        faults.append(f'{index_path} is missing.')
    except ValueError as error:
        faults.append(str(error))
    if check == 'framing':
        return faults
    faults += _check_bytes(path, shard)
    count = 0
    for offset, payload in walk(path):
        if isinstance(payload, str):
            faults.append(payload)
            continue
        count += 1
        try:
            clip = schema.read_clip(payload)
        except ValueError as error:
            faults.append(f'{path} at byte {offset}: {error}')
            continue
        tally.add(clip)
        ids[clip.id] += 1
        for head, indices in clip.labels.items():
            classes = len(info.labels[head].names) if head in info.labels else 0
            if any(not 0 <= i < classes for i in indices):
                faults.append(f'{path} at byte {offset}: label {head} {indices} is none of its {classes} classes.')
    if count != shard.num_records:
        faults.append(f'{path} should have {shard.num_records} whole records and has {count}.')
    return faults


# -- In words --


def format_bytes(count: int | float) -> str:
    power = min(4, max(0, math.floor(math.log10(max(count, 1)) / 3)))
    return f'{count:,} bytes' if not power else f'{count / 1000**power:,.1f} {"kMGT"[power - 1]}B'


def _describe_info(info: DatasetInfo) -> list[tuple[str, str]]:
    media = info.media
    lines = [('modalities', ', '.join(info.modalities))]
    if media.codec:
        quality = f'quality {media.jpeg_quality}' if media.codec == 'jpeg' else f'a keyframe every {media.gop}'
        rate = f'{media.fps:g} fps, ' if media.fps else ''
        lines.append(('picture', f'{media.codec}, {rate}short side {media.short_side}, {quality}'))
    if 'audio' in info.modalities:
        lines.append(('sound', f'int16 at {media.sample_rate:,} Hz'))
    if info.clip_seconds:
        lines.append(('clips', f'up to {round(info.clip_seconds, 2):g} s'))
    for split, shards in info.splits.items():
        size = format_bytes(sum(shard.num_bytes for shard in shards))
        lines.append((f'split {split}', f'{info.num_records(split):,} records in {len(shards):,} shards, {size}'))
    for head, labels in info.labels.items():
        shown = ', '.join(labels.names[:5]) + (', ...' if len(labels.names) > 5 else '')
        several = 'several a clip' if labels.multi else 'one a clip'
        lines.append((f'labels {head}', f'{len(labels.names)} classes, {several}: {shown}'))
        lines.append(('', f'digest of the names {labels.digest[:16]}'))
    if not info.labels:
        lines.append(('labels', 'none'))
    for modality, statistics in info.statistics.items():
        for name, value in _leaves(statistics):
            lines.append((f'{modality} statistics', f'{name} {value}'.strip()))
    return lines


def _leaves(statistics: dict) -> Iterator[tuple[str, str]]:
    """(convention, 'mean ..., std ...') of one modality."""
    if 'mean' in statistics:
        numbers = {name: np.atleast_1d(statistics[name]) for name in ('mean', 'std') if name in statistics}
        yield '', ', '.join(f'{name} {" ".join(f"{x:.4g}" for x in value)}' for name, value in numbers.items())
        return
    for name, inner in statistics.items():
        if isinstance(inner, dict):
            for _, text in _leaves(inner):
                yield name, text


def _describe_tally(split: str, tally: Tally, labels: Mapping[str, schema.LabelSet]) -> list[tuple[str, str]]:
    if not tally.clips:
        return []
    missing = ', '.join(f'{count:,} without {modality}' for modality, count in sorted(tally.without.items()))
    text = f'{tally.clips:,} clips, {tally.seconds / 60:,.1f} minutes' + (f', {missing}' if missing else '')
    lines = [(f'read {split}', text)]
    for head, counts in tally.labels.items():
        if not counts:
            continue
        names = labels[head].names if head in labels else ()

        def name(i: int, names=names) -> str:
            return names[i] if 0 <= i < len(names) else f'class {i}'

        (most, many), (least, few) = counts.most_common(1)[0], counts.most_common()[-1]
        text = f'{head}: {len(counts)} classes occur, most often {name(most)} ({many:,}), least {name(least)} ({few:,})'
        lines.append(('', text))
    return lines


def _describe_failures(folder: epath.Path) -> list[tuple[str, str]]:
    path = folder / FAILURES_FILE
    if not path.exists():
        return []
    rows = list(csv.DictReader(path.read_text().splitlines()))
    if not rows:
        return [('failures', 'none')]
    column = 'reason' if 'reason' in rows[0] else list(rows[0])[-1]
    reasons = collections.Counter(
        f'{row[column]} ({row["outcome"]})' if 'outcome' in row else row[column] for row in rows
    )
    common = [f'{count:,} x {reason}' for reason, count in reasons.most_common(5)]
    return [('failures', f'{len(rows):,} in {FAILURES_FILE}'), *(('', line) for line in common)]


# -- Some clips to look at --


def sample_clips(files: Sequence[epath.Path], count: int, mel_bins: int) -> list[Clip]:
    """Whole clips from all over some TFRecord files; damaged ones are passed over."""
    clips: list[Clip] = []
    each = -(-count // max(1, len(files)))
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)]
    for path in chosen:
        found = 0
        for _, payload in walk(path):
            clip = None if isinstance(payload, str) else parse_any(payload, mel_bins)[1]
            if clip is not None:
                clips.append(clip)
                found += 1
            if found == each:
                break
    return clips[:count]

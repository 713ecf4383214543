"""The lists people have: plain CSV, the published lists as they are, or a folder. All become the same entries.

A reader takes a `Source` and yields `Entry`s; `FORMATS` is the table of readers, and each says itself
whether a file is one of its own. Errors name the file and the line.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

VIDEO_EXTENSIONS = frozenset(
    (
        'mp4 m4v mov qt mkv webm avi mpg mpeg m1v m2v ts m2ts mts wmv flv 3gp 3g2 ogv vob asf gif mxf y4m divx f4v dv '
        'h264 264 hevc ivf mjpeg mjpg rm rmvb'
    ).split()
)
AUDIO_EXTENSIONS = frozenset('wav flac mp3 ogg oga opus m4a aac aif aiff aifc wma au caf ac3 amr mka wv'.split())
IMAGE_EXTENSIONS = frozenset('jpg jpeg png webp bmp tif tiff ppm pgm jp2'.split())
MEDIA_EXTENSIONS = VIDEO_EXTENSIONS | AUDIO_EXTENSIONS | IMAGE_EXTENSIONS
SPLIT_NAMES = {
    'train': 'train', 'training': 'train', 'test': 'test', 'testing': 'test', 'eval': 'test', 'evaluation': 'test',
    'val': 'validation', 'valid': 'validation', 'validation': 'validation', 'dev': 'validation',
}  # fmt: skip


class Entry(NamedTuple):
    """One clip as a list names it.

    Attributes:
      id: '' to be made from the path.
      path: of the file; '' when no file was found for it, and `wanted` says what was looked for.
      start, end: seconds; None where the list says nothing.
      trimmed: the file may hold this clip alone (published lists, downloaded by many tools): then its
        times count from the start of the clip. Found out from the file's length.
      labels: head -> names, numbers or codes, as written.
      split: '' where the list says nothing.
      where: 'file:line', for errors.
    """

    id: str
    path: str
    wanted: str
    start: float | None
    end: float | None
    trimmed: bool
    labels: Mapping[str, Sequence[str]]
    split: str
    where: str


class Source(NamedTuple):
    """A list or folder; `media_dir` '' is the folder of the list."""

    path: str
    media_dir: str


def extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def parse_seconds(text: str, where: str, column: str) -> float | None:
    """'12.5' or '00:01:02.5'; '' is None."""
    text = text.strip()
    if not text:
        return None
    try:
        parts = [float(part) for part in text.split(':')]
        if len(parts) > 3:
            raise ValueError(text)
    except ValueError:
        raise ValueError(f'{where}: {column} must be seconds or hh:mm:ss; got {text!r}.') from None
    seconds = 0.0
    for part in parts:
        seconds = 60 * seconds + part
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f'{where}: {column} must be a time from 0 on; got {text!r}.')
    return seconds


def _rows(path: str, comments: bool = False) -> Iterator[tuple[str, list[str]]]:
    """('file:line', cells) of each line that is neither empty nor, where a format has them, a '#' comment."""
    # surrogateescape: a path of bytes that are no UTF-8 comes back as these bytes when the file is opened.
    with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as file:
        reader = csv.reader(file, delimiter=_delimiter(path), skipinitialspace=comments)
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells) and not (comments and cells[0].startswith('#')):
                    yield f'{path}:{reader.line_num}', cells
        except csv.Error as error:
            raise ValueError(f'{path}:{reader.line_num}: {error}.') from error


def _delimiter(path: str) -> str:
    """Spreadsheets of many countries write semicolons, some write tabs; the header tells."""
    with open(path, 'rb') as file:
        start = file.read(4096)
    if start.startswith((b'\xff\xfe', b'\xfe\xff')):
        raise ValueError(f'{path} is UTF-16 text; save it as CSV in UTF-8.')
    header = next(filter(bytes.strip, start.splitlines()), b'')
    return next((mark for mark in ',;\t' if mark.encode() in header), ',')


def first_line(path: str) -> str:
    with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        for line in file:
            if line.strip() and not (line.startswith('#') and 'YTID' not in line):
                return line.strip()
    return ''


def split_of_file(path: str) -> str:
    """The split that the name of a published list tells: 'eval_segments.csv' -> 'test'."""
    for word in re.split(r'[^a-z]+', Path(path).stem.lower()):
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return ''


def walk(folder: str, refused: list[OSError] | None = None) -> Iterator[str]:
    """All files below, sorted, following links, each folder once however links may loop.

    Args:
      refused: gets an error for each folder that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(
        folder, followlinks=True, onerror=refused.append if refused is not None else None
    ):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(files):
            if not name.startswith('.'):
                yield os.path.join(root, name)


class MediaFolder:
    """Downloaded files by their stems, wherever they lie below a folder."""

    def __init__(self, folder: str):
        if not os.path.isdir(folder):
            raise ValueError(f'media_dir must be the folder of the downloaded files; {folder} is none.')
        self.folder = folder
        self._by_stem: dict[str, str] = {}
        for path in walk(folder):
            if extension(path) in MEDIA_EXTENSIONS:
                self._by_stem.setdefault(os.path.splitext(os.path.basename(path))[0], path)

    def find(self, stems: Sequence[str]) -> tuple[str, str]:
        """(path, stem) of the first stem that has a file, or ('', '')."""
        for stem in stems:
            if stem in self._by_stem:
                return self._by_stem[stem], stem
        return '', ''


# -- The readers --

PATH_COLUMNS = ('path', 'file', 'filename', 'file_name', 'video', 'audio', 'image')
LABEL_SEPARATORS = re.compile(r'[;|]')


def read_csv(source: Source) -> Iterator[Entry]:
    """path[,start,end,label|labels,label/<head>,split,id], in any order; other columns are passed over."""
    if extension(source.path) in MEDIA_EXTENSIONS:
        raise ValueError(f'{source.path} is a medium; give its folder, or a CSV that lists it under the header "path".')
    folder = source.media_dir or os.path.dirname(source.path)
    rows = _rows(source.path)
    try:
        where, cells = next(rows)
    except StopIteration:
        raise ValueError(f'{source.path} is empty; it wants a header "path,..." and a line a clip.') from None
    header = [cell.strip().lower() for cell in cells]
    path_column = next((name for name in PATH_COLUMNS if name in header), None)
    if path_column is None:
        raise ValueError(f'{where}: the header must have a column "path"; got {",".join(header)[:100]!r}.')
    for twice in (name for name in header if header.count(name) > 1 and name):
        raise ValueError(f'{where}: the header has {twice!r} twice; which column is meant?')
    if {'label', 'labels'} <= set(header):
        raise ValueError(f"{where}: the header has both 'label' and 'labels'; which column is meant?")
    heads = {name: name[6:] for name in header if name.startswith('label/') and len(name) > 6}
    heads.update({name: 'label' for name in ('label', 'labels') if name in header})
    for where, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f'{where}: {len(cells)} columns, and the header has {len(header)}.')
        cell = dict(zip(header, cells, strict=True))
        path = cell[path_column]
        if not path:
            raise ValueError(f'{where}: {path_column} is empty.')
        start, end = (parse_seconds(cell.get(name, ''), where, name) for name in ('start', 'end'))
        if end is not None and end <= (start or 0.0):
            raise ValueError(f'{where}: end must lie behind start={start or 0:g}; got {end:g}.')
        full = os.path.join(folder, path)
        yield Entry(
            id=cell.get('id', '').strip(),
            path=full if os.path.lexists(full) else '',
            wanted=path,
            start=start,
            end=end,
            trimmed=False,
            labels={head: _split_labels(cell[name]) for name, head in heads.items()},
            split=cell.get('split', '').strip(),
            where=where,
        )


def _split_labels(text: str) -> list[str]:
    return [part.strip() for part in LABEL_SEPARATORS.split(text) if part.strip()]


def read_audioset(source: Source) -> Iterator[Entry]:
    """YTID, start_seconds, end_seconds, "label codes": the published segment lists, old and new."""
    media = MediaFolder(source.media_dir or os.path.dirname(source.path) or '.')
    split = split_of_file(source.path)
    for where, cells in _rows(source.path, comments=True):
        if cells[0].strip().upper() == 'YTID':
            continue
        if len(cells) < 4:
            raise ValueError(f'{where}: AudioSet lists have 4 columns; got {len(cells)}.')
        ytid = cells[0].strip()
        start, end = (parse_seconds(cells[i], where, name) for i, name in ((1, 'start_seconds'), (2, 'end_seconds')))
        if start is None or end is None or end <= start:
            raise ValueError(f'{where}: end_seconds must lie behind start_seconds; got {cells[1:3]}.')
        labels = [code.strip() for code in ','.join(cells[3:]).split(',') if code.strip()]
        cut = [
            f'{ytid}_{start:.3f}_{end:.3f}', f'{ytid}_{start:g}_{end:g}', f'{ytid}_{start * 1000:.0f}_{end * 1000:.0f}',
            f'{ytid}_{start * 1000:.0f}', f'{ytid}_{start:g}', f'{ytid}_{start:06.0f}',
        ]  # fmt: skip
        path, stem = media.find([*cut, ytid, f'Y{ytid}', *(f'Y{name}' for name in cut)])
        whole = stem in ('', ytid, f'Y{ytid}')
        yield Entry(
            id=f'{ytid}_{start * 1000:.0f}',
            path=path,
            wanted=ytid,
            start=start if whole else 0.0,
            end=end if whole else end - start,
            trimmed=whole,
            labels={'label': labels},
            split=split,
            where=where,
        )


VGGSOUND_NAME = re.compile(r'^(?P<ytid>[\w-]{11})_(?P<start>\d{6})(\.\w+)?$')
VGGSOUND_SECONDS = 10.0


def read_vggsound(source: Source) -> Iterator[Entry]:
    """vggsound.csv (ytid, start, label, split) and the older train.csv / test.csv (ytid_start.mp4, label)."""
    media = MediaFolder(source.media_dir or os.path.dirname(source.path) or '.')
    for where, cells in _rows(source.path):
        match = VGGSOUND_NAME.match(cells[0].strip())
        if match and len(cells) == 2:
            ytid, start, label, split = match['ytid'], float(match['start']), cells[1], split_of_file(source.path)
        elif len(cells) == 4:
            ytid, label, split = cells[0].strip(), cells[2], SPLIT_NAMES.get(cells[3].strip(), cells[3].strip())
            start = parse_seconds(cells[1], where, 'start') or 0.0
        else:
            raise ValueError(f'{where}: a VGGSound line is "ytid,start,label,split" or "ytid_start.mp4,label".')
        stem = f'{ytid}_{start:06.0f}'
        cut = [stem, f'{ytid}_{start:g}', f'{ytid}_{start * 1000:.0f}_{(start + 10) * 1000:.0f}', f'{ytid}_{start:.1f}']
        path, found = media.find([*cut, ytid])
        whole = found == ytid
        yield Entry(
            id=stem,
            path=path,
            wanted=stem,
            start=start if whole else 0.0,
            end=start + VGGSOUND_SECONDS if whole else VGGSOUND_SECONDS,
            trimmed=whole,
            # The class table writes the commas of class names as underscores.
            labels={'label': [label.strip()]},
            split=split,
            where=where,
        )


EPIC_COLUMNS = ('narration_id', 'video_id', 'start_timestamp', 'stop_timestamp')
ESC_COLUMNS = ('filename', 'fold', 'target', 'category')


def _columns(path: str, rows: Iterator[tuple[str, list[str]]], wanted: Sequence[str]) -> dict[str, int]:
    """Takes the header off `rows`: name -> number of its column."""
    header = [cell.strip() for cell in next(rows, ('', []))[1]]
    if lost := [name for name in wanted if name not in header]:
        raise ValueError(
            f'{path}: the header must have the columns {", ".join(wanted)}; {", ".join(lost)} is not there.'
        )
    return {name: i for i, name in enumerate(header)}


def read_epic(source: Source) -> Iterator[Entry]:
    """EPIC-KITCHENS-100 narrations: a span of video_id.MP4, a verb and a noun."""
    media = MediaFolder(source.media_dir or os.path.dirname(source.path) or '.')
    rows = _rows(source.path)
    column = _columns(source.path, rows, EPIC_COLUMNS)
    for where, cells in rows:
        if len(cells) != len(column):
            raise ValueError(f'{where}: {len(cells)} columns, and the header has {len(column)}.')
        start = parse_seconds(cells[column['start_timestamp']], where, 'start_timestamp')
        end = parse_seconds(cells[column['stop_timestamp']], where, 'stop_timestamp')
        if start is None or end is None or end <= start:
            raise ValueError(f'{where}: stop_timestamp must lie behind start_timestamp.')
        video = cells[column['video_id']].strip()
        # The test list has no classes.
        heads = {head: cells[column[f'{head}_class']] for head in ('verb', 'noun') if f'{head}_class' in column}
        yield Entry(
            id=cells[column['narration_id']].strip(),
            path=media.find([video])[0],
            wanted=video,
            start=start,
            end=end,
            trimmed=False,
            labels={head: [value.strip()] for head, value in heads.items()},
            split=split_of_file(source.path),
            where=where,
        )


def read_esc(source: Source) -> Iterator[Entry]:
    """ESC-50 (and ESC-10): filename, fold, target, category; the splits are the folds, 'fold1' to 'fold5'."""
    folder = source.media_dir or os.path.dirname(source.path)
    media = MediaFolder(folder or '.')
    rows = _rows(source.path)
    column = _columns(source.path, rows, ESC_COLUMNS)
    for where, cells in rows:
        if len(cells) != len(column):
            raise ValueError(f'{where}: {len(cells)} columns, and the header has {len(column)}.')
        stem, fold = os.path.splitext(cells[column['filename']])[0], cells[column['fold']].strip()
        if not fold.isdecimal():
            raise ValueError(f'{where}: fold must be a number; got {fold!r}.')
        yield Entry(
            id=stem,
            path=media.find([stem])[0],
            wanted=cells[column['filename']],
            start=None,
            end=None,
            trimmed=False,
            labels={'label': [cells[column['category']].strip()]},
            split=f'fold{int(fold)}',
            where=where,
        )


def read_folder(source: Source) -> Iterator[Entry]:
    """Every media file below. Folders train, test, ... are splits; if every file has a folder, that is its label."""
    folder = source.path
    found: list[tuple[str, str, list[str]]] = []  # (path, split, folders between)
    refused: list[OSError] = []
    for path in walk(folder, refused):
        if extension(path) in MEDIA_EXTENSIONS:
            between = os.path.relpath(path, folder).split(os.sep)[:-1]
            split = SPLIT_NAMES.get(between[0].lower(), '') if between else ''
            found.append((path, split, between[1:] if split else between))
    if not found:
        raise ValueError(f'{folder} holds no file with the extension of a video, a sound or an image.')
    labelled = all(between for _, _, between in found)
    for path, split, between in found:
        yield Entry(
            id='',
            path=path,
            wanted=os.path.relpath(path, folder),
            start=None,
            end=None,
            trimmed=False,
            labels={'label': [between[0]]} if labelled else {},
            split=split,
            where=path,
        )
    for error in refused:  # Counted as one missing clip each: nobody knows how many there are.
        yield Entry('', '', str(error.filename), None, None, False, {}, '', f'{error.strerror}: {error.filename}')


class Format(NamedTuple):
    """Attributes:
    is_mine: whether the first line of a list is of this format.
    labels: file of class names that is published beside the list, by head.
    """

    read: Callable[[Source], Iterator[Entry]]
    is_mine: Callable[[str], bool]
    labels: Mapping[str, str]


def _header(*names: str) -> Callable[[str], bool]:
    def is_mine(line: str) -> bool:
        return set(names) <= {cell.strip() for cell in line.split(',')}

    return is_mine


def _is_vggsound(line: str) -> bool:
    cells = next(csv.reader([line]), [])
    return (len(cells) == 2 and bool(VGGSOUND_NAME.match(cells[0].strip()))) or (
        len(cells) == 4 and bool(re.match(r'^[\w-]{11}$', cells[0])) and cells[3].strip() in ('train', 'test')
    )


# In the order in which a list is tried; `csv` is what has a header and is none of the others.
FORMATS = {
    'audioset': Format(
        read_audioset,
        lambda line: line.lstrip('# ').startswith('YTID'),
        {'label': 'class_labels_indices.csv'},
    ),
    'epic': Format(
        read_epic,
        _header(*EPIC_COLUMNS),
        {'verb': 'EPIC_100_verb_classes.csv', 'noun': 'EPIC_100_noun_classes.csv'},
    ),
    'vggsound': Format(read_vggsound, _is_vggsound, {'label': 'class_labels_indices_vgg.csv'}),
    'esc50': Format(read_esc, _header(*ESC_COLUMNS), {}),
    'folder': Format(read_folder, lambda line: False, {}),
    'csv': Format(read_csv, lambda line: True, {}),
}


def check_list(path: str) -> None:
    """Raises unless `path` is a file that may be read several times, which a pipe may not."""
    if not os.path.isfile(path):
        what = 'is no plain file' if os.path.exists(path) else 'does not exist'
        raise ValueError(f'input must be a list or a folder; {path} {what}.')


def detect_format(path: str) -> str:
    if os.path.isdir(path):
        return 'folder'
    check_list(path)
    line = first_line(path)
    return next(name for name, entry in FORMATS.items() if entry.is_mine(line))

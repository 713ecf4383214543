"""Lists of clips -> the rows of each split, with classes as numbers and the missing counted."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from avmae_jax.data import catalogue
from avmae_jax.data.prepare import lists
from avmae_jax.data.prepare.clips import ClipRow, Failure, printable
from avmae_jax.data.schema import LabelSet

DEFAULT_SPLIT = 'train'
SPLIT_PATTERN = re.compile(r'^[a-zA-Z][a-zA-Z0-9_]*$')  # What tensorflow_datasets allows.
HEAD_PATTERN = re.compile(r'^[a-zA-Z0-9_]+$')  # It becomes part of a file's name.
MAX_CLASSES = 100_000


class Manifest(NamedTuple):
    """Everything the lists say.

    Attributes:
      splits: split -> rows of files that are there, in the (seeded) order of their records.
      labels: head -> classes.
      missing: a failure for each clip without a file.
      kinds: extension -> how many clips have it.
    """

    splits: dict[str, list[ClipRow]]
    labels: dict[str, LabelSet]
    missing: list[Failure]
    kinds: dict[str, int]

    def digest(self) -> str:
        """Of what the clips are, not of where their files lie: a moved folder is the same dataset."""
        hashed = hashlib.sha256()
        for split, rows in self.splits.items():
            for row in rows:
                hashed.update(json.dumps([split, row.id, row.start, row.end, sorted(row.labels.items())]).encode())
        return hashed.hexdigest()


def read_manifest(
    inputs: Sequence[str],
    format: str = 'auto',
    media_dir: str = '',
    label_names: Mapping[str, str] | None = None,
    eval_fraction: float = 0.0,
    seed: int = 0,
) -> Manifest:
    """Reads all lists.

    Args:
      inputs: lists or folders, each as PATH or SPLIT=PATH.
      label_names: head -> file of its class names.
      eval_fraction: share of the files without a split whose clips go to 'test', drawn by their names.
    """
    if format != 'auto' and format not in lists.FORMATS:
        raise ValueError(f'format must be auto or one of {sorted(lists.FORMATS)}; got {format!r}.')
    if not 0 <= eval_fraction < 1:
        raise ValueError(f'eval_fraction must lie in [0, 1); got {eval_fraction}.')
    if not inputs:
        raise ValueError('input must name a list of clips or a folder.')
    entries: list[lists.Entry] = []
    name_files = dict(label_names or {})
    defaults: dict[str, catalogue.Dataset] = {}
    of_list = False
    for item in inputs:
        split, path = _split_prefix(item)
        chosen = lists.detect_format(path) if format == 'auto' else format
        if chosen != 'folder':
            lists.check_list(path)
            of_list = True
        entry_format = lists.FORMATS[chosen]
        for head, file in entry_format.labels.items():
            beside = os.path.join(os.path.dirname(path), file)
            if head not in name_files and os.path.exists(beside):
                name_files[head] = beside
        if chosen in catalogue.BY_FORMAT:
            defaults.update(dict.fromkeys(entry_format.labels, catalogue.BY_FORMAT[chosen]))
        read = entry_format.read(lists.Source(path, media_dir))
        entries += (entry._replace(split=split or entry.split) for entry in read)
    if media_dir and not of_list:
        raise ValueError(f'media_dir={media_dir} is for lists; a folder has its own files: {", ".join(inputs)}.')
    if not entries:
        raise ValueError(f'{", ".join(inputs)} names no clip.')
    _check_splits(entries)
    labels = _label_sets(entries, name_files, defaults)
    if label_names and not labels:
        raise ValueError(f'label_names names {sorted(label_names)}, and the clips have no labels.')
    ids = _unique_ids(entries)
    splits: dict[str, list[ClipRow]] = {}
    missing: list[Failure] = []
    numbers = {head: _numbers(label_set, name_files.get(head)) for head, label_set in labels.items()}
    for entry, clip_id in zip(entries, ids, strict=True):
        split = entry.split or _draw_split(entry.wanted, eval_fraction)
        if not entry.path:
            detail = f'{entry.where}: no file for it'
            missing.append(Failure(split, clip_id, printable(entry.wanted), 'missing', 'skipped', printable(detail)))
            continue
        indices = {head: _indices(entry, head, numbers[head]) for head in labels}
        row = ClipRow(clip_id, entry.path, entry.start or 0.0, entry.end, indices, entry.trimmed)
        splits.setdefault(split, []).append(row)
    if not splits:
        raise ValueError(
            f'none of the {len(entries):,} clips of {", ".join(inputs)} has a file; is media_dir right? '
            f'The first that was looked for: {printable(entries[0].wanted)!r}.'
        )
    ordered = {split: splits[split] for split in sorted(splits, key=lambda name: (name != DEFAULT_SPLIT, name))}
    ordered = {split: order_rows(rows, split, seed) for split, rows in ordered.items()}
    kinds = Counter(lists.extension(entry.path) or 'none' for entry in entries if entry.path)
    return Manifest(ordered, labels, missing, dict(kinds.most_common()))


def order_rows(rows: Sequence[ClipRow], split: str, seed: int) -> list[ClipRow]:
    """Mixed once, so that each shard is a sample of the whole; whatever the order of the list was."""
    mixed = sorted(rows, key=lambda row: row.id)
    random.Random(f'{seed} {split}').shuffle(mixed)
    return mixed


def _split_prefix(item: str) -> tuple[str, str]:
    """'test=eval.csv' -> ('test', 'eval.csv'); a path that exists is never cut."""
    name, equals, path = item.partition('=')
    if equals and not os.path.exists(item):
        return name, path
    return '', item


def _check_splits(entries: Sequence[lists.Entry]) -> None:
    for entry in entries:
        if entry.split and not SPLIT_PATTERN.match(entry.split):
            raise ValueError(f'{entry.where}: a split is a word of letters, digits and _; got {entry.split!r}.')


def _draw_split(file: str, eval_fraction: float) -> str:
    """By the name of the file: clips of one film stay together, and files added later do not move the others."""
    drawn = int.from_bytes(hashlib.sha256(printable(file).encode()).digest()[:8], 'big') / 2**64
    return 'test' if drawn < eval_fraction else DEFAULT_SPLIT


def _unique_ids(entries: Sequence[lists.Entry]) -> list[str]:
    """The id of the list, or the path without its extension; with its time or a number where that is not enough."""
    bases = [entry.id or os.path.splitext(entry.wanted)[0].replace(os.sep, '/') for entry in entries]
    bases = [printable(base) for base in bases]
    count = Counter(bases)
    taken: set[str] = set()
    ids = []
    for entry, base in zip(entries, bases, strict=True):
        name = base
        if count[base] > 1:
            if entry.start is not None or entry.end is not None:
                name = f'{base}_{entry.start or 0:g}-{"end" if entry.end is None else format(entry.end, "g")}'
            else:
                name = printable(entry.wanted)
        stem, number = name, 2
        while name in taken:
            name, number = f'{stem}#{number}', number + 1
        taken.add(name)
        ids.append(name)
    return ids


# -- Labels --


def class_name(text: str) -> str:
    """As it is stored: on one line, in UTF-8."""
    return printable(' '.join(text.split()))


def read_label_names(path: str) -> list[tuple[str, tuple[str, ...]]]:
    """Class names in order, each with the codes that also mean it ('/m/09x0r').

    A CSV with a header (index or id; display_name, name, key or category; mid), or a line a name.
    """
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'label_names: {path} cannot be read: {error}.') from error
    rows = list(csv.reader(text.splitlines()))
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    number = next((header.index(name) for name in ('index', 'id', 'class_id') if name in header), None)
    names = ('display_name', 'name', 'key', 'category', 'class', 'label')
    name = next((header.index(word) for word in names if word in header), None)
    if number is None or name is None:
        plain = [line.strip() for line in text.splitlines() if line.strip()]
        if not plain or len(set(plain)) != len(plain):
            raise ValueError(f'label_names: {path} must have a name a line, each once, or columns index and name.')
        return [(line, ()) for line in plain]
    found: dict[int, tuple[str, tuple[str, ...]]] = {}
    for line, cells in enumerate(rows[1:], 2):
        try:
            codes = (cells[header.index('mid')],) if 'mid' in header else ()
            found[int(cells[number])] = (cells[name].strip(), codes)
        except (IndexError, ValueError):
            raise ValueError(f'{path}:{line}: wants a number in column {header[number]!r} and a name.') from None
    if sorted(found) != list(range(len(found))):
        raise ValueError(f'label_names: the numbers of {path} must be 0, 1, 2, ...; got {sorted(found)[:5]}...')
    return [found[i] for i in range(len(found))]


def _label_sets(
    entries: Sequence[lists.Entry], name_files: Mapping[str, str], defaults: Mapping[str, catalogue.Dataset]
) -> dict[str, LabelSet]:
    heads = sorted({head for entry in entries for head in entry.labels})
    unknown = set(name_files) - set(heads)
    if heads and unknown and not set(defaults) & unknown:
        raise ValueError(f'label_names names {sorted(unknown)}, and the clips have {heads}.')
    found = {}
    for head in heads:
        values = {class_name(value) for entry in entries for value in entry.labels.get(head, ())}
        if not values:
            continue
        if not HEAD_PATTERN.match(head):
            raise ValueError(f'a head of labels is a word of letters, digits and _; got {head!r}.')
        dataset = defaults.get(head)
        multi = any(len(entry.labels.get(head, ())) > 1 for entry in entries) or bool(dataset and dataset.multi_label)
        if head in name_files:
            names = [class_name(name) for name, _ in read_label_names(name_files[head])]
        elif all(value.isdecimal() for value in values):
            count = max(int(value) for value in values) + 1
            if dataset is not None:
                count = max(count, dataset.num_classes[head])
            if count > MAX_CLASSES:
                raise ValueError(f'label {count - 1} is too large to be the number of a class.')
            names = [str(i) for i in range(count)]
        else:
            names = sorted(values)
        if len(set(names)) != len(names):
            names = [name if names.count(name) == 1 else f'{name} ({i})' for i, name in enumerate(names)]
        found[head] = LabelSet(tuple(names), multi)
    return found


def _numbers(label_set: LabelSet, names_file: str | None) -> dict[str, int]:
    """Everything that a list may write for a class -> its number."""
    numbers = {name: i for i, name in enumerate(label_set.names)}
    if names_file:
        for i, (name, codes) in enumerate(read_label_names(names_file)):
            # VGGSound's table writes 'bird chirping_ tweeting' where its lists have a comma.
            for word in (name, *codes, name.replace('_', ',')):
                numbers.setdefault(class_name(word), i)
    if not any(name.isdecimal() for name in label_set.names):
        for i in range(len(label_set.names)):
            numbers.setdefault(str(i), i)
    return numbers


def _indices(entry: lists.Entry, head: str, numbers: Mapping[str, int]) -> tuple[int, ...]:
    found = []
    for value in entry.labels.get(head, ()):
        word = class_name(value)
        if word.isdecimal() and word not in numbers:
            word = str(int(word))
        if word not in numbers:
            raise ValueError(
                f'{entry.where}: {word!r} is none of the {len(set(numbers.values()))} classes of {head!r}; '
                'label_names gives their names.'
            )
        found.append(numbers[word])
    return tuple(sorted(set(found)))

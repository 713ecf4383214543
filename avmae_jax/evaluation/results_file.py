"""The files of an evaluation: a name that says what was asked, and content that says of what it is.

    SPLIT-SUBJECT[-noaveraged][-clips-N][-from-TRAIN_SPLIT][-data-DIGEST][-settings-DIGEST].json

Whatever changes the numbers is in the name, so that no evaluation takes the place of another one. What a command asks
of the same subject in the same way comes into the same file, beside what was asked before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from avmae_jax import settings, whole

DIGITS = 8  # Of a digest, in a name.
# Kind of results -> what tells its rows apart; the others are rewritten as a whole.
ROWS = {'classification': ('head', 'features', 'method'), 'retrieval': ('query', 'candidates', 'method')}
# Of a config, what changes the numbers; data and moments have parts of the name of their own.
DECIDING = ('video', 'audio', 'image', 'preprocess', 'model', 'objective', 'data.share_window', 'data.legacy')
SCORES = ('head', 'subset', 'metric')  # The same of the scores of a benchmark.


def asked(
    *,
    averaged: bool = True,
    num_clips: int | None = None,
    train_split: str = 'train',
    data: str = '',
    changed: Mapping[str, Any] | None = None,
) -> str:
    """The part of a name that says what was asked for; '' where nothing was.

    Args:
      averaged: False where a run keeps an average of the parameters and the last ones were wanted.
      num_clips: moments of a clip, where they are not as many as the run's config says.
      train_split: what was fitted on.
      data: digest, of other data than those of the run.
      changed: settings, 'section.name' -> value, where they are not the run's.
    """
    parts = [] if averaged else ['noaveraged']
    if num_clips is not None:
        parts.append(f'clips-{num_clips}')
    if train_split != 'train':
        parts.append(f'from-{train_split}')
    if data:
        parts.append(f'data-{data[:DIGITS]}')
    if changed:
        text = json.dumps(dict(changed), sort_keys=True)
        parts.append(f'settings-{hashlib.sha256(text.encode()).hexdigest()[:DIGITS]}')
    return ''.join(f'-{part}' for part in parts)


def find(workdir: epath.PathLike, split: str, *, subject: str = 'step', asked: str = '') -> list[epath.Path]:
    """The results of a run that were asked for in the same way, the last step at the end.

    Args:
      subject: 'step', or 'random-init-seed' for fresh parameters.
    """
    pattern = re.compile(rf'{re.escape(split)}-{subject}-(\d+){re.escape(asked)}\.json')
    folder = epath.Path(workdir) / 'evaluation'
    found = [
        (match, path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := pattern.fullmatch(path.name))
    ]
    return [path for match, path in sorted(found, key=lambda one: int(one[0][1]))]


def write(path: epath.Path, content: Mapping[str, Any]) -> None:
    """Beside what the file holds already of the same subject on the same data; of two that write at once too."""
    with whole.new_file(path, alone=True) as file:
        before = _read(path) if path.exists() else None
        if before is not None and _identity(before) == _identity(content):
            content = {**content, 'results': _together(before['results'], content['results'])}
        file.write_text(json.dumps(content, indent=1) + '\n')


def _read(path: epath.Path) -> dict[str, Any] | None:
    """What a file holds; None where it is not whole: what was computed now is not to be lost over that."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        logging.warning('%s was not whole (%s); it is written anew.', path, error)
        return None


def _identity(content: Mapping[str, Any]) -> Any:
    # The same checkpoint and data may be called by other paths.
    subject = {name: value for name, value in content['subject'].items() if name != 'checkpoint'}
    config = settings.flatten(content['config'])
    return subject, content['data'], {n: v for n, v in config.items() if settings.is_within(n, DECIDING)}


def _together(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    together = {**before, **now}
    for kind in before.keys() & now.keys():
        if kind in ROWS:
            together[kind] = _rows_together(before[kind], now[kind], ROWS[kind])
        elif kind == 'benchmark':
            together[kind] = {
                **now[kind],
                'scores': _rows_together(before[kind]['scores'], now[kind]['scores'], SCORES),
            }
    return together


def _rows_together(before: Sequence[Any], now: Sequence[Any], names: Sequence[str]) -> list[Any]:
    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in names)

    rows = {key(row): row for row in before}
    return list({**rows, **{key(row): row for row in now}}.values())


def compare_data(about: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """How the data differ from what the subject was trained on, for whoever compares results."""
    if not about.get('trained_on'):  # '': an imported model, of whose data nothing is known.
        return []
    notes = []
    if about['trained_on'] != data['digest']:
        notes.append('These are other data than it was trained on.')
    for head, digest in data['labels'].items():
        if about['labels'].get(head, digest) != digest:
            notes.append(
                f'The classes of {head!r}, or their order, are others than those of the data it was trained on.'
            )
    return notes

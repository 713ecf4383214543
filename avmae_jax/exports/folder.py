"""The JSON of an export, and what tells whether its files are those that were written.

`digests.json` tells size and sha256 of every file. README.md is among them, but no reader asks for it, so that its
licence may be filled in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from etils import epath

from avmae_jax.checkpoints.digests import digest, relative, walk
from avmae_jax.weights.files import is_file

DIGESTS_FILE = 'digests.json'
MAX_JSON_BYTES = 2**26


def write_json(path: epath.Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + '\n')


def write_digests(folder: epath.Path) -> None:
    """Of all files in the folder, those of its folders included."""
    files = {relative(path, folder): digest(path) for path in sorted(walk(folder))}
    write_json(folder / DIGESTS_FILE, {'files': files})


def read_json(folder: epath.Path, name: str) -> dict[str, Any]:
    """A table in a JSON file of the folder."""
    file = folder / name
    if not is_file(file):
        raise ValueError(f'{folder} has no {name}: it is no export, or not a whole one.')
    try:
        if file.stat().length > MAX_JSON_BYTES:
            raise ValueError(f'it has {file.stat().length:,} bytes')
        content = json.loads(file.read_text())
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f'{file} cannot be read: {error}.') from error
    if not isinstance(content, dict):
        raise ValueError(f'{file} holds no table.')
    return content


def check_digests(folder: epath.Path, names: Iterable[str]) -> None:
    """Refuses files that are not those that were written."""
    expected = read_json(folder, DIGESTS_FILE).get('files')
    for name in names:
        if not isinstance(expected, dict) or name not in expected:
            raise ValueError(f'{folder / DIGESTS_FILE} does not tell of {name}: no export to load, or not a whole one.')
        if not is_file(folder / name):
            raise ValueError(f'{folder} has no {name}: the export is not whole.')
        if digest(folder / name) != expected[name]:
            raise ValueError(f'{folder / name} is not what was exported: its size or digest differs.')

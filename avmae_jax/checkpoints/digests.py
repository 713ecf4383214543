"""Files of a folder, and what tells whether they are still those that were written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from etils import epath


def walk(folder: epath.Path) -> Iterable[epath.Path]:
    """All files in a folder and in its folders."""
    for child in folder.iterdir():
        if child.is_dir():
            yield from walk(child)
        else:
            yield child


def relative(path: epath.Path, folder: epath.Path) -> str:
    """'b/c' for 'a/b/c' in 'a'; also in a bucket."""
    return os.fspath(path)[len(os.fspath(folder)) :].lstrip('/')


def digest(path: epath.Path) -> list[int | str]:
    """[bytes, sha256 in hexadecimal]"""
    found, size = hashlib.sha256(), 0
    with path.open('rb') as file:
        while block := file.read(2**22):
            found.update(block)
            size += len(block)
    return [size, found.hexdigest()]

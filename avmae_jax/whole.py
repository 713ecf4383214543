"""Files and folders that appear whole or not at all.

    with new_folder('runs/imported') as folder:      # A folder beside it; after the block it is there under its name.
        (folder / 'config.json').write_text('{}')
    with new_file('runs/table.parquet') as path:
        path.write_bytes(...)

What is under way lies in NAME.partial.XXXXXXXX. It goes when the block fails; what a killed process left behind goes
when the same place is written next. Who still writes has a lock on it (flock), which the kernel takes back however a
process ends, so that two that write at once never sweep each other away. Where a file system has no locks for folders
(object stores, NFS), nothing is swept.

One may be made within another, as a file of a folder is: nobody else writes there, so nothing is locked or swept.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator

from etils import epath

PARTIAL = '.partial.'


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to write into, which becomes `path` at the end of the block; that must not be there, or be empty."""
    place = _place(path)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ValueError(f'{path} is there already: remove it, or write to another --output.')
    with _working_folder(place) as folder:
        yield folder
        if place.exists():
            place.rmdir()
        folder.rename(place)


@contextlib.contextmanager
def new_file(path: epath.PathLike, *, alone: bool = False) -> Iterator[epath.Path]:
    """A file to write, which takes the place of `path` at the end of the block.

    Args:
      alone: nobody else is in such a block in this folder meanwhile: for whoever adds to what is there. Not so where
        folders have no locks.
    """
    place = _place(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.parent, wait=True) if alone else contextlib.nullcontext():
        with _working_folder(place, parent_is_locked=alone) as folder:
            yield folder / place.name
            (folder / place.name).replace(place)


def text_in_store(path: epath.PathLike) -> str | None:
    """What a file in an object store holds ('' if there is none); None for a file on a disk, which can grow.

    No file in a store can: opened to append, it begins anew. Who adds to one writes the whole text again.
    """
    if '://' not in os.fspath(path):
        return None
    file = epath.Path(path)
    return file.read_text() if file.exists() else ''


def _place(path: epath.PathLike) -> epath.Path:
    """Where a path leads to: what takes the place of a link, or of '.', must lie beside what these stand for."""
    text = os.fspath(path)
    return epath.Path(text if '://' in text else os.path.realpath(text))


@contextlib.contextmanager
def _working_folder(path: epath.Path, parent_is_locked: bool = False) -> Iterator[epath.Path]:
    """A folder beside `path` that nobody else has, and that is gone after the block unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f'{path.name}{PARTIAL}'
    folder = path.parent / f'{start}{secrets.token_hex(4)}'  # Processes of two containers may have one number.
    with contextlib.ExitStack() as held:
        if any(PARTIAL in part for part in path.parent.parts):
            folder.mkdir()
        else:
            # Between being made and being locked no folder is another's to sweep.
            with contextlib.nullcontext() if parent_is_locked else _locked(path.parent, wait=True):
                for left in [child for child in path.parent.iterdir() if child.name.startswith(start)]:
                    with _locked(left) as mine:
                        if mine:
                            left.rmtree(missing_ok=True)
                folder.mkdir()
                held.enter_context(_locked(folder))
        try:
            yield folder
        finally:
            folder.rmtree(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: epath.Path, wait: bool = False) -> Iterator[bool]:
    """Whether the lock of a folder is ours within the block; never, where there are none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except OSError:
            mine = False
        yield mine
    finally:
        os.close(descriptor)

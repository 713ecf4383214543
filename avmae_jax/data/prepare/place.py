"""Where a dataset is written to: a folder on a disk, or an object store by way of one.

A store has no rename and no append, but an object appears in it whole or not at all. So a shard is written on a local
disk as ever, and copied when it is whole: first its bytes, then its index, then the side file that says it is done.
`dataset.json` comes last of all. A second run, on this machine or another, asks the store what is done.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from avmae_jax.data import schema
from avmae_jax.data.prepare import shards
from avmae_jax.data.prepare.shards import STATE_FOLDER, ShardDone

PLAN_FILE = 'plan.json'


class OnDisk:
    """A folder of this machine.

    Attributes:
      output: as it was given; for people.
      folder: where files are written.
    """

    def __init__(self, output: str):
        self.output = output
        self.folder = Path(output)
        (self.folder / STATE_FOLDER).mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Call when the folder is locked."""

    def others(self) -> list[str]:
        """Names of what lies there besides the state of a job."""
        return [path.name for path in self.folder.iterdir() if path.name != STATE_FOLDER]

    def leave(self) -> None:
        """The folder is none to write into: what was put there for the lock goes."""
        shutil.rmtree(self.folder / STATE_FOLDER)

    def plan_written(self) -> None: ...

    def read_done(self, file: str) -> ShardDone | None:
        """What is known of a shard that is done, or None."""
        return shards.read_done(self.folder, file)

    def withdraw(self) -> None:
        """The dataset is not finished, whatever an earlier run said."""
        (self.folder / schema.INFO_FILE).unlink(missing_ok=True)

    def shard_written(self, file: str) -> None: ...

    def wait(self) -> None:
        """Until every shard that was written is in its place."""

    def finish(self) -> None:
        """Call when `dataset.json` is written."""


class InStore(OnDisk):
    """An object store, as far as `epath` reaches; `folder` holds the few shards that are not yet there.

    Two machines must not prepare into one place at a time: the lock is that of this machine.
    """

    def __init__(self, output: str):
        try:
            self.target = epath.Path(output)
        except KeyError:
            raise ValueError(
                f'output={output!r} is no kind of store that is known; gs://, s3:// and az:// are.'
            ) from None
        name = f'avmae_prepare-{os.getuid()}-{hashlib.sha256(output.encode()).hexdigest()[:16]}'
        super().__init__(os.path.join(tempfile.gettempdir(), name))
        self.output = output
        self._pool = concurrent.futures.ThreadPoolExecutor(4, 'publish')
        self._copies: list[concurrent.futures.Future] = []

    def begin(self) -> None:
        local, remote = self.folder / STATE_FOLDER / PLAN_FILE, self.target / STATE_FOLDER / PLAN_FILE
        local.unlink(missing_ok=True)
        text = self._ask('read', lambda: remote.read_text() if remote.exists() else None)
        if text is not None:
            shards.write_text(local, text)

    def others(self) -> list[str]:
        def look() -> list[str]:
            return [path.name for path in self.target.iterdir()] if self.target.exists() else []

        return [name for name in self._ask('listed', look) if name != STATE_FOLDER]

    def leave(self) -> None:
        shutil.rmtree(self.folder)

    def plan_written(self) -> None:
        self._ask('written to', lambda: (self.target / STATE_FOLDER).mkdir(parents=True, exist_ok=True))
        self._copy(f'{STATE_FOLDER}/{PLAN_FILE}')

    def read_done(self, file: str) -> ShardDone | None:
        if (self.folder / file).exists() and shards.read_done(self.folder, file):
            self._publish(file)  # An earlier run was stopped between writing and copying it.
        side = self.target / STATE_FOLDER / f'{file}.json'
        index, shard = self.target / f'{file}.index', self.target / file

        def look() -> tuple[str, bytes, int] | None:
            there = all(path.exists() for path in (side, index, shard))
            return (side.read_text(), index.read_bytes(), shard.stat().length) if there else None

        found = self._ask('read', look)
        if found is None:
            return None
        try:
            done = shards.parse_done(found[0])
        except (ValueError, KeyError, TypeError):
            return None
        same = found[2] == done.info.num_bytes and hashlib.sha256(found[1]).hexdigest() == done.info.index_sha256
        return done if same else None

    def withdraw(self) -> None:
        self._ask('written to', lambda: (self.target / schema.INFO_FILE).unlink(missing_ok=True))

    def shard_written(self, file: str) -> None:
        self._copies.append(self._pool.submit(self._publish, file))
        for copy in self._copies:
            if copy.done():
                copy.result()  # Raises what went wrong, rather than filling the disk.

    def wait(self) -> None:
        for copy in self._copies:
            copy.result()
        self._pool.shutdown()

    def finish(self) -> None:
        files = [path.name for path in self.folder.iterdir() if path.is_file() and path.name != schema.INFO_FILE]
        for name in [*sorted(files), schema.INFO_FILE]:
            self._copy(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _publish(self, file: str) -> None:
        for name in (file, f'{file}.index', f'{STATE_FOLDER}/{file}.json'):
            self._copy(name)
        for name in (file, f'{file}.index'):
            (self.folder / name).unlink()

    def _copy(self, name: str) -> None:
        source, target = self.folder / name, self.target / name

        def copy() -> int:
            epath.Path(source).copy(target, overwrite=True)
            return target.stat().length

        if self._ask('written to', copy) != source.stat().st_size:
            raise OSError(f'{target} has another size than what was written to it; run the same command again.')

    def _ask(self, what: str, function: Callable[[], Any]) -> Any:
        """What the store answers. The libraries behind epath raise errors of every kind; here they become one."""
        try:
            return function()
        except ImportError as error:
            raise ValueError(f'{self.output} needs packages that are not installed ({error}).') from error
        except Exception as error:
            text = (str(error) or repr(error)).splitlines()[0]
            raise OSError(
                f'{self.output} cannot be {what} ({text}); run the same command again when it can.'
            ) from error


def choose_place(output: str) -> OnDisk:
    return InStore(output) if '://' in output else OnDisk(output)

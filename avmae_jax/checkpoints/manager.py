"""Checkpoints that are either whole and right, or passed over.

Orbax writes the arrays, in the background and in parallel. What it does not do is notice a flipped bit or a folder
that a kill left behind. So each checkpoint carries `digests.json`: size and sha256 of every file, written after the
last array and before the rename that makes the checkpoint appear. A checkpoint without it, or that does not fit
it, is passed over for the one before.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from avmae_jax.checkpoints.digests import digest, relative, walk
from avmae_jax.parallel import hosts

DIGESTS_FILE = 'digests.json'
STEP_METADATA_FILE = '_CHECKPOINT_METADATA'  # Orbax stamps the time of the commit into it after our hook has run.
COMMIT_FILE = 'commit_success.txt'  # Written after our hook, at the top of a step; nothing is read from it.
# Orbax gives a save up by the clock on the wall, which may jump. What hangs for good, the watchdog ends.
NO_DEADLINE = 100 * 365 * 24 * 3600
TEMPORARY_MARK = '.orbax-checkpoint-tmp'
META = 'meta'
METRIC = 'metric'


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the last good one is still there."""


class Restored(NamedTuple):
    """Attributes: step; items: name -> tree, as asked for; meta: the JSON that was saved with them."""

    step: int
    items: dict[str, Any]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `directory`/STEP.

    Attributes:
      directory: where they lie.
      keep_last: how many of the newest to keep.
      keep_best: how many of those with the lowest metric to keep besides.
      read_only: for looking at somebody's run: nothing is written, moved or removed.
    """

    def __init__(self, directory: epath.PathLike, *, keep_last: int = 2, keep_best: int = 1, read_only: bool = False):
        if keep_last < 1:
            raise ValueError(f'checkpoint.keep_last={keep_last} must be at least 1.')
        self.directory = epath.Path(os.path.abspath(directory) if '://' not in str(directory) else directory)
        self.read_only = read_only
        self._num_bytes = 0  # Of a checkpoint, as far as known.
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_temporary()
        keep = [policies.LatestN(keep_last)]
        if keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=_read_metric, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                best_fn=_read_metric if keep_best else None,
                best_mode='min',
                preservation_policy=None if read_only else policies.AnyPreservationPolicy(keep),
                async_options=None
                if read_only
                else ocp.AsyncOptions(timeout_secs=NO_DEADLINE, post_finalization_callback=self._write_digests),
            ),
        )

    # -- Writing --

    def save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any], metric: float | None = None) -> None:
        """Starts to write a checkpoint; returns once the arrays may change again. Raises CheckpointError.

        Also raises what went wrong with the save before this one.
        """
        self.wait()
        self._num_bytes = _count_bytes(items)
        self._check_space(step)
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args[META] = ocp.args.JsonSave(dict(meta))
        metrics = {METRIC: float(metric)} if metric is not None and math.isfinite(metric) else None
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), metrics=metrics, force=True)
        except Exception as error:  # Whatever tensorstore or the file system raises, the way on is the same.
            self._fail(error)

    def wait(self) -> None:
        """Until the save under way has become a checkpoint; raises CheckpointError if it has not."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(error)

    def check(self) -> None:
        """Raises CheckpointError if the save under way has failed; does not wait."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        try:
            self._manager.close()
        except Exception as error:
            self._fail(error)

    def _check_space(self, step: int) -> None:
        free = self._free_bytes()
        if free is not None and free < self._num_bytes:
            self._fail(OSError(f'there is no room for the checkpoint of step {step}'))

    def _free_bytes(self) -> int | None:
        if '://' in str(self.directory):
            return None
        return shutil.disk_usage(self.directory).free

    def give_up(self, error: Exception) -> NoReturn:
        """Stops a run whose disk is full, whoever noticed: as if a save had failed for that reason."""
        try:
            self._manager.wait_until_finished()
        except Exception as another:
            logging.info('The save under way failed too: %s', _last_line(another))
        self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        """Leaves nothing half-written behind and says what is needed."""
        if hosts.is_lost_process(error):
            raise error  # Nothing of the disk: another process was lost, which writes a part of it.
        self._remove_temporary()
        free = self._free_bytes()
        good = self._steps()
        raise CheckpointError(
            f'{self.directory} cannot be written to: {_last_line(error)}. A checkpoint needs about '
            f'{self._num_bytes / 1e6:,.1f} MB; '
            + (f'{free / 1e6:,.1f} MB are free there' if free is not None else 'the free space is not known')
            + f'. {f"The last checkpoint is of step {good[0]}" if good else "There is no checkpoint yet"}. '
            'Make room (or lower checkpoint.keep_last) and run the same command again: it goes on from there.'
        ) from error

    def _remove_temporary(self) -> None:
        if jax.process_index() == 0:
            for child in self.directory.iterdir():
                if TEMPORARY_MARK in child.name:
                    logging.info('Removing %s, which a save that was cut off left behind.', child)
                    child.rmtree(missing_ok=True)

    def _write_digests(self) -> None:
        """Orbax calls this in its background thread when all files of a save are there, before the rename."""
        if jax.process_index() != 0:
            return
        (folder,) = (
            child
            for child in self.directory.iterdir()
            if TEMPORARY_MARK in child.name and '.' not in child.name.split(TEMPORARY_MARK)[0]
        )
        files = sorted(path for path in walk(folder) if path.name != STEP_METADATA_FILE)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            digests = dict(zip((relative(path, folder) for path in files), pool.map(digest, files), strict=True))
        content = {'files': digests, 'step_metadata': _step_metadata(folder)}
        (folder / DIGESTS_FILE).write_text(json.dumps(content, indent=1, sort_keys=True))

    # -- Reading --

    def restore(self, targets: Mapping[str, Any], step: int | None = None) -> Restored | None:
        """The newest checkpoint that is whole, or None when there is none.

        Args:
          targets: item -> tree of jax.ShapeDtypeStructs with shardings, of any mesh; other items are not read.
          step: this one and no other; raises ValueError when it is not there or damaged.
        """
        self._num_bytes = _count_bytes(targets)
        step = self.last_good_step([*targets, META], step)
        if step is None:
            return None
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        args[META] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        meta = restored[META]
        return Restored(step=step, items={name: restored[name] for name in targets}, meta=meta)

    def read_meta(self, step: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """Step and meta of the newest whole checkpoint (or of `step`), without any arrays."""
        restored = self.restore({}, step)
        return None if restored is None else (restored.step, restored.meta)

    def last_good_step(self, items: Iterable[str] | None = None, step: int | None = None) -> int | None:
        """The newest step whose files fit their digests; what does not fit is moved aside, saying so.

        Args:
          items: only their files are read and checked; None for all.
          step: consider only this one.
        """
        good = -1
        if jax.process_index() == 0:
            for candidate in self._steps() if step is None else [step]:
                fault = find_fault(self.directory / str(candidate), items)
                if fault is None:
                    good = candidate
                    break
                logging.warning('The checkpoint of step %d in %s is passed over: %s.', candidate, self.directory, fault)
                if step is not None:
                    raise ValueError(f'The checkpoint {self.directory / str(step)} cannot be used: {fault}.')
                if not self.read_only:
                    self._move_aside(candidate)
        if jax.process_count() > 1:
            good = int(multihost_utils.broadcast_one_to_all(good))
        self._manager.reload()
        return None if good < 0 else good

    def _steps(self) -> list[int]:
        """Steps that have a folder, newest first; nothing is said of what is in it."""
        if not self.directory.exists():
            return []
        return sorted((int(child.name) for child in self.directory.iterdir() if child.name.isdigit()), reverse=True)

    def _move_aside(self, step: int) -> None:
        """Out of the way of the save that will come to this step again; kept, because somebody may ask why."""
        folder = self.directory.parent / 'damaged'
        folder.mkdir(parents=True, exist_ok=True)
        taken = {child.name for child in folder.iterdir()}
        name = next(name for i in range(len(taken) + 1) if (name := f'{step}-{i}') not in taken)
        (self.directory / str(step)).rename(folder / name)
        logging.warning('It now lies in %s.', folder / name)


def find_fault(folder: epath.PathLike, items: Iterable[str] | None = None) -> str | None:
    """What is wrong with the checkpoint in this folder, or None; `items` limits the check to their files."""
    folder = epath.Path(folder)
    if not folder.exists():
        return 'there is no such folder'
    if not (folder / DIGESTS_FILE).exists():
        return f'it has no {DIGESTS_FILE}, so it was never finished'
    try:
        content = json.loads((folder / DIGESTS_FILE).read_text())
        expected = content['files']
        if _step_metadata(folder) != content['step_metadata']:
            return f'{STEP_METADATA_FILE} is not what was written'
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f'{DIGESTS_FILE} or {STEP_METADATA_FILE} cannot be read ({error})'
    wanted = None if items is None else set(items)
    if wanted is not None and (missing := wanted - {name.split('/')[0] for name in expected}):
        return f'it holds no {" and no ".join(sorted(missing))}'
    names = [name for name in expected if wanted is None or name.split('/')[0] in wanted or '/' not in name]

    def fault(name: str) -> str | None:
        try:
            found = digest(folder / name)
        except OSError as error:
            return f'{name} cannot be read ({error.strerror or error})'
        return None if found == expected[name] else f'{name} is not what was written (its digest differs)'

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return next((found for found in pool.map(fault, names) if found), None)


def _count_bytes(items: Mapping[str, Any]) -> int:
    """What a checkpoint takes on disk: the arrays, and somewhat more for the many small files around them."""
    arrays = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(dict(items)))
    return int(1.05 * arrays) + 2**19


def _read_metric(metrics: Mapping[str, float]) -> float:
    return metrics[METRIC]


def _step_metadata(folder: epath.Path) -> dict[str, Any]:
    content = json.loads((folder / STEP_METADATA_FILE).read_text())
    return {name: value for name, value in content.items() if not name.startswith('commit_')}


def _last_line(error: BaseException) -> str:
    """The cause in one line."""
    while error.__cause__ is not None:  # Orbax wraps what the file system said in several.
        error = error.__cause__
    text = str(error).strip() or repr(error)
    if 'No space left' in text or 'ENOSPC' in text:
        return 'no space left on device'
    if 'File too large' in text or 'EFBIG' in text:
        return 'File too large: it would pass the limit of this shell (ulimit -f) or of the file system'
    return text.splitlines()[0][:300]

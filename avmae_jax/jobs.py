"""Long commands side by side, each job on its share of the cores: what is done is not done again.

A job is a few commands one after the other, such as training and evaluation. When this process is interrupted, or one
job fails, the others get a SIGTERM (at which training saves what it has) and are waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from avmae_jax.progress import format_seconds

LOG, DONE = 'log.txt', 'done'
_POLL_SECONDS = 0.1


class Job(NamedTuple):
    """Attributes:
    name: as people are told of it.
    folder: gets log.txt, which is all that the commands say, and done/STEP, the command that is done.
    commands: step -> its command, in order.
    """

    name: str
    folder: Path
    commands: Mapping[str, Sequence[str]]


class JobFailedError(Exception):
    """Attributes: exit_code: of the command; 128 + the number of the signal for one that was killed."""

    def __init__(self, job: Job, step: str, code: int):
        self.exit_code = code if code > 0 else 128 - code
        ended = f'ended with exit code {code}' if code > 0 else f'was killed by signal {-code}'
        log = job.folder / LOG
        lines = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
        last = '\n    '.join([' ends with:', *(line[:300] for line in lines[-2:])]) if lines else ' is empty.'
        super().__init__(f'{job.name}: {step} {ended} (the same command goes on from there); {log}{last}')


def left_to_do(job: Job) -> list[tuple[str, Sequence[str]]]:
    """(step, command) from the first one on that was not done, or was another command when it was."""
    steps = list(job.commands.items())
    while steps:
        step, command = steps[0]
        note = job.folder / DONE / step
        if not note.exists() or note.read_text() != shlex.join(command):
            break
        steps.pop(0)
    return steps


def deal_cores(num_shares: int) -> list[set[int]]:
    """The cores that this process may use, in shares; empty ones where the system binds no process to cores."""
    if not hasattr(os, 'sched_getaffinity'):
        return [set() for _ in range(num_shares)]
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[k::num_shares]) or {cores[k % len(cores)]} for k in range(num_shares)]


@contextlib.contextmanager
def _on_cores(cores: set[int]) -> Iterator[None]:
    """What is started meanwhile stays on these cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Running:
    """A job under way."""

    def __init__(self, job: Job, cores: set[int], cwd: Path | None):
        self.job, self.cores, self.cwd = job, cores, cwd
        self.process: subprocess.Popen | None = None
        job.folder.mkdir(parents=True, exist_ok=True)
        self.log = open(job.folder / LOG, 'ab')
        try:  # The commands inherit the lock with the file, so that it outlives this process if they do.
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.log.close()
            raise ValueError(f'{job.folder} is still written to by another run: wait for its end, or end it.') from None
        self.steps = left_to_do(job)
        for step, _ in self.steps:
            (job.folder / DONE / step).unlink(missing_ok=True)

    def proceed(self) -> bool:
        """Begins the next command if none is running; False when there is nothing more to do."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return True
            step, command = self.steps.pop(0)
            self.process = None
            if code:
                raise JobFailedError(self.job, step, code)
            (self.job.folder / DONE).mkdir(exist_ok=True)
            (self.job.folder / DONE / step).write_text(shlex.join(command))
        if not self.steps:
            self.log.close()
            return False
        step, command = self.steps[0]
        _tell(f'[{self.job.name}: {step}] {shlex.join(command)}')
        with _on_cores(self.cores):
            self.process = subprocess.Popen(
                command,
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                start_new_session=True,  # Ctrl-C is for this process, which then ends its own.
            )
        return True


def run_jobs(
    jobs: Sequence[Job],
    num_at_once: int,
    *,
    cwd: Path | None = None,
    finished: Callable[[Job], object] = lambda job: None,
) -> None:
    """Runs what is left of all jobs; tells of each command, and of each job's end with the time left.

    Args:
      finished: called after each job that had something left.
    """
    waiting = [job for job in jobs if left_to_do(job)]
    for job in jobs:
        if job not in waiting:
            _tell(f'{job.name} was done before.')
    shares = deal_cores(num_at_once)
    running: list[_Running] = []
    began, num_done = time.monotonic(), len(jobs) - len(waiting)
    num_left = len(waiting)
    try:
        while waiting or running:
            while waiting and shares:
                running.append(_Running(waiting.pop(0), shares.pop(0), cwd))
            for one in [one for one in running if not one.proceed()]:
                running.remove(one)
                shares.append(one.cores)
                num_done += 1
                seconds, num_now = time.monotonic() - began, num_left - len(waiting) - len(running)
                line = f'{one.job.name} is done, {num_done} of {len(jobs)}, after {format_seconds(seconds)}'
                if num_done < len(jobs):
                    line += f', about {format_seconds(seconds / num_now * (num_left - num_now))} left'
                _tell(f'{line}.')
                finished(one.job)
            time.sleep(_POLL_SECONDS)
    finally:
        _stop(running)


def _stop(running: Sequence[_Running]) -> None:
    for one in running:
        one.log.close()
    processes = [one.process for one in running if one.process is not None]
    for process in processes:
        process.terminate()  # Does nothing to one that has ended.
    try:
        for process in processes:
            process.wait()
    except BaseException:  # The second Ctrl-C.
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        raise


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

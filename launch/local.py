"""This machine: processes of one job, each with devices that the CPU pretends to have; or one, on what there is.

A failed process ends the others, as none can go on without it; then all are started anew, where that may help.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from launch import flags, shell
from launch.spec import FINAL_EXIT_CODES, GRACE_SECONDS, JobSpec, check_fields
from launch.submission import Command, Submission

STATE = 'state.json'
LINGER_SECONDS = 10  # For the others of a failed process to say why; they wait for it, and end by themselves or never.
PREEMPTED = 75  # Of avmae_jax.train: every process saves, and ends so.
_POLL_SECONDS = 0.05


def render(spec: JobSpec, folder: pathlib.Path) -> Submission:
    check_fields(spec, 'local', ('python',), ('cpu', 'gpu'))
    if spec.node.family != 'cpu' and spec.num_nodes > 1:
        raise ValueError(f'--num_nodes={spec.num_nodes}: one process drives all GPUs of this machine.')
    return Submission({}, [process_command(spec, index, 'PORT') for index in range(spec.num_nodes)])


def process_command(spec: JobSpec, index: int, port: int | str) -> Command:
    variables = [f'{name}={value}' for name, value in flags.environment(spec).items()]
    several = spec.num_nodes > 1
    return [
        'env',
        *variables,
        *shell.train_command(spec, spec.python or sys.executable),
        *(shell.identity(f'localhost:{port}', str(spec.num_nodes), str(index)) if several else []),
    ]


def run(spec: JobSpec, folder: pathlib.Path) -> int:
    """Runs the job to its end, with retries; its exit code. On Ctrl-C or SIGTERM its processes save, and all ends."""
    with (folder / 'lock').open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'{spec.name} is running: end it by teardown, or give another --name.') from None
        stop = _Stop()
        for attempt in range(spec.retries + 1):
            code = _Attempt(spec, folder, attempt).run(stop)
            if code == 0 or stop.signals or code in FINAL_EXIT_CODES:
                break
            following = f'retry {attempt + 1} of {spec.retries}' if attempt < spec.retries else 'no retry is left'
            tell(f'{spec.name}: exit code {code}; {following}.')
        tell(f'{spec.name}: ended with exit code {code}; its logs are in {folder / "logs"}.')
        return code


class _Stop:
    """Counts the requests to stop."""

    def __init__(self):
        self.signals = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signals += 1


class _Attempt:
    """The processes of one try, each with a log of its own."""

    def __init__(self, spec: JobSpec, folder: pathlib.Path, attempt: int):
        with socket.socket() as probe:
            probe.bind(('localhost', 0))
            port = probe.getsockname()[1]
        self.processes = []
        for index in range(spec.num_nodes):
            with (folder / 'logs' / f'try-{attempt}-process-{index}.log').open('ab') as log:
                self.processes.append(
                    subprocess.Popen(
                        process_command(spec, index, port),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C is for this process, which then ends its own.
                    )
                )
        state = {'pid': os.getpid(), 'try': attempt, 'processes': [process.pid for process in self.processes]}
        temporary = folder / f'{STATE}.new'
        temporary.write_text(json.dumps(state))
        temporary.replace(folder / STATE)

    def run(self, stop: _Stop) -> int:
        """Waits for the end of all; the code that tells most: a final one, or else of the first that failed."""
        first, deadline, asked = 0, float('inf'), 0
        while any(process.poll() is None for process in self.processes):
            if not first:
                first = next((code for code in self._codes() if code), 0)
                if first:
                    deadline = time.monotonic() + (GRACE_SECONDS if first == PREEMPTED else LINGER_SECONDS)
            if stop.signals > asked:
                asked = stop.signals
                self._send(signal.SIGTERM)
                deadline = time.monotonic() + (GRACE_SECONDS if asked == 1 else 0)  # The second Ctrl-C.
            if time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        codes = self._codes()
        return next((code for code in codes if code in FINAL_EXIT_CODES), first or max(codes))

    def _codes(self) -> list[int]:
        """Exit codes of those that have ended, as a shell gives them: 128 + the number of the signal."""
        codes = [process.returncode for process in self.processes if process.returncode is not None]
        return [128 - code if code < 0 else code for code in codes]

    def _send(self, number: int) -> None:
        """To each process still there; killing takes its own processes along."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)


def status(spec: JobSpec, folder: pathlib.Path) -> list[Command]:
    return [['cat', str(folder / STATE)]] if running(folder) else []


def teardown(spec: JobSpec, folder: pathlib.Path) -> list[Command]:
    state = running(folder)
    return [['kill', '-TERM', str(state['pid'])]] if state else []


def logs(spec: JobSpec, folder: pathlib.Path) -> dict[str, Command]:
    """They are written into the job's folder."""
    return {}


def running(folder: pathlib.Path) -> dict[str, Any] | None:
    """What STATE says, while the job runs; its lock ends with it, so that no other process is taken for it."""
    try:
        with (folder / 'lock').open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        pass  # It never ran.
    return None


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

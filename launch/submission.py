"""What a renderer makes of a job, and how it is shown and carried out: commands are words, never a shell's string."""

from __future__ import annotations

import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

Command = list[str]


class Submission(NamedTuple):
    """Attributes:
    files: name in the job's folder -> text; written before the commands run.
    commands: in order.
    """

    files: dict[str, str]
    commands: list[Command]


def show(submission: Submission, folder: pathlib.Path) -> str:
    """All that would be written and run, to the letter."""
    parts = [f'--- {folder / name} ---\n{text.rstrip()}\n' for name, text in submission.files.items()]
    return '\n'.join([*parts, *(f'$ {shlex.join(command)}' for command in submission.commands)])


def write(submission: Submission, folder: pathlib.Path) -> None:
    (folder / 'logs').mkdir(parents=True, exist_ok=True)
    for name, text in submission.files.items():
        (folder / name).write_text(text)


def run(commands: Sequence[Command]) -> int:
    """Runs commands until one fails; the exit code of the last one."""
    for command in commands:
        print(f'$ {shlex.join(command)}', file=sys.stderr, flush=True)
        code = call(command)
        if code:
            print(f'launch: {command[0]} ended with exit code {code}.', file=sys.stderr)
            return code
    return 0


def call(command: Command, output: pathlib.Path | None = None) -> int:
    """Runs one command; its output goes on to ours, or to a file."""
    try:
        if output is None:
            return subprocess.run(command).returncode
        with output.open('wb') as file:
            return subprocess.run(command, stdout=file).returncode
    except FileNotFoundError:
        raise ValueError(f'{command[0]} is not installed here, or not in PATH.') from None

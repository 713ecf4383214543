"""Pieces of the shell scripts that machines run. What a user gave is quoted; no string of theirs is read as shell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from launch.spec import FINAL_EXIT_CODES, JobSpec

# Final codes as a pattern of `case`.
FINAL = '|'.join(map(str, FINAL_EXIT_CODES))


def train_command(spec: JobSpec, python: str) -> list[str]:
    """The command of every process, but for who it is among the others."""
    return [
        python,
        '-m',
        'avmae_jax.train',
        f'--config={spec.config}',
        f'--workdir={spec.workdir}',
        *spec.settings,
    ]


def identity(coordinator: str, num_processes: str, process_id: str) -> list[str]:
    """Flags that tell a process who it is among the others.

    Not left to jax, which would give each process of SLURM a single GPU, and asks Kubernetes for rights.
    """
    return [f'--coordinator={coordinator}', f'--num_processes={num_processes}', f'--process_id={process_id}']


def wrap(words: list[str]) -> str:
    """Words, quoted already, one a line."""
    return ' \\\n    '.join(words)


def exports(variables: Mapping[str, str]) -> str:
    return '\n'.join(f'export {name}={shlex.quote(value)}' for name, value in variables.items())


def retried(command: str, retries: int) -> str:
    """Lines that run a command again where that may help; the last exit code is in $code."""
    return f"""\
attempt=0
while true; do
  code=0
  {command} || code=$?
  case $code in
    0) break ;;
    {FINAL}) echo "Exit code $code: another try would end the same." >&2; break ;;
  esac
  if [ "$attempt" -ge {retries} ]; then
    echo "Exit code $code after the last of {retries} retries." >&2
    break
  fi
  attempt=$((attempt + 1))
  echo "Exit code $code: retry $attempt of {retries}." >&2
  sleep 10
done"""


def install(extras: str) -> str:
    """Lines that install the checkout in this folder into .venv; machine images come with too old a Python."""
    return f"""\
python3 -m pip install --quiet uv
python3 -m uv venv --quiet --allow-existing --python 3.11 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[{extras}]'"""


def extras(spec: JobSpec) -> str:
    """What setup.py calls the packages for this accelerator, and for buckets."""
    return {'tpu': 'tpu,gcs', 'gpu': 'cuda,gcs', 'cpu': 'gcs'}[spec.node.family]

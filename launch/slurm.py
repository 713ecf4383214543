"""SLURM: one batch job, which runs one process on each node and puts itself back into the queue.

Options: slurm.schedmd.com/{sbatch,srun,scontrol}.html; images need the plugin pyxis (github.com/NVIDIA/pyxis).
"""

from __future__ import annotations

import pathlib
import shlex

from launch import flags, shell
from launch.spec import CODE_IN_IMAGE, GRACE_SECONDS, JobSpec, check_code, check_fields
from launch.submission import Command, Submission

SCRIPT = 'job.sh'


def render(spec: JobSpec, folder: pathlib.Path) -> Submission:
    check_fields(spec, 'slurm', ('image', 'source', 'python', 'queue', 'hours', 'options'), ('gpu', 'cpu'))
    check_code(spec, 'FOLDER of a checkout that all nodes see')
    folder = folder.absolute()  # On a disk that all nodes see.
    submit = [
        'sbatch',
        f'--job-name={spec.name}',
        f'--nodes={spec.num_nodes}',
        '--ntasks-per-node=1',  # A process drives all GPUs of its node, and all cores decode for it.
        '--exclusive',
        *([f'--gpus-per-node={spec.node.num_chips}'] if spec.node.family == 'gpu' else []),
        '--requeue',
        f'--signal=TERM@{GRACE_SECONDS}',  # Before the time is over: the run is saved, and ends with 75.
        '--open-mode=append',
        f'--output={_pattern(folder)}/logs/%j.log',
        *([f'--time={spec.hours}:00:00'] if spec.hours else []),
        *([f'--partition={spec.queue}'] if spec.queue else []),
        *spec.options,
        str(folder / SCRIPT),
    ]
    return Submission({SCRIPT: script(spec, folder)}, [submit])


# What each task runs, with the command as its arguments. A final exit code is noted, as srun ends the other tasks then,
# and tells of the highest code of all. bash waits for the process where it would die of SIGTERM itself.
TASK = f"""\
trap : TERM
"$@"
code=$?
case $code in {shell.FINAL}) echo "$code" >"$FINAL" ;; esac
exit "$code"
"""
# The number is known in the task alone. Process 0 runs on the first node.
NUMBERED = f"""\
set -- "$@" {' '.join(f'"{word}"' for word in shell.identity('$COORDINATOR', '$SLURM_NTASKS', '$SLURM_PROCID'))}
"""
NAME_COORDINATOR = """\
COORDINATOR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))
export COORDINATOR
"""


def script(spec: JobSpec, folder: pathlib.Path) -> str:
    logs = folder / 'logs'
    srun = [
        'srun --kill-on-bad-exit=1 --open-mode=append',
        '--cpu-bind=none',  # One task would be bound to one core.
        f'--output={shlex.quote(_pattern(logs) + "/%j-%t.log")}',
    ]
    if spec.image:
        mounted = _mounted(spec, logs)
        mounts = ','.join(f'{path}:{path}' for path in mounted)
        srun += [
            f'--container-image={shlex.quote(spec.image)}',
            f'--container-workdir={CODE_IN_IMAGE}',
            f'--container-mounts={shlex.quote(mounts)}',
        ]
    python = 'python' if spec.image else spec.python or '.venv/bin/python'
    words = [
        *srun,
        f'bash -c {shlex.quote(TASK if spec.num_nodes == 1 else NUMBERED + TASK)} task',
        *map(shlex.quote, shell.train_command(spec, python)),
    ]
    # What is not there cannot be mounted.
    enter = shlex.join(['mkdir', '-p', *mounted]) if spec.image else f'cd {shlex.quote(spec.source)}'
    return f"""\
#!/usr/bin/env bash
set -u
try=${{SLURM_RESTART_COUNT:-0}}
export FINAL={shlex.quote(str(logs))}/$SLURM_JOB_ID-final
{shell.exports(flags.environment(spec))}
{enter} || exit
{NAME_COORDINATOR if spec.num_nodes > 1 else ''}code=0
{shell.wrap(words)} || code=$?
if [ -e "$FINAL" ]; then
  code=$(cat "$FINAL")
fi
case $code in
  0) exit 0 ;;
  {shell.FINAL}) echo "Exit code $code: another try would end the same." >&2; exit "$code" ;;
esac
if [ "$try" -ge {spec.retries} ]; then
  echo "Exit code $code after the last of {spec.retries} retries." >&2
  exit "$code"
fi
echo "Exit code $code: retry $((try + 1)) of {spec.retries}." >&2
scontrol requeue "$SLURM_JOB_ID" && sleep 60  # It ends this script.
exit "$code"
"""


def status(spec: JobSpec, folder: pathlib.Path) -> list[Command]:
    # With jobs that have ended, for as long as SLURM remembers them (MinJobAge): is it done, or did it fail?
    return [['squeue', '--me', f'--name={spec.name}', '--states=all', '--long']]


def logs(spec: JobSpec, folder: pathlib.Path) -> dict[str, Command]:
    """They are written into the job's folder."""
    return {}


def teardown(spec: JobSpec, folder: pathlib.Path) -> list[Command]:
    return [['scancel', '--me', f'--name={spec.name}']]


def _mounted(spec: JobSpec, logs: pathlib.Path) -> list[str]:
    """Folders that a container is to see; pyxis splits what it mounts at these signs, and has none to quote them by."""
    found = [str(logs), *([] if '://' in spec.workdir else [spec.workdir])]
    for what, path in zip(('the folder of the job, --jobs,', 'WORKDIR'), found, strict=False):
        if not path.startswith('/') or set(path) & set(' ,:'):
            raise ValueError(
                f'{path}: {what} is mounted into the image, so its path begins with / and has no space, comma or colon.'
            )
    return found


def _pattern(path: pathlib.Path) -> str:
    """A path where %j is the job and %t the task."""
    return str(path).replace('%', '%%')

"""SkyPilot: a managed job, which gets new machines when it loses some.

Fields: docs.skypilot.co/en/latest/reference/yaml-spec.html, .../running-jobs/distributed-jobs.html. Its
`max_restarts_on_errors` knows no exit code that ends a job for good, and `recover_on_exit_codes` no bound
(.../examples/managed-jobs.html), so failures of the program are retried in `run`, on the machines that are there. Lost
machines are SkyPilot's to replace.
"""

from __future__ import annotations

import pathlib
import shlex
from typing import Any

import yaml

from launch import flags, shell
from launch.queued_resources import accelerator_type
from launch.spec import CODE_IN_IMAGE, GPUS, PORT, JobSpec, check_bucket, check_code, check_fields
from launch.submission import Command, Submission

FILE = 'sky.yaml'


def render(spec: JobSpec, folder: pathlib.Path) -> Submission:
    check_fields(spec, 'sky', ('image', 'source', 'spot', 'options'), ('tpu', 'gpu'))
    check_code(spec, 'FOLDER of the checkout, which is copied')
    check_bucket(spec, 'sky')
    if spec.node.family == 'tpu' and spec.num_nodes > 1:
        raise ValueError(
            f'--num_nodes={spec.num_nodes}: SkyPilot does not join TPU slices; queued_resources and jobset do.'
        )
    text = yaml.dump(task(spec), Dumper=_Dumper, sort_keys=False, width=2**31)
    launch = [
        'sky',
        'jobs',
        'launch',
        f'--name={spec.name}',
        '--yes',
        '--detach-run',
        *spec.options,
        str(folder / FILE),
    ]
    return Submission({FILE: text}, [launch])


def task(spec: JobSpec) -> dict[str, Any]:
    node = spec.node
    tpu = node.family == 'tpu'
    resources: dict[str, Any] = {
        'accelerators': f'tpu-{accelerator_type(spec)}' if tpu else f'{GPUS[node.kind].sky}:{node.num_chips}'
    }
    if spec.spot:
        resources['use_spot'] = True
    fields: dict[str, Any] = {'name': spec.name, 'num_nodes': spec.num_nodes, 'resources': resources}
    if spec.image:
        resources['image_id'] = f'docker:{spec.image}'
    else:
        fields['workdir'] = spec.source
        fields['setup'] = f'set -e\n{shell.install(shell.extras(spec))}\n'
    python = 'python' if spec.image else '.venv/bin/python'
    words = [shlex.quote(word) for word in shell.train_command(spec, python)]
    lines = [shell.exports(flags.environment(spec)), *([f'cd {CODE_IN_IMAGE} || exit'] if spec.image else [])]
    if not tpu and spec.num_nodes > 1:
        lines.append('coordinator=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)')
        known = shell.identity(f'$coordinator:{PORT}', '$SKYPILOT_NUM_NODES', '$SKYPILOT_NODE_RANK')
        words += [f'"{word}"' for word in known]
    fields['run'] = '\n'.join([*lines, shell.retried(shell.wrap(words), spec.retries), 'exit "$code"', ''])
    return fields


def status(spec: JobSpec, folder: pathlib.Path) -> list[Command]:
    return [['sky', 'jobs', 'queue']]


def logs(spec: JobSpec, folder: pathlib.Path) -> dict[str, Command]:
    return {'sky.log': ['sky', 'jobs', 'logs', f'--name={spec.name}', '--no-follow']}


def teardown(spec: JobSpec, folder: pathlib.Path) -> list[Command]:
    return [['sky', 'jobs', 'cancel', f'--name={spec.name}', '--yes']]


class _Dumper(yaml.SafeDumper):
    """Writes scripts as the lines they are."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar('tag:yaml.org,2002:str', text, style='|' if '\n' in text else None)


_Dumper.add_representer(str, _represent)

"""Cloud TPU VMs: a queued resource of one or several slices, whose hosts each run a startup script.

Flags: cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create; states and deletion:
cloud.google.com/tpu/docs/queued-resources. The queue hands machines over hours later and to nobody who waits, so the
job lies in their metadata, as a startup script, which root runs on every host at every boot: it goes on after a reboot.
"""

from __future__ import annotations

import pathlib
import shlex

from launch import flags, shell
from launch.spec import CODE_IN_IMAGE, TPUS, JobSpec, check_bucket, check_code, check_fields
from launch.submission import Command, Submission

GCLOUD = ['gcloud', 'compute', 'tpus']
SCRIPT = 'startup.sh'


def accelerator_type(spec: JobSpec) -> str:
    """v5litepod-16 for v5e:4x4; gcloud counts chips or cores, and takes the topology it holds usual for them."""
    tpu = TPUS[spec.node.kind]
    return f'{tpu.gcloud}-{spec.node.num_chips * tpu.cores}'


def render(spec: JobSpec, folder: pathlib.Path) -> Submission:
    check_fields(spec, 'queued_resources', ('image', 'source', 'project', 'zone', 'spot', 'options'), ('tpu',))
    check_code(spec, 'URL@REF of a git repository')
    check_bucket(spec, 'queued_resources')
    if not spec.zone:
        raise ValueError('Give the zone of the TPUs, as in --zone=us-west4-a.')
    create = [
        *GCLOUD,
        'queued-resources',
        'create',
        spec.name,
        *_place(spec),
        f'--accelerator-type={accelerator_type(spec)}',
        f'--runtime-version={TPUS[spec.node.kind].runtime}',
        *(
            [f'--node-id={spec.name}']
            if spec.num_nodes == 1
            else [f'--node-count={spec.num_nodes}', f'--node-prefix={spec.name}']
        ),
        f'--metadata-from-file=startup-script={folder / SCRIPT}',
        *(['--spot'] if spec.spot else []),
        *spec.options,
    ]
    return Submission({SCRIPT: startup_script(spec)}, [create])


def startup_script(spec: JobSpec) -> str:
    """jax learns from the machine's metadata who it is: slices, hosts and the coordinator need no flags."""
    variables = flags.environment(spec)
    if spec.image:
        words = [
            'docker run --rm --privileged --network=host',
            f'--name={spec.name}',
            *(f'--env={shlex.quote(f"{name}={value}")}' for name, value in variables.items()),
            f'--workdir={CODE_IN_IMAGE}',
            shlex.quote(spec.image),
            *map(shlex.quote, shell.train_command(spec, 'python')),
        ]
        registry = spec.image.partition('/')[0]
        prepare = f'docker rm --force {spec.name} >/dev/null 2>&1 || true  # Of before a reboot.'
        if registry.endswith(('.pkg.dev', 'gcr.io')):
            prepare = f'gcloud auth configure-docker {shlex.quote(registry)} --quiet\n{prepare}'
    else:
        url, _, ref = spec.source.rpartition('@')
        words = [*map(shlex.quote, shell.train_command(spec, '.venv/bin/python'))]
        prepare = f"""\
[ -d {CODE_IN_IMAGE} ] || git clone --quiet {shlex.quote(url)} {CODE_IN_IMAGE}
cd {CODE_IN_IMAGE} || exit
git checkout --quiet {shlex.quote(ref)}
{shell.install(shell.extras(spec))}
{shell.exports(variables)}"""
    return f"""\
#!/usr/bin/env bash
set -u
exec >>{log_file(spec)} 2>&1
export HOME=/root
{prepare}
{shell.retried(shell.wrap(words), spec.retries)}
exit "$code"
"""


def status(spec: JobSpec, folder: pathlib.Path) -> list[Command]:
    return [[*GCLOUD, 'queued-resources', 'describe', spec.name, *_place(spec)]]


def logs(spec: JobSpec, folder: pathlib.Path) -> dict[str, Command]:
    """gcloud writes a file for each worker into an existing folder."""
    return {
        f'{node}/': [
            *GCLOUD,
            'tpu-vm',
            'ssh',
            node,
            *_place(spec),
            '--worker=all',
            f'--command=cat {log_file(spec)}',
            f'--output-directory={folder / "logs" / node}',
        ]
        for node in nodes(spec)
    }


def teardown(spec: JobSpec, folder: pathlib.Path) -> list[Command]:
    """--force: the machines too, which cost money until then."""
    return [[*GCLOUD, 'queued-resources', 'delete', spec.name, *_place(spec), '--force', '--quiet']]


def nodes(spec: JobSpec) -> list[str]:
    """The names of the slices."""
    return [spec.name] if spec.num_nodes == 1 else [f'{spec.name}-{i}' for i in range(spec.num_nodes)]


def log_file(spec: JobSpec) -> str:
    """On each host."""
    return f'/var/log/{spec.name}.log'


def _place(spec: JobSpec) -> list[str]:
    return [f'--zone={spec.zone}', *([f'--project={spec.project}'] if spec.project else [])]

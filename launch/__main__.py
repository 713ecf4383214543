"""Submits a training job, or looks after one.

    python -m launch HOW CONFIG WORKDIR [flags] [--config.x=y ...]      shows what would be submitted; --submit does it
    python -m launch status|logs|teardown NAME                          of a job that was submitted

HOW is one of queued_resources, jobset, slurm, sky, local. See docs/launching.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import sys
from types import ModuleType

from launch import jobset, local, queued_resources, sky, slurm, submission
from launch.spec import JobSpec

RENDERERS: dict[str, ModuleType] = {
    'queued_resources': queued_resources,
    'jobset': jobset,
    'slurm': slurm,
    'sky': sky,
    'local': local,
}
LATER = ('status', 'logs', 'teardown')
SPEC, HOW = 'spec.json', 'how'
LAST_LINES = 3


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m launch',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('how', choices=RENDERERS, metavar='HOW')
    parser.add_argument('config', metavar='CONFIG', help='FILE.py, and its arguments after a colon')
    parser.add_argument('workdir', metavar='WORKDIR', help='of the run; seen by all hosts')
    parser.add_argument('--submit', action='store_true', help='do it; else it is only shown')
    parser.add_argument('--jobs', default='launched', metavar='DIR', help='gets a folder for each job (%(default)s)')
    add = parser.add_argument_group('the job').add_argument
    add('--name', default='', help='of the job; else from WORKDIR')
    add('--accelerator', default='cpu:1', help='of a node: v5e:4x4, h100:8, cpu:2 (%(default)s)')
    add('--num_nodes', type=int, default=1, help='TPU slices, machines with GPUs, local processes (%(default)s)')
    add('--image', default='', help='with the code in it, as launch/Dockerfile makes it')
    add(
        '--source',
        default='',
        help='the code: a folder on a shared disk (slurm), to copy (sky), URL@REF (queued_resources)',
    )
    add('--python', default='', help='interpreter (slurm: .venv/bin/python of the source; local: this one)')
    add('--retries', type=int, default=3, help='after failures that another try may get over (%(default)s)')
    add('--env', action='append', default=[], metavar='NAME=VALUE', help='a variable; may be repeated')
    add = parser.add_argument_group('where').add_argument
    add('--project', default='', help='of Google Cloud')
    add('--zone', default='', help='of Google Cloud')
    add('--namespace', default='', help='of Kubernetes')
    add('--queue', default='', help='partition of SLURM; local queue of Kueue')
    add('--hours', type=int, default=0, help='after which SLURM may end the job')
    add('--spot', action='store_true', help='machines that may be taken away, for less')
    add('--option', action='append', default=[], metavar='FLAG', help='of the tool that submits, as --option=--x=y')
    return parser


def make_spec(arguments: list[str]) -> tuple[JobSpec, argparse.Namespace]:
    """The job that a command line describes; what it does not know must be a setting."""
    given, settings = parser().parse_known_args(arguments)
    fields = {
        field.name: getattr(given, field.name) for field in dataclasses.fields(JobSpec) if hasattr(given, field.name)
    }
    for text in given.env:
        if '=' not in text:
            raise ValueError(f'--env={text}: give NAME=VALUE; {text}= sets it to nothing.')
    environment = tuple((name, value) for name, _, value in (text.partition('=') for text in given.env))
    spec = JobSpec(**fields, settings=tuple(settings), environment=environment, options=tuple(given.option))
    return spec, given


def submit(arguments: list[str]) -> int:
    spec, given = make_spec(arguments)
    folder = pathlib.Path(given.jobs) / spec.name
    prepared = RENDERERS[given.how].render(spec, folder)
    if not given.submit:
        print(submission.show(prepared, folder))
        print('\nNothing was submitted; --submit does it.', file=sys.stderr)
        return 0
    submission.write(prepared, folder)
    (folder / SPEC).write_text(spec.to_json())
    (folder / HOW).write_text(given.how)
    if given.how == 'local':
        return local.run(spec, folder)
    code = submission.run(prepared.commands)
    if not code:
        place = '' if given.jobs == parser().get_default('jobs') else f' --jobs={shlex.quote(given.jobs)}'
        print(f'Submitted. Next: python -m launch status|logs|teardown {spec.name}{place}')
    return code


def look_after(arguments: list[str]) -> int:
    """status, logs or teardown of a job whose spec lies in its folder."""
    later = argparse.ArgumentParser(prog='python -m launch', allow_abbrev=False)
    later.add_argument('what', choices=LATER)
    later.add_argument('name', metavar='NAME')
    later.add_argument('--jobs', default=parser().get_default('jobs'), metavar='DIR')
    given = later.parse_args(arguments)
    folder = pathlib.Path(given.jobs) / given.name
    if not (folder / SPEC).is_file():
        there = sorted(path.parent.name for path in pathlib.Path(given.jobs).glob(f'*/{SPEC}'))
        raise ValueError(f'{given.name} was not submitted from here; {given.jobs} has {", ".join(there) or "no job"}.')
    spec = JobSpec.from_json((folder / SPEC).read_text())
    renderer = RENDERERS[(folder / HOW).read_text()]
    if given.what == 'logs':
        return gather(renderer.logs(spec, folder), folder / 'logs')
    commands = getattr(renderer, given.what)(spec, folder)
    if not commands:
        print(f'{spec.name} is not running.')
    return submission.run(commands)


def gather(commands: dict[str, submission.Command], folder: pathlib.Path) -> int:
    """Fetches the logs of all hosts into one folder, and shows how each of them ends."""
    worst = 0
    for name, command in commands.items():
        print(f'$ {shlex.join(command)}', file=sys.stderr, flush=True)
        is_folder = name.endswith('/')
        (folder / name if is_folder else folder).mkdir(parents=True, exist_ok=True)
        worst = max(worst, submission.call(command, None if is_folder else folder / name))
    for path in sorted(path for path in folder.rglob('*') if path.is_file()):
        lines = path.read_text(errors='replace').splitlines()
        print(f'{path}: {len(lines)} lines', *(f'    {line[:300]}' for line in lines[-LAST_LINES:]), sep='\n')
    return worst


def main(arguments: list[str]) -> int:
    try:
        return look_after(arguments) if arguments[:1] and arguments[0] in LATER else submit(arguments)
    except ValueError as error:
        print(f'launch: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""A job spec: what it takes, what it refuses, and that it says the same as the trainer."""

import subprocess
import sys

import pytest

from launch import flags, spec
from launch.spec import Accelerator, JobSpec


def job(**fields) -> JobSpec:
    return JobSpec(**{'config': 'configs/tiny.py', 'workdir': 'gs://b/runs/Tiny_2', **fields})


@pytest.mark.parametrize(
    ('text', 'chips', 'hosts'),
    [
        ('v5e:1x1', 1, 1), ('v5e:2x4', 8, 1), ('v5e:4x4', 16, 4), ('v6e:16x16', 256, 64),
        ('v4:2x2x1', 4, 1), ('v5p:2x2x2', 8, 2), ('v5p:8x8x16', 1024, 256), ('h100:8', 8, 1), ('cpu:2', 2, 1),
    ],
)  # fmt: skip
def test_an_accelerator_has_so_many_chips_on_so_many_machines(text, chips, hosts):
    node = Accelerator.parse(text)
    assert (node.num_chips, node.num_hosts, str(node)) == (chips, hosts, text)


def test_the_exit_codes_that_end_a_job_are_the_trainers():
    from avmae_jax.train import ExitCode

    codes = {ExitCode.SETTINGS, ExitCode.DATA, ExitCode.NONFINITE, ExitCode.STORAGE}
    assert set(spec.FINAL_EXIT_CODES) == codes
    from launch import local

    assert local.PREEMPTED == ExitCode.PREEMPTED


def test_a_name_comes_from_the_workdir_and_fits_every_tool():
    assert job().name == 'tiny-2'
    assert job(workdir='/runs/2026_big run!').name == 'job-2026-big-run'
    assert len(job(workdir='x' * 80).name) == 30


def test_a_spec_is_read_back_as_it_was_written():
    wanted = job(settings=("--config.a=it's $HOME",), environment=(('A', 'b=c'),), options=('--x',), spot=True)
    assert JobSpec.from_json(wanted.to_json()) == wanted


WRONG = {
    'config': ('configs/tiny', 'FILE.py'),
    'workdir': ('', 'WORKDIR'),
    'settings': (('--confg.x=1',), '--config.name=value'),
    'name': ('Tiny', '--name=Tiny'),
    'accelerator': ('v5e:4x4x4', 'v5e:4x4'),
    'accelerator, by its sides': ('v5e:3x5', 'multiples of 4'),
    'num_nodes': (0, '--num_nodes=0'),
    'retries': (-1, '--retries=-1'),
    'hours': (-3, '--hours=-3'),
    'environment': ((('A-B', '1'),), 'NAME=VALUE'),
}


@pytest.mark.parametrize('field', WRONG)
def test_a_wrong_field_is_named_with_its_remedy(field):
    value, words = WRONG[field]
    with pytest.raises(ValueError, match=words):
        job(**{field.partition(',')[0]: value})


def test_flags_that_are_asked_for_come_last_and_so_count():
    ours = flags.environment(job(accelerator='h100:8'))
    asked = flags.environment(
        job(accelerator='h100:8', environment=(('XLA_FLAGS', '--a=1'), ('JAX_COMPILATION_CACHE_DIR', '/c')))
    )
    assert asked['XLA_FLAGS'] == ours['XLA_FLAGS'] + ' --a=1' and asked['JAX_COMPILATION_CACHE_DIR'] == '/c'
    emptied = flags.environment(job(accelerator='v5e:4x4', environment=(('NAME', ''), ('PYTHONUNBUFFERED', ''))))
    assert emptied['NAME'] == '' and emptied['PYTHONUNBUFFERED'] == '' and 'LIBTPU_INIT_ARGS' not in emptied


def test_submitting_imports_neither_jax_nor_the_package(repository):
    script = "import sys, launch.__main__; sys.exit(bool({'jax', 'avmae_jax', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, '-c', script], check=True, cwd=repository, timeout=60)

"""The same training on four devices of one process, of two, and of four: every figure of every step is the same."""

import pathlib
import socket
import subprocess
import sys

import pytest

from avmae_jax.training.writer import read_scalars

pytestmark = pytest.mark.timeout(900)
NUM_STEPS = 10
JOB = [f'--config.num_steps={NUM_STEPS}', '--config.model.encoder.size.mlp_width=1024']  # Large enough to be split.
# By the number of processes. A layer is split within a process only.
RULES = {
    1: ['--config.parallel.rules=replicated'],
    2: ['--config.parallel.rules=fsdp_tensor', '--config.parallel.model=2'],
    4: ['--config.parallel.rules=fsdp', '--config.parallel.replica=2'],
}
COMPARED = ('loss', 'grad_norm', 'param_norm', 'update_norm', 'reconstruction/video', 'reconstruction/audio')


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


@pytest.fixture
def train(start_training):
    """(workdir, number of processes) -> the figures of every step, from four devices in all."""

    def run(workdir: pathlib.Path, num_processes: int) -> list[dict]:
        job = [
            *JOB,
            *RULES[num_processes],
            f'--coordinator=localhost:{free_port()}',
            f'--num_processes={num_processes}',
        ]
        processes = [
            start_training(workdir, *job, f'--process_id={i}', num_devices=4 // num_processes)
            for i in range(num_processes)
        ]
        for process in processes:
            output, _ = process.communicate(timeout=800)
            assert process.returncode == 0, output[-4000:]
            assert 'on 4 x cpu' in output
        return read_scalars(workdir)

    return run


@pytest.fixture(scope='module')
def alone():
    return []


@pytest.mark.parametrize('num_processes', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_how_many_processes_the_devices_belong_to(train, alone, tmp_path, num_processes):
    alone.extend([] if alone else train(tmp_path / 'alone', 1))
    figures = train(tmp_path / 'several', num_processes)
    assert [line['step'] for line in figures] == list(range(1, NUM_STEPS + 1))
    for ours, expected in zip(figures, alone, strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(expected[name], rel=2e-6, abs=1e-7), (ours['step'], name)


HAND_IN_ROWS = """
import sys
import jax
import numpy as np
from avmae_jax.parallel import hosts, mesh, rules

hosts.initialize(sys.argv[1], 2, int(sys.argv[2]))
rows = np.arange(4 * 5, dtype=np.float32).reshape(4, 5) + 100 * jax.process_index()
batch = hosts.global_batch({'x': rows}, rules.batch_sharding(mesh.make_mesh()))['x']
assert batch.shape == (8, 5) and not batch.is_fully_addressable
held = [np.asarray(shard.data) for shard in batch.addressable_shards]
assert [x.shape for x in held] == [(2, 5)] * 2, held
np.testing.assert_array_equal(np.concatenate(held), rows)
"""


def test_each_process_hands_in_its_rows_and_holds_no_others(repository, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '2')
    command = [sys.executable, '-c', HAND_IN_ROWS, f'localhost:{free_port()}']
    started = [
        subprocess.Popen(
            [*command, str(i)], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(2)
    ]
    for process in started:
        output, _ = process.communicate(timeout=800)
        assert process.returncode == 0, output

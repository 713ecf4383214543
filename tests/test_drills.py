"""What may happen to a run, done to real processes: afterwards its losses equal an uninterrupted run's, bit for bit."""

import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import time

import pytest

from avmae_jax.checkpoints import manager
from avmae_jax.train import ExitCode
from avmae_jax.training.writer import read_scalars

pytestmark = pytest.mark.timeout(900)  # Several processes each, on machines that may do something else too.
NUM_STEPS = 300  # As `smallest` says: long enough for a signal to arrive, which takes the notifier up to a second.
NOT_COMPARED = ('clips_per_second', 'step_seconds', 'data_wait_share')  # Clocks.


def figures(workdir: pathlib.Path) -> list[dict]:
    """All that was computed at each step; floats as written, to the last bit."""
    return [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in read_scalars(workdir)]


def finish(process: subprocess.Popen, code: int = 0, timeout: float = 400) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, output[-4000:]
    return output


def wait_until(process: subprocess.Popen, happened, timeout: float = 400) -> None:
    """Looks often, so that a signal meets the process at the moment that was meant."""
    deadline = time.monotonic() + timeout
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.001)


def steps_done(workdir: pathlib.Path) -> int:
    file = workdir / 'metrics.jsonl'
    return file.read_text().count('\n') if file.exists() else 0


def is_saving(workdir: pathlib.Path) -> bool:
    folder = workdir / 'checkpoints'
    return folder.is_dir() and any(manager.TEMPORARY_MARK in child.name for child in folder.iterdir())


@pytest.fixture(scope='module')
def uninterrupted(request):
    return {}


@pytest.fixture
def expected(uninterrupted, start_training, tmp_path_factory) -> list[dict]:
    """The figures of a run that nothing happened to; made once."""
    if not uninterrupted:
        workdir = tmp_path_factory.mktemp('uninterrupted')
        finish(start_training(workdir))
        uninterrupted['figures'] = figures(workdir)
        assert [line['step'] for line in uninterrupted['figures']] == list(range(1, NUM_STEPS + 1))
    return uninterrupted['figures']


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(expected, start_training, tmp_path):
    moments = {
        'before the first checkpoint': lambda: steps_done(tmp_path) >= 2,
        'in a save': lambda: is_saving(tmp_path),
        'late': lambda: steps_done(tmp_path) >= 200,
    }
    for moment, happened in moments.items():
        process = start_training(tmp_path)
        wait_until(process, happened)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert steps_done(tmp_path) < NUM_STEPS, f'the run was over before it could be killed {moment}'
    finish(start_training(tmp_path))
    assert figures(tmp_path) == expected


def test_sigterm_saves_first_and_the_run_goes_on_bit_for_bit(expected, start_training, tmp_path):
    # A prime distance between saves: the step that is saved is one that only the signal can have chosen.
    seldom = '--config.checkpoint.every_steps=293'
    process = start_training(tmp_path, seldom)
    wait_until(process, lambda: steps_done(tmp_path) >= 5)
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=ExitCode.PREEMPTED)
    assert 'is saved' in output
    (saved,) = (child for child in (tmp_path / 'checkpoints').iterdir())
    assert manager.find_fault(saved) is None and 5 <= int(saved.name) < 293
    output = finish(start_training(tmp_path, seldom))
    assert f'Going on from the checkpoint of step {saved.name}' in output
    assert figures(tmp_path) == expected


def _mount(folder: pathlib.Path, options: str) -> bool:
    command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint and no second, for whoever may mount one."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    if not _mount(folder, 'size=2200k'):
        pytest.skip('mounting a small tmpfs needs root; tests/checkpoints still fakes too little free space')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


def test_a_full_disk_ends_the_run_with_its_last_checkpoint_and_room_lets_it_go_on(expected, start_training, small_disk):
    process = start_training(small_disk)
    output = finish(process, code=ExitCode.STORAGE)
    assert str(small_disk) in output and 'MB are free' in output and 'run the same command again' in output
    steps = [child.name for child in (small_disk / 'checkpoints').iterdir()]
    assert steps == ['25'] and 'The last checkpoint is of step 25' in output and not is_saving(small_disk)
    subprocess.run(['mount', '-o', 'remount,size=64m', str(small_disk)], check=True)
    finish(start_training(small_disk))
    assert figures(small_disk) == expected


@pytest.mark.parametrize('limit_bytes', [4_096, 40_000], ids=['the figures', 'a checkpoint'])
def test_where_files_may_not_grow_a_run_ends_as_on_a_full_disk(expected, start_training, tmp_path, limit_bytes):
    # A limit on the size of files (ulimit -f) meets the same calls as a full disk, and anyone may set one.
    process = start_training(tmp_path)
    wait_until(process, (tmp_path / 'checkpoints' / '25').exists)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    output = finish(process, code=ExitCode.STORAGE)
    assert 'File too large' in output and 'ulimit -f' in output and 'run the same command again' in output
    steps = [int(child.name) for child in (tmp_path / 'checkpoints').iterdir()]
    assert steps and max(steps) < NUM_STEPS and f'The last checkpoint is of step {max(steps)}' in output
    finish(start_training(tmp_path))
    assert figures(tmp_path) == expected


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_what_is_needed_to_look_into_it(start_training, tmp_path):
    output = finish(start_training(tmp_path, '--config.preprocess.audio_mean=nan'), code=ExitCode.NONFINITE)
    folder = tmp_path / 'nonfinite-0'
    assert 'step 0 is not finite; it began with the input: audio of rows [0, 1' in output and str(folder) in output
    report = json.loads((folder / 'report-0.json').read_text())
    assert len(report['clip_ids']) == 8 and all(report['clip_ids'])
    assert (folder / 'batch-0.npz').exists() and manager.find_fault(folder / 'checkpoints' / '0') is None
    assert not list((tmp_path / 'checkpoints').iterdir())


def test_a_signal_to_one_of_two_processes_stops_both_and_one_alone_goes_on(expected, start_training, tmp_path):
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    job = ['--config.parallel.rules=fsdp', f'--coordinator=localhost:{port}', '--num_processes=2']
    first, second = (start_training(tmp_path, *job, f'--process_id={i}') for i in range(2))
    wait_until(first, lambda: steps_done(tmp_path) >= 5)
    second.send_signal(signal.SIGTERM)
    finish(first, code=ExitCode.PREEMPTED)
    finish(second, code=ExitCode.PREEMPTED)
    finish(start_training(tmp_path))
    # Sums over two devices are rounded in another order than over one: close, and not the same bits.
    assert len(figures(tmp_path)) == NUM_STEPS
    for ours, theirs in zip(figures(tmp_path)[:20], expected[:20], strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-3)

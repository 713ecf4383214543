"""What may happen to a run, done to real processes: afterwards its losses equal an uninterrupted run's, bit for bit."""

import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import time

import pytest

from avmae_jax.checkpoints import manager
from avmae_jax.train import ExitCode
from avmae_jax.training import goodput, report
from avmae_jax.training.writer import read_scalars

pytestmark = pytest.mark.timeout(900)  # Several processes each, on machines that may do something else too.
NUM_STEPS = 300  # As `smallest` says: long enough for a signal to arrive, which takes the notifier up to a second.
NOT_COMPARED = ('clips_per_second', 'step_seconds', 'data_wait_share')  # Clocks.


def figures(workdir: pathlib.Path) -> list[dict]:
    """All that was computed at each step; floats as written, to the last bit."""
    return [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in read_scalars(workdir)]


def finish(process: subprocess.Popen, code: int = 0, timeout: float = 800) -> str:
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


def start_job(start_training, workdir: pathlib.Path, num_processes: int, *arguments: str, **more) -> list:
    """The processes of one job."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    job = [f'--coordinator=localhost:{port}', f'--num_processes={num_processes}', *arguments]
    return [start_training(workdir, *job, f'--process_id={i}', **more) for i in range(num_processes)]


def good_steps(workdir: pathlib.Path) -> set[int]:
    """Of the checkpoints that are whole."""
    folder = workdir / 'checkpoints'
    there = [child for child in folder.iterdir() if child.name.isdigit()] if folder.is_dir() else []
    return {int(child.name) for child in there if manager.find_fault(child) is None}


def loader_worker(process: subprocess.Popen) -> int:
    """The pid of the first worker process of a training process."""
    for pid in pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split():
        if b'avmae_jax.data.workers' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes():
            return int(pid)
    raise LookupError('It has no worker.')


@pytest.fixture(scope='module')
def uninterrupted(request):
    return {}


@pytest.fixture
def expected(uninterrupted, start_training, tmp_path_factory) -> list[dict]:
    """The figures of a run that nothing happened to; made once."""
    if 'figures' not in uninterrupted:
        workdir = uninterrupted['workdir'] = tmp_path_factory.mktemp('uninterrupted')
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
    committed = max(good_steps(tmp_path))
    damage_checkpoints(tmp_path / 'checkpoints', committed)
    output = finish(start_training(tmp_path))
    damaged = sorted(child.name for child in (tmp_path / 'damaged').iterdir())
    assert damaged == sorted(f'{committed + i}-0' for i in (1, 2, 3))
    assert f'Going on from the checkpoint of step {committed}' in output
    assert figures(tmp_path) == expected


def damage_checkpoints(folder: pathlib.Path, newest: int) -> None:
    """Puts three behind the newest that are not whole: with a flipped bit, without a file, and an empty folder."""
    flipped, lacking = (shutil.copytree(folder / str(newest), folder / str(newest + i)) for i in (1, 2))
    (folder / str(newest + 3)).mkdir()
    arrays, another = sorted((path for path in flipped.rglob('d/*') if path.is_file()), key=os.path.getsize)[-2:]
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1 << 5
    arrays.write_bytes(content)
    (lacking / another.relative_to(flipped)).unlink()


@pytest.mark.slow  # SIGTERM to one of two processes, below, is met in the same way.
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


@pytest.mark.slow  # Meets the same calls as the full disk, above, which needs root.
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
    # Divided by as little, no float32 is large enough.
    output = finish(start_training(tmp_path, '--config.preprocess.audio_std=1.2e-38'), code=ExitCode.NONFINITE)
    folder = tmp_path / 'nonfinite-0'
    assert 'step 0 is not finite; it began with the input: audio of rows [0, 1' in output and str(folder) in output
    report = json.loads((folder / 'report-0.json').read_text())
    assert len(report['clip_ids']) == 8 and all(report['clip_ids'])
    assert (folder / 'batch-0.npz').exists() and manager.find_fault(folder / 'checkpoints' / '0') is None
    assert not list((tmp_path / 'checkpoints').iterdir())


def test_a_signal_to_one_of_two_processes_stops_both_and_one_alone_goes_on(expected, start_training, tmp_path):
    first, second = start_job(start_training, tmp_path, 2, '--config.parallel.rules=fsdp')
    wait_until(first, lambda: steps_done(tmp_path) >= 5)
    second.send_signal(signal.SIGTERM)
    finish(first, code=ExitCode.PREEMPTED)
    finish(second, code=ExitCode.PREEMPTED)
    finish(start_training(tmp_path))
    # Sums over two devices are rounded in another order than over one: close, and not the same bits.
    assert len(figures(tmp_path)) == NUM_STEPS
    for ours, theirs in zip(figures(tmp_path)[:20], expected[:20], strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-3)


# -- Two processes, of which one has bad luck --

NUM_PAIR_STEPS = 120
HEARTBEAT_SECONDS = 10
LONG_SECONDS = 200  # On a machine that is busy with other things; the seconds it takes elsewhere.
PAIR = (
    '--config.parallel.rules=fsdp',
    f'--config.num_steps={NUM_PAIR_STEPS}',
    '--config.checkpoint.every_steps=20',
    '--config.data.num_workers=1',
    f'--config.parallel.heartbeat_seconds={HEARTBEAT_SECONDS}',
)


@pytest.fixture
def expected_of_two(uninterrupted, start_training, tmp_path_factory) -> list[dict]:
    """The figures of two processes that nothing happened to; made once."""
    if 'of two' not in uninterrupted:
        workdir = tmp_path_factory.mktemp('uninterrupted-two')
        for process in start_job(start_training, workdir, 2, *PAIR):
            finish(process)
        uninterrupted['of two'] = figures(workdir)
    return uninterrupted['of two']


def end_by_itself(process: subprocess.Popen, seconds: float) -> tuple[int, str]:
    """Exit code and output of a process that has nothing more to wait for."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f'a process whose partner is lost goes on after {seconds} s')
    return process.returncode, process.communicate(timeout=60)[0]


def kill_in_a_step(workdir, first, second):
    wait_until(first, lambda: steps_done(workdir) >= 25)
    second.kill()
    code, output = end_by_itself(first, LONG_SECONDS)
    assert code not in (0, *FINAL), output[-4000:]


def kill_in_a_save(workdir, first, second):
    wait_until(first, lambda: steps_done(workdir) >= 30 and is_saving(workdir))
    first.kill()  # The one that the other hears of everything from.
    code, output = end_by_itself(second, LONG_SECONDS)
    assert code not in (0, *FINAL), output[-4000:]


def freeze(workdir, first, second):
    wait_until(first, lambda: steps_done(workdir) >= 65)
    second.send_signal(signal.SIGSTOP)
    code, output = end_by_itself(first, HEARTBEAT_SECONDS + LONG_SECONDS)
    assert code not in (0, *FINAL), output[-4000:]
    second.send_signal(signal.SIGCONT)  # When it wakes up it is alone, and may not write anything.
    code, output = end_by_itself(second, HEARTBEAT_SECONDS + LONG_SECONDS)
    assert code not in (0, *FINAL), output[-4000:]


def starve(workdir, first, second):
    """The second is alive, answers, and waits for data that never comes."""
    wait_until(first, lambda: steps_done(workdir) >= 85)
    worker = loader_worker(second)
    os.kill(worker, signal.SIGSTOP)
    try:
        first.wait(LONG_SECONDS), second.wait(LONG_SECONDS)
    finally:
        os.kill(worker, signal.SIGKILL)  # It has the output of its parent open.
    ends = [end_by_itself(process, LONG_SECONDS) for process in (first, second)]
    # Both wait, and whoever's watchdog is first takes the other along.
    assert ExitCode.STUCK in [code for code, _ in ends], ends
    told = next(output for code, output in ends if code == ExitCode.STUCK)
    assert 'Stuck: process' in told and 'loop.py' in told
    assert not {code for code, _ in ends} & {0, *FINAL}


FINAL = (ExitCode.SETTINGS, ExitCode.DATA, ExitCode.NONFINITE, ExitCode.STORAGE)  # Trying again would not help.


@pytest.mark.slow
def test_when_one_of_two_is_lost_the_other_ends_and_both_go_on_bit_for_bit(expected_of_two, start_training, tmp_path):
    committed: set[int] = set()
    for bad_luck in (kill_in_a_step, kill_in_a_save, freeze, starve):
        watchdog = f'--config.parallel.watchdog_seconds={15 if bad_luck is starve else 600}'
        bad_luck(tmp_path, *start_job(start_training, tmp_path, 2, *PAIR, watchdog))
        assert steps_done(tmp_path) < NUM_PAIR_STEPS, f'the run was over before {bad_luck.__name__}'
        assert good_steps(tmp_path) and max(good_steps(tmp_path)) >= max(committed, default=0)
        committed = good_steps(tmp_path)
    for process in start_job(start_training, tmp_path, 2, *PAIR):
        output = finish(process)
        assert f'Going on from the checkpoint of step {max(committed)}' in output
    assert figures(tmp_path) == expected_of_two
    sessions = goodput.read(tmp_path)
    found = goodput.summarise(sessions)
    print(found)
    assert found.num_sessions == 5 and found.parts['lost'] > 0 and found.parts['down'] > 0


@pytest.mark.slow  # What was read ahead is used up first, and then a line of the log is waited for.
def test_a_slow_host_slows_the_job_down_and_its_log_says_what_it_waits_for(expected_of_two, start_training, tmp_path):
    first, second = start_job(start_training, tmp_path, 2, *PAIR)
    wait_until(first, lambda: steps_done(tmp_path) >= 20)
    worker = loader_worker(second)
    os.kill(worker, signal.SIGSTOP)
    done, since = 0, time.monotonic()
    while time.monotonic() - since < report.LINE_SECONDS + 2:  # Until neither of them goes on.
        assert first.poll() is None and second.poll() is None, 'a slow host ended the job'
        if steps_done(tmp_path) > done:
            done, since = steps_done(tmp_path), time.monotonic()
        time.sleep(0.01)
    assert 20 <= done < NUM_PAIR_STEPS
    os.kill(worker, signal.SIGCONT)
    finish(first)
    told = re.findall(r'Step (\d+): the device waited for data (\d+) %', finish(second))
    assert [step for step, share in told if int(share) > 50 and done <= int(step) <= done + 3], (done, told)
    assert figures(tmp_path) == expected_of_two


@pytest.mark.slow
def test_a_run_moves_between_machines_of_any_shape_and_other_rules(expected, start_training, tmp_path):
    shapes, done = ((4, 1, 'replicated'), (2, 2, 'fsdp'), (1, 1, 'replicated'), (1, 8, 'fsdp')), 0
    for leg, (num_processes, num_devices, rules) in enumerate(shapes, start=1):
        seldom = ('--config.checkpoint.every_steps=293', f'--config.parallel.rules={rules}')
        processes = start_job(start_training, tmp_path, num_processes, *seldom, num_devices=num_devices)
        # Of its own steps: before the first one it does not yet listen to signals.
        wait_until(processes[0], lambda done=done: steps_done(tmp_path) >= done + 8)
        for process in processes if rules == 'fsdp' else processes[-1:]:  # To all, and to one.
            process.send_signal(signal.SIGTERM)
        for process in processes:
            output = finish(process, code=ExitCode.PREEMPTED)
        assert f'on {num_processes * num_devices} x cpu' in output
        assert (f'Going on from the checkpoint of step {done}' in output) if leg > 1 else True
        done = max(good_steps(tmp_path))
    found = figures(tmp_path)
    assert [line['step'] for line in found] == list(range(1, done + 1)) and done < NUM_STEPS
    for ours, theirs in zip(found, expected[:done], strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-3)


# -- One process, and a world that changes around it --


def test_a_shard_that_disappears_is_read_on_while_it_is_open_and_then_missed_by_name(
    expected, start_training, tiny_dataset, tmp_path
):
    dataset, workdir = shutil.copytree(tiny_dataset, tmp_path / 'data'), tmp_path / 'run'
    here = f'--config.data.path={dataset}'
    process = start_training(workdir, here)
    wait_until(process, lambda: steps_done(workdir) >= 30)
    shard = next(path for path in sorted(dataset.glob('*train*')) if not path.name.endswith('.index'))
    shard.rename(tmp_path / shard.name)
    wait_until(process, lambda: steps_done(workdir) >= 60)
    process.kill()
    process.wait()
    committed = good_steps(workdir)
    output = finish(start_training(workdir, here), code=ExitCode.SETTINGS)
    assert f'{shard} is missing' in output and good_steps(workdir) == committed
    (tmp_path / shard.name).rename(shard)
    finish(start_training(workdir, here))
    assert figures(workdir) == expected


JUMPS = """
import random, time
_honest, _jumps = time.time, random.Random(0)
time.time = lambda: _honest() + _jumps.choice((-86400, 86400))
"""


@pytest.mark.slow
def test_a_clock_that_jumps_by_days_changes_nothing(expected, start_training, tmp_path, monkeypatch):
    (tmp_path / 'sitecustomize.py').write_text(JUMPS)
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{os.environ.get("PYTHONPATH", "")}')
    began = time.monotonic()
    process = start_training(tmp_path / 'run')
    wait_until(process, lambda: steps_done(tmp_path / 'run') >= 100)
    process.kill()
    process.wait()
    finish(start_training(tmp_path / 'run'))
    assert figures(tmp_path / 'run') == expected
    sessions = goodput.read(tmp_path / 'run')
    assert all(abs(session['began'] - time.time()) > 40_000 for session in sessions)
    assert sum(session['seconds'] for session in sessions) < time.monotonic() - began


def test_a_second_job_in_a_workdir_is_refused_and_the_first_goes_on(expected, start_training, tmp_path):
    first = start_training(tmp_path, '--config.parallel.heartbeat_seconds=900')
    wait_until(first, lambda: steps_done(tmp_path) >= 5)
    first.send_signal(signal.SIGSTOP)  # So that it is there until the other has ended, and changes nothing itself.
    before = contents(tmp_path)
    output = finish(start_training(tmp_path), code=ExitCode.SETTINGS)
    assert f'is in use by process {first.pid} on {socket.gethostname()}' in output
    assert contents(tmp_path) == before
    first.send_signal(signal.SIGCONT)
    finish(first)
    assert figures(tmp_path) == expected


def test_the_workdir_of_another_run_is_refused_and_left_as_it_is(expected, uninterrupted, start_training):
    workdir = uninterrupted['workdir']
    before = contents(workdir)
    output = finish(start_training(workdir, '--config.seed=1'), code=ExitCode.SETTINGS)
    assert 'holds a run with other settings: seed: 0 -> 1' in output
    assert contents(workdir) == before


def test_every_fault_that_is_documented_names_the_tests_that_do_it(repository):
    text = (repository / 'docs' / 'reliability.md').read_text()
    rows = [line.split('|')[1:-1] for line in text.partition('| fault |')[2].partition('\n\n')[0].splitlines()[2:]]
    assert len(rows) > 20 and all(len(row) == 5 for row in rows)
    for fault, *_, tests in rows:
        named = re.findall('`([^`]+)`', tests)
        assert named, f'{fault} has no test'
        for each in named:
            file, colon, name = each.partition(': ') if '.py' in each else ('test_drills.py', ': ', each)
            path = repository / 'tests' / file
            assert path.is_file() and (not colon or re.search(rf'def test_\w*{name}', path.read_text())), each


def contents(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of change of all files."""
    files = (path for path in sorted(folder.rglob('*')) if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

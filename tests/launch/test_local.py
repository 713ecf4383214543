"""The local launcher with real processes: what it tries again, what it does not, how it ends; and a killed training."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from avmae_jax.training.writer import read_scalars
from launch import local

pytestmark = pytest.mark.timeout(900)
NOT_COMPARED = ('clips_per_second', 'step_seconds', 'data_wait_share')  # Clocks.

# Stands in for Python: the k-th start of a process ends as the k-th word of $ENDS says.
STAND_IN = """\
#!/usr/bin/env bash
echo "$JAX_NUM_CPU_DEVICES devices, $*"
all="$*"
id=${all##*--process_id=}
trap 'exit 75' TERM
echo x >>"$ENDS-$id"
end=$(sed -n "$(wc -l <"$ENDS-$id")p" "$ENDS")
case $end in
  kill) kill -9 $$ ;;
  wait) for _ in {1..600}; do sleep 0.1; done ;;
  *) exit "$end" ;;
esac
"""


@pytest.fixture
def launch(tmp_path, repository):
    """Starts `python -m launch local` with the stand-in, whose starts end as given; ends with the test."""
    python, started = tmp_path / 'python', []
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def start(ends: list[str], *flags: str) -> subprocess.Popen:
        (tmp_path / 'ends').write_text('\n'.join(ends) + '\n')
        command = [sys.executable, '-m', 'launch', 'local', 'configs/tiny.py', str(tmp_path / 'run'), '--submit']
        command += [f'--jobs={tmp_path}/jobs', f'--python={python}', '--accelerator=cpu:2', *flags]
        environment = {**os.environ, 'ENDS': str(tmp_path / 'ends')}
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
        started.append(subprocess.Popen(command, cwd=repository, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(process: subprocess.Popen, code: int, timeout: float = 120) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, output
    return output


def wait_for(path: pathlib.Path, process: subprocess.Popen, timeout: float = 400) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


def starts(tmp_path: pathlib.Path) -> int:
    """How often process 0 was started."""
    return (tmp_path / 'ends-0').read_text().count('x')


def test_what_would_end_the_same_is_not_tried_again(launch, tmp_path):
    output = finish(launch(['2', '0'], '--num_nodes=2'), 2)
    assert starts(tmp_path) == 1 and 'retry' not in output


def test_crashes_signals_and_preemptions_are_tried_again_and_each_try_has_its_logs(launch, tmp_path):
    output = finish(launch(['kill', '75', '1', '0'], '--num_nodes=2'), 0)
    assert [word in output for word in ('code 137; retry 1 of 3', 'code 75; retry 2', 'code 1; retry 3')] == [True] * 3
    logs = sorted((tmp_path / 'jobs/run/logs').iterdir())
    assert [log.name for log in logs] == [f'try-{k}-process-{i}.log' for k in range(4) for i in range(2)]
    for i, log in enumerate(logs):
        told = log.read_text()
        assert told.startswith('2 devices, -m avmae_jax.train') and f'--num_processes=2 --process_id={i % 2}' in told
    ports = {log.read_text().split('--coordinator=')[1].split()[0] for log in logs}
    assert len(ports) == 4  # A new one for each try: the last one's may not be free yet.


def test_retries_are_bounded(launch, tmp_path):
    output = finish(launch(['1'] * 5, '--num_nodes=2', '--retries=1'), 1)
    assert starts(tmp_path) == 2 and 'no retry is left' in output


def test_a_process_that_waits_for_a_dead_one_is_ended(launch, tmp_path, monkeypatch):
    (tmp_path / 'ends').write_text('0\n')
    folder = tmp_path / 'job'
    (folder / 'logs').mkdir(parents=True)
    script = tmp_path / 'half'  # Process 0 dies, process 1 hangs.
    script.write_text('#!/usr/bin/env bash\ncase $* in *process_id=0) exit 65 ;; *) sleep 100 ;; esac\n')
    script.chmod(0o755)
    monkeypatch.setattr(local, 'LINGER_SECONDS', 0.2)
    spec = local.JobSpec('c.py', 'x', python=str(script), num_nodes=2)
    began = time.monotonic()
    stop = type('Never', (), {'signals': 0})()
    assert local._Attempt(spec, folder, 0).run(stop) == 65 and time.monotonic() - began < 50


@pytest.mark.parametrize('by', ['Ctrl-C', 'teardown'])
def test_a_job_that_is_stopped_saves_and_is_not_tried_again(launch, tmp_path, repository, by):
    process = launch(['wait'], '--num_nodes=2')
    wait_for(tmp_path / 'ends-1', process)
    wait_for(tmp_path / 'ends-0', process)

    def later(verb: str) -> str:
        command = [sys.executable, '-m', 'launch', verb, 'run', f'--jobs={tmp_path}/jobs']
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout

    state = json.loads(later('status'))
    assert len(state['processes']) == 2 and state['pid'] == process.pid
    if by == 'Ctrl-C':
        process.send_signal(signal.SIGINT)
    else:
        later('teardown')
    output = finish(process, 75)
    assert 'retry' not in output
    for pid in state['processes']:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert 'run is not running' in later('status')


# -- Training --


@pytest.fixture
def train(repository, tiny_dataset, smallest, tmp_path):
    """Starts two processes of two devices on the smallest config, by the command line."""
    started = []

    def start(name: str) -> subprocess.Popen:
        values = {'data.path': tiny_dataset, **smallest, 'num_steps': 60, 'checkpoint.every_steps': 10}
        values['parallel.rules'] = 'fsdp'
        del values['model.encoder.fusion_layer']
        command = [sys.executable, '-m', 'launch', 'local', 'configs/tiny.py:encoder=early', str(tmp_path / name)]
        command += ['--accelerator=cpu:2', '--num_nodes=2', '--retries=1', f'--jobs={tmp_path}/jobs', '--submit']
        command += [f'--env=JAX_COMPILATION_CACHE_DIR={os.environ["JAX_COMPILATION_CACHE_DIR"]}']  # Not the job's own.
        command += [f'--config.{setting}={value}' for setting, value in values.items()]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
        started.append(subprocess.Popen(command, cwd=repository, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait()


def figures(workdir: pathlib.Path) -> list[dict]:
    """All that was computed at each step; floats as written, to the last bit."""
    return [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in read_scalars(workdir)]


def test_a_process_that_is_killed_costs_a_retry_and_not_a_bit_of_the_result(train, tmp_path):
    process = train('killed')
    wait_for(tmp_path / 'killed/checkpoints/10', process)
    state = json.loads((tmp_path / 'jobs/killed/state.json').read_text())
    os.kill(state['processes'][1], signal.SIGKILL)
    output = finish(process, 0, timeout=800)
    assert 'exit code 137; retry 1 of 1' in output
    second = (tmp_path / 'jobs/killed/logs/try-1-process-0.log').read_text()
    assert 'Going on from the checkpoint of step' in second
    finish(train('undisturbed'), 0, timeout=800)
    assert len(figures(tmp_path / 'killed')) == 60
    assert figures(tmp_path / 'killed') == figures(tmp_path / 'undisturbed')

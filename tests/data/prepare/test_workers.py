import os
import pathlib
import subprocess
import sys
import time

import pytest

from avmae_jax.data.prepare import workers

HERE = pathlib.Path(__file__).resolve().parent


@pytest.fixture
def strange(monkeypatch):
    """The module of tasks, importable here and in the workers."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv('PYTHONPATH', str(HERE))
    import strange_tasks

    return strange_tasks


def run(tasks, num_workers=1):
    results = {id(task): [] for task in tasks}
    workers.run_tasks(tasks, num_workers, lambda task, row: results[id(task)].append(row))
    return [results[id(task)] for task in tasks]


def test_every_row_of_every_task_is_heard_of_in_order(strange, tmp_path):
    tasks = [strange.task([f'{i} {k}' for k in range(3)], tmp_path) for i in range(5)]
    assert run(tasks, num_workers=2) == [[f'{i} {k}' for k in range(3)] for i in range(5)]


def test_a_row_that_hangs_is_killed_and_the_task_goes_on(strange, tmp_path):
    begin = time.monotonic()
    (found,) = run([strange.task(['a', 'hang', 'b'], tmp_path, timeout_seconds=0.5)])
    assert found == ['a', 'timeout: killed after 0.5 s', 'b'] and time.monotonic() - begin < 20


def test_a_row_that_crashes_its_process_twice_is_lost_and_the_task_goes_on(strange, tmp_path):
    (found,) = run([strange.task(['a', 'segfault', 'b', 'exit', 'c'], tmp_path)])
    assert found == ['a', 'crash: the process died of SIGSEGV', 'b', 'crash: the process died of exit status 3', 'c']


def test_a_process_killed_for_another_is_innocent(strange, tmp_path):
    assert run([strange.task(['a', 'killed_once', 'b'], tmp_path)]) == [['a', 'killed_once', 'b']]


def test_a_row_that_wants_too_much_memory_gets_none(strange, tmp_path):
    assert run([strange.task(['hog', 'b'], tmp_path, memory_gb=2.0)]) == [['not enough memory', 'b']]


def test_an_error_of_ours_stops_the_job_with_its_traceback(strange, tmp_path):
    with pytest.raises(RuntimeError, match='a bug of ours'):
        run([strange.task(['a', 'raise'], tmp_path)])


def test_a_full_disk_stops_the_job_and_says_so(strange, tmp_path):
    with pytest.raises(OSError, match='No space left on device'):
        run([strange.task(['a', 'disk_full'], tmp_path)])


def test_workers_that_cannot_start_are_no_failures_of_clips(strange, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'executable', '/bin/false')
    with pytest.raises(RuntimeError, match='could not start'):
        run([strange.task(['a'], tmp_path)])


def test_a_folder_is_locked_while_it_is_written(tmp_path):
    folder = tmp_path / 'set' / '.prepare'
    folder.mkdir(parents=True)
    with workers.lock_folder(folder / 'lock', 'gs://bucket/set'):
        with pytest.raises(ValueError, match='gs://bucket/set is being written by another run'):
            workers.lock_folder(folder / 'lock', 'gs://bucket/set', wait_seconds=0.3)
    workers.lock_folder(folder / 'lock', 'gs://bucket/set', wait_seconds=0.3).close()


def test_workers_import_neither_jax_nor_tensorflow(repository):
    code = (
        'import sys, avmae_jax.prepare, avmae_jax.data.prepare.workers\n'
        'print([name for name in ("jax", "jaxlib", "flax", "tensorflow", "tensorflow_datasets", "grain")'
        ' if name in sys.modules])'
    )
    environment = {**os.environ, 'PYTHONPATH': str(repository)}
    out = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from avmae_jax import jobs


def python(script, *arguments):
    return [sys.executable, '-S', '-c', f'import os, sys, time; {script}', *map(str, arguments)]


def append(path, word):
    return python('open(sys.argv[1], "a").write(sys.argv[2])', path, word)


def test_what_is_done_is_not_done_again_and_another_command_is(tmp_path, capfd):
    told = tmp_path / 'told'
    commands = {'one': append(told, '1'), 'two': append(told, '2')}
    job = jobs.Job('a', tmp_path / 'a', commands)
    ended = []
    jobs.run_jobs([job], 1, finished=ended.append)
    assert told.read_text() == '12' and ended == [job]
    jobs.run_jobs([job], 1, finished=ended.append)
    assert told.read_text() == '12' and ended == [job] and 'a was done before' in capfd.readouterr().err
    jobs.run_jobs([job._replace(commands={**commands, 'two': append(told, '3')})], 1)
    assert told.read_text() == '123'
    # What follows on a command that is done anew is done anew as well.
    jobs.run_jobs([job._replace(commands={'one': append(told, '4'), 'two': append(told, '3')})], 1)
    assert told.read_text() == '12343'


def test_a_step_that_fails_ends_all_and_the_next_run_begins_with_it(tmp_path, capfd):
    told, broken = tmp_path / 'told', tmp_path / 'broken'
    broken.touch()
    second = python('print("no disk"); sys.exit(74 * os.path.exists(sys.argv[1]))', broken)
    chain = [
        jobs.Job(name, tmp_path / name, {'one': append(told, name), 'two': two, 'three': append(told, '!')})
        for name, two in (('a', append(told, '.')), ('b', second), ('c', append(told, '.')))
    ]
    with pytest.raises(
        jobs.JobFailedError, match=r'b: two ended with exit code 74 .*/b/log.txt ends with:\n    no disk'
    ) as caught:
        jobs.run_jobs(chain, 1)
    assert caught.value.exit_code == 74 and told.read_text() == 'a.!b'
    broken.unlink()
    jobs.run_jobs(chain, 1)
    assert told.read_text() == 'a.!b!c.!'
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith('b is done, 2 of 3, after ') and line.endswith(' left.') for line in lines)


def test_jobs_run_side_by_side_each_on_its_share_of_the_cores(tmp_path, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    # Each waits for the other to have begun.
    script = (
        'open(sys.argv[1], "w").write(",".join(map(str, sorted(os.sched_getaffinity(0)))))\n'
        'while not os.path.exists(sys.argv[2]): time.sleep(0.02)'
    )
    names = {'a': 'b', 'b': 'a'}
    chain = [
        jobs.Job(name, tmp_path / f'run-{name}', {'one': python(script, tmp_path / name, tmp_path / other)})
        for name, other in names.items()
    ]
    jobs.run_jobs(chain, 2)
    found = [{int(core) for core in (tmp_path / name).read_text().split(',')} for name in names]
    assert found == jobs.deal_cores(2) and (len(cores) == 1 or not found[0] & found[1])
    assert sorted(os.sched_getaffinity(0)) == cores
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {1, 3, 5})
    assert jobs.deal_cores(2) == [{1, 5}, {3}] and jobs.deal_cores(4) == [{1}, {3}, {5}, {1}]


@pytest.fixture
def interruptible():
    """A shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('interruptible')
def test_an_interruption_stops_the_commands_and_waits_for_what_they_save(tmp_path):
    script = (
        'import signal\n'
        'def save(*_): time.sleep(0.3); open(sys.argv[1], "w").write("saved"); sys.exit(75)\n'
        'signal.signal(signal.SIGTERM, save)\n'
        'open(sys.argv[2], "w").close()\n'
        'time.sleep(60)'
    )
    job = jobs.Job('a', tmp_path / 'a', {'one': python(script, tmp_path / 'saved', tmp_path / 'begun')})

    def interrupt():
        while not (tmp_path / 'begun').exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # What a shell starts with & ignores Ctrl-C.
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            jobs.run_jobs([job], 1)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert (tmp_path / 'saved').read_text() == 'saved' and jobs.left_to_do(job)


def test_a_command_that_outlived_its_parent_keeps_its_folder(tmp_path):
    parent = (
        'from avmae_jax import jobs; import pathlib, sys; '
        'jobs.run_jobs([jobs.Job("a", pathlib.Path(sys.argv[1]), {"one": sys.argv[2:]})], 1)'
    )
    child = python('print(os.getpid(), flush=True); time.sleep(60)')
    started = subprocess.Popen([sys.executable, '-c', parent, str(tmp_path), *child], stderr=subprocess.DEVNULL)
    log = tmp_path / jobs.LOG
    while not (log.exists() and log.read_text().strip()):
        time.sleep(0.05)
    started.kill()
    started.wait()
    orphan = int(log.read_text())
    again = jobs.Job('a', tmp_path, {'one': python('pass')})
    try:
        with pytest.raises(ValueError, match='still written to by another run'):
            jobs.run_jobs([again], 1)
    finally:
        os.kill(orphan, signal.SIGKILL)
    time.sleep(0.2)
    jobs.run_jobs([again], 1)


def test_a_command_that_is_killed_is_told_with_its_signal(tmp_path):
    job = jobs.Job('a', tmp_path, {'one': python('os.kill(os.getpid(), 9)')})
    with pytest.raises(jobs.JobFailedError, match=r'a: one was killed by signal 9 .*log\.txt is empty') as caught:
        jobs.run_jobs([job], 1)
    assert caught.value.exit_code == 137

import errno
import os
import signal
import socket
import subprocess
import sys
import time

from avmae_jax.training import lock

HOLD = (
    'import sys, time; from avmae_jax.training.lock import WorkdirLock\n'
    'mine = WorkdirLock(sys.argv[1]); print(mine.holder, flush=True); time.sleep(100)'
)


def test_a_second_one_is_told_who_has_it_until_that_one_is_killed(tmp_path, repository):
    command = [sys.executable, '-c', HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repository) as process:
        assert process.stdout.readline().strip() == 'None'
        refused = lock.WorkdirLock(tmp_path)
        assert refused.holder == f'process {process.pid} on {socket.gethostname()}'
        refused.close()
        assert lock.WorkdirLock(tmp_path).holder == refused.holder  # Being refused takes nothing away.
        process.send_signal(signal.SIGKILL)
    mine = lock.WorkdirLock(tmp_path)
    assert mine.holder is None
    assert lock.WorkdirLock(tmp_path).holder == f'process {os.getpid()} on {socket.gethostname()}'
    mine.close()
    assert lock.WorkdirLock(tmp_path).holder is None


def test_a_process_that_this_one_starts_does_not_inherit_it(tmp_path):
    mine = lock.WorkdirLock(tmp_path)
    child = subprocess.Popen(['sleep', '100'], close_fds=False)
    mine.close()
    assert lock.WorkdirLock(tmp_path).holder is None
    child.kill()
    child.wait()


def test_the_lock_of_another_host_is_waited_for_as_that_may_be_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, 'ELSEWHERE_SECONDS', 1.5)
    monkeypatch.setattr(lock.socket, 'gethostname', lambda: 'dead')
    theirs = lock.WorkdirLock(tmp_path)
    monkeypatch.setattr(lock.socket, 'gethostname', lambda: 'alive')
    began = time.monotonic()
    assert lock.WorkdirLock(tmp_path).holder == f'process {os.getpid()} on dead'
    assert time.monotonic() - began > 1.5
    sleep = time.sleep
    monkeypatch.setattr(lock.time, 'sleep', lambda seconds: (theirs.close(), sleep(0)))
    assert lock.WorkdirLock(tmp_path).holder is None


def test_a_file_that_is_taken_away_while_it_is_waited_for_is_made_anew(tmp_path, monkeypatch):
    theirs, take, tries = lock.WorkdirLock(tmp_path), lock.WorkdirLock._take, []

    def taken_away_before(self):
        tries.append(self)
        if len(tries) == 1:
            (tmp_path / lock.FILE).unlink()  # What a job does that leaves nothing behind.
            theirs.close()
        return take(self)

    monkeypatch.setattr(lock.WorkdirLock, '_take', taken_away_before)
    mine = lock.WorkdirLock(tmp_path)
    assert mine.holder is None and len(tries) == 2
    assert lock.WorkdirLock(tmp_path).holder == f'process {os.getpid()} on {socket.gethostname()}'


def test_where_there_are_no_locks_the_run_goes_on_and_the_log_says_so(tmp_path, monkeypatch, caplog):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(lock.fcntl, 'flock', no_locks)
    assert lock.WorkdirLock(tmp_path).holder is None and lock.WorkdirLock(tmp_path).holder is None
    assert 'nothing refuses a second job' in caplog.text
    assert lock.WorkdirLock('gs://bucket/run').holder is None

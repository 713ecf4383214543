"""The watchdog ends a process in every way of being stuck, and no other."""

import subprocess
import sys
import time

import pytest

from avmae_jax.parallel import hosts

HEAD = """
import ctypes, os, threading, time
from avmae_jax.parallel import hosts
hosts._TELL_SECONDS = 0.5

def hang_here():
    threading.Event().wait()

def hold_the_lock_of_the_interpreter():
    ctypes.PyDLL(None).sleep(100)

watchdog = hosts.Watchdog(0.5, code=71, slow_seconds=2.0)
"""
STUCK = {
    'in a step': ('watchdog.progress(); hang_here()', 71, 'hang_here'),
    'before the first step': ('hang_here()', 71, 'hang_here'),
    'with the lock of the interpreter': ('watchdog.progress(); hold_the_lock_of_the_interpreter()', 1, 'hold_the_lock'),
    'with nobody to read what it says': (
        'os.set_blocking(2, False)\n'
        'try:\n'
        '    while True: os.write(2, bytes(4096))\n'
        'except BlockingIOError: os.set_blocking(2, True)\n'
        'watchdog.progress(); hang_here()',
        71,
        '',
    ),
}


@pytest.fixture(scope='module')
def stuck(repository):
    """All of them at once, as each takes its time to import jax."""
    run = {
        name: subprocess.Popen(
            [sys.executable, '-c', HEAD + code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=repository
        )
        for name, (code, _, _) in STUCK.items()
    }
    yield run
    for process in run.values():
        process.kill()


@pytest.mark.parametrize('how', STUCK)
def test_a_process_that_is_stuck_ends_with_the_stacks_of_its_threads(stuck, how):
    process, (_, code, seen) = stuck[how], STUCK[how]
    assert process.wait(timeout=100) == code  # Before reading: in one case the pipe is full, and nobody reads.
    output = process.stderr.read().decode()
    assert seen in output
    if code == 71 and seen:
        assert 'Stuck: process' in output and 'watchdog_seconds=0.5' in output


def test_what_makes_progress_or_needs_long_is_left_alone():
    with hosts.Watchdog(0.3, code=71, slow_seconds=30.0) as watchdog:  # It would end the tests.
        time.sleep(0.6)  # Before the first step.
        for _ in range(5):
            watchdog.progress()
            time.sleep(0.1)
        watchdog.progress(slow=True)
        time.sleep(0.6)
        watchdog.progress()
    time.sleep(0.6)  # It is over.


def test_no_time_switches_it_off_and_a_negative_one_is_refused():
    with hosts.Watchdog(0, code=71) as watchdog:
        watchdog.progress()
        assert not any(thread.name == 'watchdog' for thread in hosts.threading.enumerate())
    with pytest.raises(ValueError, match='watchdog_seconds=-1 must be at least 0'):
        hosts.Watchdog(-1, code=71)

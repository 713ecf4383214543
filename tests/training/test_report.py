import types

import jax
import numpy as np
import pytest
from absl import logging

from avmae_jax.progress import progress
from avmae_jax.training import report as report_lib


class Kept:
    """A writer that remembers."""

    def __init__(self):
        self.scalars = {}

    def write_scalars(self, step, scalars):
        self.scalars[step] = dict(scalars)

    def flush(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(report_lib.time, 'monotonic', lambda: now.seconds)
    return now


def _step(report, step, waited_seconds=0.0, **more):
    metrics = {'loss': np.float32(0.5), 'finite': np.bool_(True)}
    report.step_done(step, metrics, damaged=0, waited_seconds=waited_seconds, bar=progress(10, what='x'), **more)


def test_speed_counts_training_alone_and_tells_the_share_of_waiting(clock, monkeypatch):
    said = []
    monkeypatch.setattr(logging, 'warning', lambda text, *args: said.append(text % args))
    kept = Kept()
    report = report_lib.Report(kept, log_every_steps=2, clips_per_step=8)
    _step(report, 1, waited_seconds=5.0)
    report.start(waited_seconds=5.0)  # The wait for the first batch does not count.
    clock.seconds += 1
    _step(report, 2, waited_seconds=5.0)
    clock.seconds += 4
    report.pause(2.0)  # A checkpoint.
    _step(report, 3, waited_seconds=5.5)
    _step(report, 4, waited_seconds=6.0)
    assert set(kept.scalars) == {1, 2, 4} and 'clips_per_second' not in kept.scalars[1]
    assert kept.scalars[2]['clips_per_second'] == pytest.approx(8)
    assert kept.scalars[4]['clips_per_second'] == pytest.approx(8) and kept.scalars[4]['step_seconds'] == 1
    assert kept.scalars[4]['data_wait_share'] == pytest.approx(0.5)
    assert not said
    clock.seconds += 20
    _step(report, 5, waited_seconds=16.0, last=True)
    assert any('waited for data 50 %' in text for text in said)


def test_utilisation_is_told_where_the_chip_is_known(clock, monkeypatch):
    kind = jax.devices()[0].device_kind
    kept = Kept()
    for peak, expected in (({}, None), ({kind: 1e3}, 1 / jax.device_count())):
        monkeypatch.setattr(report_lib, 'PEAK_FLOPS', peak)
        report = report_lib.Report(kept, log_every_steps=1, clips_per_step=8, flops_per_step=1e3)
        report.start(0.0)
        clock.seconds += 1
        _step(report, 2)
        assert kept.scalars[2].get('flop_utilisation') == (None if expected is None else pytest.approx(expected))


def test_damaged_records_are_counted(clock):
    kept = Kept()
    report = report_lib.Report(kept, log_every_steps=1, clips_per_step=8)
    for step in (2, 3):
        metrics = {'loss': np.float32(0.5), 'finite': np.bool_(True)}
        report.step_done(step, metrics, damaged=2, waited_seconds=0.0, bar=progress(10, what='x'))
    assert kept.scalars[3]['damaged_records'] == 4


def test_the_profiler_traces_the_chosen_steps_alone(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(report_lib.profiler, 'start', lambda folder: calls.append('start'))
    monkeypatch.setattr(report_lib.profiler, 'stop', lambda: calls.append('stop'))
    profile = report_lib.Profile(tmp_path, first_step=3, num_steps=2)
    for step in range(8):
        profile.before_step(step)
        calls.append(step)
    profile.close()
    assert calls == [0, 1, 2, 'start', 3, 4, 'stop', 5, 6, 7]

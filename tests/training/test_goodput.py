import json
import re
import time

import pytest

from avmae_jax.training import goodput


def session(began, seconds, first_step, step, **parts):
    spent = dict.fromkeys(('compile', 'restore', 'save', 'hooks', 'start', 'data', 'steps'), 0.0) | parts
    assert sum(spent.values()) == pytest.approx(seconds)
    return {'began': began, 'seconds': seconds, 'first_step': first_step, 'step': step, 'parts': spent}


def test_an_undisturbed_run_loses_what_was_no_step():
    found = goodput.summarise([session(1000.0, 100.0, 0, 50, compile=10.0, data=5.0, save=5.0, steps=80.0)])
    assert found.share == pytest.approx(0.8) and found.seconds == 100 and found.num_sessions == 1
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert '80 % of 1 min 40 s' in str(found) and 'lost' not in str(found)


def test_steps_behind_the_last_checkpoint_are_lost_and_so_is_the_time_between():
    killed = session(1000.0, 100.0, 0, 40, start=20.0, steps=80.0)  # 2 s a step; the checkpoint was of step 30.
    again = session(1150.0, 60.0, 30, 50, restore=20.0, steps=40.0)
    found = goodput.summarise([killed, again])
    assert found.parts['lost'] == pytest.approx(20.0)
    assert found.parts['down'] == pytest.approx(50.0)
    assert found.parts['steps'] == pytest.approx(100.0)
    assert found.seconds == pytest.approx(210.0) and found.share == pytest.approx(100 / 210)


def test_a_clock_on_the_wall_that_jumps_back_takes_no_time_away():
    first, second = session(1000.0, 10.0, 0, 5, steps=10.0), session(500.0, 10.0, 5, 10, steps=10.0)
    found = goodput.summarise([first, second])
    assert found.seconds == 20 and found.share == 1


def test_while_a_session_runs_the_clock_on_the_wall_may_jump(tmp_path, monkeypatch):
    account = goodput.Account(tmp_path)
    account.begin_steps(0)
    monkeypatch.setattr(goodput.time, 'time', lambda: -1e9)
    with account.spend('save'):
        time.sleep(0.02)
    account.write(1, 0.0)
    (line,) = goodput.read(tmp_path)
    assert 0.02 <= line['parts']['save'] <= line['seconds'] < 5 and line['began'] > 0


def test_nothing_but_gaps_and_labels_reads_the_clock_on_the_wall(repository):
    package = repository / 'avmae_jax'
    clock = re.compile(r'time\.time(_ns)?\(|datetime|strftime|CLOCK_REALTIME')
    found = {str(path.relative_to(package)) for path in package.rglob('*.py') if clock.search(path.read_text())}
    # The gaps between sessions; the label that TensorBoard shows beside a step.
    assert found == {'training/goodput.py', 'training/writer.py'}


def test_of_each_session_the_last_whole_line_counts(tmp_path):
    assert goodput.summarise(goodput.read(tmp_path)) is None
    lines = [
        session(1.0, 5.0, 0, 2, steps=5.0),
        session(1.0, 9.0, 0, 4, steps=9.0),
        session(20.0, 1.0, 4, 5, steps=1.0),
    ]
    text = '\n'.join(map(json.dumps, lines)) + '\n{"began": 20.0, "secon'
    (tmp_path / goodput.FILE).write_text(text)
    assert [one['seconds'] for one in goodput.read(tmp_path)] == [9.0, 1.0]


def test_an_account_knows_where_its_time_went(tmp_path):
    account = goodput.Account(tmp_path, seconds_before=1.0)
    with account.spend('compile'):
        time.sleep(0.05)
    account.write(0, 0.0)  # Before the first step there is nothing to tell.
    assert not (tmp_path / goodput.FILE).exists()
    account.begin_steps(7)
    time.sleep(0.05)
    with account.spend('save'):
        time.sleep(0.02)
    account.write(9, 0.01)
    (line,) = goodput.read(tmp_path)
    parts = line['parts']
    assert (line['first_step'], line['step']) == (7, 9)
    assert parts['start'] >= 1 and parts['compile'] >= 0.05 and parts['save'] >= 0.02 and parts['data'] == 0.01
    assert parts['steps'] >= 0.03
    assert sum(parts.values()) == pytest.approx(line['seconds'], abs=1e-6)
    goodput.Account(None).write(1, 0.0)


def test_an_exception_within_is_counted_all_the_same(tmp_path):
    account = goodput.Account(tmp_path)
    account.begin_steps(0)
    with pytest.raises(KeyError), account.spend('save'):
        time.sleep(0.02)
        raise KeyError
    account.write(1, 0.0)
    assert goodput.read(tmp_path)[0]['parts']['save'] >= 0.02

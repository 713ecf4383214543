"""The demo's own part: the interruption that must lose steps and get them back, and errors that say what happened."""

import pathlib
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from avmae_jax import demo
from avmae_jax.data import schema

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Writes what the demo looks at: losses by step, a checkpoint every 10 steps, and where it went on.
TRAINER = """
import json, pathlib, sys, time
workdir, num_steps, noise = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
folder = workdir / 'checkpoints'
folder.mkdir(parents=True, exist_ok=True)
start = max([int(child.name) for child in folder.iterdir()], default=0)
file = workdir / 'metrics.jsonl'
lines = file.read_text().splitlines()[:start] if start else []
file.write_text(''.join(line + chr(10) for line in lines))
if start:
    print(f'Going on from the checkpoint of step {start}, read in 0.1 s.', flush=True)
for step in range(start + 1, num_steps + 1):
    loss = 1 / step + (noise if start else 0)
    with file.open('a') as out:
        out.write(json.dumps({'step': step, 'loss': loss, 'reconstruction/video': loss}) + chr(10))
    if step % 10 == 0:
        (folder / str(step)).mkdir()
        (folder / str(step) / 'digests.json').write_text('{}')
    time.sleep(0.03)
sys.exit(3 if len(sys.argv) > 4 else 0)
"""


@pytest.fixture(autouse=True)
def parsed_flags(tmp_path):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(output=str(tmp_path / 'demo')):
        yield


@pytest.fixture
def trainer(tmp_path):
    (tmp_path / 'trainer.py').write_text(TRAINER)

    def parts(*arguments):
        return [sys.executable, str(tmp_path / 'trainer.py'), str(tmp_path / 'run'), *arguments]

    return parts


def test_training_is_killed_once_and_what_was_lost_is_held_against_what_comes_again(tmp_path, trainer, capsys):
    interruption = demo.train(trainer('40', '0'), tmp_path / 'run', tmp_path, num_steps=40)
    assert interruption.killed_at > interruption.saved >= 10
    assert len(interruption.losses) == interruption.killed_at - interruption.saved
    assert max(demo.read_losses(tmp_path / 'run')) == 40
    assert 'bit for bit' in capsys.readouterr().out
    demo.draw_curves(tmp_path / 'run', interruption, tmp_path / 'losses.png')
    assert (tmp_path / 'losses.png').stat().st_size > 1000


def test_a_run_that_goes_on_otherwise_is_an_error(tmp_path, trainer):
    with pytest.raises(demo.DemoError, match='not what they were'):
        demo.train(trainer('40', '1e-9'), tmp_path / 'run', tmp_path, num_steps=40)


def test_a_training_that_fails_shows_the_end_of_its_log(tmp_path, trainer):
    with pytest.raises(demo.DemoError, match=r'(?s)exit code 3.*Going on from'):
        demo.train(trainer('40', '0', 'fail'), tmp_path / 'run', tmp_path, num_steps=40)


def test_half_a_line_of_figures_is_left_for_the_next_look(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 0.5}\n{"step": 1, "test/loss": 3}\n{"step": 2, "lo')
    assert list(demo.read_losses(tmp_path)) == [1]


@pytest.mark.parametrize(
    ('splits', 'chosen'),
    [
        (('test', 'train'), ('train', 'test')),
        (('train', 'val'), ('train', 'val')),
        (('all',), ('all', None)),
        (('train', 'dev', 'test'), ('train', 'test')),
    ],
)
def test_splits_of_any_name_are_used(splits, chosen):
    media = schema.MediaSettings('jpeg', 12.5, 64, 85, 16000, None, 0)
    info = schema.DatasetInfo('x', ('video',), media, dict.fromkeys(splits, ()), {}, {})
    assert demo.choose_splits(info) == chosen


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / 'thesis.tex').write_text('...')
    with flagsaver.flagsaver(fresh=True), pytest.raises(demo.DemoError, match='something else'):
        demo.claim(tmp_path)
    assert (tmp_path / 'thesis.tex').exists()


def run(*arguments, cwd):
    command = [sys.executable, '-m', 'avmae_jax.demo', *arguments]
    env = {'PYTHONPATH': str(ROOT), 'PATH': ''}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=env)


def test_clips_that_are_not_there_end_the_demo_with_their_name(tmp_path):
    done = run('--clips=no-such.csv', cwd=tmp_path)
    assert done.returncode == 1 and 'no-such.csv does not exist' in done.stderr and 'Traceback' not in done.stderr


def test_an_error_of_a_step_is_shown(tmp_path):
    (tmp_path / 'mine.csv').write_text('path,label\nmissing.mp4,a\n')
    done = run('--clips=mine.csv', cwd=tmp_path)
    assert done.returncode == 1 and 'avmae_jax.prepare' in done.stderr and 'exit code' in done.stderr
    assert 'missing' in done.stderr and 'Traceback' not in done.stderr

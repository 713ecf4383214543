"""Folds are dealt, run and put together; what train and evaluate do themselves is the matter of their own tests."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from avmae_jax import crossvalidate, jobs
from avmae_jax.data import schema
from avmae_jax.evaluation import benchmarks

FOLDS = ('fold1', 'fold2', 'fold3')
# Stands in for the package in the commands: notes what it was called with, and hands out what the test has laid ready.
VERB = """
import os, pathlib, shutil, sys
here = pathlib.Path(__file__).parent.parent
verb = pathlib.Path(__file__).stem
with open(here / 'called', 'a') as file:
    print(verb, *sys.argv[1:], sep='|', file=file)
flags = dict(argument[2:].split('=', 1) for argument in sys.argv[1:])
fold = os.path.basename(flags['workdir'])
if (here / f'{verb}-{fold}-fails').exists():
    print(f'{verb}: no more memory', file=sys.stderr)
    sys.exit(70)
if verb == 'evaluate':
    shutil.copytree(here / 'ready' / fold, os.path.join(flags['workdir'], 'evaluation'), dirs_exist_ok=True)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a dataset of three folds, stand-ins for the verbs, and the evaluations that they will write."""
    package = tmp_path / 'avmae_jax'
    package.mkdir()
    for name, text in {'__init__': '', 'train': VERB, 'evaluate': VERB}.items():
        (package / f'{name}.py').write_text(text)
    monkeypatch.chdir(tmp_path)  # From where `python -m` imports first.
    info = schema.DatasetInfo(
        name='esc',
        modalities=('audio',),
        media=schema.MediaSettings('jpeg', 0.0, 0, 0, 16_000, 5.0, 0),
        splits=dict.fromkeys(FOLDS, ()),
        labels={'label': schema.LabelSet(('dog', 'rain', 'sea'), False)},
        statistics={},
    )
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / schema.INFO_FILE).write_text(info.to_json())
    for k, fold in enumerate(FOLDS):
        lay_ready(tmp_path, fold, seed=k, ids=[f'{fold}-{i}' for i in range(6 + k)])
    return tmp_path


def lay_ready(place, fold, seed, ids, step=40, digest='d' * 64, asked=''):
    rng = np.random.default_rng(seed)
    heads = {
        'label': benchmarks.Head(
            rng.normal(size=(len(ids), 3)).astype(np.float32),
            np.eye(3, dtype=np.float32)[np.arange(len(ids)) % 3],
            ('dog', 'rain', 'sea'),
        )
    }
    folder = place / 'ready' / fold
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        'subject': {'digest': f'digest of {fold}', 'step': step},
        'data': {'digest': digest},
        'versions': {'jax': '0'},
        'results': {'benchmark': benchmarks.score('single-label', heads)},
    }
    (folder / f'{fold}-step-{step:07d}{asked}.json').write_text(json.dumps(content))
    np.savez(folder / f'{fold}-step-{step:07d}{asked}-logits.npz', ids=np.array(ids))
    return heads['label']


def called(place):
    """(verb, flags) of each call so far."""
    lines = (place / 'called').read_text().splitlines()
    return [
        (verb, dict(argument[2:].split('=', 1) for argument in arguments))
        for verb, *arguments in (line.split('|') for line in lines)
    ]


def run(place, given=(), **more):
    given = {'config.data.path': 'data', 'config.start.path': 'pretrained/{fold}', **dict(given)}
    crossvalidate.crossvalidate('esc50.py:size=S', given, workdir=place / 'run', **more)


def test_each_fold_is_tested_once_by_a_run_that_never_saw_it(place, capsys):
    # Of one moment only, there are other results beside these.
    heads = [
        lay_ready(place, fold, seed=k + 9, ids=[f'{fold}-{i}' for i in range(6 + k)], asked='-clips-3')
        for k, fold in enumerate(FOLDS)
    ]
    run(place, num_clips=3)
    calls = called(place)
    assert [verb for verb, _ in calls] == ['train', 'evaluate'] * 3
    for fold, (_, train), (_, evaluate) in zip(FOLDS, calls[::2], calls[1::2], strict=True):
        assert set(train['config.data.split'].split('+')) == set(FOLDS) - {fold}
        assert evaluate == {
            'workdir': str(place / 'run' / fold), 'split': fold, 'what': 'benchmark', 'num_clips': '3',
        }  # fmt: skip
        assert train == {
            'config': 'esc50.py:size=S',
            'config.data.path': 'data',
            'config.start.path': f'pretrained/{fold}',
            'config.data.split': train['config.data.split'],
            'config.evaluation.split': fold,
            'workdir': evaluate['workdir'],
        }
    content = json.loads((place / 'run/crossvalidation.json').read_text())
    right = [(head.logits.argmax(1) == head.targets.argmax(1)) for head in heads]
    top_1 = next(row for row in content['results']['scores'] if row['metric'] == 'top-1')
    assert top_1['mean'] == pytest.approx(np.mean([one.mean() for one in right]))
    assert top_1['pooled'] == pytest.approx(np.concatenate(right).mean()) and top_1['num_records'] == 21
    assert content['folds']['fold2']['file'] == 'fold2/evaluation/fold2-step-0000040-clips-3.json'
    assert content['folds']['fold2']['subject']['digest'] == 'digest of fold2'
    header = capsys.readouterr().out.splitlines()[2].split()
    assert header[-4:-1] == list(FOLDS)


def test_a_fold_that_fails_is_named_and_the_same_command_goes_on_with_it(place):
    (place / 'train-fold2-fails').touch()
    with pytest.raises(
        jobs.JobFailedError, match='fold2: train ended with exit code 70 .*fold2/log.txt ends with:\n    train: no more'
    ) as caught:
        run(place)
    assert caught.value.exit_code == 70 and not (place / 'run/crossvalidation.json').exists()
    (place / 'train-fold2-fails').unlink()
    (place / 'evaluate-fold3-fails').touch()
    with pytest.raises(jobs.JobFailedError, match='fold3: evaluate ended'):
        run(place)
    (place / 'evaluate-fold3-fails').unlink()
    run(place)
    done = [(verb, os.path.basename(flags['workdir'])) for verb, flags in called(place)]
    assert done == [
        ('train', 'fold1'), ('evaluate', 'fold1'), ('train', 'fold2'),
        ('train', 'fold2'), ('evaluate', 'fold2'), ('train', 'fold3'), ('evaluate', 'fold3'),
        ('evaluate', 'fold3'),
    ]  # fmt: skip


def test_what_is_among_the_folds_is_chosen_and_the_newest_evaluation_counts(place):
    newer = lay_ready(place, 'fold1', seed=9, ids=['n-0', 'n-1', 'n-2'], step=100)
    run(place, folds=['fold1', 'fold3'])
    assert [flags['config.data.split'] for verb, flags in called(place) if verb == 'train'] == ['fold3', 'fold1']
    # How many moments count is the config's matter where nothing is asked for.
    assert all('num_clips' not in flags for verb, flags in called(place))
    content = json.loads((place / 'run/crossvalidation.json').read_text())
    top_1 = next(row for row in content['results']['scores'] if row['metric'] == 'top-1')
    assert top_1['folds']['fold1'] == pytest.approx((newer.logits.argmax(1) == newer.targets.argmax(1)).mean())
    assert content['folds']['fold1']['subject']['step'] == 100


def test_folds_of_different_data_are_not_put_together(place):
    lay_ready(place, 'fold2', seed=1, ids=['a', 'b', 'c'], digest='e' * 64)
    with pytest.raises(ValueError, match='different content .*fold2 eeee'):
        run(place)
    lay_ready(place, 'fold2', seed=1, ids=['fold1-0', 'b', 'c'])
    shutil.rmtree(place / 'run')
    with pytest.raises(ValueError, match='record fold1-0 was tested in the folds fold1 and fold2'):
        run(place)


@pytest.mark.parametrize(
    'given, more, message',
    [
        ({'config.data.split': 'fold1'}, {}, '--config.data.split=fold1: each fold has its own'),
        ({'config.evaluation.split': 'x'}, {}, '--config.evaluation.split=x: each fold'),
        ({'config.data.path': ''}, {}, '--config.data.path is needed'),
        ({'config.data.path': 'nowhere'}, {}, 'nowhere has no dataset.json'),
        ({}, {'folds': ['fold1', 'fold4']}, r"data has no split 'fold4'; it has \['fold1', 'fold2', 'fold3'\]"),
        ({}, {'folds': ['fold1']}, 'at least 2 folds; there is fold1 alone'),
        ({}, {'num_at_once': 0}, '--jobs=0 must be at least 1'),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_anything_runs(place, given, more, message):
    with pytest.raises(ValueError, match=message):
        run(place, given, **more)
    assert not (place / 'called').exists() and not (place / 'run').exists()


def test_the_command_ends_in_one_line_that_says_what_is_wrong(place, repository):
    environment = {**os.environ, 'PYTHONPATH': str(repository), 'PYTHONSAFEPATH': '1'}  # Not the stand-in.
    command = [sys.executable, '-m', 'avmae_jax.crossvalidate', '--config=esc50.py', '--config.data.path=data']
    done = subprocess.run([*command, '--fold=fold1'], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'crossvalidate: ' in done.stderr
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, 'crossvalidate: --workdir is needed; --help lists the flags.\n')
    done = subprocess.run(
        [*command, '--workdir=run', '--config.data.path=data2'],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.startswith('crossvalidate: data2 has no dataset.json')


def test_splits_of_a_dataset_may_differ_in_what_is_there(place):
    info = schema.read_info(place / 'data')
    shutil.copytree(place / 'data', place / 'more')
    (place / 'more' / schema.INFO_FILE).write_text(
        dataclasses.replace(info, splits=dict.fromkeys(FOLDS[:2], ())).to_json()
    )
    with pytest.raises(ValueError, match=r"more has no split 'fold3'"):
        crossvalidate.choose_folds('data,more', [])
    assert crossvalidate.choose_folds('data,more', ['fold2', 'fold1']) == ['fold2', 'fold1']

import dataclasses
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest

from avmae_jax import evaluate, experiment, settings, subjects
from avmae_jax.checkpoints.manager import Checkpoints
from avmae_jax.data import schema
from avmae_jax.evaluation import results_file, tables
from avmae_jax.evaluation.evaluator import Evaluator
from avmae_jax.training.state import to_items


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, tiny_dataset, smallest, repository):
    """A run that was saved before its first step."""
    folder = tmp_path_factory.mktemp('run')
    config = runpy.run_path(str(repository / 'configs/tiny.py'))['get_config']()
    config.update_from_flattened_dict({'data.path': str(tiny_dataset), 'data.num_workers': 0, **smallest})
    config = settings.to_plain(config)
    source = experiment.open_train_sources(config)
    parts = experiment.build(config, source)
    state = jax.jit(experiment.make_init(parts))(jax.random.key(config['seed']))
    checkpoints = Checkpoints(folder / 'checkpoints')
    checkpoints.save(0, to_items(state), experiment.make_meta(config, source, parts.shapes, state))
    checkpoints.close()
    settings.save_config(config, folder)
    return folder


def make_evaluator(subject):
    return Evaluator(subject, split='test', layers=[1])


def test_a_run_is_scored_in_every_way_on_eight_devices(workdir):
    subject = subjects.load_subject(workdir, overrides={})
    evaluator = make_evaluator(subject)
    num_test = len(evaluator.source)
    results = evaluate.evaluate(evaluator, list(evaluate.PRETRAINED)).results
    assert {(e['modality'], e['unit']) for e in results['reconstruction']} == {
        ('video', 'input'), ('video', 'raw'), ('audio', 'input'), ('audio', 'raw'),
    }  # fmt: skip
    methods = {(s['features'], s['method']) for s in results['classification']}
    assert {(m, w) for m in ('audio', 'video', 'both', 'video, layer 1') for w in ('knn', 'probe')} <= methods
    assert all(s['num_test'] == num_test and 0 <= s['value'] <= 1 for s in results['classification'])
    assert {(r['query'], r['candidates']) for r in results['retrieval']} == {('video', 'audio'), ('audio', 'video')}
    json.dumps(results)
    text = tables.describe(results)
    assert 'nats of log-mel' in text and 'video -> audio' in text and 'chance' in text
    media, titles = evaluator.paint(3)
    assert set(media) == {'video', 'audio'} and len(set(titles)) == 3


def test_random_init_is_what_the_run_began_with(workdir):
    saved = subjects.load_subject(workdir, overrides={})
    fresh = subjects.load_subject(workdir, overrides={}, random_init=True)
    other = subjects.load_subject(workdir, overrides={}, random_init=True, seed=5)
    jax.tree.map(np.testing.assert_array_equal, saved.params, fresh.params)
    assert not all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (fresh.params, other.params)), strict=True)
    )
    assert (saved.name, fresh.name) == ('step-0000000', 'random-init-seed-0')
    assert saved.about['digest'] and fresh.about == {'random_init': True, 'seed': 0}


def test_results_say_what_they_are_of_and_that_the_classes_are_others(workdir, tiny_dataset, tmp_path):
    about = subjects.load_subject(workdir, overrides={}).about
    others = shutil.copytree(tiny_dataset, tmp_path / 'others')
    info = schema.read_info(others)
    turned = dataclasses.replace(info.labels['label'], names=info.labels['label'].names[::-1])
    (others / schema.INFO_FILE).write_text(dataclasses.replace(info, labels={'label': turned}).to_json())
    found = {}
    for folder in (tiny_dataset, others):
        subject = subjects.load_subject(workdir, overrides={'data.path': str(folder)})
        data = evaluate.describe_data(Evaluator(subject, split='test'))
        found[folder] = results_file.compare_data(about, data)
    assert found[tiny_dataset] == []
    assert len(found[others]) == 2 and "classes of 'label'" in found[others][1]
    assert results_file.compare_data({'random_init': True, 'seed': 0}, data) == []


def test_overrides_are_taken_out_of_the_command_line():
    rest, found = settings.split_overrides(
        ['evaluate', '--workdir=X', '--config.data.path=some/dir', '--config.batch_size=8', '-config.a.b=None']
    )
    assert rest == ['evaluate', '--workdir=X']
    assert found == {'data.path': 'some/dir', 'batch_size': 8, 'a.b': None}
    assert settings.split_overrides(['--config.data.path={[1]}'])[1] == {'data.path': '{[1]}'}  # Nothing in Python.


def test_an_override_must_exist_and_fit():
    config = {'batch_size': 8, 'data': {'path': 'x', 'rate': 0.5, 'flip': True, 'mean': None}}
    changed = settings.override(config, {'data.rate': 1, 'data.mean': 3.0, 'batch_size': 4})
    assert changed == {'batch_size': 4, 'data': {'path': 'x', 'rate': 1, 'flip': True, 'mean': 3.0}}
    assert config['batch_size'] == 8
    with pytest.raises(ValueError, match='did you mean path'):
        settings.override(config, {'data.pth': 'y'})
    for name, value in (
        ('batch_size', 'many'),
        ('batch_size', True),
        ('data', 3),
        ('data.path', 4),
        ('data.mean', {1}),
    ):
        with pytest.raises(ValueError, match=f'config.{name} is'):
            settings.override(config, {name: value})
    with pytest.raises(ValueError, match='data.path.more'):
        settings.override(config, {'data.path.more': 1})


def test_a_damaged_checkpoint_is_not_scored(workdir, tmp_path):
    with pytest.raises(ValueError, match='neither a workdir'):
        subjects.load_subject(tmp_path, overrides={})
    os.makedirs(tmp_path / 'checkpoints' / '7')
    with pytest.raises(ValueError, match='no checkpoint that is whole'):
        subjects.load_subject(tmp_path, overrides={})


def start_evaluation(workdir, repository, *arguments, num_devices):
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(num_devices)}
    return subprocess.Popen(
        [sys.executable, '-m', 'avmae_jax.evaluate', f'--workdir={workdir}', '--layers=1', *arguments],
        cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process, code=0):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output[-4000:]
    return output


@pytest.mark.timeout(900)
def test_two_processes_score_a_run_as_one_does(workdir, repository, tmp_path):
    folders = [tmp_path / name for name in ('one', 'two')]
    for folder in folders:
        shutil.copytree(workdir, folder)
    # Batches of 8 from splits of 9 and 3: neither divides, so that filled rows are there to be counted wrongly.
    rules = '--config.parallel.rules=fsdp'
    alone = start_evaluation(folders[0], repository, rules, num_devices=4)
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        job = [f'--coordinator=localhost:{probe.getsockname()[1]}', '--num_processes=2', rules]
    first, second = (
        start_evaluation(folders[1], repository, *job, f'--process_id={i}', num_devices=2) for i in range(2)
    )
    finish(alone)
    assert 'Written to' in finish(first)
    assert 'Written to' not in finish(second)
    one, two = (json.loads((folder / 'evaluation/test-step-0000000.json').read_text()) for folder in folders)
    assert one['data'] == two['data']
    # Sharded parameters are summed over in another order: close, and not the same bits.
    found, wanted = (jax.tree.leaves_with_path(content['results']) for content in (two, one))
    for (where, ours), (there, theirs) in zip(found, wanted, strict=True):
        assert where == there and ours == (pytest.approx(theirs, 1e-4) if isinstance(theirs, float) else theirs)
    assert one['subject']['digest'] and one['subject']['trained_on'] == one['data']['digest'] and one['notes'] == []
    assert {'avmae_jax', 'python', 'jax'} <= set(one['versions']) and one['config']['parallel']['rules'] == 'fsdp'
    assert one['results']['classification'][0]['num_train'] == 9
    sounds = sorted(path.name for path in (folders[0] / 'evaluation/test-step-0000000-sounds').iterdir())
    assert sounds == [f'0{i}-{row}.wav' for i in (1, 2, 3) for row in ('input', 'left', 'reconstructed')]
    sheets = [cv2.imread(str(folder / 'evaluation/test-step-0000000.png')) for folder in folders]
    assert cv2.absdiff(*sheets).max() <= 2


def test_a_job_described_by_halves_is_refused(workdir, repository):
    process = start_evaluation(workdir, repository, '--num_processes=2', num_devices=1)
    assert 'give all three or none' in finish(process, code=2)

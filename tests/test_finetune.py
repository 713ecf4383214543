"""Pretrain -> finetune with everything on -> evaluate -> score files, each the command that a person types."""

import csv
import dataclasses
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time
import wave
from typing import NamedTuple

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from avmae_jax import evaluate, experiment, settings, starts, subjects, train
from avmae_jax.checkpoints import manager
from avmae_jax.data import schema
from avmae_jax.evaluation.evaluator import Evaluator
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.parallel import rules
from avmae_jax.training.writer import read_scalars

pytestmark = pytest.mark.timeout(900)  # Several processes, on machines that may do something else too.
NUM_STEPS, SAVED = 250, 100
EVERYTHING = {
    'num_steps': NUM_STEPS,
    'checkpoint.every_steps': SAVED,
    'evaluation.every_steps': NUM_STEPS,
    'data.balanced_by': 'label',
    'preprocess.lose_modality_ratio': 0.3,
    'optimizer.accumulate_steps': 2,
    'optimizer.average_decay': 0.9,
}
CLOCKS = ('clips_per_second', 'step_seconds', 'data_wait_share')


class Runs(NamedTuple):
    """Attributes: before, after: the lines of metrics.jsonl when the run was killed, and when it was done."""

    pretrained: pathlib.Path
    finetuned: pathlib.Path
    before: list[dict]
    after: list[dict]
    output: str


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output[-4000:]
    return output


def figures(workdir: pathlib.Path) -> list[dict]:
    return [{name: v for name, v in line.items() if name not in CLOCKS} for line in read_scalars(workdir)]


@pytest.fixture(scope='module')
def runs(start_verb, tiny_dataset, smallest, smallest_finetuning, tmp_path_factory) -> Runs:
    """A few steps of pretraining, and a finetuning from there that was killed once."""
    pretrained, finetuned = (tmp_path_factory.mktemp(name) for name in ('pretrained', 'finetuned'))

    def command(config: str, workdir: pathlib.Path, values: dict) -> list[str]:
        values = {'data.path': tiny_dataset, **values}
        return [f'--config=configs/{config}', f'--workdir={workdir}'] + [f'--config.{k}={v}' for k, v in values.items()]

    values = {name: value for name, value in smallest.items() if name != 'model.encoder.fusion_layer'}
    finish(start_verb('train', *command('tiny.py:encoder=early', pretrained, {**values, 'num_steps': 6})))
    values = {**smallest_finetuning, **EVERYTHING, 'start.path': pretrained}
    finetuning = ['train', *command('finetune/tiny.py', finetuned, values)]
    process = start_verb(*finetuning)
    deadline = time.monotonic() + 400
    while not (finetuned / 'checkpoints' / str(SAVED)).exists() or read_scalars(finetuned)[-1]['step'] <= SAVED:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = figures(finetuned)
    output = finish(start_verb(*finetuning))
    return Runs(pretrained, finetuned, before, figures(finetuned), output)


def test_a_finetuning_that_was_killed_goes_on_bit_for_bit(runs):
    trained = [line for line in runs.after if 'loss' in line]
    assert [line['step'] for line in trained] == list(range(1, NUM_STEPS + 1))
    again = {line['step']: line for line in trained}
    (saved,) = re.findall(r'Going on from the checkpoint of step (\d+)', runs.output)
    assert int(saved) < runs.before[-1]['step'] < NUM_STEPS, 'nothing was computed twice'
    for line in runs.before:
        assert line == again[line['step']]


def test_it_started_from_what_was_pretrained_and_says_so(runs):
    told = (runs.finetuned / 'start.txt').read_text()
    assert (
        'encoder/video/layer_*' in told and 'encoder/joint/layer_*' in told and '2 kept at initialisation' not in told
    )
    config = settings.load_config(runs.finetuned)
    source = experiment.open_train_sources(config)
    params, report = starts.start_params(config, experiment.build(config, source), source)
    theirs = experiment.restore_model(runs.pretrained).params
    for stream in ('video', 'audio'):
        jax.tree.map(
            np.testing.assert_array_equal, params['encoder'][stream]['layers'], theirs['encoder']['joint']['layers']
        )
    assert str(report) == told.rstrip('\n')
    assert set(report.names('kept at initialisation')) == {
        'encoder/bottlenecks',
        'head_label/kernel',
        'head_label/bias',
    }


def test_its_figures_are_those_of_a_classifier(runs):
    losses = {'label/video', 'label/audio'}
    assert losses | {'loss', 'grad_norm', 'learning_rate'} <= set(runs.after[0])
    # Heads begin at zero, so that all classes are alike likely before the first update, whatever is mixed.
    assert runs.after[0]['loss'] == pytest.approx(np.log(9), rel=1e-5)
    (scored,) = (line for line in runs.after if 'test/loss' in line)
    assert scored['step'] == NUM_STEPS and losses <= {name.removeprefix('test/') for name in scored}
    assert 0 <= scored['test/label/accuracy'] <= 1
    assert ' GFLOP a clip' in (runs.finetuned / 'train.log').read_text()
    assert not (runs.finetuned / 'pictures').exists()


@pytest.fixture(scope='module')
def evaluated(runs, start_verb) -> str:
    """What is printed; results lie in the workdir."""
    return finish(
        start_verb('evaluate', f'--workdir={runs.finetuned}', '--what=benchmark,modalities,knn,probe,retrieval')
    )


NAME = f'test-step-{NUM_STEPS:07d}'


def test_a_finetuned_model_is_scored_in_every_way(runs, evaluated, tiny_dataset):
    folder = runs.finetuned / 'evaluation'
    content = json.loads((folder / f'{NAME}.json').read_text())
    assert set(content['results']) == {'benchmark', 'modalities', 'classification', 'retrieval'}
    subject, data = content['subject'], content['data']
    restored = experiment.restore_model(runs.finetuned)
    labels = {'label': restored.info.labels['label'].digest}
    assert subject['labels'] == data['labels'] == labels
    assert subject['averaged'] and subject['step'] == NUM_STEPS and len(subject['digest']) == 64
    assert subject['trained_on'] == data['digest'] == schema.read_info(tiny_dataset).digest() and content['notes'] == []
    assert data['num_records'] == 3 and data['splits'] == {'train': 'train', 'test': 'test'}
    assert content['config'] == settings.load_config(runs.finetuned) and {'jax', 'avmae_jax'} <= set(
        content['versions']
    )
    scores = {score['metric']: score for score in content['results']['benchmark']['scores']}
    assert set(scores) == {'top-1', 'top-5', 'mean class accuracy'}
    assert all(score['num_records'] == 3 and 0 <= score['value'] <= 1 for score in scores.values())
    ways = {row['given'] for row in content['results']['modalities']}
    assert ways == {'everything', 'video alone', 'audio alone', 'video missing', 'audio missing'}
    for row in content['results']['modalities']:
        assert row['difference'] == pytest.approx(row['value'] - scores[row['metric']]['value'])
    for words in ('Benchmark, single-label', 'audio missing', 'video -> audio', 'probe', 'chance'):
        assert words in evaluated


def test_the_details_of_a_benchmark_lie_beside_its_scores(runs, evaluated, tiny_dataset):
    folder = runs.finetuned / 'evaluation'
    results = json.loads((folder / f'{NAME}.json').read_text())['results']['benchmark']
    names = schema.read_info(tiny_dataset).labels['label'].names
    rows = list(csv.DictReader((folder / f'{NAME}-label-classes.csv').open()))
    assert [row['name'] for row in rows] == list(names) and sum(int(row['num_records']) for row in rows) == 3
    assert (folder / f'{NAME}-label-confusion.png').read_bytes().startswith(b'\x89PNG')
    with np.load(folder / f'{NAME}-logits.npz') as stored:
        logits, targets = stored['label/logits'], stored['label/targets']
        assert len(set(stored['ids'].tolist())) == 3 and stored['label/names'].tolist() == list(names)
    right = np.take_along_axis(targets, logits.argmax(axis=1)[:, None], axis=1).mean()
    assert right == pytest.approx(next(s['value'] for s in results['scores'] if s['metric'] == 'top-1'))
    for path in folder.iterdir():
        assert path.name in evaluated


def test_two_processes_score_a_finetuned_model_as_one_does(runs, evaluated, start_verb, tmp_path):
    shutil.copytree(runs.finetuned, tmp_path / 'run', ignore=shutil.ignore_patterns('evaluation'))
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        job = [f'--coordinator=localhost:{probe.getsockname()[1]}', '--num_processes=2', '--what=benchmark,modalities']
    both = [
        start_verb('evaluate', f'--workdir={tmp_path / "run"}', *job, f'--process_id={i}', num_devices=2)
        for i in range(2)
    ]
    assert ['Written to' in finish(process) for process in both] == [True, False]
    one, two = (
        json.loads((folder / f'evaluation/{NAME}.json').read_text()) for folder in (runs.finetuned, tmp_path / 'run')
    )
    assert two['data'] == one['data'] and two['subject']['digest'] == one['subject']['digest']
    for kind, found in two['results'].items():
        wanted = one['results'][kind]
        for (where, ours), (there, theirs) in zip(*map(jax.tree.leaves_with_path, (found, wanted)), strict=True):
            assert where == there and ours == (pytest.approx(theirs, abs=1e-6) if isinstance(theirs, float) else theirs)
    logits = [np.load(folder / f'evaluation/{NAME}-logits.npz') for folder in (runs.finetuned, tmp_path / 'run')]
    assert logits[0]['ids'].tolist() == logits[1]['ids'].tolist()
    np.testing.assert_allclose(logits[0]['label/logits'], logits[1]['label/logits'], atol=1e-5)


def test_files_are_scored_and_a_bad_one_does_not_keep_the_others(runs, start_verb, tiny_clips, tmp_path):
    clip = next(iter(tiny_clips.parent.rglob('*.mp4')))
    sound, bad = tmp_path / 'b.wav', tmp_path / 'bad.mp4'
    with wave.open(str(sound), 'wb') as file:
        file.setparams((1, 2, 16_000, 0, 'NONE', ''))
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 32_000).astype('<i2').tobytes())
    bad.write_bytes(b'this is no video')
    output = finish(
        start_verb('evaluate', f'--checkpoint={runs.finetuned}', '--top=2', '--files', str(clip), str(sound), str(bad)),
        code=65,
    )
    assert output.count('label ') >= 2 and str(clip) in output
    assert f'{bad}: not scored' in output and f'{sound}: scored without it' in output
    assert 'some of the 3 files could not be scored' in output and 'Traceback' not in output


# -- What does not fit is refused in one sentence --


@pytest.fixture
def evaluate_with(capsys):
    """Runs `evaluate` in this process; gives its exit code and what it told."""
    flags.FLAGS.mark_as_parsed()

    def call(overrides=None, **values):
        # Other verbs have a --num_clips too, and the last that was imported says what it is where nobody does.
        with flagsaver.flagsaver(**{'num_clips': None, **values}), pytest.raises(SystemExit) as ended:
            evaluate.main(['evaluate'], overrides or {})
        return ended.value.code, capsys.readouterr().err

    return call


def test_data_with_another_label_map_are_refused(runs, tiny_dataset, tmp_path, evaluate_with):
    others = shutil.copytree(tiny_dataset, tmp_path / 'others')
    info = schema.read_info(others)
    turned = dataclasses.replace(info.labels['label'], names=info.labels['label'].names[::-1])
    (others / schema.INFO_FILE).write_text(dataclasses.replace(info, labels={'label': turned}).to_json())
    code, told = evaluate_with({'data.path': str(others)}, workdir=str(runs.finetuned))
    assert code == 2 and 'same label map' in told and turned.digest[:12] in told and told.count('\n') == 1
    (others / schema.INFO_FILE).write_text(dataclasses.replace(info, labels={}).to_json())
    code, told = evaluate_with({'data.path': str(others)}, workdir=str(runs.finetuned))
    assert code == 2 and "no labels for 'label'" in told


def test_what_goes_with_another_kind_of_model_is_refused(runs, evaluate_with, tmp_path):
    code, told = evaluate_with(workdir=str(runs.finetuned), what=['reconstruction'])
    assert code == 2 and 'for a finetuned model there are benchmark, modalities' in told
    code, told = evaluate_with(workdir=str(runs.pretrained), what=['benchmark', 'knn'])
    assert code == 2 and '--what=benchmark: for a pretrained model there are reconstruction' in told
    code, told = evaluate_with(workdir=str(runs.pretrained), files=['a.mp4'])
    assert code == 2 and '--files needs a finetuned model' in told
    code, told = evaluate_with(
        workdir=str(runs.finetuned), what=['benchmark'], epic_annotations=str(tmp_path), num_pictures=0
    )
    assert code == 2 and 'heads verb and noun' in told
    code, told = evaluate_with({'evaluation.num_clips': 0}, workdir=str(runs.finetuned))
    assert code == 2 and 'config.evaluation.num_clips=0 must be at least 1' in told
    code, told = evaluate_with(workdir=str(runs.finetuned), what=['knn'], layers=['2', 'last'])
    assert code == 2 and '--layers=2,last must be numbers of layers' in told
    code, told = evaluate_with(workdir=str(runs.finetuned), config='nowhere.py')
    assert code == 2 and 'there is no file nowhere.py' in told


@pytest.mark.parametrize(
    'given, told',
    [
        (['--seed=1'], '--seed goes with --random_init: leave it out.'),
        (['--top=3'], '--top goes with --files'),
        (['--split=train', '--files=a.mp4'], '--split goes without --files'),
        (['--layers=2', '--what=benchmark'], '--layers goes with --what=knn, probe or retrieval'),
        (['--epic_annotations=x', '--what=modalities'], '--epic_annotations goes with --what=benchmark'),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(runs, evaluate_with, given, told):
    names = dict(argument.removeprefix('--').split('=') for argument in given)
    with flagsaver.as_parsed(**{name: value for name, value in names.items() if name != 'files'}):
        code, said = evaluate_with(workdir=str(runs.finetuned), files=[names['files']] if 'files' in names else [])
    assert code == 2 and told in said and said.count('\n') == 1


def test_a_config_may_be_given_besides_a_checkpoint(runs, repository, tiny_dataset):
    given = settings.read_config(str(repository / 'configs/finetune/tiny.py'))
    overrides = {'data.path': str(tiny_dataset), 'evaluation.num_clips': 3}
    subject = subjects.load_subject(runs.finetuned, overrides=overrides, config=given)
    own = settings.load_config(runs.finetuned)
    # What is looked at is of the file; what the model is, and was trained for, stays.
    assert subject.config['video'] == given['video'] != own['video']
    assert subject.config['evaluation']['num_clips'] == 3 and subject.config['data']['path'] == str(tiny_dataset)
    assert {n: subject.config[n] for n in ('model', 'objective', 'optimizer')} == {
        n: own[n] for n in ('model', 'objective', 'optimizer')
    }
    given = settings.read_config(str(repository / 'configs/finetune/tiny.py') + ':modalities=audio')
    with pytest.raises(ValueError, match='--config has audio and the checkpoint audio, video'):
        subjects.load_subject(runs.finetuned, overrides={}, config=given)
    with pytest.raises(ValueError, match=r'config\.model\.encoder\.drop_path is of the training'):
        subjects.load_subject(runs.finetuned, overrides={'model.encoder.drop_path': 0.5})
    with pytest.raises(ValueError, match='no function get_config'):
        settings.read_config(str(repository / 'configs/sections.py'))


@pytest.mark.parametrize(
    'options, overrides, asked, name',
    [
        ({}, {}, {}, ''),
        ({'averaged': False}, {'batch_size': 4}, {}, '-noaveraged'),
        ({}, {'evaluation.num_clips': 3}, {}, '-clips-3'),
        ({}, {}, {'num_clips': 1, 'train_split': 'test'}, '-clips-1-from-test'),
        ({}, {'video.short_side': 40}, {}, '-settings-[0-9a-f]{8}'),
    ],
)
def test_what_is_asked_beyond_the_run_itself_is_in_the_name(runs, options, overrides, asked, name):
    subject = subjects.load_subject(runs.finetuned, overrides=overrides, **options)
    data = evaluate.describe_data(
        Evaluator(subject, split='test', **{'num_clips': subjects.moments(subject.config), **asked})
    )
    num_clips = asked.get('num_clips')
    assert re.fullmatch(name, evaluate.describe_asked(subject, data, num_clips=num_clips))
    other = {**data, 'digest': '0123456789abcdef'}
    assert '-data-01234567' in evaluate.describe_asked(subject, other, num_clips=num_clips)


@pytest.mark.parametrize('which', ['average', 'trained'])
def test_the_average_is_what_is_scored_unless_it_is_not_wanted(runs, which):
    restored = experiment.restore_model(runs.finetuned, averaged=which == 'average')
    config = settings.load_config(runs.finetuned)
    assert restored.averaged == (which == 'average')
    # The state itself, as training would go on with it.
    source = experiment.open_train_sources(config)
    abstract = experiment.state_lib.abstract_state(experiment.make_init(experiment.build(config, source)))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: place, abstract)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
    checkpoints = manager.Checkpoints(runs.finetuned / 'checkpoints', read_only=True)
    state = train.restore(checkpoints, abstract, shardings)
    checkpoints.close()
    wanted = state.params if which == 'trained' else train.averaged(state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, restored.params, jax.tree.map(np.asarray, wanted))
    assert not np.array_equal(
        state.params['head_label']['kernel'], train.averaged(state.opt_state)['head_label']['kernel']
    )


# -- Starts --


@pytest.fixture
def start_with(runs, small_finetuning):
    """(arguments of the config, **changes) -> what training would begin with."""

    def start(arguments=None, **changes):
        config = small_finetuning(arguments, **{'start.path': str(runs.pretrained), **changes})
        source = experiment.open_train_sources(config)
        return starts.start_params(config, experiment.build(config, source), source)

    return start


def test_a_start_that_does_not_fit_names_the_setting(start_with, runs):
    with pytest.raises(
        ValueError, match=r'config.start: .* is \(16,\) in the start and \(32,\) in the model: .* \(width, mlp_width'
    ):
        start_with(**{'model.encoder.size.width': 32})
    with pytest.raises(ValueError, match=r'config.start: config.model.tokenizers.video.patch=\(1, 16, 16\)'):
        start_with(**{'model.tokenizers.video.patch': (1, 16, 16)})
    with pytest.raises(ValueError, match=r"config.start.heads=True.*'label'.*not there.*set it to False"):
        start_with(**{'start.heads': True})
    _, report = start_with(**{'start.heads': True, 'start.path': str(runs.finetuned)})
    assert {'head_label/kernel', 'encoder/bottlenecks'} <= set(report.names('taken'))


def test_heads_of_other_classes_are_refused(start_with, runs, tiny_dataset, tmp_path):
    others = shutil.copytree(tiny_dataset, tmp_path / 'others')
    info = schema.read_info(others)
    more = dataclasses.replace(info.labels['label'], names=(*info.labels['label'].names, 'silence'))
    (others / schema.INFO_FILE).write_text(dataclasses.replace(info, labels={'label': more}).to_json())
    wrong = {'start.heads': True, 'start.path': str(runs.finetuned), 'data.path': str(others)}
    with pytest.raises(ValueError, match=r'config.start.heads=True.*9 others, the data has 10: set it to False'):
        start_with(**wrong)
    _, report = start_with(**{**wrong, 'start.heads': False})
    assert 'head_label/kernel' in report.names('kept at initialisation')


def test_a_start_that_was_refused_can_be_put_right_in_the_same_workdir(runs, small_finetuning, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'log_to_file', lambda path: None)

    def first_step(state, batch, step):
        raise RuntimeError('the first step')

    monkeypatch.setattr(train, 'compile_step', lambda *args, **more: first_step)
    flags.FLAGS.mark_as_parsed()
    wrong = small_finetuning(**{'start.path': str(runs.pretrained), 'start.heads': True})
    workdir = train.epath.Path(tmp_path)
    with flagsaver.flagsaver(distributed=False):
        with pytest.raises(ValueError, match='config.start.heads=True'):
            train.run(wrong, workdir)
        assert not (tmp_path / 'config.json').exists()
        with pytest.raises(RuntimeError, match='the first step'):
            train.run({**wrong, 'start': {**wrong['start'], 'heads': False}}, workdir)
    assert 'Parameters: ' in (tmp_path / 'start.txt').read_text()


def test_a_run_that_is_refused_is_left_as_it_is(runs, monkeypatch):
    flags.FLAGS.mark_as_parsed()

    def contents():
        return {path: path.read_bytes() for path in runs.finetuned.rglob('*') if path.is_file()}

    before, config = contents(), settings.load_config(runs.finetuned)
    with flagsaver.flagsaver(distributed=False):
        with pytest.raises(ValueError, match='holds a run with other settings'):
            train.run({**config, 'seed': 5}, train.epath.Path(runs.finetuned))
        # Other workers are no other settings, and would be written down.
        monkeypatch.setattr(experiment, 'dataset_digest', lambda source: 'of other clips')
        with pytest.raises(ValueError, match='is a run on a dataset of other content'):
            train.run({**config, 'data': {**config['data'], 'stall_seconds': 7.0}}, train.epath.Path(runs.finetuned))
    assert contents() == before


def test_a_start_that_is_refused_leaves_nothing_in_a_new_folder(runs, small_finetuning, tmp_path, monkeypatch):
    flags.FLAGS.mark_as_parsed()
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'noted').mkdir()
    (tmp_path / 'noted' / 'train.log').write_text('mine')
    before = sorted(tmp_path.rglob('*'))
    refused = {
        'multiple of the 8 devices': {'batch_size': 12},  # Told when the devices are known.
        'config.start.heads=True': {'start.heads': True},  # Told when the checkpoints were looked at.
    }
    for told, changed in refused.items():
        config = small_finetuning(**{'start.path': str(runs.pretrained), **changed})
        for folder in ('new', 'empty', 'noted'):
            with flagsaver.flagsaver(distributed=False), pytest.raises(ValueError, match=told):
                train.run(config, train.epath.Path(tmp_path / folder))
            assert sorted(tmp_path.rglob('*')) == before
    assert (tmp_path / 'noted' / 'train.log').read_text().startswith('mine')

    def refuse(config, workdir, *_):
        (workdir / 'compiled').mkdir()  # jax's cache, where a launcher wants it.
        raise ValueError('is refused')

    monkeypatch.setattr(train, 'train', refuse)
    with flagsaver.flagsaver(distributed=False), pytest.raises(ValueError, match='is refused'):
        train.run(config, train.epath.Path(tmp_path / 'cached'))
    assert [path.name for path in (tmp_path / 'cached').iterdir()] == ['compiled']


def test_the_first_state_is_the_start_and_else_what_it_is_without(runs, small_finetuning, tmp_path):
    config = small_finetuning(**{'start.path': str(runs.pretrained), 'optimizer.average_decay': 0.9})
    source = experiment.open_train_sources(config)
    parts = experiment.build(config, source)
    init = experiment.make_init(parts)
    abstract = experiment.state_lib.abstract_state(init)
    shardings = rules.state_shardings(abstract, mesh_lib.make_mesh(), 'fsdp', min_elements=1)
    started, fresh = (
        train.first_state(
            {**config, 'start': {**config['start'], 'path': path}},
            parts, source, init=init, shardings=shardings, folder=train.epath.Path(tmp_path),
        )
        for path in (str(runs.pretrained), '')
    )  # fmt: skip
    params, report = starts.start_params(config, parts, source)
    jax.tree.map(np.testing.assert_array_equal, started.params, params)
    assert jax.tree.map(lambda x: x.sharding, started.params) == shardings.params
    # An average begins at what training begins with.
    jax.tree.map(np.testing.assert_array_equal, train.averaged(started.opt_state), started.params)
    assert int(started.step) == 0 and (started.rng == fresh.rng).all()
    assert {len(row.name) > 0 for row in report.rows if row.fate == 'kept at initialisation'} == {True}
    for name in report.names('kept at initialisation'):
        ours, theirs = (
            {rules.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state.params)}[name]
            for state in (started, fresh)
        )
        np.testing.assert_array_equal(ours, theirs)

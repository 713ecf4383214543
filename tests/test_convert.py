"""Weights of others become runs: ordinary ones, that train, evaluate, plan and config.start take."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath
from ml_collections import config_flags

from avmae_jax import convert, evaluate, experiment, plan, settings, starts, subjects, train
from avmae_jax.checkpoints.manager import Checkpoints
from avmae_jax.data.described import Described
from avmae_jax.data.mixing import Mixture
from avmae_jax.data.schema import LabelSet
from avmae_jax.evaluation import results_file
from avmae_jax.evaluation.evaluator import Evaluator
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.training.writer import read_scalars
from configs import tiny
from configs.finetune import imagenet as finetune_imagenet
from configs.finetune import tiny as finetune_tiny
from tests.weights.test_vit import published

IMAGE = {
    'data.num_workers': 0, 'batch_size': 8, 'image.short_side': 14, 'image.crop_size': 12, 'num_epochs': 4.0,
    'optimizer.warmup_epochs': 1.0, 'evaluation.every_steps': 0, 'checkpoint.every_steps': 25,
    'model.compute.dtype': 'float32',
}  # fmt: skip


def finetuning(**changes):
    config = finetune_imagenet.get_config('mixup=none')
    config.update_from_flattened_dict({**IMAGE, **changes})
    return settings.to_plain(config)


def save(tmp_path, weights):
    np.savez(tmp_path / 'vit.npz', **weights)
    return tmp_path / 'vit.npz'


def test_a_vit_becomes_a_run_that_is_rebuilt_from_its_folder(tmp_path):
    weights = published()
    told = convert.convert('vit_npz', save(tmp_path, weights), tmp_path / 'run', finetuning())
    restored = experiment.restore_model(tmp_path / 'run')
    assert restored.folder.name == '0' and restored.model.num_classes == {'label': 7}
    assert np.array_equal(restored.params['head_label']['kernel'], weights['head/kernel'])
    changed = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line.startswith('model.')}
    assert changed['model.representation'] == ['None', '6', 'file'] and 'model.pooling' not in changed
    assert '(4, 4, 3, 12)' in told and 'none is left over' in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ['run', 'vit.npz']
    assert settings.load_config(tmp_path / 'run') == settings.read_config(str(tmp_path / 'run/config.py'))
    model = json.loads((tmp_path / 'run/config.json').read_text())['model']
    assert model == experiment.describe_model(restored.model) and model['encoder']['drop_path'] == 0.2


def test_every_setting_of_an_imported_run_can_be_a_flag(tmp_path):
    convert.convert('vit_npz', save(tmp_path, published()), tmp_path / 'run', finetuning())
    values, file = flags.FlagValues(), tmp_path / 'run/config.py'
    given = {'optimizer.clip_norm': 0.5, 'preprocess.rgb_std': (0.5, 0.5, 0.25), 'data.data_dir': 'here', 'seed': 3}
    line = ['train', f'--config={file}', *(f'--config.{name}={value}' for name, value in given.items())]
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=line)
    values(line)
    assert settings.to_plain(values.config) == settings.override(settings.load_config(tmp_path / 'run'), given)


def test_a_vit_without_a_head_gets_one_of_zeros(tmp_path):
    weights = {name: array for name, array in published().items() if not name.startswith('head/')}
    told = convert.convert('vit_npz', save(tmp_path, weights), tmp_path / 'run', finetuning())
    restored = experiment.restore_model(tmp_path / 'run')
    assert not np.any(restored.params['head_label']['kernel']) and restored.model.num_classes == {'label': 1}
    assert '0 ignored, 1 made' in told
    # Its features are evaluated, on data of any classes.
    subject = subjects.load_subject(tmp_path / 'run', overrides={})
    assert evaluate.choose_what(subject, []) == ['knn', 'probe', 'retrieval']
    assert evaluate.choose_what(subject, ['benchmark']) == ['benchmark']


def birds(names):
    described = Described('birds', 10, image=True, clip_seconds=None, conventions=())
    described.info = dataclasses.replace(described.info, labels={'label': LabelSet(tuple(names), False)})
    return Mixture([described])


def test_classes_of_which_only_the_number_is_known_are_scored_by_as_many(tmp_path):
    convert.convert('vit_npz', save(tmp_path, published()), tmp_path / 'run', finetuning())
    subject = subjects.load_subject(tmp_path / 'run', overrides={})
    assert evaluate.choose_what(subject, []) == ['benchmark']
    subjects.check_classes(subject, birds('bcdefga'))
    for wrong, names in ((subject, 'abcdef'), (subject._replace(trained_on='of data'), 'bcdefga')):
        with pytest.raises(ValueError, match='or their order, are others than the model was trained on'):
            subjects.check_classes(wrong, birds(names))


@pytest.mark.parametrize(
    'changes, overrides, complaint',
    [
        ({'image.crop_size': 8}, {}, r'trained on image of shape \(12, 12, 3\), and the config gives \(8, 8, 3\)'),
        ({}, {'model.pooling': 'mean'}, "model.pooling='mean', and the weights are of a model with 'token'"),
        (
            {},
            {'model.encoder.size': 'B'},
            "--config.model.encoder.size='B' makes model.encoder.size.mlp_width=3072, .* 20",
        ),
    ],
)
def test_what_does_not_fit_is_told_and_nothing_is_written(tmp_path, changes, overrides, complaint):
    file = save(tmp_path, published())
    with pytest.raises(ValueError, match=complaint):
        convert.convert('vit_npz', file, tmp_path / 'run', finetuning(**changes), overrides=overrides)
    assert [path.name for path in tmp_path.iterdir()] == ['vit.npz']


def test_an_imported_classifier_goes_on_with_data_of_its_classes_alone(tmp_path, monkeypatch):
    config = finetuning()
    convert.convert('vit_npz', save(tmp_path, published()), tmp_path / 'run', config)
    checkpoints = Checkpoints(tmp_path / 'run/checkpoints', read_only=True)
    step, meta = checkpoints.read_meta()
    monkeypatch.setattr(Checkpoints, 'read_meta', lambda self: (step, meta))

    def check(names):
        train.check_data(epath.Path(tmp_path / 'run'), config, birds(names))

    check('bcdefga')  # The file says how many there are, and not which.
    with pytest.raises(ValueError, match='model has 7 and the data 6.*--config.start.path=.*/run --config') as caught:
        check('abcdef')
    assert str(caught.value).endswith('--config.start.heads=False --workdir=NEW')
    meta['dataset']['info']['labels']['label']['names'] = list('abcdefg')
    check('abcdefg')
    with pytest.raises(ValueError, match="number 5 of the model is 'f', and of the data 'g'"):
        check('abcdegf')
    meta['dataset']['digest'] = 'of data'  # Of a run on data, that is what is compared.
    with pytest.raises(ValueError, match='is a run on a dataset of other content'):
        check('abcdefg')


def test_values_that_are_not_finite_are_refused(tmp_path):
    weights = published()
    weights['head/kernel'][1, 2] = np.nan
    with pytest.raises(ValueError, match='head/kernel holds numbers that are not finite'):
        convert.convert('vit_npz', save(tmp_path, weights), tmp_path / 'run', finetuning())


# -- An imported model is an ordinary one --

TRANSFORMERS = "needs torch and transformers, of the extra `interop`: pip install 'avmae_jax[interop]'"
TUBELETS = {
    'num_steps': 3, 'checkpoint.every_steps': 3, 'evaluation.every_steps': 0, 'optimizer.warmup_steps': 1.0,
    'video.short_side': 20, 'video.crop_size': 15, 'video.num_frames': 6, 'model.compute.dtype': 'float32',
    'data.num_workers': 0, 'batch_size': 8, 'report.pictures_every_steps': 0,
}  # fmt: skip


@pytest.fixture(scope='module')
def published_video(tmp_path_factory):
    """A VideoMAE as transformers saves it, with made-up weights."""
    pytest.importorskip('torch', reason=TRANSFORMERS)
    pytest.importorskip('transformers', reason=TRANSFORMERS)
    from tests.weights.test_huggingface import made, saved

    folder = saved(made('VideoMAEForPreTraining'), tmp_path_factory.mktemp('published'))
    normalised = {'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]}
    (folder / 'preprocessor_config.json').write_text(json.dumps(normalised))
    return folder


@pytest.fixture(scope='module')
def run(published_video, tiny_dataset, tmp_path_factory, start_verb):
    """(what the command makes of it, what it prints)."""
    folder = tmp_path_factory.mktemp('imported') / 'run'
    values = {**TUBELETS, 'data.path': tiny_dataset}
    process = start_verb(
        'convert', '--from=huggingface', f'--input={published_video}', f'--output={folder}',
        '--config=configs/tiny.py:modalities=video,encoder=shared', *(f'--config.{k}={v}' for k, v in values.items()),
        num_devices=8,
    )  # fmt: skip
    told, _ = process.communicate(timeout=280)
    assert process.returncode == 0, told
    return folder, told


def train_to_its_end(config, folder):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(['train'])
    with flagsaver.flagsaver(distributed=False):
        assert train.run(config, epath.Path(folder)) == train.ExitCode.DONE


def first_batch(config, source, parts):
    with experiment.build_train_stream(config, source, 0, 1) as stream:
        return parts.preprocess(next(iter(stream)), train=False)


def test_the_command_says_what_it_took_and_what_of_the_config_it_changed(run, published_video):
    folder, told = run
    assert (folder / 'start.txt').read_text() in told.replace(f'\n\nWritten to {folder}.', '')
    rows = {line.split()[0]: line.split()[-1] for line in told.splitlines() if ' file' in line}
    changed = {'model.architecture.gelu', 'model.encoder.size.width', 'preprocess.rgb_mean', 'model.decoder.positions'}
    assert changed - {'model.decoder.positions'} <= set(rows) and 'model.decoder.positions' not in rows
    assert 'videomae.encoder.layer.*.attention.attention.(q_bias + v_bias)' in told and 'none is left over' in told
    config = settings.load_config(folder)
    assert config['preprocess']['rgb_mean'] == [0.485, 0.456, 0.406]
    target = config['objective']['terms']['reconstruction']['target']['video']
    assert target['standardise'] == 'channel' and target['convention'] == 'videomae'
    assert config['batch_size'] == 8 and config['model']['architecture']['norm_epsilon'] == 1e-2


def test_an_imported_model_goes_on_training(run, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(run[0], folder)
    config = settings.read_config(str(folder / 'config.py'))
    before = experiment.restore_model(folder).params
    train_to_its_end(config, folder)
    restored = experiment.restore_model(folder)
    assert restored.folder.name == '3'
    lines = [line for line in read_scalars(folder) if 'loss' in line]
    assert [line['step'] for line in lines] == [1, 2, 3]
    source = experiment.open_train_sources(config)
    parts = experiment.build(config, source)
    with experiment.build_train_stream(config, source, 0, 1) as stream:
        batch = next(iter(stream))
    # The first step starts from the imported parameters: their loss, under masks that step drew.
    _, meta = Checkpoints(run[0] / 'checkpoints', read_only=True).read_meta(0)
    key = jax.random.wrap_key_data(np.asarray(meta['rng']['data'], np.uint32), impl=meta['rng']['impl'])

    @jax.jit
    def loss(params, batch):
        inputs = parts.preprocess(batch, train=True)
        return parts.objective(parts.model, params, None, inputs, batch, jax.random.fold_in(key, 0))[0]

    assert lines[0]['loss'] == pytest.approx(float(loss(before, batch)), rel=1e-4)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, restored.params)
    assert max(jax.tree.leaves(moved)) > 0


def test_an_imported_model_is_evaluated(run):
    subject = subjects.load_subject(run[0], overrides={})
    assert subject.name == 'step-0000000'
    evaluator = Evaluator(subject, split='test', batch_size=8)
    found = evaluate.evaluate(evaluator, ['reconstruction', 'knn']).results
    assert set(found) == {'reconstruction', 'classification'}
    assert all(np.isfinite(row['model']) for row in found['reconstruction'] if 'model' in row)


@pytest.fixture
def video_finetuning(run, tiny_dataset):
    """What a person gives who finetunes the imported model, and no more."""
    config = finetune_tiny.get_config('modalities=video,encoder=shared,mixup=none')
    values = {name: value for name, value in TUBELETS.items() if not name.startswith('report')}
    values |= {'data.path': str(tiny_dataset), 'start.path': str(run[0]), 'model.pooled_norm': True}
    values |= {'preprocess.rgb_mean': (0.485, 0.456, 0.406), 'preprocess.rgb_std': (0.229, 0.224, 0.225)}
    config.update_from_flattened_dict(values)
    return settings.to_plain(config)


def test_an_imported_model_is_finetuned(run, video_finetuning, tmp_path, monkeypatch):
    """What the finetuning starts from encodes as the imported model does; made otherwise, it is refused."""
    config, source = video_finetuning, experiment.open_train_sources(video_finetuning)
    flags = '--config.model.architecture.gelu=exact --config.model.architecture.norm_epsilon=0.01, or config.start'
    with pytest.raises(ValueError, match=f"which has gelu='tanh' and not 'exact', .*: give {flags}"):
        starts.start_params(config, experiment.build(config, source), source)
    asked = settings.override(config, {'start.trunk': True})
    with monkeypatch.context() as patch:  # Else the command could not start jax.distributed any more.
        patch.setattr('jax._src.xla_bridge.backends', None)
        taken = starts.with_trunk(asked)
    assert starts.with_trunk(config) == config and starts.with_trunk(taken) == taken
    parts = experiment.build(taken, source)
    params, report = starts.start_params(taken, parts, source)
    assert set(report.names('kept at initialisation')) == {
        'norm/scale', 'norm/bias', 'head_label/kernel', 'head_label/bias'
    }  # fmt: skip
    assert {name.split('/')[0] for name in report.names('left over')} == {'decoder'}
    inputs = first_batch(taken, source, parts)
    restored = experiment.restore_model(run[0])
    wanted = restored.model.apply({'params': restored.params}, inputs, method='encode')['video']
    got = parts.model.apply({'params': params}, inputs, method='encode')['video']
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    # How it is trained and computed is not of the start, and what flags say one by one comes to the same.
    assert taken['model']['encoder']['drop_path'] == 0.1 and taken['model']['compute'] == config['model']['compute']
    size = {f'model.encoder.size.{name}': value for name, value in taken['model']['encoder']['size'].items()}
    by_flags = settings.override(config, {
        **size, 'model.tokenizers.video.patch': (3, 5, 5), 'model.encoder.final_norm': False,
        'model.architecture.gelu': 'exact', 'model.architecture.norm_epsilon': 1e-2,
    })  # fmt: skip
    assert experiment.build_model(by_flags, source.sources[0].info) == parts.model
    # The command takes it over by itself.
    trained = []
    monkeypatch.setattr(train, 'train', lambda config, *_: trained.append(config) or train.ExitCode.DONE)
    train_to_its_end(asked, tmp_path / 'tuned')
    assert trained == [taken]


def test_what_a_start_has_otherwise_is_told_with_both_values(run, video_finetuning, caplog):
    told = ("tokenizers.video.positions='sincos_3d' and not 'sincos_1d'", "tokenizers.video.class_token=True and not",
            'encoder.final_norm=True and not False', 'encoder.final_norm_epsilon=1e-05 and not None')  # fmt: skip
    ours = starts.with_trunk(settings.override(video_finetuning, {'start.trunk': True}))
    changes = {'tokenizers.video.positions': 'sincos_3d', 'tokenizers.video.class_token': True}
    changes |= {'encoder.final_norm': True, 'encoder.final_norm_epsilon': 1e-5}
    changed = settings.override(ours, {f'model.{name}': value for name, value in changes.items()})
    info, imported = birds('ab').sources[0].info, experiment.restore_model(run[0]).model
    for config in (ours, changed):
        caplog.clear()
        starts._compare_trunks(experiment.build_model(config, info), imported)
        assert [text in caplog.text for text in told] == [config is changed] * 4
    bare = settings.override(ours, {'model.pooled_norm': False})
    starts._compare_trunks(experiment.build_model(bare, info), imported)
    assert 'config.model.pooled_norm=True puts one there' in caplog.text


def test_the_trunk_of_a_file_of_images_is_taken(tmp_path, monkeypatch):
    config = finetuning(**{'start.path': str(save(tmp_path, published())), 'start.trunk': True})
    with monkeypatch.context() as patch:
        patch.setattr('jax._src.xla_bridge.backends', None)
        taken = starts.with_trunk(config)
    source = birds('abc')
    parts = experiment.build(taken, source)
    _, report = starts.start_params(taken, parts, source)
    assert set(report.names('kept at initialisation')) == {'head_label/kernel', 'head_label/bias'}
    assert set(report.names('left over')) == {f'{part}/{name}' for part in ('head_label', 'representation') for name in
                                              ('kernel', 'bias')}  # fmt: skip
    assert parts.model.tokenizers['image'].positions == 'learned'


def test_a_trunk_that_is_not_there_is_told(run, video_finetuning, tmp_path):
    sound = settings.to_plain(finetune_tiny.get_config('modalities=audio'))
    for config, values, complaint in (
        (sound, {'start.path': str(run[0])}, f'start.trunk=True, and {run[0]} has no tokenizer of audio'),
        (sound, {}, 'of config.start.path, which is empty'),
        (sound, {'start.path': str(tmp_path)}, 'config.start.path: .* is neither a workdir'),
        (sound, {'start.path': str(tmp_path / 'no.npz')}, 'config.start.path: .*no.npz is no file'),
    ):
        with pytest.raises(ValueError, match=complaint):
            starts.with_trunk(settings.override(config, {**values, 'start.trunk': True}))


def test_an_imported_model_is_planned(run):
    """All that comes before the compiler; that it compiles is a matter of budgets (tests/planning)."""
    config = settings.read_config(str(run[0] / 'config.py'))
    source = plan.describe_data(config, str(run[0] / 'config.py'), None, None, {})
    parts = experiment.build(config, source)
    assert experiment.step_flops(config, parts) > 0
    placed = experiment.place(config, experiment.make_init(parts), mesh_lib.make_mesh())
    assert placed.state.params['encoder']['shared']['layers']['mlp']['up']['kernel'].shape == (3, 12, 20)


def test_without_data_a_run_goes_on_with_any(run, published_video, tmp_path):
    config = tiny.get_config('modalities=video,encoder=shared')
    config.update_from_flattened_dict(TUBELETS)
    convert.convert('huggingface', published_video, tmp_path / 'run', settings.to_plain(config))
    config = settings.load_config(tmp_path / 'run')
    source = plan.describe_data({**config, 'data': {'path': '', 'split': 'train'}}, 'any.py', None, 10, {})
    init = experiment.make_init(experiment.build(config, source))
    placed = experiment.place(config, init, mesh_lib.make_mesh())
    train.check_data(epath.Path(tmp_path / 'run'), config, source)
    state = train.restore(Checkpoints(tmp_path / 'run/checkpoints'), placed.state, placed.shardings)
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, experiment.restore_model(run[0]).params)
    # One that was made with data is of that.
    with pytest.raises(ValueError, match='is a run on a dataset of other content'):
        train.check_data(epath.Path(run[0]), config, source)
    data = {'digest': 'of any', 'labels': {}}
    assert results_file.compare_data({'trained_on': '', 'labels': {}}, data) == []
    assert len(results_file.compare_data({'trained_on': 'of others', 'labels': {}}, data)) == 1


def test_a_classifier_keeps_its_classes_and_refuses_others(tiny_dataset, tmp_path):
    pytest.importorskip('torch', reason=TRANSFORMERS)
    pytest.importorskip('transformers', reason=TRANSFORMERS)
    from tests.weights.test_huggingface import made, saved

    theirs = made('ASTForAudioClassification')
    folder = saved(theirs, tmp_path / 'ast')
    (folder / 'preprocessor_config.json').write_text(json.dumps({'mean': -3.0, 'std': 2.0}))
    config = finetune_tiny.get_config('modalities=audio,encoder=shared,mixup=none')
    config.model.compute.dtype = 'float32'
    plain = settings.to_plain(config)
    convert.convert('huggingface', folder, tmp_path / 'run', plain)
    restored = experiment.restore_model(tmp_path / 'run')
    assert restored.info.labels['label'].names == ('cat', 'dog', 'rain', 'bell', 'drum')
    preprocess = experiment.build_preprocess(settings.load_config(tmp_path / 'run'), restored.info)
    assert (preprocess.convention, preprocess.audio_mean, preprocess.audio_std) == ('kaldi', -3.0, 4.0)
    sound = np.random.default_rng(0).normal(size=(2, 17, 12)).astype(np.float32)
    scores = restored.model.apply({'params': restored.params}, {'audio': sound}).averaged['label']
    import torch

    np.testing.assert_allclose(scores, theirs(torch.from_numpy(sound)).logits.detach(), rtol=1e-4, atol=1e-4)
    with_data = settings.override(plain, {'data.path': str(tiny_dataset)})
    with pytest.raises(ValueError, match='the head has 5 classes, and the data in config.data.path 9'):
        convert.convert('huggingface', folder, tmp_path / 'other', with_data)
    names = {'id2label': {i: f'sound {i}' for i in range(9)}}
    with pytest.raises(ValueError, match='9 of 9 classes have other names in the file than in the data'):
        nine = saved(made('ASTForAudioClassification', **names), tmp_path / 'nine')
        convert.convert('huggingface', nine, tmp_path / 'other', with_data)
    # Nor are such data trained on by the way of a run that was made without any, or scored.
    going_on = settings.load_config(tmp_path / 'run')
    with pytest.raises(ValueError, match="'label' are others .* model has 5 and the data 9.*config.start.heads=False"):
        train_to_its_end(settings.override(going_on, {'data.path': str(tiny_dataset)}), tmp_path / 'run')
    subject = subjects.load_subject(tmp_path / 'run', overrides={})
    with pytest.raises(ValueError, match='or their order, are others than the model was trained on'):
        subjects.check_classes(subject, experiment.open_train_sources(with_data))
    # What the file does not say, nobody makes up.
    (folder / 'preprocessor_config.json').unlink()
    with pytest.raises(ValueError, match='holds no audio statistics'):
        convert.convert('huggingface', folder, tmp_path / 'other', plain)
    assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize(
    'arguments, complaint',
    [
        ('modalities=audio,encoder=shared', 'the weights are of video, and the config is for audio'),
        ('modalities=video+audio,encoder=shared', 'the weights are of video, and the config is for audio, video'),
    ],
)
def test_another_modality_is_refused(published_video, tmp_path, arguments, complaint):
    config = settings.to_plain(tiny.get_config(arguments))
    with pytest.raises(ValueError, match=complaint):
        convert.convert('huggingface', published_video, tmp_path / 'run', config)
    with pytest.raises(ValueError, match='the weights are of an autoencoder, and the config is for a classifier'):
        classifying = settings.to_plain(finetune_tiny.get_config('modalities=video,encoder=shared'))
        convert.convert('huggingface', published_video, tmp_path / 'run', classifying)
    with pytest.raises(ValueError, match="^--from='hugingface' is none of .*; did you mean huggingface"):
        convert.convert('hugingface', published_video, tmp_path / 'run', config)
    with pytest.raises(ValueError, match='--given=heads: huggingface takes nothing'):
        convert.convert('huggingface', published_video, tmp_path / 'run', config, given={'heads': '3'})
    assert not list(tmp_path.iterdir())


def test_a_file_with_another_digest_is_refused(tmp_path):
    file = save(tmp_path, published())
    with pytest.raises(ValueError, match='--output=.*vit.npz is there already'):
        convert.convert('vit_npz', file, file, finetuning())
    with pytest.raises(ValueError, match='vit.npz has the sha256 .* and not 00'):
        convert.convert('vit_npz', file, tmp_path / 'run', finetuning(), sha256='00')
    assert not (tmp_path / 'run').exists()


def test_an_interrupted_command_says_that_nothing_was_written(monkeypatch, capsys):
    def interrupt(overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, 'run', interrupt)
    assert convert.main(['convert'], {}) == 130
    assert capsys.readouterr().err == 'convert: interrupted; nothing was written.\n'

"""Exports that `load_pretrained` reads: what goes in comes out, and what is damaged is refused."""

import dataclasses
import functools
import json
import operator
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath

import avmae_jax
from avmae_jax import experiment, export, pretrained
from avmae_jax.exports import card
from avmae_jax.exports import folder as folders
from avmae_jax.exports.trained import named_arrays, published
from avmae_jax.weights import safetensors


@pytest.fixture(scope='module')
def exported(pretrained_run, finetuned_run, tmp_path_factory):
    root = tmp_path_factory.mktemp('exports')
    for name, run in (('pretrained', pretrained_run), ('finetuned', finetuned_run)):
        export.export(root / name, pretrained.read_run(run), 'safetensors', 'float32')
    return root


def assert_equal_bits(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), found, wanted)


@pytest.mark.parametrize('name', ['pretrained', 'finetuned'])
def test_an_export_gives_back_the_model_bit_for_bit(exported, pretrained_run, finetuned_run, name):
    run = {'pretrained': pretrained_run, 'finetuned': finetuned_run}[name]
    before, after = pretrained.read_run(run), avmae_jax.load_pretrained(exported / name).trained
    assert_equal_bits(after.params, before.params)
    assert after.model == before.model and after.preprocess == before.preprocess
    assert after.shapes == before.shapes and after.row_shapes == before.row_shapes
    assert after.about == published(before.about) and after.objective == before.objective
    assert {h: after.info.labels[h] for h in after.heads} == {h: before.info.labels[h] for h in before.heads}


def test_the_average_of_the_parameters_is_what_is_exported_where_the_run_keeps_one(finetuned_run):
    kept = experiment.restore_model(finetuned_run, averaged=True).params
    last = experiment.restore_model(finetuned_run, averaged=False).params
    assert_equal_bits(pretrained.read_run(finetuned_run).params, kept)
    assert_equal_bits(pretrained.read_run(finetuned_run, averaged=False).params, last)
    assert not np.array_equal(jax.tree.leaves(kept)[0], jax.tree.leaves(last)[0])


def test_the_mean_of_the_last_checkpoints(pretrained_run):
    steps = [experiment.restore_model(pretrained_run / 'checkpoints' / str(step)).params for step in (5, 6, 7)]
    found = pretrained.read_run(pretrained_run, average_last=2)
    mean = jax.tree.map(lambda a, b: ((np.float64(a) + b) / 2).astype(np.float32), *steps[1:])
    assert_equal_bits(found.params, mean)
    assert found.about['averaged_steps'] == [7, 6]
    assert_equal_bits(pretrained.read_run(pretrained_run / 'checkpoints' / '6').params, steps[1])
    with pytest.raises(ValueError, match='has 3 checkpoints up to step 7, and the mean of 4'):
        pretrained.read_run(pretrained_run, average_last=4)


def test_bfloat16_halves_the_file_and_rounds_each_number_once(exported, pretrained_run, tmp_path):
    trained = pretrained.read_run(pretrained_run)
    export.export(tmp_path / 'half', trained, 'safetensors', 'bfloat16')
    ratio = (tmp_path / 'half/model.safetensors').stat().st_size / (
        exported / 'pretrained/model.safetensors'
    ).stat().st_size
    assert ratio < 0.65  # Names take a part of such a small file.
    after = avmae_jax.load_pretrained(tmp_path / 'half').trained
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), trained.params)
    assert_equal_bits(after.params, rounded)


def test_the_card_tells_where_the_model_comes_from(exported, pretrained_run, tmp_path):
    text = (exported / 'finetuned' / 'README.md').read_text()
    trained = pretrained.read_run(pretrained_run)
    for words in ('MBT', 'moving average', 'load_pretrained', '`label`: 9 classes', 'model.classify', 'TODO', 'jax '):
        assert words in text, words
    run = shutil.copytree(pretrained_run, tmp_path / 'run')
    (run / 'evaluation').mkdir()
    trained = pretrained.read_run(run)
    scores = {'retrieval': [], 'classification': [
        {'head': 'label', 'features': 'both', 'method': 'knn', 'metric': 'accuracy', 'value': 0.4321, 'chance': 0.1,
         'num_train': 9, 'num_test': 3},
    ]}  # fmt: skip
    content = {'data': {'splits': {'test': 'test'}, 'digest': 'd1'}, 'results': scores}
    (run / 'evaluation/a.json').write_text(json.dumps({'subject': trained.about, **content}))
    other = {**trained.about, 'digest': 'another'}
    (run / 'evaluation/b.json').write_text(json.dumps({'subject': other, **content}).replace('4321', '8765'))
    for name, content in {'cut': '{"subject": ', 'list': '[]', 'empty': '{}'}.items():
        (run / f'evaluation/{name}.json').write_text(content)
    export.export(tmp_path / 'with results', trained, 'safetensors', 'float32')
    text = (tmp_path / 'with results' / 'README.md').read_text()
    assert '0.432' in text and '0.87' not in text  # Results of other parameters say nothing of these.
    for name in ('cut', 'list', 'empty'):
        assert f'`evaluation/{name}.json` of the run could not be read' in text
    assert trained.about['digest'] in text and trained.about['trained_on'] in text


def test_the_card_of_each_format_says_how_that_is_loaded_and_fed(pretrained_run, tmp_path):
    trained = pretrained.read_run(pretrained_run)
    (tmp_path / 'config.json').write_text('{"architectures": ["ASTModel"]}')
    told = {}
    for name in ('scenic', 'huggingface', 'torch'):
        card.write_card(export.epath.Path(tmp_path), trained, name, 'float32')
        told[name] = (tmp_path / 'README.md').read_text()
    assert '`checkpoint_7` is read' in told['scenic']
    assert "transformers.ASTModel.from_pretrained('.')" in told['huggingface']
    for name, text in told.items():
        assert ('uint8' not in text, 'takes normalised arrays' in text) == ((name != 'torch',) * 2)
        assert 'imported' not in text and 'trained with avmae_jax: the checkpoint of step 7' in text


def test_the_card_of_an_imported_model_says_where_from(pretrained_run):
    trained = pretrained.read_run(pretrained_run)
    info = dataclasses.replace(trained.info, name='vit_npz B_16.npz')
    imported = trained._replace(info=info, about={**trained.about, 'trained_on': '', 'step': 0})
    text = card.card(imported, 'safetensors', 'float32', [])
    assert 'clips, imported by avmae_jax from vit_npz B_16.npz\n' in text
    assert '- imported by avmae_jax from vit_npz B_16.npz, and not trained further' in text
    assert 'trained on' not in text and 'trained with' not in text and '``\n' not in text.replace('```', '')


# -- Damage --


def change_json(file, section=(), /, **changes):
    content = json.loads(file.read_text())
    functools.reduce(operator.getitem, section, content).update(changes)
    file.write_text(json.dumps(content))


def change_arrays(file, change):
    arrays = safetensors.read(file)
    change(arrays)
    safetensors.write(file, arrays)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


NORM = 'encoder/joint/norm/scale'
# (what happens to the export, are its digests renewed so that they fit, what is said)
DAMAGE = {
    'cut': (lambda x: cut(x / 'model.safetensors'), False, 'model.safetensors is not what was exported'),
    'flipped': (lambda x: flip(x / 'model.safetensors'), False, 'model.safetensors is not what was exported'),
    'cut, digest renewed': (lambda x: cut(x / 'model.safetensors'), True, 'cannot be read as safetensors'),
    'config edited': (lambda x: change_json(x / 'config.json', format_version=2), False, 'config.json is not what'),
    'other version': (lambda x: change_json(x / 'config.json', format_version=2), True, 'version 2'),
    'no config': (lambda x: (x / 'config.json').unlink(), False, 'has no config.json'),
    'no weights': (lambda x: (x / 'model.safetensors').unlink(), False, 'has no model.safetensors'),
    'no digests': (lambda x: (x / 'digests.json').unlink(), False, 'has no digests.json'),
    'config is no JSON': (lambda x: (x / 'config.json').write_text('{"a"'), True, 'config.json cannot be read'),
    'config without model': (lambda x: (x / 'config.json').write_text('{"format": "avmae_jax", "format_version": 1}'),
                             True, 'does not tell what the model is'),
    'NaN': (lambda x: change_arrays(x / 'model.safetensors', lambda a: a[NORM].__setitem__(3, np.nan)), True,
            f"{NORM}' holds values that are no finite"),
    'missing key': (lambda x: change_arrays(x / 'model.safetensors', lambda a: a.pop(NORM)), True,
                    f'nothing was given for them: {NORM}'),
    'extra key': (lambda x: change_arrays(x / 'model.safetensors', lambda a: a.update(more=a[NORM])), True,
                  'no rule takes them: more'),
    'wrong shape': (lambda x: change_arrays(x / 'model.safetensors', lambda a: a.update({NORM: a[NORM][:-1]})), True,
                    rf'{NORM} \(15,\) for \(16,\)'),
    'shapes are a list': (lambda x: change_json(x / 'config.json', input_shapes=[1, 2]), True,
                          r'config.json: input_shapes is \[1, 2\], and due is a shape for each of'),
    'giant shape': (lambda x: change_json(x / 'config.json', ('input_shapes',), audio=[2**40, 16]), True,
                    r'config.json: audio would be of shape \(1099511627776, 16\), and sizes are from 1 to'),
    'large shape': (lambda x: change_json(x / 'config.json', ('input_shapes',), audio=[2**19, 2**19]), True,
                    r'config.json: audio of shape \(524288, 524288\) has \d+ tokens .* from 1 to 131072 are read'),
    'wide model': (lambda x: change_json(x / 'config.json', ('model', 'encoder', 'size'), width=10**9), True,
                   'config.json: encoder.size.width would be 1000000000, and of these arrays it is at most'),
    'deep model': (lambda x: change_json(x / 'config.json', ('model', 'encoder', 'size'), num_layers=10**9), True,
                   'config.json: encoder.size.num_layers would be 1000000000'),
    'another crop': (lambda x: change_json(x / 'preprocessing.json', ('video',), crop_size=16), True,
                     r'preprocessing.json: it makes video of shape \(2, 16, 16, 3\), and by config.json the'),
    'another length': (lambda x: change_json(x / 'preprocessing.json', ('audio',), num_spec_frames=7), True,
                       r'preprocessing.json: it makes audio of shape \(7, '),
    'other preprocessing': (lambda x: change_json(x / 'preprocessing.json', audio={}), True,
                            "preprocessing.json: audio has no 'seconds'"),
    'NaN in the preprocessing': (lambda x: change_json(x / 'preprocessing.json', ('audio',), mean=float('nan')), True,
                                 'preprocessing.json: audio.mean is nan, where a finite number was due'),
    'an endless deviation': (lambda x: change_json(x / 'preprocessing.json', ('video',), rgb_std=[1, 1, float('inf')]),
                             True, r'video.rgb_std is \[1, 1, inf\], where a list \(a finite number each\) was due'),
    'a deviation of nothing': (lambda x: change_json(x / 'preprocessing.json', ('audio',), std=1e-300), True,
                               'preprocessing.json: audio_std must be above 0; got 1e-300'),
    'a word for a rate': (lambda x: change_json(x / 'preprocessing.json', ('audio',), sample_rate='16k'), True,
                          "preprocessing.json: audio.sample_rate is '16k', where a whole number was due"),
    'endless frames': (lambda x: change_json(x / 'preprocessing.json', ('video',), frame_seconds=1e308), True,
                       'preprocessing.json: video.frame_seconds is 1e.308, where a finite number'),
    'an endless epsilon': (lambda x: change_json(x / 'config.json', ('model', 'architecture'), norm_epsilon=1e308),
                           True, 'config.json: config.model.architecture.norm_epsilon is 1e.308, where a finite'),
    'a word for a width': (lambda x: change_json(x / 'config.json', ('model', 'encoder', 'size'), width='16'), True,
                           "config.json: config.model.encoder.size.width is '16', where a whole number was due"),
}  # fmt: skip


@pytest.mark.parametrize('name', DAMAGE)
def test_a_damaged_export_is_refused_with_a_sentence_that_names_it(exported, tmp_path, name):
    damage, renewed, message = DAMAGE[name]
    copy = shutil.copytree(exported / 'pretrained', tmp_path / 'copy')
    damage(copy)
    if renewed:
        (copy / 'digests.json').unlink()
        folders.write_digests(export.epath.Path(copy))
    with pytest.raises(ValueError, match=message) as caught:
        avmae_jax.load_pretrained(copy)
    assert str(copy) in str(caught.value)


def test_how_layers_are_laid_out_need_not_be_told(exported, tmp_path):
    copy = shutil.copytree(exported / 'finetuned', tmp_path / 'copy')
    content = json.loads((copy / 'config.json').read_text())
    del content['model']['compute']['scan']
    (copy / 'config.json').write_text(json.dumps(content))
    folders.write_digests(epath.Path(copy))
    assert pretrained.read_export(epath.Path(copy)).model.encoder.compute.scan


@pytest.mark.parametrize('name', ['config.json', 'preprocessing.json', 'labels.json', 'digests.json'])
def test_whatever_the_json_says_an_export_is_loaded_or_refused(exported, tmp_path, broken_json, monkeypatch, name):
    copy = epath.Path(shutil.copytree(exported / 'finetuned', tmp_path / 'copy'))
    arrays, whole, loads = safetensors.read(copy / 'model.safetensors'), json.loads((copy / name).read_text()), 0
    traced, make_init_params = {}, experiment.make_init_params

    def traced_once(model, objective, shapes):
        key = repr((model, shapes))
        if key not in traced:
            traced[key] = jax.eval_shape(make_init_params(model, objective, shapes), jax.random.key(0))
        return lambda key_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), traced[key])

    monkeypatch.setattr(experiment, 'make_init_params', traced_once)
    if name != 'digests.json':  # As if each were what was written.
        monkeypatch.setattr(folders, 'check_digests', lambda folder, names: None)
    for where, text in broken_json(whole):
        (copy / name).write_bytes(text.encode('latin-1'))
        try:
            trained = pretrained.read_export(copy)
        except ValueError as error:
            assert str(copy) in str(error), where
            continue
        except Exception as error:
            raise AssertionError(f'{name} with {where}') from error
        loads += 1
        assert_equal_bits(named_arrays(trained.params), arrays)
        assert all(np.all(np.isfinite(x)) for x in trained.preprocess.undo({'audio': np.ones((1, 2, 2))}).values())
    assert loads


def test_the_config_of_another_model_does_not_take_the_weights(exported, tmp_path):
    copy = shutil.copytree(exported / 'finetuned', tmp_path / 'copy')
    shutil.copy(exported / 'pretrained' / 'config.json', copy)
    with pytest.raises(ValueError, match='config.json is not what was exported'):
        avmae_jax.load_pretrained(copy)
    folders.write_digests(export.epath.Path(copy))
    with pytest.raises(ValueError, match='do not fit the model'):
        avmae_jax.load_pretrained(copy)


def test_another_log_mel_is_refused(exported, tmp_path):
    copy = shutil.copytree(exported / 'pretrained', tmp_path / 'copy')
    content = json.loads((copy / 'preprocessing.json').read_text())
    content['audio']['log_mel']['fft_length'] = 512
    (copy / 'preprocessing.json').write_text(json.dumps(content))
    folders.write_digests(export.epath.Path(copy))
    with pytest.raises(ValueError, match="'avmae' were others"):
        avmae_jax.load_pretrained(copy)


def test_an_edited_card_is_no_damage(exported, tmp_path):
    copy = shutil.copytree(exported / 'pretrained', tmp_path / 'copy')
    (copy / 'README.md').write_text('license: mit')
    avmae_jax.load_pretrained(copy)


def test_nothing_half_written_stays_behind(exported, pretrained_run, tmp_path, monkeypatch):
    trained = pretrained.read_run(pretrained_run)
    monkeypatch.setattr(export.card, 'write_card', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(tmp_path / 'new', trained, 'safetensors', 'float32')
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match='is there already'):
        export.export(exported / 'pretrained', trained, 'safetensors', 'float32')


def test_names_are_layer_by_layer_however_the_model_lays_them_out(exported, pretrained_run):
    arrays = safetensors.read(exported / 'pretrained' / 'model.safetensors')
    assert set(arrays) == set(named_arrays(pretrained.read_run(pretrained_run).params))
    assert 'encoder/video/layer_0/attention/qkv/kernel' in arrays


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], '--checkpoint is needed'),
        (['--checkpoint=nowhere', '--output=x'], 'nowhere is neither a workdir'),
        (['--checkpoint={run}'], '--output is needed'),
        (['--checkpoint={run}', '--output={out}', '--format=onnx'], '--format=onnx is none of safetensors'),
        (['--checkpoint={run}', '--output={out}', '--dtype=int8'], '--dtype=int8 is none of float32, bfloat16'),
        (['--checkpoint={run}', '--output={out}', '--average_last=9'], 'the mean of 9 is asked for'),
        (['--checkpoint={run}', '--output={out}', 'stray'], 'What is stray?'),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(arguments, message, run_export, pretrained_run, tmp_path, capsys):
    arguments = [text.format(run=pretrained_run, out=tmp_path / 'out') for text in arguments]
    with pytest.raises(SystemExit) as caught:
        run_export(*arguments)
    assert caught.value.code == export.EXIT_SETTINGS
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()

"""Checkpoints of Scenic as files: what is written is read again bit for bit, and the older layouts too."""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import serialization

from avmae_jax import convert, experiment, settings
from avmae_jax.models.blocks import Compute
from avmae_jax.weights import files, scenic_avmae, scenic_config, scenic_files, scenic_mbt
from avmae_jax.weights.formats import FORMATS
from avmae_jax.weights.table import flatten, unflatten
from configs.pretrain import audioset

COMPUTE = Compute('float32', scan=True)
STACK = {'hidden_size': 12, 'mlp_dim': 20, 'num_layers': 3, 'num_heads': 2}
DECODER = {'hidden_size': 8, 'mlp_dim': 12, 'num_layers': 1, 'num_heads': 2}
DATA = {
    'num_frames': 4, 'crop_size': 16, 'num_spec_frames': 3, 'spec_shape': (8, 16), 'normalization_mean_spec': 1.102,
    'normalization_std_spec': 2.762,
}  # fmt: skip
SHAPES = {'video': (4, 16, 16, 3), 'audio': (24, 16)}
LOSS = {'target': ['rgb', 'spectrogram'], 'token_mask_probability_dict': {'rgb': 0.9, 'spectrogram': 0.7}}


def autoencoder_config(**changes):
    model = {
        **STACK, 'patches': {'size': (8, 8, 2)}, 'classifier': 'none', 'positional_embedding': 'learned_space_time',
        'positional_embedding_decoder': 'sinusoidal_1d', 'encoder_strategy': 'separate_encoders_and_concat',
        'decoder_strategy': 'same_decoder', 'fusion_layers': 1, 'use_modality_tokens': True, 'decoder_config': DECODER,
    }  # fmt: skip
    return {'model': {**model, **changes}, 'masked_feature_loss': LOSS, 'dataset_configs': DATA}


def mbt_config(**changes):
    model = {
        **STACK, 'patches': {'size': (8, 8, 2)}, 'classifier': 'gap', 'fusion_layer': 1, 'use_bottleneck': True,
        'modality_fusion': ('rgb', 'spectrogram'), 'temporal_encoding_config': {'method': '3d_conv'}, **changes,
    }  # fmt: skip
    return {'model': model, 'dataset_configs': DATA}


def classifier_config():
    model = {
        **STACK, 'patches': {'size': (8, 8)}, 'classifier': 'token', 'positional_embedding': 'sinusoidal_2d',
        'decoder_config': DECODER,
    }  # fmt: skip
    return {'model': model, 'dataset_configs': {'pp_train': 'decode'}}


def inputs_of(model, shapes):
    return {m: jax.ShapeDtypeStruct((1, *shapes[m]), jnp.float32) for m in model.tokenizers}


def random_arrays(rows, model, shapes):
    """Random numbers for every parameter of the model, under Scenic's names."""
    random = np.random.default_rng(1)
    leaves = flatten(scenic_avmae.looped_shapes(model, inputs_of(model, shapes)))
    ours = {name: random.normal(size=leaf.shape).astype(np.float32) for name, leaf in leaves.items()}
    return scenic_avmae.dump_rows(rows, unflatten(ours))


def made(name):
    """(config, their arrays, the row of the registry, what is given)."""
    if name == 'autoencoder':
        config = autoencoder_config()
        model = scenic_config.build_autoencoder(config, COMPUTE)
        return config, random_arrays(scenic_avmae.scenic_rows(model), model, SHAPES), 'scenic_avmae', {}
    if name == 'classifier':
        config = {**classifier_config(), 'masked_feature_loss': {'target': 'rgb'}}
        model = scenic_config.build_classifier(config, 5, COMPUTE, final_norm=True, pooled_norm=False)
        arrays = random_arrays(scenic_avmae.scenic_rows(model, single=True), model, {'image': (16, 16, 3)})
        return classifier_config(), arrays, 'scenic_avmae', {'image': '16x16'}
    variant = {'mbt of av_mae': 'av_mae', 'mbt': 'mbt'}[name]
    config = mbt_config(**({'classifier': 'token', 'representation_size': 6} if variant == 'mbt' else {}))
    model = scenic_config.build_mbt(config, 5, COMPUTE, variant, audio_channels=3 if variant == 'mbt' else 1)
    arrays = random_arrays(scenic_mbt.mbt_rows(model, variant), model, SHAPES)
    return config, arrays, {'av_mae': 'scenic_avmae', 'mbt': 'scenic_mbt'}[variant], {}


NAMES = ('autoencoder', 'classifier', 'mbt of av_mae', 'mbt')


def write_config(folder, config, name='config.json'):
    """As a user of Scenic writes it."""
    (folder / name).write_text(json.dumps(ml_collections.ConfigDict(config).to_dict(), default=list))


@pytest.mark.parametrize('name', NAMES)
def test_a_checkpoint_makes_its_model_and_is_written_again_bit_for_bit(tmp_path, name):
    config, arrays, kind, given = made(name)
    write_config(tmp_path, config)
    scenic_files.write_checkpoint(tmp_path / 'checkpoint_7', arrays, step=7)
    imported = FORMATS[kind].read(tmp_path / 'checkpoint_7', COMPUTE, given)
    assert imported.classes == (None if name == 'autoencoder' else ())
    assert all(imported.shapes[m] == SHAPES.get(m, (16, 16, 3)) for m in imported.model.tokenizers)
    back = scenic_avmae.dump_rows(imported.rows, imported.params)
    assert set(back) == set(arrays) and all(np.array_equal(back[key], arrays[key]) for key in arrays)
    scenic_files.write_checkpoint(tmp_path / 'again', back, step=7)
    assert (tmp_path / 'again').read_bytes() == (tmp_path / 'checkpoint_7').read_bytes()
    read = scenic_files.read_checkpoint(tmp_path / 'again')
    assert read.step == 7 and set(read.arrays) == set(arrays)


def test_what_the_config_says_of_data_is_handed_on(tmp_path):
    config, arrays, _, _ = made('autoencoder')
    write_config(tmp_path, config, 'other.json')
    scenic_files.write_checkpoint(tmp_path / 'checkpoint', arrays)
    given = {'config': str(tmp_path / 'other.json')}
    assert scenic_files.read_imported(tmp_path / 'checkpoint', COMPUTE, given, 'av_mae').settings == {
        'video.num_frames': 4, 'video.crop_size': 16, 'preprocess.num_mel_bins': 16, 'preprocess.num_spec_frames': 24,
        'preprocess.audio_mean': 1.102, 'preprocess.audio_std': 2.762,
        'objective.mask_ratio.video': 0.9, 'objective.mask_ratio.audio': 0.7,
    }  # fmt: skip


LAYOUTS = {
    'optax': lambda params: {'params': params, 'model_state': {}, 'global_step': np.full(4, 9), 'opt_state': {'0': {}}},
    'variables within params': lambda params: {'params': {'params': params}, 'global_step': 9},
    'flax.optim': lambda params: {'optimizer': {'target': params, 'state': {'step': 9}}, 'global_step': 9},
    'flax.optim, variables': lambda params: {'optimizer': {'target': {'params': params}}, 'global_step': np.int32(9)},
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_of_a_training_state_is_read(tmp_path, layout):
    arrays = {'cls': np.ones((1, 1, 2), np.float32), 'Transformer/norm/scale': np.arange(3, dtype=np.float32)}
    state = LAYOUTS[layout](unflatten(arrays))
    (tmp_path / 'checkpoint').write_bytes(serialization.msgpack_serialize(state))
    read = scenic_files.read_checkpoint(tmp_path / 'checkpoint')
    assert read.step == 9 and set(read.arrays) == set(arrays)
    assert all(np.array_equal(read.arrays[name], arrays[name]) for name in arrays)


def test_flax_restores_what_is_written(tmp_path):
    scenic_files.write_checkpoint(tmp_path / 'checkpoint', {'a/kernel': np.ones(3, np.float32)}, step=3)
    restored = serialization.msgpack_restore((tmp_path / 'checkpoint').read_bytes())
    assert restored['global_step'] == 3 and restored['model_state'] == {} and restored['rng'] is None
    np.testing.assert_array_equal(restored['params']['a']['kernel'], np.ones(3))


@pytest.mark.parametrize(
    'state, complaint',
    [
        ({'weights': {}}, 'checkpoint is no training state of Scenic: it has weights'),
        ({'params': {'a': np.ones(2, np.float32)}, 'model_state': {'batch_stats': {'m': np.ones(2)}}}, 'has a state'),
        ({'params': {'a': np.ones(2, np.float32)}, 'model_state': 5}, 'checkpoint: its model has a state'),
        ({'params': {'a': np.ones(2, np.int32)}}, 'checkpoint: a are no arrays of floats'),
        ({'params': {'a': np.full(2, np.nan, np.float32)}}, 'checkpoint: a holds numbers that are not finite'),
        *(
            (
                {'params': {'a': np.ones(2, np.float32)}, 'global_step': step},
                r'checkpoint: global_step is .* one integer',
            )
            for step in ('7', {'0': 7}, 7.5, -1, True, np.array([7, 8]), np.empty(0, np.int32))
        ),
    ],
)
def test_states_that_do_not_fit_are_refused(tmp_path, state, complaint):
    files.write_msgpack(tmp_path / 'checkpoint', state)
    with pytest.raises(ValueError, match=complaint):
        scenic_files.read_checkpoint(tmp_path / 'checkpoint')


def test_a_config_that_is_missing_or_does_not_fit_is_told(tmp_path):
    config, arrays, _, _ = made('autoencoder')
    path = tmp_path / 'checkpoint'
    scenic_files.write_checkpoint(path, arrays)

    def read(**given):
        return scenic_files.read_imported(path, COMPUTE, given, 'av_mae')

    with pytest.raises(
        ValueError, match=r'config.json is not there: .*json.dumps\(get_config\(\).to_dict\(\), default'
    ):
        read()
    for text, complaint in [('{', 'config.json is no config in JSON'), ('[]', "has no section 'model'")]:
        (tmp_path / 'config.json').write_text(text)
        with pytest.raises(ValueError, match=complaint):
            read()
    write_config(tmp_path, {**config, 'dataset_configs': {}})
    with pytest.raises(ValueError, match='what video it was trained on is not known, .* give --given=video=16x224x224'):
        read()
    with pytest.raises(ValueError, match='--given=video=4x16 is no shape'):
        read(video='4x16')
    assert read(video='4x16x16', audio='24x16').shapes == SHAPES
    write_config(tmp_path, autoencoder_config(num_layers=2))
    with pytest.raises(ValueError, match='checkpoint: .*no place for encoder/.*layer_1'):
        read()
    for wrong, complaint in (
        ({'hidden_size': None}, 'config.json: config.model.hidden_size is None, where a whole number was due'),
        ({'num_layers': 'x'}, "config.json: config.model.num_layers is 'x', where"),
        ({'patches': None}, 'config.json: config.model.patches is None, where a table was due'),
        ({'hidden_size': 10**9}, r'checkpoint: encoder.size.width would be 1000000000, .* at most 67'),
        ({'num_layers': 10**9}, r'checkpoint: encoder.size.num_layers would be 1000000000, .* at most 126'),
        ({'patches': {'size': (8, 4, 4)}}, r'it is of shape \(2, 8, 8, 3, 12\), where \(4, 8, 4, 3, 12\) was due'),
        ({'num_heads': 6}, r'it is of shape \(12, 2, 6\), where \(12, 6, 2\) was due'),
    ):
        write_config(tmp_path, autoencoder_config(**wrong))
        with pytest.raises(ValueError, match=complaint):
            read()
    smaller = autoencoder_config()
    del smaller['model']['hidden_size']
    write_config(tmp_path, smaller)
    with pytest.raises(ValueError, match="checkpoint: its config has no 'hidden_size'"):
        read()


@pytest.mark.parametrize('name', ['autoencoder', 'mbt'])
def test_whatever_the_config_says_a_checkpoint_is_read_or_refused(
    tmp_path, broken_json, read_once, assert_read_or_refused, name
):
    config, arrays, kind, given = made(name)
    scenic_files.write_checkpoint(tmp_path / 'checkpoint', arrays)
    read = functools.partial(FORMATS[kind].read, tmp_path / 'checkpoint', COMPUTE, given)
    whole = json.loads(json.dumps(config, default=list))
    loads = 0
    for where, text in broken_json(whole):
        (tmp_path / 'config.json').write_text(text, 'latin-1')
        loads += assert_read_or_refused(read, tmp_path, where)
    assert loads  # Some names are not read, and some values fit as well.


def test_a_checkpoint_becomes_a_run(tmp_path):
    config, arrays, _, _ = made('autoencoder')
    write_config(tmp_path, config)
    scenic_files.write_checkpoint(tmp_path / 'checkpoint', arrays, step=7)
    ours = audioset.get_config('size=Ti')
    ours.update_from_flattened_dict(
        {'data.num_workers': 0, 'batch_size': 8, 'model.compute.dtype': 'float32', 'video.short_side': 16}
    )
    told = convert.convert(
        'scenic_avmae', tmp_path / 'checkpoint', tmp_path / 'run', settings.to_plain(ours), overrides={}
    )
    assert 'none is left over' in told
    restored = experiment.restore_model(tmp_path / 'run')
    back = scenic_avmae.dump(restored.model, restored.params)
    assert all(np.array_equal(back[key], arrays[key]) for key in arrays)


ROOT = pathlib.Path(__file__).resolve().parents[2]
REFERENCE = pathlib.Path(os.environ.get('AVMAE_REFERENCE', ROOT.parent / 'shared/reference'))
CASES = ('multimae/enc-sepconcat2__dec-same__joint', 'mbt/av_mae__both__bottleneck__fusion2__separate__gap',
         'mbt/mbt__both__bottleneck__fusion2__separate__token', 'single/vivitcls__gap_sin1d')  # fmt: skip
STORES = {'multimae': 'params', 'mbt/av_mae': 'params_av_mae', 'mbt/mbt': 'params_mbt', 'single': 'params'}


@pytest.mark.skipif(
    not REFERENCE.exists(), reason=f'{REFERENCE} is not there: set AVMAE_REFERENCE to what holds cases.'
)
@pytest.mark.parametrize('case', CASES)
def test_a_file_of_the_public_reference_computes_what_the_reference_computed(tmp_path, case):
    file = REFERENCE / f'{case}.json'
    if not file.exists():
        pytest.skip(f'{file} is not there.')
    manifest, family = json.loads(file.read_text()), case.split('/')[0]
    store = next(name for start, name in STORES.items() if case.startswith(start))
    params, inputs = np.load(REFERENCE / family / f'{store}.npz'), np.load(REFERENCE / family / 'inputs.npz')
    arrays = {name: params[manifest['param_store_keys'].get(name, name)] for name in manifest['params']}
    scenic_files.write_checkpoint(tmp_path / 'checkpoint', arrays)
    write_config(tmp_path, manifest['config'])
    loop = Compute('float32', scan=False, attention='xla')
    kind = 'scenic_mbt' if '/mbt__' in case else 'scenic_avmae'
    shapes = {'video': '4x32x32' if family == 'single' else '4x32x24', 'audio': '48x16'}
    imported = FORMATS[kind].read(tmp_path / 'checkpoint', loop, shapes)
    if family == 'single':
        media = {'video': inputs['input/video']}
    else:
        sound = inputs['input_3ch/spectrogram'] if kind == 'scenic_mbt' else inputs['input/spectrogram'][..., 0]
        media = {'video': inputs['input/rgb'], 'audio': sound}
    wanted = np.load(file.with_suffix('.npz'))
    if family == 'multimae':
        encoded = imported.model.apply({'params': imported.params}, media, method='encode')
        for m, theirs in (('video', 'rgb'), ('audio', 'spectrogram')):
            np.testing.assert_allclose(encoded[m], wanted[f'encoder_eval/{theirs}'], rtol=1e-4, atol=1e-5)
    else:
        scores = imported.model.apply({'params': imported.params}, media)
        np.testing.assert_allclose(scores.averaged['label'], wanted['logits_eval'], rtol=1e-4, atol=1e-5)

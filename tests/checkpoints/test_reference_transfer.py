"""A start from an autoencoder gives what the public reference meant to give, parameter by parameter.

The cases lie in the folder named by AVMAE_REFERENCE (default: ../shared/reference beside the repository). They are
compared `as_intended`: as shipped, the reference leaves out the stem of sound, because of a name.
"""

import functools
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from avmae_jax.checkpoints.transfer import transfer
from avmae_jax.models.blocks import Compute
from avmae_jax.structs import Mask
from avmae_jax.weights import scenic_avmae, scenic_config, scenic_mbt

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(os.environ.get('AVMAE_REFERENCE', ROOT.parent / 'shared/reference'))
COMPUTE = Compute('float32', scan=False)
INPUTS = {'video': np.zeros((2, 4, 32, 24, 3), np.float32), 'audio': np.zeros((2, 48, 16), np.float32)}
SIZE = {'hidden_size': 32, 'mlp_dim': 64, 'num_layers': 3, 'num_heads': 4, 'patches': {'size': [8, 8, 2]}}
DECODER = {'hidden_size': 16, 'mlp_dim': 32, 'num_layers': 2, 'num_heads': 2}
NAMES = {'rgb': 'video', 'spectrogram': 'audio'}


def cases():
    index = FOLDER / 'transfer/index.json'
    if not index.exists():
        reason = f'{FOLDER} holds no transfer cases: set AVMAE_REFERENCE to the folder that does.'
        return [pytest.param('', marks=pytest.mark.skip(reason=reason), id='none')]
    listed = [entry['case'] for entry in json.loads(index.read_text())]
    found = sorted(path.stem for path in (FOLDER / 'transfer').glob('*__to__*.json'))
    return [*listed, *(name for name in found if name not in listed)]


@functools.cache
def read_arrays(path):
    with np.load(FOLDER / path) as stored:
        return dict(stored)


def made_up(shapes):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)


def source_of(case):
    """The autoencoder a case starts from: (their arrays, our parameters)."""
    config = {
        'masked_feature_loss': {'target': ['rgb', 'spectrogram']},
        'model': {
            **SIZE,
            'positional_embedding': 'sinusoidal_1d',
            'positional_embedding_decoder': 'sinusoidal_1d',
            'classifier': 'none',
            'encoder_strategy': case['encoder_strategy'],
            'fusion_layers': case['fusion_layers'],
            'decoder_config': DECODER,
        },
    }
    model = scenic_config.build_autoencoder(config, COMPUTE)
    masks = {}
    for m, grid in model.grids(INPUTS).items():
        tokens = np.broadcast_to(np.arange(np.prod(grid)), (2, int(np.prod(grid))))
        masks[m] = Mask(kept=tokens[:, :1], hidden=tokens[:, 1:])
    shapes = scenic_avmae.dump(model, made_up(jax.eval_shape(model.init, jax.random.key(0), INPUTS, masks)['params']))
    store = read_arrays('multimae/params.npz')
    theirs = {}
    for name, array in shapes.items():
        key = name if store[name].shape == array.shape else f'{name}#{"x".join(map(str, array.shape))}'
        theirs[name] = store[key]
    return theirs, scenic_avmae.load(model, theirs, INPUTS)


def target_of(case, provenance):
    """The classifier a case starts: (model, their arrays before, our parameters)."""
    config = {
        'model': {
            **SIZE,
            'temporal_encoding_config': {'method': '3d_conv'},
            'modality_fusion': case['target_modalities'],
            'fusion_layer': 2,
            'use_bottleneck': 'bottleneck' in provenance,
            'share_encoder': False,
            'classifier': 'token' if 'cls' in provenance else 'gap',
        }
    }
    model = scenic_config.build_mbt(config, 7, COMPUTE, 'av_mae', case['spectrogram_channels'])
    inputs = {NAMES[name]: INPUTS[NAMES[name]] for name in case['target_modalities']}
    ours = made_up(jax.eval_shape(model.init, jax.random.key(0), inputs)['params'])
    theirs = scenic_mbt.dump(model, ours, 'av_mae')
    stored = FOLDER / f'transfer/target_init_{"+".join(case["target_modalities"])}.npz'
    if stored.exists():
        arrays = read_arrays(f'transfer/{stored.name}')
        theirs = {name: arrays[name] if arrays[name].shape == array.shape else array for name, array in theirs.items()}
    return model, theirs, scenic_mbt.load(model, theirs, inputs, 'av_mae')


@pytest.mark.parametrize('name', cases())
def test_case_is_reproduced(name):
    case = json.loads((FOLDER / f'transfer/{name}.json').read_text())
    intended = case['as_intended']
    if not intended['ok']:
        pytest.skip(f'the reference fails here: {intended["error"]}')
    source, source_params = source_of(case)
    model, before, params = target_of(case, intended['provenance'])
    new, _ = transfer(params, source_params, divide_stem=False)
    after = scenic_mbt.dump(model, new, 'av_mae')
    assert set(after) == set(intended['provenance'])
    for parameter, origin in intended['provenance'].items():
        wanted = before[parameter] if origin['source'] is None else source[origin['source']]
        if origin.get('op') == 'tile_channels_x3':
            wanted = np.tile(wanted, (1, 1, 3, 1))
        np.testing.assert_array_equal(after[parameter], wanted, err_msg=parameter)
    stored = FOLDER / f'transfer/{name}.npz'
    results = read_arrays(f'transfer/{name}.npz') if stored.exists() else {}
    for key, array in results.items():
        if key.startswith('result/'):
            np.testing.assert_array_equal(after[key.removeprefix('result/')], array, err_msg=key)

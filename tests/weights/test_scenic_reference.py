"""Our models with the public reference's parameters compute what the reference computed, case by case.

The cases lie in the folder named by AVMAE_REFERENCE (default: ../shared/reference beside the repository); its README
describes them. Every case found there is run.
"""

import functools
import json
import os
import pathlib
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.models.blocks import Compute
from avmae_jax.objectives import Objective, Target
from avmae_jax.ops import positions
from avmae_jax.structs import Mask
from avmae_jax.weights import scenic_avmae, scenic_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(os.environ.get('AVMAE_REFERENCE', ROOT.parent / 'shared/reference'))
# Nothing here is jitted as a whole: the cases share the shapes of their pieces, which are then compiled once for all.
COMPUTE = Compute(dtype='float32', scan=False, attention='xla')
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def read_json(path):
    return json.loads((FOLDER / path).read_text())


@functools.cache
def read_arrays(path):
    with np.load(FOLDER / path) as stored:
        return dict(stored)


def multimodal_cases():
    index = FOLDER / 'multimae/index.json'
    listed = [case['case'] for case in json.loads(index.read_text())] if index.exists() else []
    found = sorted(path.stem for path in (FOLDER / 'multimae').glob('*__*.json'))
    return [*listed, *(case for case in found if case not in listed)]


def single_cases(classifiers):
    paths = sorted((FOLDER / 'single').glob('*__*.json'))
    return [path.stem for path in paths if ('cls__' in path.stem) == classifiers]


needs_reference = pytest.mark.skipif(
    not (FOLDER / 'multimae/index.json').exists(),
    reason=f'{FOLDER} holds no reference cases: set AVMAE_REFERENCE to the folder that does.',
)


def parameters(manifest, store):
    return {name: store[manifest['param_store_keys'].get(name, name)] for name in manifest['params']}


def assert_close(ours, theirs, tolerance, what):
    scale = np.max(np.abs(theirs)) + 1e-12
    error = np.max(np.abs(np.asarray(ours, np.float64) - theirs)) / scale
    assert error < tolerance, f'{what}: relative error {error:.2e}'


def assert_gradients_close(gradients, manifest, arrays):
    """Every gradient by its norm and its projection, and element by element where they are stored."""
    largest = max(np.max(np.abs(gradient)) for gradient in gradients.values())
    assert set(gradients) == set(manifest['grad_probe'])
    for name, (norm, projection) in manifest['grad_probe'].items():
        gradient = gradients[name].astype(np.float64)
        probe = np.random.RandomState(zlib.crc32(f'probe:{name}'.encode())).standard_normal(gradient.shape)
        # Gradients of key biases are zero but for rounding, hence the floor.
        scale = max(norm, largest)
        assert abs(np.sqrt(np.sum(gradient**2)) - norm) < GRADIENT_TOLERANCE * scale, name
        assert abs(np.sum(gradient * probe.astype(np.float32)) - projection) < GRADIENT_TOLERANCE * scale, name
        if f'grad/{name}' in arrays:
            error = np.max(np.abs(gradient - arrays[f'grad/{name}']))
            floor = max(np.max(np.abs(arrays[f'grad/{name}'])), 1e-3 * largest)
            assert error < GRADIENT_TOLERANCE * floor, f'{name}: {error:.2e} of {floor:.2e}'


def with_options(objective, standardise, on_all_tokens, per_value):
    """The objective of a case with one of the 24 combinations of its `losses`."""
    ((name, term),) = objective.terms.items()
    # Standardising by colour leaves spectrograms as they are.
    audio = 'patch' if standardise == 'patch' else 'none'
    target = {m: Target(audio if m == 'audio' else standardise) for m in term.target}
    options = {'weight': term.weight, 'target': target, 'on_all_tokens': on_all_tokens, 'per_value': per_value}
    return Objective(objective.mask_ratio, {name: type(term)(**options)})


def all_losses(objective, outputs, masks, mask_names):
    """'normdim=..,std=..,loss_unmasked=..,batch_mask=..' -> loss."""
    losses = {}
    modalities = list(outputs.patches)
    for per_value in (True, False):
        for theirs, ours in (('none', 'none'), ('patch', 'patch'), ('patch_channels', 'channel')):
            for everything in (False, True):
                variant = with_options(objective, ours, everything, per_value)
                for mask_name, rows in mask_names.items():
                    key = f'normdim={per_value},std={theirs},loss_unmasked={everything},batch_mask={mask_name}'
                    ((_, term),) = variant.terms.items()
                    losses[key] = weighted(term, outputs, masks, dict.fromkeys(modalities, rows))
    return losses


def weighted(term, outputs, masks, rows):
    return sum(term.weight[m] * loss for m, loss in term(outputs, masks, rows).items())


@needs_reference
@pytest.mark.parametrize('case', multimodal_cases())
def test_multimodal_case_is_reproduced(case):
    manifest, arrays = read_json(f'multimae/{case}.json'), read_arrays(f'multimae/{case}.npz')
    theirs = {'video': 'rgb', 'audio': 'spectrogram'}
    config, prefix = manifest['config'], manifest['input_key_prefix']
    stored = read_arrays(f'multimae/{manifest["input_file"]}')
    inputs = {m: stored[f'{prefix}/{theirs[m]}'] for m in scenic_config.modalities_of(config)}
    if 'audio' in inputs:
        inputs['audio'] = inputs['audio'][..., 0]
    masks = {
        m: Mask(kept=arrays[f'mask/{theirs[m]}/unmasked_indices'], hidden=arrays[f'mask/{theirs[m]}/masked_indices'])
        for m in inputs
    }
    # Ours says which place a decoder token is for, theirs to which slot it is moved: the same numbers.
    places = {m: arrays[f'shuffle/{theirs[m]}/ids'] for m in inputs if f'shuffle/{theirs[m]}/ids' in arrays}
    model = scenic_config.build_autoencoder(config, COMPUTE)
    objective = scenic_config.build_objective(config)
    inpaint = 'inpainting' in objective.terms
    source = parameters(manifest, read_arrays('multimae/params.npz'))
    params = scenic_avmae.load(model, source, inputs)

    back = scenic_avmae.dump(model, params)
    assert set(back) == set(source)
    assert all(np.array_equal(back[name], source[name]) for name in source)

    (loss, scored), gradients = jax.value_and_grad(
        lambda p: objective(model, p, None, inputs, None, jax.random.key(0), masks, places), has_aux=True
    )(params)
    outputs = scored.outputs
    features = model.apply({'params': params}, inputs, method='encode')
    names = {name.partition('batch_mask=')[2] for name in manifest['losses']}
    count = len(next(iter(inputs.values())))
    rows = {name: jnp.ones(count) if name == 'None' else jnp.asarray([*map(float, name.split('_'))]) for name in names}
    losses = all_losses(objective, outputs, masks, rows)
    for m, values in (outputs.inpainted if inpaint else outputs.predicted).items():
        assert_close(features[m], arrays[f'encoder_eval/{theirs[m]}'], OUTPUT_TOLERANCE, f'encoder_eval {m}')
        assert_close(values, arrays[f'pred/{theirs[m]}'], OUTPUT_TOLERANCE, f'pred {m}')
        if inpaint:
            asked = outputs.inpainted_mask[m]
        else:
            asked = np.zeros(values.shape[:2])
            np.put_along_axis(asked, masks[m].hidden, 1.0, axis=1)
            hidden = np.take_along_axis(arrays[f'pred/{theirs[m]}'], masks[m].hidden[..., None], axis=1)
            assert_close(outputs.predicted_hidden[m], hidden, OUTPUT_TOLERANCE, f'pred of hidden {m}')
        np.testing.assert_array_equal(asked, arrays[f'token_mask_out/{theirs[m]}'])
    check_targets(stored, prefix, theirs, outputs.patches, config['masked_feature_loss']['select_central_frame'])

    assert_close(loss, manifest['loss'], OUTPUT_TOLERANCE, 'loss')
    assert set(losses) == set(manifest['losses'])
    for name, value in manifest['losses'].items():
        assert_close(losses[name], value, OUTPUT_TOLERANCE, name)
    assert_gradients_close(scenic_avmae.dump(model, gradients), manifest, arrays)


def check_targets(stored, prefix, theirs, patches, central):
    tag = prefix.replace('input', 'target', 1)
    names = {'none': 'none', 'patch': 'patch', 'patch_channels': 'channel'}
    for m, values in patches.items():
        for name, standardise in names.items():
            key = f'{tag}/{theirs[m]}/std={name},central={bool(central and m == "video")}'
            if key in stored:
                ours = Target(standardise)(jnp.asarray(values), m)
                assert_close(ours, stored[key], OUTPUT_TOLERANCE, key)
        key = f'{tag}/{theirs[m]}/grayscale'
        if key in stored and stored[key].shape == values.shape:
            ours = Target(grayscale=True)(jnp.asarray(values), m)
            assert_close(ours, stored[key], OUTPUT_TOLERANCE, key)


@needs_reference
@pytest.mark.parametrize('case', single_cases(classifiers=False))
def test_autoencoder_of_one_modality_is_reproduced(case):
    manifest, arrays = read_json(f'single/{case}.json'), read_arrays(f'single/{case}.npz')
    config, modality = manifest['config'], {'vivit': 'video', 'vit': 'image'}[manifest['kind']]
    inputs = {modality: read_arrays('single/inputs.npz')[f'input/{modality}']}
    masks = {modality: Mask(kept=arrays['mask/unmasked_indices'], hidden=arrays['mask/masked_indices'])}
    model = scenic_config.build_autoencoder(config, COMPUTE)
    objective = scenic_config.build_objective(config)
    source = parameters(manifest, read_arrays('single/params.npz'))
    params = scenic_avmae.load(model, source, inputs, single=True)

    (loss, scored), gradients = jax.value_and_grad(
        lambda p: objective(model, p, None, inputs, None, jax.random.key(0), masks), has_aux=True
    )(params)
    outputs = scored.outputs
    features = model.apply({'params': params}, inputs, method='encode')
    assert_close(features[modality], arrays['encoder_eval'], OUTPUT_TOLERANCE, 'encoder_eval')
    assert_close(outputs.predicted[modality], arrays['pred'], OUTPUT_TOLERANCE, 'pred')
    ((_, term),) = objective.terms.items()
    target = term.target[modality](outputs.patches[modality], modality)
    assert_close(target, arrays['target'], OUTPUT_TOLERANCE, 'target')
    assert_close(loss, manifest['loss'], OUTPUT_TOLERANCE, 'loss')
    assert_gradients_close(scenic_avmae.dump(model, gradients, single=True), manifest, arrays)


@needs_reference
@pytest.mark.parametrize('case', single_cases(classifiers=True))
def test_classifier_of_one_modality_is_reproduced(case):
    manifest, arrays = read_json(f'single/{case}.json'), read_arrays(f'single/{case}.npz')
    config, modality = manifest['config'], 'video' if manifest['kind'].startswith('vivit') else 'image'
    inputs = {modality: read_arrays('single/inputs.npz')[f'input/{modality}']}
    final_norm = 'Transformer/encoder_norm/scale' in manifest['params']
    pooled_norm = 'encoder_norm/scale' in manifest['params']
    num_classes = manifest['params']['output_projection/bias'][0]
    model = scenic_config.build_classifier(config, num_classes, COMPUTE, final_norm, pooled_norm)
    source = parameters(manifest, read_arrays('single/params.npz'))
    params = scenic_avmae.load(model, source, inputs, single=True)
    logits = model.apply({'params': params}, inputs).logits[scenic_config.HEAD][modality]
    assert_close(logits, arrays['logits_eval'], OUTPUT_TOLERANCE, 'logits')


@needs_reference
def test_fixed_positions_are_those_of_the_reference():
    for key, table in read_arrays('single/posemb_tables.npz').items():
        kind, shape = key.split('/')
        sizes = {letter: int(number) for letter, number in re.findall(r'([a-z]+)(\d+)', shape)}
        grid = [sizes[axis] for axis in ('len', 't', 'h', 'w') if axis in sizes]
        ours = positions.TABLES[kind.replace('sinusoidal', 'sincos')](grid, sizes['d'])
        np.testing.assert_allclose(ours, table.reshape(ours.shape), atol=1e-6)

"""MBT with the public reference's parameters computes what the reference computed, case by case.

The cases lie in the folder named by AVMAE_REFERENCE (default: ../shared/reference beside the repository); its README
describes them. Every case found there is run, in both of the reference's variants; where the reference itself failed,
the case is skipped with the error it gave.
"""

import functools
import json
import os
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avmae_jax.models.blocks import Compute
from avmae_jax.weights import scenic_config, scenic_mbt

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(os.environ.get('AVMAE_REFERENCE', ROOT.parent / 'shared/reference')) / 'mbt'
COMPUTE = Compute('float32', scan=False, attention='xla')
VARIANTS = ('av_mae', 'mbt')
NAMES = {'rgb': 'video', 'spectrogram': 'audio'}
TOLERANCE = 1e-5


@functools.cache
def read_arrays(name):
    with np.load(FOLDER / name) as stored:
        return dict(stored)


def read_index(variant):
    path = FOLDER / f'index_{variant}.json'
    listed = json.loads(path.read_text()) if path.exists() else []
    found = sorted(path.stem.partition('__')[2] for path in FOLDER.glob(f'{variant}__*.json'))
    names = {entry['case'] for entry in listed}
    return [*listed, *({'case': name, 'error': None} for name in found if name not in names)]


def cases():
    found = []
    for variant in VARIANTS:
        for entry in read_index(variant):
            failed = entry['error'] and f'the reference fails here: {entry["error"]}'
            marks = [pytest.mark.skip(reason=failed)] if failed else []
            found.append(pytest.param(variant, entry['case'], marks=marks, id=f'{variant}__{entry["case"]}'))
    if not found:
        reason = f'{FOLDER} holds no cases of MBT: set AVMAE_REFERENCE to the folder that holds mbt/.'
        found = [pytest.param('', '', marks=pytest.mark.skip(reason=reason), id='none')]
    return found


class Case:
    """A case with the model, parameters and inputs that are made from it."""

    def __init__(self, variant, name, classifier=None, compute=COMPUTE):
        self.manifest = json.loads((FOLDER / f'{variant}__{name}.json').read_text())
        self.arrays, self.variant = read_arrays(f'{variant}__{name}.npz'), variant
        store, keys = read_arrays(f'params_{variant}.npz'), self.manifest['param_store_keys']
        self.theirs = {key: store[keys.get(key, key)] for key in self.manifest['params']}
        config = self.manifest['config']
        if classifier is not None:
            config = {**config, 'model': {**config['model'], 'classifier': classifier}}
        self.names = {NAMES[theirs]: theirs for theirs in config['model']['modality_fusion']}
        stem = self.theirs.get('embedding_spectrogram/kernel')
        channels = 1 if stem is None else stem.shape[2]
        stored = read_arrays('inputs.npz')
        self.labels = stored['labels']
        sound = stored['input/spectrogram'][..., 0] if channels == 1 else stored['input_3ch/spectrogram']
        self.inputs = {m: {'video': stored['input/rgb'], 'audio': sound}[m] for m in self.names}
        classes = self.arrays['logits_eval'].shape[-1]
        self.model = scenic_config.build_mbt(config, classes, compute, variant, channels)
        self.params = scenic_mbt.load(self.model, self.theirs, self.inputs, variant)

    def loss(self, params):
        """The reference's loss, over whatever parts there are."""
        logits = self.model.apply({'params': params}, self.inputs, train=True).logits[scenic_config.HEAD]
        smoothing, losses = self.manifest['label_smoothing'] or 0.0, []
        for part, values in logits.items():
            labels = jnp.asarray(self.labels if part == 'joint' else self.arrays[f'labels_mixed/{self.names[part]}'])
            labels = labels * (1 - smoothing) + smoothing / labels.shape[-1]
            if self.manifest['loss_kind'] == 'softmax_ce':
                losses.append(optax.softmax_cross_entropy(values, labels).mean())
            else:
                losses.append(optax.sigmoid_binary_cross_entropy(values, labels).sum(axis=-1).mean())
        return sum(losses) / len(losses), logits


def assert_close(ours, theirs, what):
    error = np.max(np.abs(np.asarray(ours, np.float64) - theirs)) / (np.max(np.abs(theirs)) + 1e-12)
    assert error < TOLERANCE, f'{what}: relative error {error:.2e}'


@pytest.mark.parametrize('variant, name', cases())
def test_case_is_reproduced(variant, name):
    case = Case(variant, name)
    back = scenic_mbt.dump(case.model, case.params, variant)
    assert set(back) == set(case.theirs)
    assert all(np.array_equal(back[key], case.theirs[key]) for key in back)

    scores = case.model.apply({'params': case.params}, case.inputs)
    assert_close(scores.averaged[scenic_config.HEAD], case.arrays['logits_eval'], 'logits_eval')
    if 'preclassifier_eval' in case.arrays:
        together = jnp.concatenate([scores.encoded[m] for m in case.names], axis=1)
        assert_close(together, case.arrays['preclassifier_eval'], 'preclassifier_eval')
    else:
        for m, theirs in case.names.items():
            assert_close(scores.encoded[m], case.arrays[f'preclassifier_eval/{theirs}'], f'preclassifier_eval {m}')

    (loss, logits), gradients = jax.value_and_grad(case.loss, has_aux=True)(case.params)
    if 'logits_train' in case.arrays:
        assert_close(logits['joint'], case.arrays['logits_train'], 'logits_train')
    else:
        assert set(logits) == set(case.names)
        for m, theirs in case.names.items():
            assert_close(logits[m], case.arrays[f'logits_train/{theirs}'], f'logits_train {m}')
    assert_close(loss, case.manifest['loss'], 'loss')
    assert_gradients_close(scenic_mbt.dump(case.model, gradients, variant), case)


def cases_of_one_token():
    found = [(variant, path.stem.removeprefix(f'{variant}__')) for variant in VARIANTS for path in
             sorted(FOLDER.glob(f'{variant}__*onetoken*.npz'))]  # fmt: skip
    skipped = pytest.param('', '', marks=pytest.mark.skip(reason=f'{FOLDER} holds no such case.'), id='none')
    return found or [skipped]


@pytest.mark.parametrize('variant, name', cases_of_one_token())
def test_a_case_that_fails_in_training_alone_gives_the_scores_of_the_tokens_it_reads(variant, name):
    # The reference reads one token of each stream, but puts no class tokens there, and yet counts one: it reads the
    # first patch of the first stream and the second of the second. Ours has the tokens; it has no such pooling.
    case = Case(variant, name, classifier='gap')
    encoded = case.model.apply({'params': case.params}, case.inputs, method='encode')
    head = case.params[f'head_{scenic_config.HEAD}']
    scores = [encoded[m][:, place] @ head['kernel'] + head['bias'][None] for place, m in enumerate(case.names)]
    assert_close(sum(scores) / len(scores), case.arrays['logits_eval'], 'logits_eval')


def assert_gradients_close(gradients, case):
    """Every gradient by its norm and its projection, and element by element where they are stored."""
    largest = max(np.max(np.abs(gradient)) for gradient in gradients.values())
    assert set(gradients) == set(case.manifest['grad_probe'])
    for name, (norm, projection) in case.manifest['grad_probe'].items():
        gradient = gradients[name].astype(np.float64)
        probe = np.random.RandomState(zlib.crc32(f'probe:{name}'.encode())).standard_normal(gradient.shape)
        # Gradients of key biases are zero but for rounding, hence the floor.
        scale = max(norm, largest)
        assert abs(np.sqrt(np.sum(gradient**2)) - norm) < TOLERANCE * scale, name
        # A projection adds up as many rounding errors as there are elements.
        assert abs(np.sum(gradient * probe.astype(np.float32)) - projection) < 5 * TOLERANCE * scale, name
        if f'grad/{name}' in case.arrays:
            error = np.max(np.abs(gradient - case.arrays[f'grad/{name}']))
            assert error < TOLERANCE * largest, f'{name}: {error:.2e} of {largest:.2e}'

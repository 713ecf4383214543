"""Real steps of the public reference, repeated: the same parameters after each."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.models.blocks import Compute
from avmae_jax.structs import Mask
from avmae_jax.training import optimizer as optimizer_lib
from avmae_jax.training import state as state_lib
from avmae_jax.training import step as step_lib
from avmae_jax.weights import scenic_avmae, scenic_config

NAMES = {'video': 'rgb', 'audio': 'spectrogram'}


class GivenBatch(NamedTuple):
    """Inputs and the masks that the reference drew for them."""

    inputs: dict
    masks: dict


class GivenMasks:
    """The objective, but its masks come with the batch."""

    def __init__(self, objective):
        self.objective = objective

    def __call__(self, model, params, teacher, inputs, batch, rng):
        return self.objective(model, params, teacher, inputs, None, rng, masks=batch.masks)

    def update(self, teacher, params):
        return self.objective.update(teacher, params)


def test_adam_with_decay_of_kernels_follows_the_reference_step_by_step(reference):
    file = reference / 'steps' / 'pretrain_adam_explicit_wd.json'
    if not file.exists():
        pytest.skip(f'{file} is not there.')
    manifest, arrays = json.loads(file.read_text()), np.load(file.with_suffix('.npz'))
    config = manifest['config']
    start = json.loads((reference / 'multimae' / 'enc-sepconcat2__dec-same__joint.json').read_text())
    store, stored = np.load(reference / 'multimae' / 'params.npz'), np.load(reference / 'multimae' / 'inputs.npz')
    source = {name: store[start['param_store_keys'].get(name, name)] for name in start['params']}
    inputs = {'video': stored['input/rgb'], 'audio': stored['input/spectrogram'][..., 0]}
    model = scenic_config.build_autoencoder(config, Compute(dtype='float32', scan=True, attention='xla'))
    objective = GivenMasks(scenic_config.build_objective(config))

    rates = config['lr_configs']
    schedule = optimizer_lib.WarmupCosine(
        peak=rates['base_learning_rate'], num_steps=rates['steps_per_cycle'], warmup_steps=rates['warmup_steps']
    )
    optimizer = optimizer_lib.adam(schedule, weight_decay=config['explicit_weight_decay'])
    params = scenic_avmae.load(model, source, inputs)
    state = state_lib.TrainState(jnp.int32(0), params, optimizer.init(params), None, jax.random.key(0))
    loss = step_lib.make_loss(model, objective, lambda batch, train: batch.inputs)
    train_step = jax.jit(step_lib.make_train_step(loss, objective=objective, optimizer=optimizer, schedule=schedule))
    assert len(manifest['steps']) == 4
    for i, expected in enumerate(manifest['steps']):
        masks = {
            m: Mask(
                kept=arrays[f'step{i}/mask/{theirs}/unmasked_indices'],
                hidden=arrays[f'step{i}/mask/{theirs}/masked_indices'],
            )
            for m, theirs in NAMES.items()
        }
        state, metrics = train_step(state, GivenBatch(inputs, masks), np.int32(i))
        np.testing.assert_allclose(metrics['loss'], expected['metrics']['total_loss'][0], rtol=1e-5)
        np.testing.assert_allclose(metrics['grad_norm'], expected['metrics']['max_grad_norm_preclip'][0], rtol=1e-4)
        np.testing.assert_allclose(metrics['learning_rate'], expected['lr'], rtol=1e-6)
        after = {
            name.removeprefix(f'step{i}/params_after/'): arrays[name]
            for name in arrays
            if name.startswith(f'step{i}/params_after/')
        }
        ours = scenic_avmae.dump(model, state.params)
        for name, array in (after or source if i == 0 else after).items():
            # Adam divides by the root of the second moment: where a gradient is rounding noise (key biases), so is
            # its update, of the size of the learning rate.
            if 'key/bias' in name:
                continue
            np.testing.assert_allclose(ours[name], array, atol=2e-5 * np.abs(array).max(), rtol=0, err_msg=name)
    assert int(state.step) == 4

"""Real finetuning steps of the public reference, repeated: MBT, mixup, clipping, SGD with rates by depth."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.models.blocks import Compute
from avmae_jax.objectives import Classification
from avmae_jax.ops.mixup import Mixing
from avmae_jax.structs import Batch
from avmae_jax.training import optimizer as optimizer_lib
from avmae_jax.training import state as state_lib
from avmae_jax.training import step as step_lib
from avmae_jax.weights import scenic_config, scenic_mbt

START = 'av_mae__both__bottleneck__fusion2__separate__gap'


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('name', ['mixmod', 'shared'])
def test_finetuning_follows_the_reference_step_by_step(reference, name, scan):
    file = reference / 'steps' / f'finetune_sgd_layerwise_mixup_{name}.json'
    if not file.exists():
        pytest.skip(f'{file} is not there.')
    manifest, arrays = json.loads(file.read_text()), np.load(file.with_suffix('.npz'))
    case = json.loads((reference / 'mbt' / f'{START}.json').read_text())
    store, stored = np.load(reference / 'mbt' / 'params_av_mae.npz'), np.load(reference / 'mbt' / 'inputs.npz')
    theirs = {key: store[case['param_store_keys'].get(key, key)] for key in case['params']}
    inputs = {'video': stored['input/rgb'], 'audio': stored['input/spectrogram'][..., 0]}
    compute = Compute('float32', scan=scan, attention='xla')
    model = scenic_config.build_mbt(case['config'], case['num_classes'], compute, 'av_mae')

    num_rows = len(stored['labels'])
    there = np.ones(num_rows, bool)
    batch = Batch(
        media={},
        present={'video': there, 'audio': there},
        labels={scenic_config.HEAD: stored['labels']},
        record=np.arange(num_rows),
        seed=np.zeros((num_rows, 2), np.uint32),
        weight=np.ones(num_rows, np.float32),
        damaged=np.zeros(num_rows, np.int32),
    )
    objective = Classification({scenic_config.HEAD: 'sigmoid'}, label_smoothing=case['label_smoothing'])
    rates = jnp.asarray([step['lr_base_at_count'] for step in manifest['steps']])
    optimizer = optimizer_lib.tailored(
        optimizer_lib.sgd(lambda step: rates[step], momentum=0.9, clip_norm=0.25), layer_decay=0.75
    )
    params = scenic_mbt.load(model, theirs, inputs, 'av_mae')
    state = state_lib.TrainState(jnp.int32(0), params, optimizer.init(params), None, jax.random.key(0))

    def loss(params, teacher, shares, rng):
        weight = {m: jnp.full(num_rows, share) for m, share in zip(('video', 'audio'), shares, strict=True)}
        total, scored = objective(model, params, teacher, inputs, batch, rng, mixing=Mixing(weight))
        return total, scored.losses

    train_step = jax.jit(
        step_lib.make_train_step(loss, objective=objective, optimizer=optimizer, schedule=lambda step: rates[step])
    )
    compared = 0
    for i in range(len(manifest['steps'])):
        state, _ = train_step(state, tuple(arrays[f'step{i}/mixup_weights']), np.int32(i))
        prefix = f'step{i}/params_after/'
        after = {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}
        ours = scenic_mbt.dump(model, state.params, 'av_mae')
        for key, array in after.items():
            compared += 1
            np.testing.assert_allclose(ours[key], array, atol=2e-6 * np.abs(array).max(), rtol=1e-5, err_msg=key)
    assert compared

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avmae_jax.training import optimizer as optimizer_lib


def _schedules(reference):
    file = reference / 'optim' / 'lr_schedules.json'
    return json.loads(file.read_text()), np.load(file.with_suffix('.npz'))


def test_learning_rates_are_those_of_the_released_configs(reference):
    settings, arrays = _schedules(reference)
    assert settings
    for name, setting in settings.items():
        rates = setting['lr_configs']
        schedule = optimizer_lib.WarmupCosine(
            peak=rates['base_learning_rate'],
            num_steps=setting['total_steps'],
            warmup_steps=setting['warmup_steps'],
            end_ratio=rates.get('alpha', 0.0),
        )
        steps, expected = arrays[f'{name}/steps'], arrays[f'{name}/lr']
        # The reference jumps back to its peak behind the last step; see test_the_rate_stays_at_its_end.
        within = steps < setting['total_steps']
        ours = jax.vmap(schedule)(jnp.asarray(steps[within]))
        # Near the end 1 + cos() cancels in float32: an absolute error of 1e-7 of the peak.
        np.testing.assert_allclose(ours, expected[within], rtol=1e-5, atol=1e-7 * rates['base_learning_rate'])


def test_peak_rates_follow_from_the_base_rates_of_the_recipe(reference):
    settings, _ = _schedules(reference)
    for name, base in (('audioset_pretrain', 3e-4), ('vggsound_pretrain', 1.5e-4), ('imagenet_pretrain', 1.5e-4)):
        if name in settings:
            peak = optimizer_lib.peak_learning_rate(base, settings[name]['batch_size'])
            assert peak == pytest.approx(settings[name]['lr_configs']['base_learning_rate'])


def test_the_first_update_has_rate_zero_and_the_rate_stays_at_its_end():
    schedule = optimizer_lib.WarmupCosine(peak=1.0, num_steps=10, warmup_steps=2)
    assert schedule(0) == 0
    assert schedule(2) == 1
    assert schedule(10) == schedule(11) == schedule(1000) == 0


def _params():
    return {'dense': {'kernel': jnp.full((2, 3), 2.0), 'bias': jnp.full((3,), 2.0)}, 'mask_token': jnp.full((3,), 2.0)}


def test_decay_shrinks_kernels_alone_and_by_the_learning_rate():
    optimizer = optimizer_lib.adam(lambda step: 0.1, weight_decay=0.5)
    params = _params()
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new['dense']['kernel'], 2.0 * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(new['dense']['bias'], params['dense']['bias'])
    np.testing.assert_array_equal(new['mask_token'], params['mask_token'])


def test_clipping_leaves_small_gradients_alone_and_shortens_large_ones():
    def first_moment(clip_norm, scale):
        optimizer = optimizer_lib.adam(lambda step: 0.1, clip_norm=clip_norm)
        params = _params()
        grads = jax.tree.map(lambda x: scale * jnp.ones_like(x), params)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        return optax.global_norm(optax.tree.get(state, 'mu')) / 0.1  # After one step mu is (1 - beta1) * gradient.

    small = optax.global_norm(jax.tree.map(lambda x: 1e-3 * jnp.ones_like(x), _params()))
    np.testing.assert_allclose(first_moment(1.0, 1e-3), small, rtol=1e-5)
    np.testing.assert_allclose(first_moment(1.0, 1e3), 1.0, rtol=1e-5)
    assert first_moment(None, 1e3) > 1000

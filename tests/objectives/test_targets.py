import numpy as np
import pytest

from avmae_jax.objectives.targets import Target

CUT = np.random.default_rng(0).normal(3, 2, size=(2, 4, 24)).astype(np.float32)


def test_a_standardised_patch_has_mean_0_and_variance_1():
    values = np.asarray(Target('patch')(CUT, 'video'))
    np.testing.assert_allclose(values.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(values.var(-1), 1, atol=1e-4)


def test_standardised_by_channel_each_colour_has():
    values = np.asarray(Target('channel')(CUT, 'video')).reshape(2, 4, 8, 3)
    np.testing.assert_allclose(values.mean(-2), 0, atol=1e-5)
    np.testing.assert_allclose(values.var(-2), 1, atol=1e-4)


def test_a_flat_patch_does_not_become_infinite():
    assert not np.any(Target('patch')(np.ones((1, 1, 12), np.float32), 'video'))


def test_sound_has_no_colours():
    with pytest.raises(ValueError, match='grayscale=False'):
        Target(grayscale=True)(CUT, 'audio')
    with pytest.raises(ValueError, match='standardise must be one of'):
        Target('pixel')

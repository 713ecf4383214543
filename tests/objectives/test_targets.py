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


@pytest.mark.parametrize('standardise, groups', [('patch', 1), ('channel', 3)])
def test_conventions_differ_in_the_variance_and_in_what_is_added_to_it(standardise, groups):
    values = (1e-2 * CUT).reshape(2, 4, -1, groups)
    centred, variance = values - values.mean(-2, keepdims=True), values.var(-2, keepdims=True)
    sample = values.var(-2, keepdims=True, ddof=1)
    deviations = {
        'scenic': np.sqrt(variance + 1e-6),
        'mae': np.sqrt(sample + 1e-6),
        'videomae': np.sqrt(sample) + 1e-6,
    }
    for convention, deviation in deviations.items():
        got = Target(standardise, convention=convention)(1e-2 * CUT, 'video')
        np.testing.assert_allclose(got, (centred / deviation).reshape(CUT.shape), rtol=1e-4, atol=1e-5)


def test_pixels_are_brought_back_to_what_they_were_before_their_normalisation():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    pixels = CUT.reshape(2, 4, 8, 3) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    got = Target(rgb_mean=mean, rgb_std=std)(CUT, 'image')
    np.testing.assert_allclose(got, pixels.reshape(CUT.shape), rtol=1e-6)
    with pytest.raises(ValueError, match='rgb_mean and rgb_std come together'):
        Target(rgb_mean=mean)


@pytest.mark.parametrize(
    'fields', [{}, {'convention': 'mae'}, {'rgb_mean': (0.4, 0.5, 0.6), 'rgb_std': (0.2, 0.3, 0.1)}]
)
@pytest.mark.parametrize('kind', ['none', 'patch', 'channel'])
def test_an_answer_that_is_right_is_restored_to_what_was_asked(kind, fields):
    target = Target(kind, **fields)
    np.testing.assert_allclose(target.plain(CUT, 'video'), CUT, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target.restore(target(CUT, 'video'), CUT, 'video'), CUT, rtol=1e-4, atol=1e-4)


def test_a_flat_patch_does_not_become_infinite():
    assert not np.any(Target('patch')(np.ones((1, 1, 12), np.float32), 'video'))


def test_sound_has_no_colours():
    with pytest.raises(ValueError, match='grayscale=False'):
        Target(grayscale=True)(CUT, 'audio')
    with pytest.raises(ValueError, match='standardise must be one of'):
        Target('pixel')

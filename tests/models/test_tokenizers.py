import jax
import numpy as np
import pytest

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.decoders import SharedDecoder
from avmae_jax.models.encoders import SharedEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import AudioTokenizer, ImageTokenizer, VideoTokenizer
from avmae_jax.ops.positions import sincos_1d

RANDOM = np.random.default_rng(0)
CASES = {
    'video': (VideoTokenizer((2, 4, 4)), RANDOM.normal(size=(2, 4, 8, 8, 3)).astype(np.float32)),
    'audio': (AudioTokenizer((4, 2)), RANDOM.normal(size=(2, 8, 4)).astype(np.float32)),
    'image': (ImageTokenizer((4, 4)), RANDOM.normal(size=(2, 8, 8, 3)).astype(np.float32)),
}


@pytest.mark.parametrize('modality', CASES)
def test_joining_undoes_cutting(modality):
    tokenizer, x = CASES[modality]
    np.testing.assert_array_equal(tokenizer.join(tokenizer.cut(x), tokenizer.grid(x.shape)), x)


@pytest.mark.parametrize(
    'fields', [{}, {'positions': 'learned'}, {'positions': 'learned_space_time'}, {'modality_token': True}]
)
def test_the_tokens_of_kept_patches_are_those_of_all_patches_at_their_places(fields):
    x = CASES['video'][1]
    tokenizer = VideoTokenizer((2, 4, 4), **fields)
    cut, grid = tokenizer.cut(x), tokenizer.grid(x.shape)
    params = tokenizer.init(jax.random.key(0), cut, grid, None, 12, 'float32')
    kept = np.asarray([[6, 1, 3], [0, 7, 2]])
    every = np.asarray(tokenizer.apply(params, cut, grid, None, 12, 'float32'))
    some = tokenizer.apply(params, cut, grid, kept, 12, 'float32')
    np.testing.assert_allclose(some, np.take_along_axis(every, kept[..., None], axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('placed', [True, False])
def test_a_distillation_token_comes_behind_the_class_token_and_is_treated_alike(placed):
    x = CASES['audio'][1]
    fields = dict(positions='learned', class_token=True, class_position=placed, modality_token=True)
    tokenizer = AudioTokenizer((4, 2), **fields, distillation_token=True)
    cut, grid = tokenizer.cut(x), tokenizer.grid(x.shape)
    shapes = jax.eval_shape(lambda: tokenizer.init(jax.random.key(0), cut, grid, None, 12, 'float32'))['params']
    own = jax.tree.map(lambda leaf: RANDOM.normal(size=leaf.shape).astype(np.float32), shapes)
    assert own['positions']['table'].shape == (4 + 2 * placed, 12)
    out = np.asarray(tokenizer.apply({'params': own}, cut, grid, None, 12, 'float32'))
    assert out.shape == (2, 6, 12)
    for i, name in enumerate(('class_token', 'distillation_token')):
        added = own['positions']['table'][i] + own['modality_token'] if placed else 0
        np.testing.assert_allclose(out[:, i], np.tile(own[name] + added, (2, 1)), rtol=1e-5, atol=1e-6)
    plain = AudioTokenizer((4, 2), positions='learned', modality_token=True)
    rest = {'embedding': own['embedding'], 'modality_token': own['modality_token']}
    rest['positions'] = {'table': own['positions']['table'][2 * placed :]}
    np.testing.assert_array_equal(out[:, 2:], plain.apply({'params': rest}, cut, grid, None, 12, 'float32'))
    with pytest.raises(ValueError, match='distillation_token=True needs class_token=True'):
        AudioTokenizer((4, 2), distillation_token=True)


def test_overlapping_patches_are_for_classifiers_alone():
    tokenizer = AudioTokenizer((4, 2), stride=(2, 1))
    assert tokenizer.grid((2, 8, 4)) == (3, 3) and tokenizer.cut(CASES['audio'][1]).shape == (2, 9, 8)
    size = Size(8, 2, 8, 1)
    with pytest.raises(ValueError, match=r'tokenizers.audio.stride=\(2, 1\): .* an autoencoder has stride=None'):
        MaskedAutoencoder({'audio': tokenizer}, SharedEncoder(size), SharedDecoder(size))


@pytest.mark.parametrize('positions', ['sincos_1d', 'learned'])
def test_a_class_token_with_a_position_is_one_token_more(positions):
    x = CASES['audio'][1]
    plain = AudioTokenizer((4, 2), positions=positions, class_token=True, modality_token=True)
    counted = AudioTokenizer((4, 2), positions, modality_token=True, class_token=True, class_position=True)
    cut, grid = plain.cut(x), plain.grid(x.shape)
    one, two = (t.init(jax.random.key(0), cut, grid, None, 12, 'float32') for t in (plain, counted))
    token = np.arange(12.0, dtype=np.float32)
    for params in (one, two):
        params['params'] |= {'class_token': token, 'modality_token': 2 * token}
    first = np.asarray(plain.apply(one, cut, grid, None, 12, 'float32'))[:, 0]
    np.testing.assert_array_equal(first, [token, token])
    table = sincos_1d(5, 12) if positions == 'sincos_1d' else two['params']['positions']['table']
    out = np.asarray(counted.apply(two, cut, grid, None, 12, 'float32'))
    assert out.shape == (2, 5, 12)
    np.testing.assert_allclose(out[:, 0], np.stack([3 * token + np.asarray(table)[0]] * 2), rtol=1e-5)
    embedded = np.asarray(cut) @ np.asarray(two['params']['embedding']['kernel']) + 2 * token
    np.testing.assert_allclose(out[:, 1:], embedded + np.asarray(table)[None, 1:], rtol=1e-4, atol=1e-5)


def test_a_class_position_needs_a_class_token_and_a_sequence():
    with pytest.raises(ValueError, match='class_token=True'):
        AudioTokenizer((4, 2), class_position=True)
    tokenizer, x = AudioTokenizer((4, 2), 'sincos_2d', class_token=True, class_position=True), CASES['audio'][1]
    with pytest.raises(ValueError, match="positions='sincos_2d' have no place for a class token"):
        tokenizer.init(jax.random.key(0), tokenizer.cut(x), tokenizer.grid(x.shape), None, 12, 'float32')


def test_a_spectrogram_is_repeated_for_a_stem_of_three_channels():
    x = CASES['audio'][1]
    tokenizer = AudioTokenizer((4, 2), channels=3)
    cut = tokenizer.cut(x)
    np.testing.assert_array_equal(cut, tokenizer.cut(np.stack([x] * 3, axis=-1)))
    assert cut.shape == (2, 4, 24) and tokenizer.grid((2, 8, 4, 3)) == (2, 2)
    with pytest.raises(ValueError, match='channels=3 do not fit'):
        tokenizer.cut(np.stack([x] * 2, axis=-1))


def test_positions_that_do_not_fit_the_grid_are_refused():
    tokenizer, x = AudioTokenizer((4, 2), positions='sincos_3d'), CASES['audio'][1]
    with pytest.raises(ValueError, match='grid of 2 axes'):
        tokenizer.init(jax.random.key(0), tokenizer.cut(x), tokenizer.grid(x.shape), None, 12, 'float32')

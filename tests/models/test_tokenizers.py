import jax
import numpy as np
import pytest

from avmae_jax.models.tokenizers import AudioTokenizer, ImageTokenizer, VideoTokenizer

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


def test_positions_that_do_not_fit_the_grid_are_refused():
    tokenizer, x = AudioTokenizer((4, 2), positions='sincos_3d'), CASES['audio'][1]
    with pytest.raises(ValueError, match='grid of 2 axes'):
        tokenizer.init(jax.random.key(0), tokenizer.cut(x), tokenizer.grid(x.shape), None, 12, 'float32')

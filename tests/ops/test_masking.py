import jax
import numpy as np
import pytest

from avmae_jax.ops import masking

GRIDS = {'video': (4, 3, 5), 'audio': (6, 4), 'image': (4, 4)}
CASES = [(modality, name) for modality, names in masking.STRATEGIES.items() for name in names]


def draw(modality, name, ratio=0.5, seed=0, batch_size=3):
    axes = masking.drawn_axes(modality, name)
    key = jax.random.key(seed)
    return masking.draw_mask(key, batch_size=batch_size, grid=GRIDS[modality], axes=axes, mask_ratio=ratio)


@pytest.mark.parametrize('modality, name', CASES)
def test_every_token_is_kept_or_hidden_exactly_once(modality, name):
    order = np.asarray(masking.token_order(draw(modality, name)))
    num_tokens = int(np.prod(GRIDS[modality]))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(num_tokens), order.shape))


@pytest.mark.parametrize('modality, name', CASES)
def test_rows_and_keys_get_masks_of_their_own(modality, name):
    rows = [tuple(np.sort(row)) for seed in range(4) for row in np.asarray(draw(modality, name, seed=seed).hidden)]
    assert len(set(rows)) > len(rows) // 3


@pytest.mark.parametrize(
    'modality, name, shared', [('video', 'tube', 0), ('audio', 'time', 1), ('audio', 'frequency', 0)]
)
def test_structured_masks_are_constant_along_the_other_axis(modality, name, shared):
    mask = draw(modality, name)
    hidden = np.zeros((3, int(np.prod(GRIDS[modality]))))
    np.put_along_axis(hidden, np.asarray(mask.hidden), 1, axis=1)
    hidden = np.moveaxis(hidden.reshape(3, *GRIDS[modality]), 1 + shared, 1)
    assert (hidden == hidden[:, :1]).all()


def test_the_published_ratios_keep_the_published_numbers_of_tokens():
    assert 1568 - masking.num_hidden(1568, 0.9) == 157
    assert 496 - masking.num_hidden(496, 0.7) == 149


@pytest.mark.parametrize('ratio', [0.0, 0.01, 1.0])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    with pytest.raises(ValueError, match='mask_ratio'):
        draw('image', 'random', ratio)


def test_an_unknown_strategy_is_answered_with_the_right_ones():
    with pytest.raises(ValueError, match='frequency.*random.*time'):
        masking.drawn_axes('audio', 'tube')


def test_reordering_and_back_changes_nothing_nor_does_its_gradient():
    order = masking.token_order(draw('image', 'random'))
    inverse = masking.inverse_order(order)
    tokens = np.random.default_rng(0).normal(size=(3, 16, 2)).astype(np.float32)
    there = masking.reorder_tokens(tokens, order, inverse)
    np.testing.assert_array_equal(masking.reorder_tokens(there, inverse, order), tokens)
    weight = np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)
    ours = jax.grad(lambda x: (masking.reorder_tokens(x, order, inverse) * weight).sum())(tokens)
    plain = jax.grad(lambda x: (masking.take_tokens(x, order) * weight).sum())(tokens)
    np.testing.assert_array_equal(ours, plain)

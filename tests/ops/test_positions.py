import numpy as np
import pytest

from avmae_jax.ops import positions


@pytest.mark.parametrize('kind, grid', [('sincos_1d', (2, 3, 4)), ('sincos_2d', (3, 4)), ('sincos_3d', (2, 3, 4))])
def test_every_token_has_a_position_of_its_own(kind, grid):
    table = positions.TABLES[kind](grid, 48)
    assert table.shape == (np.prod(grid), 48)
    assert len(np.unique(table.round(5), axis=0)) == len(table)


def test_a_longer_sequence_begins_like_a_shorter_one():
    np.testing.assert_array_equal(positions.sincos_1d(10, 8)[:6], positions.sincos_1d(6, 8))


def test_the_axes_of_a_grid_have_channels_of_their_own():
    table = positions.sincos_grid((2, 3, 4), 24).reshape(2, 3, 4, 6, 4)  # Channels of t, t, x, x, y, y.
    assert (table[..., :2, :] == table[:, :1, :1, :2]).all()
    assert (table[..., 2:4, :] == table[:1, :1, :, 2:4]).all()
    assert (table[..., 4:, :] == table[:1, :, :1, 4:]).all()


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match='divisible by 6'):
        positions.sincos_grid((2, 2, 2), 32)

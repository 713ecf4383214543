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


def test_a_table_on_a_finer_grid_and_back_is_what_it_was_and_keeps_its_corners():
    table = np.random.default_rng(0).normal(size=(2 * 3, 4)).astype(np.float32)
    finer = positions.resize_table(table, (2, 3), (3, 5))
    np.testing.assert_allclose(positions.resize_table(finer, (3, 5), (2, 3)), table, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(finer.reshape(3, 5, 4)[::2, ::4], table.reshape(2, 3, 4)[:, ::2])
    np.testing.assert_allclose(finer.reshape(3, 5, 4)[1, 1], table.reshape(2, 3, 4)[:, :2].mean((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(positions.resize_table(table, (2, 3), (2, 3)), table)


def test_one_place_is_repeated_and_many_become_their_middle():
    table = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    repeated = positions.resize_table(table, (1, 3), (4, 3)).reshape(4, 3, 2)
    np.testing.assert_array_equal(repeated, np.stack([table] * 4))
    np.testing.assert_array_equal(positions.resize_table(table, (3,), (1,)), table[1:2])
    with pytest.raises(ValueError, match='3 places on the grid'):
        positions.resize_table(table, (2, 3), (2, 3))

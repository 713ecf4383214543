import numpy as np
import pytest

from avmae_jax.ops import patches


@pytest.mark.parametrize('dims, patch', [((4, 8, 6), (2, 4, 3)), ((6, 4), (3, 2)), ((5,), (1,))])
def test_unpatchify_undoes_patchify(dims, patch):
    x = np.random.default_rng(0).normal(size=(2, *dims, 3)).astype(np.float32)
    cut = patches.patchify(x, patch)
    np.testing.assert_array_equal(patches.unpatchify(cut, patches.patch_grid(dims, patch), patch), x)


def test_tokens_run_over_time_then_height_then_width():
    video = np.zeros((1, 4, 6, 8, 3), np.float32)
    video[0, 2:4, 0:2, 6:8] = 1  # Second tubelet in time, first row, fourth column.
    cut = np.asarray(patches.patchify(video, (2, 2, 2)))
    assert cut.shape == (1, 2 * 3 * 4, 2 * 2 * 2 * 3)
    assert list(np.flatnonzero(cut.sum(-1)[0])) == [1 * 12 + 0 * 4 + 3]


def test_what_does_not_fill_a_patch_is_left_out():
    x = np.random.default_rng(0).normal(size=(1, 5, 7, 1)).astype(np.float32)
    np.testing.assert_array_equal(patches.patchify(x, (2, 3)), patches.patchify(x[:, :4, :6], (2, 3)))


@pytest.mark.parametrize('stride', [(2, 3), (1, 4), (5, 2)])
def test_patches_with_a_stride_are_windows_at_that_distance(stride):
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 3)).astype(np.float32)
    rows, columns = (range(0, size - patch + 1, step) for size, patch, step in zip((9, 8), (4, 3), stride, strict=True))
    wanted = [x[:, i : i + 4, j : j + 3].reshape(2, -1) for i in rows for j in columns]
    np.testing.assert_array_equal(patches.patchify(x, (4, 3), stride), np.stack(wanted, axis=1))
    assert patches.patch_grid((9, 8), (4, 3), stride) == (len(rows), len(columns))
    with pytest.raises(ValueError, match='one entry of 1 or more'):
        patches.patch_grid((9, 8), (4, 3), (0, 2))


def test_a_patch_larger_than_the_input_is_refused():
    with pytest.raises(ValueError, match='use a smaller patch'):
        patches.patch_grid((4, 4), (8, 2))


def test_the_central_frame_of_a_tubelet_is_that_frame_cut_alone():
    video = np.random.default_rng(0).normal(size=(1, 6, 4, 4, 3)).astype(np.float32)
    central = patches.central_frame(patches.patchify(video, (3, 2, 2)), (3, 2, 2))
    np.testing.assert_array_equal(central, patches.patchify(video[:, 1::3], (1, 2, 2)))


def test_grayscale_keeps_shapes_and_makes_colours_equal():
    cut = patches.patchify(np.random.default_rng(0).uniform(size=(1, 4, 4, 3)).astype(np.float32), (2, 2))
    gray = np.asarray(patches.to_grayscale(cut)).reshape(1, 4, 4, 3)
    np.testing.assert_array_equal(gray[..., 0], gray[..., 2])
    white = np.asarray(patches.to_grayscale(np.ones_like(cut)))
    np.testing.assert_allclose(white, 0.9999, rtol=1e-6)

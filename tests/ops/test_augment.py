import colorsys
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.ops import augment
from avmae_jax.ops.preprocess import Preprocess
from avmae_jax.ops.rand_augment import RandAugment
from avmae_jax.structs import Batch


def seeds(count, start=0):
    return np.random.default_rng(start).integers(0, 2**32, (count, 2), dtype=np.uint32)


def pixels(count, *shape):
    return np.random.default_rng(1).random((count, *shape, 3)).astype(np.float32)


def log_mels(count, frames=50, bins=20):
    return 1 + np.random.default_rng(2).random((count, frames, bins)).astype(np.float32)  # Nowhere 0.


ALWAYS = augment.ColorJitter(jitter_ratio=1.0)
AUGMENTATIONS = {
    'color': (ALWAYS, pixels(6, 2, 4, 4)),
    'rand': (functools.partial(RandAugment(num_ops=3, op_ratio=1.0), fill=(0.4, 0.5, 0.6)), pixels(6, 2, 7, 5)),
    'erase': (augment.RandomErasing(ratio=0.7), pixels(6, 2, 7, 5)),
    'gray': (augment.ColorJitter(jitter_ratio=0.5, drop_ratio=0.5), pixels(6, 4, 4)),
    'spec': (augment.SpecAugment(frequency_width=6, time_width=9), log_mels(6)),
    'shift': (augment.shift_time, log_mels(6)),
}


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_a_row_is_changed_by_its_own_seed_alone(name):
    change, x = AUGMENTATIONS[name]
    order = np.array([4, 0, 5])
    np.testing.assert_allclose(change(x, seeds(6))[order], change(x[order], seeds(6)[order]), atol=1e-6)
    assert not np.array_equal(change(x, seeds(6)), change(x, seeds(6, start=1)))


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_rows_are_changed_where_they_lie(name):
    change, x = AUGMENTATIONS[name]
    x, given = np.repeat(x[:4], 2, axis=0), seeds(8)
    mesh = jax.make_mesh((8,), ('rows',), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P('rows'))
    compiled = jax.jit(change, in_shardings=sharding, out_shardings=sharding).lower(x, given).compile()
    assert not any(word in compiled.as_text() for word in ('all-gather', 'all-reduce', 'collective-permute'))
    np.testing.assert_allclose(compiled(*jax.device_put((x, given), sharding)), change(x, given), atol=1e-5)


# -- Colours --


def test_hue_and_saturation_are_those_of_hsv():
    x = pixels(5, 3, 3)
    x[0, 0, 0], x[1, 0, 0], x[2, 0, 0] = (0.3, 0.3, 0.3), (0, 0, 0), (1, 1, 0)
    saturation, hue = np.array([0.5, 1.5, 1.0, 0.0, 4.0]), np.array([0.1, -0.3, 0.5, 0.2, 0.0])
    ours = augment.turn_colors(x, saturation.astype(np.float32), hue.astype(np.float32))
    for row in range(5):
        for place in np.ndindex(3, 3):
            h, s, v = colorsys.rgb_to_hsv(*x[row][place])
            theirs = colorsys.hsv_to_rgb((h + hue[row]) % 1, min(1, s * saturation[row]), v)
            np.testing.assert_allclose(ours[row][place], theirs, atol=2e-6)


def test_all_frames_of_a_clip_are_seen_in_the_same_light():
    still = np.repeat(pixels(8, 1, 4, 4), 3, axis=1)
    still[:, 2, :2], still[:, 2, 2:] = still[:, 0, 1::-1], 0  # Some of the same pixels at other places, and darkness.
    seen = ALWAYS(still, seeds(8))
    np.testing.assert_array_equal(seen[:, 0], seen[:, 1])
    np.testing.assert_allclose(seen[:, 2, :2], seen[:, 0, 1::-1], atol=1e-6)
    assert seen.min() >= 0 and seen.max() <= 1


def test_each_setting_changes_what_it_is_named_after():
    off = {'brightness': 0.0, 'contrast': 0.0, 'saturation': 0.0, 'hue': 0.0}
    x, given = 0.3 + 0.4 * pixels(40, 4, 4), seeds(40)
    only = lambda **on: np.asarray(augment.ColorJitter(jitter_ratio=1.0, **{**off, **on})(x, given))  # noqa: E731
    np.testing.assert_allclose(only(), x, atol=1e-6)
    added = only(brightness=0.2) - x
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1, :1], added.shape), atol=1e-6)
    assert 0.15 < added.max() <= 0.2 and -0.2 <= added.min() < -0.15
    stretched = only(contrast=0.4)
    np.testing.assert_allclose(stretched.mean((1, 2)), x.mean((1, 2)), atol=1e-5)
    factor = (stretched.std((1, 2)) / x.std((1, 2))).mean(-1)
    assert 0.6 <= factor.min() < 0.75 and 1.25 < factor.max() <= 1.4
    np.testing.assert_allclose(only(hue=0.2).max(-1), x.max(-1), atol=1e-6)  # The value of HSV stays,
    np.testing.assert_allclose(only(hue=0.2).min(-1), x.min(-1), atol=1e-6)  # and so does the chroma.
    np.testing.assert_allclose(only(saturation=0.3).max(-1), x.max(-1), atol=1e-6)


def test_shares_of_rows_are_jittered_and_turned_gray():
    x = pixels(400, 2, 2)
    seen = np.asarray(augment.ColorJitter(jitter_ratio=0.8, drop_ratio=0.1)(x, seeds(400)))
    gray = np.ptp(seen, axis=-1).max((1, 2)) < 1e-6
    same = np.isclose(seen, x, atol=1e-6).all((1, 2, 3))
    assert 20 < gray.sum() < 64  # 40 expected, four standard deviations.
    assert 40 < same.sum() < 104  # 0.2 * 0.9 of 400.
    np.testing.assert_array_equal(augment.ColorJitter(0.0, 0.0)(x, seeds(400)), x)


# -- Erased rectangles --


def erased(ratio=1.0, count=200, shape=(24, 20), **settings):
    x = np.full((count, *shape, 3), 9.0, np.float32)  # No noise of deviation 1 comes that high.
    gone = np.asarray(augment.RandomErasing(ratio, **settings)(x, seeds(count))) != x
    assert (gone.all(-1) == gone.any(-1)).all()
    return gone[..., 0]


def test_a_share_of_pictures_loses_a_rectangle_of_every_permitted_size_and_place():
    gone = erased(count=400)
    lines, columns = gone.any(2), gone.any(1)
    np.testing.assert_array_equal(gone, lines[:, :, None] & columns[:, None, :])
    for side in (lines, columns):  # In one piece.
        assert (np.abs(np.diff(side.astype(int), axis=1)).sum(1) <= 2).all()
    area, aspect = gone.mean((1, 2)), lines.sum(1) / columns.sum(1)
    # Sides are rounded to whole pixels; areas are drawn evenly, aspects by their logarithm.
    assert area.min() > 0.01 and 0.3 < area.max() < 0.36 and abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.02
    assert 0.2 < aspect.min() < 0.45 and 2.5 < aspect.max() < 4.5 and abs(np.median(np.log(aspect))) < 0.2
    assert lines[:, 0].any() and lines[:, -1].any() and columns[:, 0].any() and columns[:, -1].any()
    assert 70 < erased(0.25, count=400).any((1, 2)).sum() < 135  # 100 expected, four standard deviations.
    assert not erased(0.0).any() and (erased(area=(0.5, 0.5)).mean((1, 2)) > 0.45).all()


def test_what_is_erased_is_noise_of_every_pixel_and_stays_in_all_frames():
    x = np.full((60, 2, 24, 20, 3), 9.0, np.float32)
    seen = np.asarray(augment.RandomErasing(1.0)(x, seeds(60)))
    np.testing.assert_array_equal(seen[:, 0], seen[:, 1])
    noise = seen[:, 0][seen[:, 0] != 9]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and len(np.unique(noise)) > 0.99 * len(noise)


# -- Log-mels --


def covered(before, after):
    """Which frames and which bins are silenced as a whole; all else must be as it was."""
    gone = np.asarray(after) == 0
    frames, bins = gone.all(2), gone.all(1)
    np.testing.assert_array_equal(gone, frames[:, :, None] | bins[:, None, :])
    np.testing.assert_array_equal(np.where(gone, 0, before), after)
    return frames.sum(1), bins.sum(1)


def test_masks_silence_whole_bins_and_whole_frames_and_nothing_else():
    x = log_mels(300, frames=120, bins=64)
    masks = augment.SpecAugment(frequency_masks=1, frequency_width=12, time_masks=1, time_width=30)
    frames, bins = covered(x, masks(x, seeds(300)))
    assert (frames.max(), bins.max()) == (30, 12) and (frames.min(), bins.min()) == (0, 0)
    # All widths alike: the mean is half of the largest, within four standard deviations.
    assert abs(bins.mean() - 6) < 0.9 and abs(frames.mean() - 15) < 2.1


def test_masks_come_everywhere_alike():
    x = log_mels(600, frames=8, bins=4)
    gone = np.asarray(augment.SpecAugment(0, 0, time_masks=1, time_width=1)(x, seeds(600))) == 0
    assert (gone.all(2).sum(1) <= 1).all()
    assert gone.all(2).sum(0).min() > 15  # 300 masks of one frame on 8 places.


def test_as_much_is_masked_as_in_the_public_reference(reference):
    file = reference / 'data' / 'specaugment_stats.json'
    if not file.exists():
        pytest.skip(f'{file} is not there.')
    for name, case in json.loads(file.read_text()).items():
        theirs = case['params']
        if theirs['time_warp_max_ratio']:
            continue
        x = log_mels(64, frames=1000, bins=128)
        masks = augment.SpecAugment(
            frequency_masks=theirs['freq_mask_count'],
            frequency_width=theirs['freq_mask_max_bins'],
            time_masks=theirs['time_mask_count'],
            time_width=theirs['time_mask_max_frames'],
            time_ratio=theirs['time_mask_max_ratio'],
        )
        frames, bins = covered(x, masks(x, seeds(64)))
        # One standard deviation of the mean of 64 is about 2 bins and 3.5 frames; both means are drawn.
        assert abs(bins.mean() - case['mean_masked_mel_bins']) < 9, name
        assert abs(frames.mean() - case['mean_masked_time_rows']) < 18, name
        assert (frames.max() == 0) == (case['max_masked_time_rows'] == 0), name


def test_a_time_mask_covers_at_most_its_ratio_of_all_frames():
    x = log_mels(200, frames=40)
    frames, _ = covered(x, augment.SpecAugment(0, 0, time_masks=1, time_width=30, time_ratio=0.1)(x, seeds(200)))
    assert frames.max() == 4


def test_shifting_goes_around_and_loses_nothing():
    x = log_mels(100, frames=10, bins=3)
    shifted, starts = np.asarray(augment.shift_time(x, seeds(100))), []
    for before, after in zip(x, shifted, strict=True):
        (start,) = [k for k in range(10) if np.array_equal(np.roll(before, -k, axis=0), after)]
        starts.append(start)
    assert set(starts) == set(range(10))


# -- Lost modalities --


def batch(count, video=True, audio=True):
    present = {'video': np.broadcast_to(video, count), 'audio': np.broadcast_to(audio, count)}
    media = {'video': np.full((count, 2, 4, 4, 3), 9, np.uint8), 'audio': np.full((count, 32, 8), 3, np.float32)}
    zeros = np.zeros(count, np.int32)
    return Batch(media, present, {}, zeros, seeds(count), np.ones(count, np.float32), zeros)


def test_a_row_loses_one_modality_or_none_but_never_both():
    given = batch(600)
    seen = augment.lose_modality(given, 0.3)
    video, audio = (np.asarray(seen.present[m]) for m in ('video', 'audio'))
    assert (video | audio).all()
    lost = [(~video).sum(), (~audio).sum()]
    assert all(55 < count < 128 for count in lost)  # 90 expected, four standard deviations.
    for m, there in (('video', video), ('audio', audio)):
        np.testing.assert_array_equal(seen.media[m][there], given.media[m][there])
        assert not np.asarray(seen.media[m])[~there].any() and seen.media[m].dtype == given.media[m].dtype


def test_a_row_keeps_the_only_modality_it_has():
    has_video = np.arange(50) % 2 == 0
    seen = augment.lose_modality(batch(50, video=has_video, audio=~has_video), 1.0)
    np.testing.assert_array_equal(seen.present['video'], has_video)
    np.testing.assert_array_equal(seen.present['audio'], ~has_video)
    assert (np.asarray(augment.lose_modality(batch(50), 1.0).present['video']) != has_video).any()
    jax.tree.map(np.testing.assert_array_equal, augment.lose_modality(batch(50), 0.0), batch(50))


def test_without_a_modality_no_row_has_it_and_the_others_are_what_they_were():
    has_video = np.arange(6) % 2 == 0
    given = batch(6, video=has_video)
    seen = jax.jit(augment.without, static_argnums=1)(given, 'audio')
    assert not np.asarray(seen.present['audio']).any() and not np.asarray(seen.media['audio']).any()
    assert seen.media['audio'].dtype == given.media['audio'].dtype
    # Rows that have nothing else have nothing.
    np.testing.assert_array_equal(seen.present['video'], has_video)
    np.testing.assert_array_equal(seen.media['video'], given.media['video'])
    assert given.present['audio'].all() and given.media['audio'].all()
    with pytest.raises(ValueError, match=r"'image' cannot be left out of clips that hold \['audio', 'video'\]"):
        augment.without(given, 'image')


# -- Within preprocessing --

CHANGING = {
    'rand_augment': RandAugment(op_ratio=1.0),
    'color_jitter': augment.ColorJitter(jitter_ratio=1.0),
    'random_erasing': augment.RandomErasing(ratio=1.0),
    'time_shift': True,
    'spec_augment': augment.SpecAugment(frequency_width=4, time_width=9),
}


@pytest.mark.parametrize('name', CHANGING)
def test_training_alone_is_augmented_and_its_own_modality_alone(name):
    given = batch(16)
    given.media['audio'][...] = log_mels(16, 32, 8)
    given.media['video'][...] = (255 * pixels(16, 2, 4, 4)).astype(np.uint8)
    plain = Preprocess(convention='stored', num_mel_bins=8, flip=False)
    changing = Preprocess(convention='stored', num_mel_bins=8, flip=False, **{name: CHANGING[name]})
    wanted, seen = plain(given, train=True), changing(given, train=True)
    own = 'audio' if name in ('time_shift', 'spec_augment') else 'video'
    for m in wanted:
        assert np.array_equal(seen[m], wanted[m]) == (m != own)
        np.testing.assert_array_equal(changing(given, train=False)[m], plain(given, train=False)[m])


def test_a_row_without_a_modality_is_in_training_what_it_is_in_evaluation():
    preprocess = Preprocess(convention='stored', num_mel_bins=8, **CHANGING)
    missing = batch(8, video=False, audio=False)
    missing = missing._replace(media=jax.tree.map(np.zeros_like, missing.media))
    jax.tree.map(np.testing.assert_array_equal, preprocess(missing, train=True), preprocess(missing, train=False))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r'drop_ratio .* \[0, 1\]; got 2'):
        augment.ColorJitter(drop_ratio=2)
    with pytest.raises(ValueError, match=r'hue .* \[0, 0.5\]; got 0.7'):
        augment.ColorJitter(hue=0.7)
    with pytest.raises(ValueError, match=r'ratio of random erasing .* \[0, 1\]; got 2'):
        augment.RandomErasing(ratio=2)
    with pytest.raises(ValueError, match=r'area of random erasing .* got \(0.5, 0.1\)'):
        augment.RandomErasing(area=(0.5, 0.1))
    with pytest.raises(ValueError, match='time_masks of SpecAugment must not be below 0; got -1'):
        augment.SpecAugment(time_masks=-1)
    with pytest.raises(ValueError, match=r'\[0, 1\]; got 1.5'):
        augment.lose_modality(batch(2), 1.5)
    assert jnp.isfinite(ALWAYS(np.zeros((1, 2, 2, 3), np.float32), seeds(1))).all()

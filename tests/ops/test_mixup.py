import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.ops import mixup


def seeds(count, start=0):
    return np.random.default_rng(start).integers(0, 2**32, (count, 2), dtype=np.uint32)


ONES = {'video': np.ones(8, np.float32), 'audio': np.ones(8, np.float32)}


def inputs(count=8):
    rng = np.random.default_rng(1)
    return {
        'video': rng.random((count, 2, 6, 4, 3)).astype(np.float32),
        'audio': rng.random((count, 5, 4)).astype(np.float32),
    }


def test_inputs_and_labels_are_mixed_as_in_the_public_reference(reference):
    file = reference / 'data' / 'mixup.npz'
    if not file.exists():
        pytest.skip(f'{file} is not there.')
    arrays = np.load(file)
    for mixmod in (True, False):
        prefix = f'mixmod={mixmod}'
        for name, weight in zip(('rgb', 'spectrogram'), arrays[f'{prefix}/weights_rgb_spectrogram'], strict=True):
            row_weights = jnp.full(4, weight)
            for ours, theirs in (
                (arrays[f'input/{name}'], arrays[f'{prefix}/inputs/{name}']),
                (arrays['input/label'], arrays[f'{prefix}/label/{name}']),
            ):
                np.testing.assert_allclose(mixup.blend(ours, row_weights), theirs, atol=1e-6)


def test_rectangles_are_cut_as_in_the_public_reference(reference):
    file = reference / 'data' / 'mixup.npz'
    if not file.exists():
        pytest.skip(f'{file} is not there.')
    arrays, found = np.load(file), 0
    x = arrays['mixup_cutmix/input']
    cases = sorted(name.split('/')[1] for name in arrays if name.startswith('mixup_cutmix/') and 'inputs' in name)
    for case in cases:
        theirs = arrays[f'mixup_cutmix/{case}/inputs']
        inside = np.isclose(theirs, x[::-1]).all(-1)
        if not inside.any():
            continue  # Blended, not cut.
        found += 1
        np.testing.assert_allclose(mixup.cut(x, inside), theirs, atol=1e-6)
    assert found


def test_one_share_for_all_modalities_or_one_for_each():
    together = mixup.Mixup(0.5).draw(seeds(8), ['video', 'audio'])
    np.testing.assert_array_equal(together['video'], together['audio'])
    apart = mixup.Mixup(0.5, per_modality=True).draw(seeds(8), ['video', 'audio'])
    assert not np.isclose(apart['video'], apart['audio']).any()
    alone = mixup.Mixup(0.5, per_modality=True).draw(seeds(8), ['audio'])
    np.testing.assert_array_equal(alone['audio'], apart['audio'])


@pytest.mark.parametrize('alpha', [0.5, 1.0, 2.0])
def test_shares_are_drawn_from_a_beta_distribution(alpha):
    weight = np.asarray(mixup.Mixup(alpha).draw(seeds(4000), ['audio'])['audio'])
    assert ((weight >= 0) & (weight <= 1)).all()
    deviation = (1 / (4 * (2 * alpha + 1))) ** 0.5
    assert abs(weight.mean() - 0.5) < 4 * deviation / 4000**0.5
    assert weight.std() == pytest.approx(deviation, rel=0.05)


def test_a_share_is_a_function_of_the_seed_of_its_row():
    draw = functools.partial(mixup.Mixup(0.5).draw, modalities=['audio'])
    order = [5, 2, 7]
    np.testing.assert_array_equal(draw(seeds(8)[order])['audio'], draw(seeds(8))['audio'][np.array(order)])


def test_a_row_that_stays_whole_gets_nothing_of_its_partner_even_if_that_is_not_finite():
    x = np.array([[1.0], [2.0]], np.float32)
    np.testing.assert_array_equal(mixup.blend(x, jnp.ones(2)), x)
    np.testing.assert_array_equal(mixup.blend(x, jnp.zeros(2)), x[::-1])


@pytest.mark.parametrize('per_modality', [False, True])
def test_rows_that_lack_a_modality_neither_give_nor_get_it(per_modality):
    counts = {'video': np.ones(8, np.float32), 'audio': np.ones(8, np.float32)}
    counts['audio'][1] = 0  # Its partner is row 6.
    counts['video'][0] = counts['audio'][0] = 0  # Padding; its partner is row 7.
    weight = mixup.draw_mixing(seeds(8), inputs(), counts, mixup.Mixup(0.5, per_modality)).weight
    np.testing.assert_array_equal(weight['audio'][np.array([0, 1, 6, 7])], 1)
    np.testing.assert_array_equal(weight['video'][np.array([0, 7])], 1)
    assert (np.asarray(weight['video'])[[1, 6]] < 1).all() == per_modality
    assert (np.asarray(weight['audio'])[2:6] < 1).all()


def test_rectangles_lie_within_the_picture_and_have_the_drawn_area():
    inside = np.asarray(mixup.CutMix(alpha=1.0, ratio=1.0).draw(seeds(500), 12, 20))
    rows, columns = inside.any(2), inside.any(1)
    np.testing.assert_array_equal(inside, rows[:, :, None] & columns[:, None, :])
    for one in (rows, columns):
        assert (np.abs(np.diff(one.astype(int), axis=1)).sum(1) <= 2).all()  # One piece.
    # Uniform areas, of which what falls over the edge is lost: between a quarter of one half, and one half.
    assert 0.25 < inside.mean() < 0.45
    assert inside.mean(0).min() > 0.07  # Everywhere: an eighth of the rows in the corners.
    share = (~np.asarray(mixup.CutMix(ratio=0.25).draw(seeds(500), 12, 20)).any((1, 2))).mean()
    assert 0.67 < share < 0.86


@pytest.mark.parametrize('modality', ['image', 'video'])
def test_the_label_follows_the_area_that_was_cut(modality):
    """Every row is one constant, its own number, so that the mean of a picture says how much is whose."""
    shape = (8, 6, 6, 3) if modality == 'image' else (8, 2, 6, 6, 3)
    number = np.arange(8, dtype=np.float32)
    x = np.broadcast_to(number.reshape(8, *(1,) * (len(shape) - 1)), shape)
    counts = {modality: np.ones(8, np.float32)}
    mixing = mixup.draw_mixing(seeds(8), {modality: x}, counts, mixup.Mixup(1.0), mixup.CutMix(ratio=0.5))
    mixed = np.asarray(mixup.mix(x, modality, mixing)).reshape(8, -1).mean(1)
    np.testing.assert_allclose(mixed, mixup.blend(number, mixing.weight[modality]), rtol=1e-5)
    cut = np.asarray(mixing.inside).any((1, 2))
    assert 0 < cut.sum() < 8
    values = [len(np.unique(np.asarray(mixup.mix(x, modality, mixing))[i])) for i in range(8)]
    assert all(values[i] == 1 for i in range(8) if not cut[i]) and any(values[i] == 2 for i in range(8) if cut[i])


def test_sound_is_blended_by_the_area_of_the_picture_when_they_share_a_label():
    counts = ONES
    mixing = mixup.draw_mixing(seeds(8), inputs(), counts, mixup.Mixup(0.5), mixup.CutMix(ratio=1.0))
    np.testing.assert_array_equal(mixing.weight['audio'], mixing.weight['video'])
    np.testing.assert_allclose(mixing.weight['video'], 1 - np.asarray(mixing.inside).mean((1, 2)), rtol=1e-6)
    apart = mixup.draw_mixing(seeds(8), inputs(), counts, mixup.Mixup(0.5, True), mixup.CutMix(ratio=1.0))
    assert not np.isclose(apart.weight['audio'], apart.weight['video']).all()


def test_pairs_are_the_same_on_any_number_of_devices():
    mesh = jax.make_mesh((8,), ('rows',), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P('rows'))

    def step(seed, given, counts):
        mixing = mixup.draw_mixing(seed, given, counts, mixup.Mixup(0.5, True), mixup.CutMix())
        return {m: mixup.mix(x, m, mixing) for m, x in given.items()}

    given = (seeds(8), inputs(), ONES)
    alone = step(*given)
    spread = jax.jit(step, in_shardings=sharding, out_shardings=sharding)(*jax.device_put(given, sharding))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), spread, alone)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match='alpha of mixup must be above 0; got 0'):
        mixup.Mixup(0)
    with pytest.raises(ValueError, match='cutmix needs an alpha'):
        mixup.CutMix(ratio=1.5)
    with pytest.raises(ValueError, match='one modality with pictures'):
        audio = {'audio': inputs()['audio']}
        mixup.draw_mixing(seeds(8), audio, {'audio': ONES['audio']}, None, mixup.CutMix())

"""Each operation against Pillow's arithmetic, written out here pixel by pixel; then how they are drawn and combined."""

import functools
import math

import jax
import numpy as np
import pytest

from avmae_jax.ops import rand_augment
from avmae_jax.ops.rand_augment import ENHANCED, LOOKED_UP, MOVED, NOTHING, OPERATIONS, RandAugment

FILL = (124, 116, 104)


def seeds(count, start=0):
    return np.random.default_rng(start).integers(0, 2**32, (count, 2), dtype=np.uint32)


def picture(kind, height=23, width=31):
    rng = np.random.default_rng(height)
    noise = rng.integers(0, 256, (height, width, 3))
    slope = np.add.outer(7 * np.arange(height), 5 * np.arange(width))[..., None] * np.array([1, 2, 0.5])
    return {'noise': noise, 'dull': 90 + noise // 8, 'slope': slope.astype(int) % 256, 'flat': 0 * noise + 77}[kind]


def gray_of(rgb):
    red, green, blue = (int(x) for x in rgb)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def table_of(name, channel, strength):
    """What Pillow's point() gets for one channel."""
    counts = [int((channel == level).sum()) for level in range(256)]
    there = [level for level in range(256) if counts[level]]
    if name == 'autocontrast':
        low, high = there[0], there[-1]
        return [i if low == high else min(255, max(0, (i - low) * 255 // (high - low))) for i in range(256)]
    if name == 'equalize':
        step = (channel.size - counts[there[-1]]) // 255
        starts = [step // 2 + sum(counts[:i]) for i in range(256)]
        return [min(255, start // step) for start in starts] if len(there) > 1 and step else list(range(256))
    if name == 'posterize':
        mask = ~(2 ** (8 - max(1, 4 - int(4 * strength))) - 1)
        return [i & mask for i in range(256)]
    return [
        {
            'invert': 255 - i,
            'solarize': i if i < 256 - int(256 * strength) else 255 - i,
            'solarize_add': min(255, i + min(128, int(110 * strength))) if i < 128 else i,
        }[name]
        for i in range(256)
    ]


def without(name, image):
    """The picture without what the operation enhances."""
    height, width, _ = image.shape
    gray = np.array([[[gray_of(rgb)] * 3 for rgb in line] for line in image])
    if name == 'sharpness':
        smooth = image.copy()
        for y in range(1, height - 1):
            for x in range(1, width - 1):
                around = image[y - 1 : y + 2, x - 1 : x + 2].sum((0, 1)) + 4 * image[y, x]
                smooth[y, x] = np.floor(around / 13 + 0.5)
        return smooth
    return {'color': gray, 'contrast': 0 * gray + int(gray.mean() + 0.5), 'brightness': 0 * gray}[name]


def read_at(image, x, y, fill):
    height, width, _ = image.shape
    if not (0 <= x < width and 0 <= y < height):
        return np.asarray(fill, float)
    x, y = x - 0.5, y - 0.5
    left, top = math.floor(x), math.floor(y)
    value = np.zeros(3)
    for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            value += weight_x * weight_y * image[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
    return value


def place_of(name, x, y, signed, height, width):
    """Where Pillow's rotate() and transform() read."""
    if name == 'rotate':
        angle, u, v = math.radians(30 * signed), x - width / 2, y - height / 2
        return (
            math.cos(angle) * u - math.sin(angle) * v + width / 2,
            math.sin(angle) * u + math.cos(angle) * v + height / 2,
        )
    return {
        'shear_x': (x + 0.3 * signed * y, y),
        'shear_y': (x, y + 0.3 * signed * x),
        'translate_x': (x + 0.45 * signed * width, y),
        'translate_y': (x, y + 0.45 * signed * height),
    }[name]


def wanted(name, image, strength, sign, fill=FILL):
    """float [h w 3]: the operation done by Pillow's rules, for lists of numbers."""
    height, width, _ = image.shape
    if name in LOOKED_UP:
        tables = [table_of(name, image[..., c], strength) for c in range(3)]
        return np.stack([np.array(tables[c])[image[..., c]] for c in range(3)], axis=-1).astype(float)
    if name in ENHANCED:
        factor = np.float32(max(0.1, 1 + 0.9 * strength * sign))
        degenerate = without(name, image).astype(np.float32)
        return np.floor(np.clip(degenerate + factor * (image.astype(np.float32) - degenerate), 0, 255))
    places = [
        [place_of(name, x + 0.5, y + 0.5, strength * sign, height, width) for x in range(width)] for y in range(height)
    ]
    return np.array([[read_at(image, *place, fill) for place in line] for line in places])


def done(operations, image, strengths, signs):
    """The same by ours, of one picture or clip, one operation after the other."""
    which = np.array([[OPERATIONS.index(name) for name in operations]], np.int32)
    strength, sign = (np.asarray([values], np.float32) for values in (strengths, signs))
    levels = image[None].astype(np.float32)
    for k in range(len(operations)):
        levels = rand_augment.change_colors(levels, which[:, k], strength[:, k], sign[:, k])
    places = rand_augment.place_matrices(which, strength * sign, *image.shape[-3:-1])
    return np.asarray(rand_augment.move(levels, places, np.asarray(FILL, np.float32)))[0]


@pytest.mark.parametrize('name', OPERATIONS)
def test_an_operation_is_what_pillow_does(name):
    rng = np.random.default_rng(1)
    for kind in ('noise', 'dull', 'slope', 'flat'):
        strength, sign = rng.uniform(0.1, 1), rng.choice([-1, 1])
        image = picture(kind)
        found, theirs = done([name], image, [strength], [sign]), wanted(name, image, strength, sign)
        # Pillow cuts off what comes after the point; ours are not rounded where places are moved.
        np.testing.assert_allclose(found, theirs, atol=0.02 if name in MOVED else 1e-6, err_msg=kind)


def test_operations_follow_each_other_and_places_are_moved_once():
    image = picture('noise')
    colors = ['color', 'equalize', 'sharpness']
    strengths, signs = [0.7, 0.2, 0.9], [1, -1, 1]
    theirs = image
    for name, strength, sign in zip(colors, strengths, signs, strict=True):
        theirs = wanted(name, theirs, strength, sign).astype(int)
    np.testing.assert_allclose(done(colors, image, strengths, signs), theirs, atol=1e-6)
    # Forth and back by whole pixels: only what was interpolated in between would be lost, and nothing is.
    strength = 4 / (0.45 * image.shape[1])
    found = done(['translate_x', 'translate_x', 'invert'], image, [strength, strength, 1], [1, -1, 1])
    np.testing.assert_allclose(found, 255 - image, atol=1e-2)
    turned = done(['rotate', 'shear_y'], image, [0.8, 0.6], [1, -1])
    height, width, _ = image.shape
    for y, x in ((3, 4), (6, 9), (9, 12)):
        # What is done last is asked first where it reads.
        place = place_of('shear_y', x + 0.5, y + 0.5, -0.6, height, width)
        place = place_of('rotate', *place, 0.8, height, width)
        np.testing.assert_allclose(turned[y, x], read_at(image, *place, FILL), atol=0.02)


@pytest.mark.parametrize('name', OPERATIONS)
def test_a_clip_is_changed_as_one_picture_of_all_its_frames(name):
    still = np.stack([picture('dull')] * 3)
    if name != 'equalize':  # Which rounds by the number of pixels.
        found = done([name], still, [0.8], [-1])
        np.testing.assert_allclose(found, np.stack([done([name], still[0], [0.8], [-1])] * 3), atol=1e-5)
    if name in LOOKED_UP:  # Equal pixels stay equal, whatever frame they are of.
        moving = np.concatenate([picture('noise')[None], picture('slope')[None]])
        pairs = {}
        for before, after in zip(moving.reshape(-1, 3), done([name], moving, [0.8], [-1]).reshape(-1, 3), strict=True):
            for channel in range(3):
                assert pairs.setdefault((channel, before[channel]), after[channel]) == after[channel]


def test_every_operation_is_drawn_alike_and_half_of_them_done():
    which, strength, sign = (np.asarray(x) for x in RandAugment().draw(seeds(3000)))
    assert which.shape == (3000, 2)
    counts = np.bincount(which.ravel(), minlength=NOTHING + 1)
    assert abs(counts[NOTHING] - 3000) < 155  # Four standard deviations.
    assert (np.abs(counts[:NOTHING] - 200) < 56).all()
    assert abs(sign.mean()) < 0.06 and set(np.unique(sign)) == {-1.0, 1.0}
    assert abs(strength.mean() - 0.9) < 0.004 and abs(strength.std() - 0.05) < 0.004 and strength.max() <= 1
    apart = np.corrcoef(which[:, 0], which[:, 1])[0, 1], np.corrcoef(strength[:, 0], strength[:, 1])[0, 1]
    assert np.abs(apart).max() < 0.08
    _, always, _ = RandAugment(magnitude=3, magnitude_std=0, op_ratio=1).draw(seeds(5))
    np.testing.assert_allclose(always, 0.3, atol=1e-6)


def test_what_is_done_is_what_was_drawn_and_without_any_nothing_changes():
    x = np.stack([picture('noise')] * 6).astype(np.float32) / 255
    augment, given = RandAugment(num_ops=1, op_ratio=1.0), seeds(6)
    seen = augment(x, given, fill=tuple(value / 255 for value in FILL))
    for row, (which, strength, sign) in enumerate(
        zip(*(np.asarray(v)[:, 0] for v in augment.draw(given)), strict=True)
    ):
        theirs = wanted(OPERATIONS[which], picture('noise'), float(strength), float(sign))
        np.testing.assert_allclose(255 * seen[row], theirs, atol=0.02)
    np.testing.assert_allclose(RandAugment(op_ratio=0.0)(x, given, fill=(0, 0, 0)), x, atol=1e-6)
    assert seen.min() >= 0 and seen.max() <= 1


@pytest.mark.parametrize('shape', [(1, 1), (2, 3), (3, 3)])
def test_pictures_may_be_small(shape):
    x = np.random.default_rng(0).random((40, *shape, 3)).astype(np.float32)
    augment = functools.partial(RandAugment(op_ratio=1.0), fill=(0.5, 0.5, 0.5))
    assert np.isfinite(jax.jit(augment)(x, seeds(40))).all()


@pytest.mark.parametrize(
    'setting, message',
    [
        ({'num_ops': 0}, 'num_ops of RandAugment must be at least 1; got 0. Without it, leave the section out'),
        ({'magnitude': 11}, r'magnitude of RandAugment must lie in \[0, 10\]; got 11'),
        ({'magnitude_std': -1}, 'magnitude_std of RandAugment must not be below 0; got -1'),
        ({'op_ratio': 1.5}, r'op_ratio of RandAugment must lie in \[0, 1\]; got 1.5'),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        RandAugment(**setting)

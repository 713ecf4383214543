"""RandAugment (Cubuk et al. 2020) on the device, with the operations and strengths that ViTs are finetuned with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt32

from avmae_jax.ops import rows
from avmae_jax.structs import Array

# Each row of pixels is looked up in a table of 256 values a channel,
LOOKED_UP = ('autocontrast', 'equalize', 'invert', 'posterize', 'solarize', 'solarize_add')
# or moved away from, or towards, a picture with less of what the operation is called after,
ENHANCED = ('color', 'contrast', 'brightness', 'sharpness')
# or read at other places.
MOVED = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')
OPERATIONS = LOOKED_UP + ENHANCED + MOVED
NOTHING = len(OPERATIONS)

LEVELS = np.arange(256, dtype=np.float32)[None, None]  # In a shape that goes with tables [b c 256].

# At the largest magnitude (timm's `rand-...-inc1`: changes grow with the magnitude).
LARGEST_MAGNITUDE = 10
ANGLE_DEGREES, SHEAR, TRANSLATION, ENHANCEMENT = 30.0, 0.3, 0.45, 0.9  # Translation: of height or width.


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """A few operations one after the other, each drawn from all alike: other colours, other places.

    The defaults are those of the image MAE's finetuning (He et al. 2022, table 9: RandAug (9, 0.5)), in timm's words
    rand-m9-mstd0.5-inc1. All frames of a clip go through the same operations, whose statistics are of the whole clip.
    Colours are those of Pillow, on whole numbers from 0 to 255. Places are moved once, by all that was drawn for them,
    at the end: a picture is interpolated once (bilinear, as Pillow does it), and what comes in from outside has no
    part in the statistics and keeps its colour.

    Attributes:
      num_ops: operations drawn for a row.
      magnitude: how strong they are, in [0, 10].
      magnitude_std: the deviation of each one's magnitude.
      op_ratio: how likely each operation that was drawn is done.
    """

    num_ops: int = 2
    magnitude: int | float = 9.0
    magnitude_std: int | float = 0.5
    op_ratio: int | float = 0.5

    def __post_init__(self):
        if self.num_ops < 1:
            raise ValueError(
                f'num_ops of RandAugment must be at least 1; got {self.num_ops}. Without it, leave the section out.'
            )
        if not 0 <= self.magnitude <= LARGEST_MAGNITUDE:
            raise ValueError(f'magnitude of RandAugment must lie in [0, {LARGEST_MAGNITUDE}]; got {self.magnitude}.')
        if self.magnitude_std < 0:
            raise ValueError(f'magnitude_std of RandAugment must not be below 0; got {self.magnitude_std}.')
        if not 0 <= self.op_ratio <= 1:
            raise ValueError(f'op_ratio of RandAugment must lie in [0, 1]; got {self.op_ratio}.')

    def __call__(
        self, pixels: Float[Array, 'b *thw 3'], seed: UInt32[Array, 'b 2'], fill: Sequence[int | float]
    ) -> Float[Array, 'b *thw 3']:
        """Pixels in [0, 1] to pixels in [0, 1].

        Args:
          fill: RGB in [0, 1] of what comes in from outside.
        """
        which, strength, sign = self.draw(seed)
        levels = jnp.round(255 * pixels)
        for k in range(self.num_ops):
            levels = change_colors(levels, which[:, k], strength[:, k], sign[:, k])
        height, width = pixels.shape[-3:-1]
        places = place_matrices(which, strength * sign, height, width)
        return move(levels, places, 255 * jnp.asarray(fill, jnp.float32)) / 255

    def draw(
        self, seed: UInt32[Array, 'b 2']
    ) -> tuple[Int[Array, 'b ops'], Float[Array, 'b ops'], Float[Array, 'b ops']]:
        """(which of OPERATIONS, or NOTHING; its strength in [0, 1]; 1 or -1) for each row, in order."""

        def draw_one(key: jax.Array) -> tuple[Array, Array]:
            key, magnitude_key = jax.random.split(key)
            return jax.random.uniform(key, (3, self.num_ops)), jax.random.normal(magnitude_key, (self.num_ops,))

        drawn, deviation = jax.vmap(draw_one)(rows.row_keys(seed, rows.RAND_AUGMENT))
        which = jnp.floor(drawn[:, 0] * len(OPERATIONS)).astype(jnp.int32)
        which = jnp.where(drawn[:, 1] < self.op_ratio, which, NOTHING)
        magnitude = jnp.clip(self.magnitude + self.magnitude_std * deviation, 0, LARGEST_MAGNITUDE)
        return which, magnitude / LARGEST_MAGNITUDE, jnp.where(drawn[:, 2] < 0.5, -1.0, 1.0)


# -- Colours --


def change_colors(
    levels: Float[Array, 'b *thw 3'], which: Int[Array, 'b'], strength: Float[Array, 'b'], sign: Float[Array, 'b']
) -> Float[Array, 'b *thw 3']:
    """One operation on each row; levels are whole numbers from 0 to 255, and so is what comes out.

    All operations are computed for all rows: those with tables on their 256 values, not on the pixels.
    """
    flat = levels.reshape(len(levels), -1, 3)
    table = jnp.broadcast_to(LEVELS, (len(levels), 3, 256))
    for name, other in make_tables(count_levels(flat), strength).items():
        table = jnp.where(rows.per_row(which == OPERATIONS.index(name), table), other, table)
    levels = look_up(table, flat).reshape(levels.shape)
    degenerate = levels
    for name, other in make_degenerates(levels).items():
        degenerate = jnp.where(rows.per_row(which == OPERATIONS.index(name), levels), other, degenerate)
    factor = rows.per_row(jnp.maximum(0.1, 1 + ENHANCEMENT * strength * sign), levels)
    return jnp.floor(jnp.clip(degenerate + factor * (levels - degenerate), 0, 255))


def count_levels(levels: Float[Array, 'b n c']) -> Float[Array, 'b c 256']:
    """How often each level occurs in a channel."""

    def by_comparing(levels: Array) -> Array:
        return jnp.sum(levels[..., None, :] == LEVELS[..., None], axis=-1, dtype=jnp.float32)

    def by_adding(levels: Array) -> Array:
        return jax.vmap(jax.vmap(lambda x: jnp.zeros(256, jnp.float32).at[x].add(1)))(levels.astype(jnp.int32))

    # A TPU adds and reads at scattered places one by one; 256 comparisons a value never leave its registers. Elsewhere
    # they would be written to memory.
    return jax.lax.platform_dependent(levels.swapaxes(1, 2), tpu=by_comparing, default=by_adding)


def look_up(table: Float[Array, 'b c 256'], levels: Float[Array, 'b n c']) -> Float[Array, 'b n c']:
    """table[row, channel, level]"""

    def by_comparing(table: Array, levels: Array) -> Array:
        return jnp.sum(jnp.where(levels[..., None] == LEVELS[None], table[..., None, :], 0), axis=-1)

    def by_reading(table: Array, levels: Array) -> Array:
        return jnp.take_along_axis(table, levels.astype(jnp.int32), axis=-1)

    found = jax.lax.platform_dependent(table, levels.swapaxes(1, 2), tpu=by_comparing, default=by_reading)
    return found.swapaxes(1, 2)


def make_tables(counts: Float[Array, 'b c 256'], strength: Float[Array, 'b']) -> dict[str, Float[Array, 'b #c 256']]:
    """What each level becomes under the operations LOOKED_UP.

    Args:
      counts: how often each level occurs.
    """
    level = LEVELS
    strength = strength[:, None, None]
    bits_lost = jnp.minimum(7, 4 + jnp.floor(4 * strength))  # Of 8: without any, the picture would be black.
    threshold = 256 - jnp.floor(256 * strength)
    added = jnp.minimum(128, jnp.floor(110 * strength))
    return {
        'autocontrast': _stretched(counts),
        'equalize': _equalized(counts),
        'invert': jnp.broadcast_to(255 - level, counts.shape),
        'posterize': jnp.floor(level / 2**bits_lost) * 2**bits_lost,
        'solarize': jnp.where(level < threshold, level, 255 - level),
        'solarize_add': jnp.where(level < 128, jnp.minimum(255, level + added), level),
    }


def _stretched(counts: Float[Array, 'b c 256']) -> Float[Array, 'b c 256']:
    """The darkest level of a channel becomes 0 and the brightest 255."""
    level = LEVELS
    low = jnp.min(jnp.where(counts > 0, level, 255), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(counts > 0, level, 0), axis=-1, keepdims=True)
    stretched = (level - low) * 255 / jnp.where(high > low, high - low, 255)
    # Rounding must not make 254 of what is 255.
    return jnp.where(high > low, jnp.clip(jnp.floor(stretched + 1e-3), 0, 255), level)


def _equalized(counts: Float[Array, 'b c 256']) -> Float[Array, 'b c 256']:
    """All levels of a channel become about equally frequent."""
    level = LEVELS
    last = jnp.max(jnp.where(counts > 0, level, 0), axis=-1, keepdims=True).astype(jnp.int32)
    of_last = jnp.take_along_axis(counts, last, axis=-1)
    step = jnp.floor((jnp.sum(counts, axis=-1, keepdims=True) - of_last) / 255)
    before = jnp.cumsum(counts, axis=-1) - counts
    spread = jnp.floor((jnp.floor(step / 2) + before) / jnp.maximum(step, 1))
    return jnp.where(step > 0, jnp.minimum(spread, 255), level)


def make_degenerates(levels: Float[Array, 'b *thw 3']) -> dict[str, Float[Array, 'b ...']]:
    """The picture without what the operations ENHANCED change: without colours, contrast, light, sharpness."""
    whole = levels.astype(jnp.int32)
    gray = (19595 * whole[..., :1] + 38470 * whole[..., 1:2] + 7471 * whole[..., 2:] + 2**15) // 2**16
    gray = gray.astype(jnp.float32)
    mean = jnp.mean(gray, axis=tuple(range(1, gray.ndim)), keepdims=True)
    return {
        'color': gray,
        'contrast': jnp.floor(mean + 0.5),
        'brightness': jnp.zeros((), jnp.float32),
        'sharpness': _smoothed(levels),
    }


def _smoothed(levels: Float[Array, 'b *thw 3']) -> Float[Array, 'b *thw 3']:
    """A weighted mean with the eight neighbours; the outermost pixels have not all of them, and stay."""
    height, width = levels.shape[-3:-1]
    if min(height, width) < 3:
        return levels
    total = 4 * levels[..., 1:-1, 1:-1, :]
    for i in range(3):
        for j in range(3):
            total += levels[..., i : height - 2 + i, j : width - 2 + j, :]
    return levels.at[..., 1:-1, 1:-1, :].set(jnp.floor(total / 13 + 0.5))


# -- Places --


def place_matrices(
    which: Int[Array, 'b ops'], signed: Float[Array, 'b ops'], height: int, width: int
) -> Float[Array, 'b 3 3']:
    """Where each place (x, y, 1) of a picture, in pixels from its corner, is to be read in the one that was given."""
    zero, one = jnp.zeros_like(signed), jnp.ones_like(signed)

    def matrix(*entries: Any) -> Float[Array, 'b ops 3 3']:
        return jnp.stack([*entries, zero, zero, one], axis=-1).reshape(*signed.shape, 3, 3)

    angle = -jnp.deg2rad(ANGLE_DEGREES * signed)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2  # The centre stays.
    of = {
        'rotate': matrix(cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y),
        'shear_x': matrix(one, SHEAR * signed, zero, zero, one, zero),
        'shear_y': matrix(one, zero, zero, SHEAR * signed, one, zero),
        'translate_x': matrix(one, zero, TRANSLATION * width * signed, zero, one, zero),
        'translate_y': matrix(one, zero, zero, zero, one, TRANSLATION * height * signed),
    }
    each = matrix(one, zero, zero, zero, one, zero)
    for name, other in of.items():
        each = jnp.where((which == OPERATIONS.index(name))[..., None, None], other, each)
    total = each[:, 0]
    for k in range(1, which.shape[1]):  # Read backwards: what is done last is asked first.
        total = jnp.einsum('bij,bjk->bik', total, each[:, k], precision='highest')
    return total


def move(
    pixels: Float[Array, 'b *thw 3'], places: Float[Array, 'b 3 3'], fill: Float[Array, '3']
) -> Float[Array, 'b *thw 3']:
    """Each pixel is what lies at its place, between the centres of four others; all frames of a clip alike."""
    height, width = pixels.shape[-3:-1]
    lines, columns = jnp.arange(height)[:, None] + 0.5, jnp.arange(width)[None] + 0.5
    frames = pixels.reshape(len(pixels), -1, *pixels.shape[-3:])

    def move_one(frames: Float[Array, 't h w 3'], place: Float[Array, '3 3']) -> Float[Array, 't h w 3']:
        x = place[0, 0] * columns + place[0, 1] * lines + place[0, 2]
        y = place[1, 0] * columns + place[1, 1] * lines + place[1, 2]
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
        right_share, lower_share = (x - 0.5 - left)[None, ..., None], (y - 0.5 - top)[None, ..., None]
        # The four are laid side by side, so that each place is read once.
        wide = jnp.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='edge')
        four = jnp.stack([wide[:, i : height + 1 + i, j : width + 1 + j] for i in (0, 1) for j in (0, 1)], axis=3)
        row, column = jnp.clip(top + 1, 0, height), jnp.clip(left + 1, 0, width)
        four = four[:, row.astype(jnp.int32), column.astype(jnp.int32)]
        upper = four[..., 0, :] * (1 - right_share) + four[..., 1, :] * right_share
        lower = four[..., 2, :] * (1 - right_share) + four[..., 3, :] * right_share
        moved = upper * (1 - lower_share) + lower * lower_share
        return jnp.where(inside[None, ..., None], moved, fill[None, None, None])

    return jax.vmap(move_one)(frames, places).reshape(pixels.shape)

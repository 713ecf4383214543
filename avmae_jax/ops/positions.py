"""Fixed tables of where a token is: sines and cosines over the flattened sequence, or over each axis of the grid.

Fixed tables are numpy constants: they depend on shapes alone, and every device may have its copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def sincos_1d(num_tokens: int, width: int) -> Float[np.ndarray, 'n d']:
    """Position along the flattened sequence; even channels are sines and odd ones cosines (Vaswani et al., 2017)."""
    if width % 2:
        raise ValueError(f'sincos_1d needs an even width; got {width}.')
    frequency = np.exp(-np.arange(0, width, 2) * (math.log(1e4) / width))
    angle = np.arange(num_tokens)[:, None] * frequency
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(num_tokens, width).astype(np.float32)


def sincos_grid(grid: Sequence[int], width: int) -> Float[np.ndarray, 'n d']:
    """Position along each axis of the grid in its own share of the channels, sines first.

    The axes come as (x, y) for a picture and (t, x, y) for a video, x being the width, as in the published models.
    """
    parts = 2 * len(grid)
    if width % parts:
        raise ValueError(f'sincos_{len(grid)}d needs a width divisible by {parts}; got {width}.')
    frequency = 1e4 ** (-np.arange(width // parts) / (width / parts))
    places = np.meshgrid(*(np.arange(size) for size in grid), indexing='ij')
    *leading, y, x = places
    angles = [place.reshape(-1, 1) * frequency for place in (*leading, x, y)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def sincos_flat(grid: Sequence[int], width: int) -> Float[np.ndarray, 'n d']:
    """`sincos_1d` over the tokens of a grid in token order."""
    return sincos_1d(math.prod(grid), width)


def resize_table(
    table: Float[np.ndarray, 'n d'], grid: Sequence[int], new_grid: Sequence[int]
) -> Float[np.ndarray, 'm d']:
    """A learned table on another grid, linear along each axis; the first and the last place of an axis stay those.

    What has one place along an axis is repeated along it.
    """
    if len(grid) != len(new_grid) or math.prod(grid) != len(table):
        raise ValueError(f'A table of {len(table)} places on the grid {tuple(grid)} cannot become {tuple(new_grid)}.')
    values = np.asarray(table).reshape(*grid, -1)
    for axis, (old, new) in enumerate(zip(grid, new_grid, strict=True)):
        place = np.linspace(0, old - 1, new) if new > 1 else np.asarray([(old - 1) / 2])
        lower = np.floor(place).astype(int)
        upper = np.minimum(lower + 1, old - 1)
        share = (place - lower).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        values = values.take(lower, axis) * (1 - share) + values.take(upper, axis) * share
    return values.reshape(math.prod(new_grid), -1).astype(table.dtype)


TABLES = {'sincos_1d': sincos_flat, 'sincos_2d': sincos_grid, 'sincos_3d': sincos_grid}

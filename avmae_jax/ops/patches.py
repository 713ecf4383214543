"""Cut media into patches and put them back; THE token order of the whole project.

Tokens run over the first axis of the grid slowest and the last fastest: time, height, width for video, time then
frequency for sound, height then width for images. The values inside a patch keep that order too, colour last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from avmae_jax.structs import Array


def patch_grid(dims: Sequence[int], patch: Sequence[int], stride: Sequence[int] | None = None) -> tuple[int, ...]:
    """How many whole patches fit along each axis; what is left over at the end of an axis is not used.

    `stride` is the distance from patch to patch; None: they lie side by side.
    """
    if len(dims) != len(patch):
        raise ValueError(f'patch={tuple(patch)} must have one entry for each of the {len(dims)} axes of {tuple(dims)}.')
    steps = patch if stride is None else stride
    if len(steps) != len(patch) or min(steps) < 1:
        raise ValueError(f'stride={tuple(steps)} must have one entry of 1 or more for each of {tuple(patch)}.')
    grid = tuple(max(0, (dim - size) // step + 1) for dim, size, step in zip(dims, patch, steps, strict=True))
    if 0 in grid:
        raise ValueError(f'patch={tuple(patch)} is larger than the input {tuple(dims)}: use a smaller patch.')
    return grid


def patchify(
    x: Float[Array, 'b *dims c'], patch: Sequence[int], stride: Sequence[int] | None = None
) -> Float[Array, 'b n v']:
    """One row of values per patch, in token order; patches overlap where `stride` is less than their size."""
    grid = patch_grid(x.shape[1:-1], patch, stride)
    num_axes = len(grid)
    if stride is None:
        x = x[(slice(None), *(slice(g * p) for g, p in zip(grid, patch, strict=True)))]
        interleaved = [size for pair in zip(grid, patch, strict=True) for size in pair]
        x = x.reshape(x.shape[0], *interleaved, x.shape[-1])
    else:
        for i, (count, size, step) in enumerate(zip(grid, patch, stride, strict=True)):
            x = jnp.take(x, np.arange(count)[:, None] * step + np.arange(size), axis=1 + 2 * i)
    grid_axes = [1 + 2 * i for i in range(num_axes)]
    patch_axes = [2 + 2 * i for i in range(num_axes)]
    x = x.transpose(0, *grid_axes, *patch_axes, 1 + 2 * num_axes)
    return x.reshape(x.shape[0], math.prod(grid), math.prod(patch) * x.shape[-1])


def unpatchify(patches: Float[Array, 'b n v'], grid: Sequence[int], patch: Sequence[int]) -> Float[Array, 'b *dims c']:
    """Undoes `patchify` (the cropped remainder of an axis stays lost)."""
    num_axes = len(grid)
    channels = patches.shape[-1] // math.prod(patch)
    x = patches.reshape(patches.shape[0], *grid, *patch, channels)
    order = [axis for i in range(num_axes) for axis in (1 + i, 1 + num_axes + i)]
    x = x.transpose(0, *order, 1 + 2 * num_axes)
    return x.reshape(x.shape[0], *(g * p for g, p in zip(grid, patch, strict=True)), channels)


def central_frame(patches: Float[Array, 'b n v'], patch: Sequence[int]) -> Float[Array, 'b n w']:
    """The frame in the middle of each tubelet, as patches of one frame."""
    frames = patch[0]
    values = patches.shape[-1] // frames
    start = frames // 2 * values
    return patches[..., start : start + values]


def to_grayscale(patches: Float[Array, 'b n v']) -> Float[Array, 'b n v']:
    """Replaces each colour by its luma (ITU-R BT.601), three times over, so that shapes stay as they are."""
    pixels = patches.reshape(*patches.shape[:-1], -1, 3)
    luma = jnp.dot(pixels, jnp.asarray([0.2989, 0.5870, 0.1140], pixels.dtype))
    return jnp.repeat(luma[..., None], 3, axis=-1).reshape(patches.shape)

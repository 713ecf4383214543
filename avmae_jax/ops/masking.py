"""Which tokens to hide, and taking and moving tokens by index.

A mask hides the same number of tokens in every row, so shapes are static: `hidden = int(mask_ratio * choices)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from avmae_jax.structs import Array, Mask

# Which axes of the token grid the draw is over; along the others every token shares its fate.
# The grid is (time, height, width), (time, frequency) or (height, width), by modality.
STRATEGIES: dict[str, dict[str, tuple[int, ...]]] = {
    'video': {'random': (0, 1, 2), 'tube': (1, 2)},
    'audio': {'random': (0, 1), 'time': (0,), 'frequency': (1,)},
    'image': {'random': (0, 1)},
}


def drawn_axes(modality: str, masking: str) -> tuple[int, ...]:
    """The axes a named strategy draws over, or an error that names the right ones."""
    if masking not in STRATEGIES[modality]:
        names = sorted(STRATEGIES[modality])
        raise ValueError(f'masking of {modality} must be one of {names}; got {masking!r}.')
    return STRATEGIES[modality][masking]


def num_hidden(num_choices: int, mask_ratio: float) -> int:
    """How many of `num_choices` are hidden; at least one is hidden and one is kept, or there is nothing to learn."""
    hidden = int(mask_ratio * num_choices)
    if not 0 < hidden < num_choices:
        raise ValueError(
            f'mask_ratio={mask_ratio} of {num_choices} places hides {hidden}: choose a ratio that hides at least one '
            'place and keeps at least one.'
        )
    return hidden


def draw_mask(rng: jax.Array, *, batch_size: int, grid: Sequence[int], axes: Sequence[int], mask_ratio: float) -> Mask:
    """Hides a share of the places along `axes` of the grid, the same along all other axes, row by row at random.

    All axes: plain random masking. The space of a video: tubes, so that nothing can be copied from its neighbour in
    time. The time of a spectrogram: whole moments; its frequency: whole bands.
    """
    choices = math.prod(grid[axis] for axis in axes)
    hidden = num_hidden(choices, mask_ratio)
    order = jnp.argsort(jax.random.uniform(rng, (batch_size, choices)), axis=-1).astype(jnp.int32)
    if len(axes) == len(grid):
        return Mask(kept=order[:, hidden:], hidden=order[:, :hidden])
    # tokens_of[c] lists the tokens that share the fate of choice c; sorted afterwards, so that neighbours in memory
    # stay neighbours.
    others = [axis for axis in range(len(grid)) if axis not in axes]
    tokens_of = np.arange(math.prod(grid), dtype=np.int32).reshape(grid).transpose(*axes, *others).reshape(choices, -1)

    def expand(chosen: Int[Array, 'b k']) -> Int[Array, 'b _m']:
        return jnp.sort(jnp.asarray(tokens_of)[chosen].reshape(batch_size, -1), axis=-1)

    return Mask(kept=expand(order[:, hidden:]), hidden=expand(order[:, :hidden]))


def draw_order(rng: jax.Array, *, batch_size: int, num_tokens: int) -> Int[Array, 'b n']:
    """A random permutation for each row."""
    return jnp.argsort(jax.random.uniform(rng, (batch_size, num_tokens)), axis=-1).astype(jnp.int32)


def take_tokens(tokens: Float[Array, 'b n d'], index: Int[Array, 'b k']) -> Float[Array, 'b k d']:
    """The tokens at `index`, row by row."""
    return jnp.take_along_axis(tokens, index[..., None], axis=1, mode='promise_in_bounds')


def take_rows(table: Float[Array, 'n d'], index: Int[Array, 'b k']) -> Float[Array, 'b k d']:
    """Rows of one table shared by the batch, such as positions."""
    return jnp.asarray(table).at[index].get(mode='promise_in_bounds')


def token_order(mask: Mask) -> Int[Array, 'b n']:
    """Every token once: the kept ones first, in the encoder's order, then the hidden ones."""
    return jnp.concatenate([mask.kept, mask.hidden], axis=1)


@jax.custom_vjp
def reorder_tokens(
    tokens: Float[Array, 'b n d'], order: Int[Array, 'b n'], inverse: Int[Array, 'b n']
) -> Float[Array, 'b n d']:
    """Token `order[b, i]` of each row comes to place i; `inverse` undoes `order`.

    The gradient of a general gather is a scatter, which runs one row at a time on CPU and in random order on GPU. That
    of a permutation is the inverse permutation, hence the second index.
    """
    return take_tokens(tokens, order)


def _reorder_forward(tokens, order, inverse):
    return take_tokens(tokens, order), (order, inverse)


def _reorder_backward(residuals, gradient):
    order, inverse = residuals
    return take_tokens(gradient, inverse), None, None


reorder_tokens.defvjp(_reorder_forward, _reorder_backward)


def inverse_order(order: Int[Array, 'b n']) -> Int[Array, 'b n']:
    """The permutation that undoes `order`."""
    return jnp.argsort(order, axis=-1).astype(jnp.int32)

"""From media to tokens with positions: tubelets of video, patches of a spectrogram, patches of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Int

from avmae_jax.models.blocks import Dense
from avmae_jax.ops import masking, patches, positions
from avmae_jax.ops.dense import last_axis, spread
from avmae_jax.structs import Array


class Positions(nn.Module):
    """Where a token is, added to what it is.

    Attributes:
      kind: 'sincos_1d' (over the flattened sequence), 'sincos_2d', 'sincos_3d' (over the axes of the grid), 'learned'
        (a table over the sequence), 'learned_space_time' (one table over places and one over moments, added).
      grid: tokens along each axis.
      in_front: tokens before those of the grid that have a place in the sequence too.
    """

    kind: str
    grid: tuple[int, ...]
    width: int
    in_front: int = 0

    @nn.compact
    def __call__(self) -> Float[Array, 'n d']:
        num_tokens = self.in_front + math.prod(self.grid)
        if self.in_front and self.kind not in ('sincos_1d', 'learned'):
            raise ValueError(
                f"positions={self.kind!r} have no place for a class token: choose 'sincos_1d' or 'learned', or "
                'class_position=False.'
            )
        if self.kind == 'sincos_1d':
            return positions.TABLES[self.kind]((num_tokens,), self.width)
        if self.kind in positions.TABLES:
            if self.kind != f'sincos_{len(self.grid)}d':
                raise ValueError(
                    f"positions={self.kind!r} do not fit a grid of {len(self.grid)} axes; try 'sincos_1d'."
                )
            return positions.TABLES[self.kind](self.grid, self.width)
        init = nn.initializers.normal(stddev=0.02)
        if self.kind == 'learned':
            return self.param('table', init, (num_tokens, self.width))
        if self.kind == 'learned_space_time':
            time = self.param('time', init, (self.grid[0], self.width))
            space = self.param('space', init, (math.prod(self.grid[1:]), self.width))
            return (time[:, None] + space[None]).reshape(-1, self.width)
        known = [*positions.TABLES, 'learned', 'learned_space_time']
        raise ValueError(f'positions must be one of {known}; got {self.kind!r}.')


class Tokenizer(nn.Module):
    """Patches of one modality -> tokens.

    Attributes:
      patch: size of a patch along each axis of the grid. The one place where it is written.
      positions: kind of positions, see `Positions`.
      modality_token: adds a learned vector that says which modality a token is of.
      class_token: puts a learned token before the others.
      class_position: the class token is one token more, with the first position and the modality token, as in MBT;
        otherwise it has neither, as in the image MAE.
      distillation_token: puts a second learned token behind the class token, alike in everything else (DeiT, AST).
      stride: distance from patch to patch along each axis; None: they lie side by side.
    """

    patch: tuple[int, ...]
    positions: str = 'sincos_1d'
    modality_token: bool = False
    class_token: bool = False
    class_position: bool = False
    distillation_token: bool = False
    stride: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.distillation_token and not self.class_token:
            raise ValueError('distillation_token=True needs class_token=True, behind which it comes.')
        if self.class_position and not self.class_token:
            raise ValueError('class_position=True needs class_token=True: there is no class token to have a position.')

    @property
    def num_in_front(self) -> int:
        """Tokens before those of the grid."""
        return int(self.class_token) + int(self.distillation_token)

    @nn.nowrap
    def grid(self, shape: Sequence[Any]) -> tuple[int, ...]:
        """Tokens along each axis for an input of this shape (with its batch dimension, of whatever kind)."""
        return patches.patch_grid(self.axes_of(shape), self.patch, self.stride)

    @nn.nowrap
    def axes_of(self, shape: Sequence[Any]) -> tuple[int, ...]:
        """The sizes of the axes that are cut, from the shape of an input."""
        return tuple(shape[1:-1])

    @nn.nowrap
    def cut(self, x: Float[Array, 'b ...']) -> Float[Array, 'b n v']:
        """The values of every patch, float32."""
        return patches.patchify(jnp.asarray(x, jnp.float32), self.patch, self.stride)

    @nn.nowrap
    def asked(self, cut: Float[Array, 'b n v']) -> Float[Array, 'b n w']:
        """The part of each patch that is to be reconstructed: all of it."""
        return cut

    @nn.nowrap
    def join(self, values: Float[Array, 'b n v'], grid: Sequence[int]) -> Float[Array, 'b ...']:
        """Puts patches back in their places; undoes `cut`, for patches that do not overlap."""
        return patches.unpatchify(values, grid, self.patch)

    @nn.compact
    def __call__(
        self,
        cut: Float[Array, 'b n v'],
        grid: tuple[int, ...],
        kept: Int[Array, 'b k'] | None,
        width: int,
        dtype: str,
    ) -> Float[Array, 'b _ d']:
        """Tokens of the kept patches (None: of all); those that were hidden are never embedded."""
        in_front = self.num_in_front if self.class_position else 0
        table = jnp.asarray(Positions(self.positions, grid, width, in_front, name='positions')())
        first, table = table[:in_front], table[in_front:]
        if kept is not None:
            cut = masking.take_tokens(cut, kept)
        table = table[None] if kept is None else masking.take_rows(table, kept)
        # Scenic's stems are convolutions with flax's default initialiser.
        embedding = Dense(width, dtype, kernel_init=nn.initializers.lecun_normal(), name='embedding')
        tokens = embedding(cut)
        tokens = tokens + spread(table, tokens.shape, dtype)
        if self.modality_token:
            modality_token = self.param('modality_token', nn.initializers.zeros, (width,))
            tokens = tokens + spread(last_axis(modality_token, tokens), tokens.shape, dtype)
        names = ('class_token', 'distillation_token')[: self.num_in_front]
        in_front_of_all = []
        for i, name in enumerate(names):
            token = self.param(name, nn.initializers.zeros, (width,))
            if self.class_position:
                token = token + first[i]
                token = token + modality_token if self.modality_token else token
            in_front_of_all.append(spread(last_axis(token, tokens), (tokens.shape[0], 1, width), dtype))
        return jnp.concatenate([*in_front_of_all, tokens], axis=1) if names else tokens


class VideoTokenizer(Tokenizer):
    """Tubelets of a video [b t h w 3]; `patch` is (frames, height, width).

    Attributes:
      central_frame: only the middle frame of each tubelet is to be reconstructed.
    """

    central_frame: bool = False

    @nn.nowrap
    def asked(self, cut: Float[Array, 'b n v']) -> Float[Array, 'b n w']:
        return patches.central_frame(cut, self.patch) if self.central_frame else cut


class AudioTokenizer(Tokenizer):
    """Patches of a spectrogram [b s f], or [b s f c]; `patch` is (time bins, mel bins).

    Attributes:
      channels: values of a bin; a spectrogram of one value each is repeated. 3 is for stems that were made for
        pictures.
    """

    channels: int = 1

    @nn.nowrap
    def axes_of(self, shape: Sequence[Any]) -> tuple[int, ...]:
        return tuple(shape[1:3])

    @nn.nowrap
    def cut(self, x: Float[Array, 'b ...']) -> Float[Array, 'b n v']:
        x = jnp.asarray(x, jnp.float32)
        if x.ndim == 3:
            x = jnp.broadcast_to(x[..., None], (*x.shape, self.channels))
        if x.shape[-1] != self.channels:
            raise ValueError(f'channels={self.channels} do not fit a spectrogram of shape {x.shape}.')
        return patches.patchify(x, self.patch, self.stride)

    @nn.nowrap
    def join(self, values: Float[Array, 'b n v'], grid: Sequence[int]) -> Float[Array, 'b ...']:
        return patches.unpatchify(values, grid, self.patch)[..., 0]


class ImageTokenizer(Tokenizer):
    """Patches of an image [b h w 3]; `patch` is (height, width)."""


TOKENIZERS = {'video': VideoTokenizer, 'audio': AudioTokenizer, 'image': ImageTokenizer}

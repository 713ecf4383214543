"""What a token is asked for: the values of its patch, raw or standardised."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.ops import patches
from avmae_jax.structs import Array, Modality

CHANNELS = {'image': 3, 'video': 3, 'audio': 1}
STANDARDISE = ('none', 'patch', 'channel')
EPSILON = 1e-6


class Convention(NamedTuple):
    """Attributes: taken_off: from the number of values that squares are divided by; inside: EPSILON is added to the
    variance, and not to its root."""

    taken_off: int
    inside: bool


# Scenic; the image MAE's code (torch.var); VideoMAE's.
CONVENTIONS = {'scenic': Convention(0, True), 'mae': Convention(1, True), 'videomae': Convention(1, False)}


def standardise(values: Float[Array, 'b n v'], groups: int = 1, convention: str = 'scenic') -> Float[Array, 'b n v']:
    """Mean 0 and variance 1 within each patch, or within each of its `groups` of interleaved channels."""
    taken_off, inside = CONVENTIONS[convention]
    grouped = values.reshape(*values.shape[:-1], -1, groups)
    centred = grouped - jnp.mean(grouped, axis=-2, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-2, keepdims=True)
    if taken_off:
        variance = variance * (grouped.shape[-2] / (grouped.shape[-2] - taken_off))
    deviation = jnp.sqrt(variance + EPSILON) if inside else jnp.sqrt(variance) + EPSILON
    return (centred / deviation).reshape(values.shape)


@dataclasses.dataclass(frozen=True)
class Target:
    """Makes targets of the patches of one modality.

    Attributes:
      standardise: 'none' asks for raw values; 'patch' for values standardised over the patch; 'channel' for values
        standardised over the patch in each colour by itself.
      convention: key of CONVENTIONS, how values are standardised: published models differ by some per cent.
      rgb_mean, rgb_std: where given, values are first brought back to RGB in [0, 1], x * rgb_std + rgb_mean, for models
        that were asked for pixels before their normalisation (VideoMAE).
      grayscale: asks for luma in place of colours. The number of values stays, so that a model fits either.
    """

    standardise: str = 'none'
    grayscale: bool = False
    convention: str = 'scenic'
    rgb_mean: tuple[float | int, ...] | None = None
    rgb_std: tuple[float | int, ...] | None = None

    def __post_init__(self):
        if self.convention not in CONVENTIONS:
            raise ValueError(f'convention must be one of {tuple(CONVENTIONS)}; got {self.convention!r}.')
        given = [x for x in (self.rgb_mean, self.rgb_std) if x is not None]
        if len(given) == 1 or any(len(x) != 3 for x in given):
            raise ValueError(
                f'rgb_mean and rgb_std come together, three values each; got {self.rgb_mean}, {self.rgb_std}.'
            )
        if self.standardise not in STANDARDISE:
            raise ValueError(f'standardise must be one of {STANDARDISE}; got {self.standardise!r}.')

    def __call__(self, values: Float[Array, 'b n v'], modality: Modality) -> Float[Array, 'b n v']:
        if self.rgb_mean is not None:
            if CHANNELS[modality] != 3:
                raise ValueError(f'rgb_mean is for pictures, and {modality} has no colours: leave it out.')
            pixels = values.reshape(*values.shape[:-1], -1, 3)
            mean, std = (jnp.asarray(x, values.dtype).reshape(1, 1, 1, 3) for x in (self.rgb_mean, self.rgb_std))
            values = (pixels * std + mean).reshape(values.shape)
        if self.grayscale:
            if CHANNELS[modality] != 3:
                raise ValueError(f'grayscale targets need colours, which {modality} has not: set grayscale=False.')
            values = patches.to_grayscale(values)
        if self.standardise == 'none':
            return values
        groups = CHANNELS[modality] if self.standardise == 'channel' else 1
        return standardise(values, groups, self.convention)

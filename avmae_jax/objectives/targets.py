"""What a token is asked for: the values of its patch, raw or standardised."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.ops import patches
from avmae_jax.structs import Array, Modality

CHANNELS = {'image': 3, 'video': 3, 'audio': 1}
STANDARDISE = ('none', 'patch', 'channel')
EPSILON = 1e-6  # Added to the variance; He et al. 2022 and Scenic.


def standardise(values: Float[Array, 'b n v'], groups: int = 1) -> Float[Array, 'b n v']:
    """Mean 0 and variance 1 within each patch, or within each of its `groups` of interleaved channels."""
    grouped = values.reshape(*values.shape[:-1], -1, groups)
    centred = grouped - jnp.mean(grouped, axis=-2, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-2, keepdims=True)
    return (centred / jnp.sqrt(variance + EPSILON)).reshape(values.shape)


@dataclasses.dataclass(frozen=True)
class Target:
    """Makes targets of the patches of one modality.

    Attributes:
      standardise: 'none' asks for raw values; 'patch' for values standardised over the patch; 'channel' for values
        standardised over the patch in each colour by itself.
      grayscale: asks for luma in place of colours. The number of values stays, so that a model fits either.
    """

    standardise: str = 'none'
    grayscale: bool = False

    def __post_init__(self):
        if self.standardise not in STANDARDISE:
            raise ValueError(f'standardise must be one of {STANDARDISE}; got {self.standardise!r}.')

    def __call__(self, values: Float[Array, 'b n v'], modality: Modality) -> Float[Array, 'b n v']:
        if self.grayscale:
            if CHANNELS[modality] != 3:
                raise ValueError(f'grayscale targets need colours, which {modality} has not: set grayscale=False.')
            values = patches.to_grayscale(values)
        if self.standardise == 'none':
            return values
        return standardise(values, groups=CHANNELS[modality] if self.standardise == 'channel' else 1)

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


class Scale(NamedTuple):
    """Mean and deviation of each patch, or of each of its channels: [b n 1 groups]."""

    mean: Array
    deviation: Array


def scale_of(values: Float[Array, 'b n v'], groups: int, convention: str) -> Scale:
    """By which patches, or each of their `groups` of interleaved channels, are standardised."""
    taken_off, inside = CONVENTIONS[convention]
    grouped = values.reshape(*values.shape[:-1], -1, groups)
    mean = jnp.mean(grouped, axis=-2, keepdims=True)
    variance = jnp.mean(jnp.square(grouped - mean), axis=-2, keepdims=True)
    if taken_off:
        variance = variance * (grouped.shape[-2] / (grouped.shape[-2] - taken_off))
    return Scale(mean, jnp.sqrt(variance + EPSILON) if inside else jnp.sqrt(variance) + EPSILON)


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
        values = self._asked(values, modality)
        if self.standardise == 'none':
            return values
        groups = self._groups(modality)
        mean, deviation = scale_of(values, groups, self.convention)
        return ((values.reshape(*values.shape[:-1], -1, groups) - mean) / deviation).reshape(values.shape)

    def plain(self, values: Float[Array, 'b n v'], modality: Modality) -> Float[Array, 'b n v']:
        """What is asked for but for its standardisation, in the units of the input."""
        return self._as_input(self._asked(values, modality))

    def restore(
        self, predicted: Float[Array, 'b n v'], values: Float[Array, 'b n v'], modality: Modality
    ) -> Float[Array, 'b n v']:
        """Predictions in the units of the input; standardised ones get mean and deviation of the true patches."""
        predicted = predicted.astype(jnp.float32)
        if self.standardise != 'none':
            groups = self._groups(modality)
            mean, deviation = scale_of(self._asked(values, modality), groups, self.convention)
            predicted = (predicted.reshape(*values.shape[:-1], -1, groups) * deviation + mean).reshape(values.shape)
        return self._as_input(predicted)

    def _groups(self, modality: Modality) -> int:
        return CHANNELS[modality] if self.standardise == 'channel' else 1

    def _asked(self, values: Float[Array, 'b n v'], modality: Modality) -> Float[Array, 'b n v']:
        """Before they are standardised."""
        if self.rgb_mean is not None:
            if CHANNELS[modality] != 3:
                raise ValueError(f'rgb_mean is for pictures, and {modality} has no colours: leave it out.')
            mean, std = self._rgb(values)
            values = (values.reshape(*values.shape[:-1], -1, 3) * std + mean).reshape(values.shape)
        if self.grayscale:
            if CHANNELS[modality] != 3:
                raise ValueError(f'grayscale targets need colours, which {modality} has not: set grayscale=False.')
            values = patches.to_grayscale(values)
        return values

    def _as_input(self, values: Float[Array, 'b n v']) -> Float[Array, 'b n v']:
        if self.rgb_mean is None:
            return values
        mean, std = self._rgb(values)
        return ((values.reshape(*values.shape[:-1], -1, 3) - mean) / std).reshape(values.shape)

    def _rgb(self, values: Float[Array, 'b n v']) -> tuple[Array, Array]:
        mean, std = (jnp.asarray(x, values.dtype).reshape(1, 1, 1, 3) for x in (self.rgb_mean, self.rgb_std))
        return mean, std

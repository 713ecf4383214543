"""Changes of pixels and log-mels that leave the label as it is, on the device; a row's are drawn from its own seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, UInt32

from avmae_jax.ops import patches, rows
from avmae_jax.structs import JOINT_ORDER, Array, Batch, Modality


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Other light on the same scene: the pixels of a row, all frames of a clip alike, go through one function.

    The defaults are those of DeepMind's video reader (DMVR), which Scenic finetunes with; the recipe has a
    drop_ratio of 0.1 besides.

    Attributes:
      jitter_ratio: share of rows whose colours are changed.
      drop_ratio: share of rows that are turned to gray.
      brightness: largest number that is added to pixels in [0, 1], or taken away.
      contrast, saturation: they are multiplied by 1 - x to 1 + x.
      hue: largest turn of the circle of colours, of one round.
    """

    jitter_ratio: int | float = 0.8
    drop_ratio: int | float = 0.0
    brightness: int | float = 32 / 255
    contrast: int | float = 0.4
    saturation: int | float = 0.4
    hue: int | float = 0.2

    def __post_init__(self):
        for name, most in {'jitter_ratio': 1, 'drop_ratio': 1, 'contrast': 1, 'saturation': 1, 'hue': 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f'{name} of the colour jitter must lie in [0, {most}]; got {getattr(self, name)}.')
        if self.brightness < 0:
            raise ValueError(f'brightness of the colour jitter must not be below 0; got {self.brightness}.')

    def __call__(self, pixels: Float[Array, 'b *thw 3'], seed: UInt32[Array, 'b 2']) -> Float[Array, 'b *thw 3']:
        """Pixels in [0, 1] to pixels in [0, 1]."""
        drawn = rows.uniform(seed, rows.COLOR, 6)
        sides = 2 * drawn - 1  # In [-1, 1).
        changed = jnp.clip(pixels + rows.per_row(self.brightness * sides[:, 0], pixels), 0, 1)
        # The mean is that of the whole clip, so that frames are not changed against each other.
        mean = jnp.mean(changed, axis=tuple(range(1, changed.ndim - 1)), keepdims=True)
        changed = jnp.clip((changed - mean) * rows.per_row(1 + self.contrast * sides[:, 1], pixels) + mean, 0, 1)
        changed = turn_colors(changed, 1 + self.saturation * sides[:, 2], self.hue * sides[:, 3])
        pixels = jnp.where(rows.per_row(drawn[:, 4] < self.jitter_ratio, pixels), changed, pixels)
        gray = patches.to_grayscale(pixels.reshape(len(pixels), -1, 3)).reshape(pixels.shape)
        return jnp.where(rows.per_row(drawn[:, 5] < self.drop_ratio, pixels), gray, pixels)


def turn_colors(
    pixels: Float[Array, 'b *thw 3'], saturation: Float[Array, 'b'], hue: Float[Array, 'b']
) -> Float[Array, 'b *thw 3']:
    """Multiplies the saturation of RGB in [0, 1] and turns its hue, as parts of a round, in the sense of HSV."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    safe = jnp.where(chroma > 0, chroma, 1)
    # Never `value == red`: compiled, the two may be rounded differently, and then no channel is the largest.
    sixth = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        jnp.where(green >= blue, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixth = sixth + rows.per_row(6 * hue, sixth)
    chroma = jnp.minimum(chroma * rows.per_row(saturation, chroma), value)

    def channel(place: int) -> Array:
        k = jnp.mod(place + sixth, 6)
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return jnp.stack([channel(5), channel(3), channel(1)], axis=-1)


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """Noise in the place of a rectangle (Zhong et al. 2020): normal, in the units that the model sees, for every pixel.

    As timm does it for the image MAE (`reprob=0.25, remode='pixel', recount=1`). A clip loses the same rectangle in all
    its frames, under the same noise.

    Attributes:
      ratio: share of rows that lose one.
      area: the least and the most of a picture that a rectangle may cover.
    """

    ratio: int | float = 0.25
    area: tuple[int | float, ...] = (0.02, 1 / 3)

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ValueError(f'ratio of random erasing must lie in [0, 1]; got {self.ratio}.')
        if len(self.area) != 2 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f'area of random erasing takes two rising shares in (0, 1]; got {self.area}.')

    def __call__(self, pixels: Float[Array, 'b *thw 3'], seed: UInt32[Array, 'b 2']) -> Float[Array, 'b *thw 3']:
        """Standardised pixels, of mean 0 and deviation 1 or so."""
        height, width = pixels.shape[-3:-1]

        def draw_one(key: jax.Array) -> tuple[Bool[Array, 'h w'], Float[Array, 'h w 3']]:
            chosen_key, shape_key, noise_key = jax.random.split(key, 3)
            drawn = jax.random.uniform(shape_key, (4, ATTEMPTS))
            area = height * width * (self.area[0] + (self.area[1] - self.area[0]) * drawn[0])
            aspect = jnp.exp((2 * drawn[1] - 1) * math.log(LARGEST_ASPECT))
            tall, wide = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
            fits = (tall < height) & (wide < width)
            top, left = jnp.floor(drawn[2] * (height - tall + 1)), jnp.floor(drawn[3] * (width - wide + 1))
            tall, wide, top, left = (x[jnp.argmax(fits)] for x in (tall, wide, top, left))
            line, column = jnp.arange(height)[:, None], jnp.arange(width)[None]
            inside = (line >= top) & (line < top + tall) & (column >= left) & (column < left + wide)
            erased = jnp.any(fits) & (jax.random.uniform(chosen_key) < self.ratio)
            return inside & erased, jax.random.normal(noise_key, (height, width, 3))

        inside, noise = jax.vmap(draw_one)(rows.row_keys(seed, rows.ERASING))
        frames = pixels.reshape(len(pixels), -1, height, width, 3)
        return jnp.where(inside[:, None, ..., None], noise[:, None], frames).reshape(pixels.shape)


# Of a rectangle to be erased: the largest height by width, and how many are drawn until one fits, as in timm.
LARGEST_ASPECT, ATTEMPTS = 1 / 0.3, 10


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """Silences bands of frequencies and moments of a normalised log-mel (Park et al. 2019, without the warping).

    Masks get the value 0, the mean of the data. The defaults are those of AudioSet; VGGSound has one band of up to 48.

    Attributes:
      frequency_masks, time_masks: how many.
      frequency_width, time_width: the most that one may cover, in mel bins and in frames.
      time_ratio: the most that one time mask may cover of all frames. 0 switches time masks off, as the released
        settings do.
    """

    frequency_masks: int = 2
    frequency_width: int = 36
    time_masks: int = 4
    time_width: int = 48
    time_ratio: int | float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f'{field.name} of SpecAugment must not be below 0; got {getattr(self, field.name)}.')

    def __call__(self, log_mel: Float[Array, 'b s f'], seed: UInt32[Array, 'b 2']) -> Float[Array, 'b s f']:
        _, num_frames, num_bins = log_mel.shape
        time_width = min(self.time_width, int(self.time_ratio * num_frames))
        masks = self.time_masks + self.frequency_masks
        drawn = rows.uniform(seed, rows.SPEC_MASKS, masks, 2)
        frames = _covered(drawn[:, : self.time_masks], time_width, num_frames)
        bins = _covered(drawn[:, self.time_masks :], self.frequency_width, num_bins)
        return jnp.where(frames[:, :, None] | bins[:, None, :], 0, log_mel)


def _covered(drawn: Float[Array, 'b masks 2'], width: int, size: int) -> Bool[Array, 'b size']:
    """The places that some mask covers; each is 0 to `width` long, all lengths and then all places alike."""
    length = jnp.floor(drawn[..., 0] * (min(width, size) + 1))
    start = jnp.floor(drawn[..., 1] * (size - length + 1))
    place = jnp.arange(size, dtype=jnp.float32)[None, None]
    inside = (place >= start[..., None]) & (place < (start + length)[..., None])
    return jnp.any(inside, axis=1)


def shift_time(log_mel: Float[Array, 'b s f'], seed: UInt32[Array, 'b 2']) -> Float[Array, 'b s f']:
    """Begins each log-mel anywhere, and puts what came before at its end."""
    frames = log_mel.shape[1]
    by = jnp.floor(rows.uniform(seed, rows.TIME_SHIFT) * frames).astype(jnp.int32)
    return jax.vmap(lambda x, start: jnp.roll(x, -start, axis=0))(log_mel, by)


def lose_modality(batch: Batch, ratio: int | float) -> Batch:
    """A share of the rows loses one of its modalities, any of them alike. Rows that have one modality only keep it.

    To be done before `Preprocess` and the objective see the batch.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f'the share of rows that lose a modality must lie in [0, 1]; got {ratio}.')
    names = [m for m in JOINT_ORDER if m in batch.media]
    drawn = rows.uniform(batch.seed, rows.LOST_MODALITY, 1 + len(names))
    present = jnp.stack([jnp.asarray(batch.present[m]) for m in names], axis=1)
    loses = (drawn[:, 0] < ratio) & (jnp.sum(present, axis=1) > 1)
    which = jnp.argmax(jnp.where(present, drawn[:, 1:], -1.0), axis=1)
    return _lose(batch, {m: loses & (which == i) for i, m in enumerate(names)})


def without(batch: Batch, modality: Modality) -> Batch:
    """Every row loses this modality: how well does a model do with what is left?

    A row that has nothing else has nothing then, so that none is scored by what is said to be missing. `present`
    tells; whoever takes a mean leaves such rows out.
    """
    if modality not in batch.media:
        raise ValueError(f'{modality!r} cannot be left out of clips that hold {sorted(batch.media)}.')
    return _lose(batch, {modality: jnp.ones(len(batch.media[modality]), bool)})


def _lose(batch: Batch, lost: Mapping[Modality, Bool[Array, 'b']]) -> Batch:
    """Rows as if their clips had been stored without: `present` says so, and the media are the bytes such clips get."""
    media, present = dict(batch.media), dict(batch.present)
    for m, rows_lost in lost.items():
        media[m] = jnp.where(rows.per_row(rows_lost, media[m]), jnp.zeros((), media[m].dtype), media[m])
        present[m] = jnp.asarray(present[m]) & ~rows_lost
    return batch._replace(media=media, present=present)

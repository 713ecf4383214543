"""From a batch as the host hands it over to what the model sees, augmented in training; inside the jitted step.

The host sends uint8 pixels and int16 sound, a quarter and a half of the bytes of float32; everything
after that is element-wise over rows, so it stays on the device that holds the row.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Num, UInt8, UInt32

from avmae_jax.ops import augment, rows, spectrogram
from avmae_jax.ops.rand_augment import RandAugment
from avmae_jax.structs import Array, Batch, Modality

STORED = 'stored'  # The convention of data that holds log-mels already.
SMALLEST = float(np.finfo(np.float32).tiny)  # What is below becomes zero where it is divided by.


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Flips and scales pixels, turns sound into normalised log-mel; in training changes both, where asked for.

    Attributes:
      flip: mirror half of the rows left to right in training; picture and video of a row alike.
      convention: of the log-mel, a key of `ops.spectrogram.CONVENTIONS`, or 'stored' when the data holds
        log-mels.
      num_spec_frames: cut or fill up spectrograms to this many frames; None for all there are.
      audio_mean, audio_std: of the log-mel, in nats.
      rgb_mean, rgb_std: of RGB in [0, 1], for ImageNet-style standardisation; without them pixels are
        scaled to [-1, 1].
      rand_augment: of pictures and videos in training; before `color_jitter`.
      color_jitter: of pictures and videos in training.
      random_erasing: of pictures and videos in training, once they are standardised.
      time_shift: log-mels are shifted around in time in training; before `spec_augment`, whose masks stay where they
        are drawn.
      spec_augment: of normalised log-mels in training.
      lose_modality_ratio: share of the rows that lose one of their modalities in training (modality dropout). Whoever
        computes the loss does it (`augment.lose_modality`), since the batch tells the objective what is there.
    """

    flip: bool = True
    convention: str = 'avmae'
    sample_rate: int = 16_000
    num_mel_bins: int = 128
    num_spec_frames: int | None = None
    audio_mean: float = 0.0
    audio_std: float = 1.0
    rgb_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    rgb_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rand_augment: RandAugment | None = None
    color_jitter: augment.ColorJitter | None = None
    random_erasing: augment.RandomErasing | None = None
    time_shift: bool = False
    spec_augment: augment.SpecAugment | None = None
    lose_modality_ratio: int | float = 0.0

    def __post_init__(self):
        if self.convention != STORED:
            if self.convention not in spectrogram.CONVENTIONS:
                known = sorted([*spectrogram.CONVENTIONS, STORED])
                raise ValueError(f'log-mel convention must be one of {known}; got {self.convention!r}.')
            self.log_mel_convention  # noqa: B018  Its settings are checked here and not in the middle of a trace.
        if not 0 <= self.lose_modality_ratio <= 1:
            raise ValueError(f'lose_modality_ratio must lie in [0, 1]; got {self.lose_modality_ratio}.')
        for name in ('num_mel_bins', 'num_spec_frames'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1; got {getattr(self, name)}.')
        if not self.audio_std >= SMALLEST:
            raise ValueError(f'audio_std must be above 0; got {self.audio_std}.')
        if len(self.rgb_mean) != 3 or len(self.rgb_std) != 3 or not min(self.rgb_std) >= SMALLEST:
            raise ValueError(
                f'rgb_mean and rgb_std take three values, std above 0; got {self.rgb_mean}, {self.rgb_std}.'
            )

    @property
    def log_mel_convention(self) -> spectrogram.Convention:
        convention = spectrogram.get_convention(self.convention)
        return dataclasses.replace(
            convention,
            sample_rate=self.sample_rate,
            num_mel_bins=self.num_mel_bins,
            max_hz=min(convention.max_hz, self.sample_rate / 2),
        )

    def __call__(self, batch: Batch, *, train: bool) -> dict[Modality, Array]:
        """float32 inputs: 'video' [b t h w 3], 'image' [b h w 3], 'audio' [b s f]."""
        inputs = {}
        for modality, media in batch.media.items():
            if modality == 'audio':
                plain = self._normalised_log_mel(media)
                changed = self._changed_log_mel(plain, batch.seed)
            else:
                pixels = flip_rows(media, batch.seed) if train and self.flip else jnp.asarray(media)
                pixels = pixels.astype(jnp.float32) / 255
                plain, changed = self._standardised(pixels), self._changed_pixels(pixels, batch.seed)
            if train and changed is not None:
                # A row without the modality is in training what it is in evaluation.
                present = rows.per_row(jnp.asarray(batch.present[modality]), plain)
                inputs[modality] = jnp.where(present, changed, plain)
            else:
                inputs[modality] = plain
        return inputs

    def _changed_log_mel(
        self, log_mel: Float32[Array, 'b s f'], seed: UInt32[Array, 'b 2']
    ) -> Float32[Array, 'b s f'] | None:
        """As training is to hear it; None where that is as it is."""
        if not self.time_shift and self.spec_augment is None:
            return None
        if self.time_shift:
            log_mel = augment.shift_time(log_mel, seed)
        return log_mel if self.spec_augment is None else self.spec_augment(log_mel, seed)

    def _changed_pixels(
        self, pixels: Float32[Array, 'b *thw 3'], seed: UInt32[Array, 'b 2']
    ) -> Float32[Array, 'b *thw 3'] | None:
        """As training is to see it; None where that is as it is."""
        if self.rand_augment is None and self.color_jitter is None and self.random_erasing is None:
            return None
        if self.rand_augment is not None:
            pixels = self.rand_augment(pixels, seed, fill=self.rgb_mean)
        if self.color_jitter is not None:
            pixels = self.color_jitter(pixels, seed)
        pixels = self._standardised(pixels)
        return pixels if self.random_erasing is None else self.random_erasing(pixels, seed)

    def _standardised(self, pixels: Float32[Array, 'b *thw 3']) -> Float32[Array, 'b *thw 3']:
        return (pixels - self._rgb(pixels, self.rgb_mean)) / self._rgb(pixels, self.rgb_std)

    def undo(self, inputs: dict[Modality, Array]) -> dict[Modality, Array]:
        """Back to RGB in [0, 1] and log-mel in nats: the units in which errors are told and pictures drawn."""
        media = {}
        for modality, x in inputs.items():
            if modality == 'audio':
                media[modality] = x * self.audio_std + self.audio_mean
            else:
                media[modality] = x * self._rgb(x, self.rgb_std) + self._rgb(x, self.rgb_mean)
        return media

    def _rgb(self, pixels, values):
        return np.asarray(values, np.float32).reshape((1,) * (pixels.ndim - 1) + (3,))

    def _normalised_log_mel(self, sound: Num[Array, 'b l'] | Float32[Array, 'b s f']) -> Float32[Array, 'b s f']:
        if (sound.ndim == 3) != (self.convention == STORED):
            held = 'stored log-mels' if sound.ndim == 3 else 'waveforms'
            wanted = STORED if sound.ndim == 3 else ' or '.join(map(repr, spectrogram.CONVENTIONS))
            raise ValueError(f'the data holds {held}, but convention is {self.convention!r}: set it to {wanted}.')
        if sound.ndim == 2:
            log_mel = spectrogram.log_mel(jnp.asarray(sound), self.log_mel_convention, self.num_spec_frames)
        else:
            log_mel = jnp.asarray(sound)
            shape = (self.num_spec_frames or log_mel.shape[1], self.num_mel_bins)
            if log_mel.shape[1:] != shape:
                raise ValueError(
                    f'stored log-mels have {log_mel.shape[1]} frames of {log_mel.shape[2]} bins; '
                    f'num_spec_frames and num_mel_bins ask for {shape[0]} of {shape[1]}.'
                )
        return (log_mel - self.audio_mean) / self.audio_std


def flip_rows(pixels: UInt8[Array, 'b *thw 3'], seed: UInt32[Array, 'b 2']) -> UInt8[Array, 'b *thw 3']:
    """Mirrors half of the rows; which ones is a function of each row's seed alone, whatever batch it came in."""
    flipped = jax.vmap(jax.random.bernoulli)(rows.row_keys(seed, rows.FLIP))
    return jnp.where(rows.per_row(flipped, pixels), pixels[..., ::-1, :], pixels)

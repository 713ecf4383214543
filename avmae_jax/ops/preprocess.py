"""From a batch as the host hands it over to what the model sees; inside the jitted step.

The host sends uint8 pixels and int16 sound, a quarter and a half of the bytes of float32; everything
after that is element-wise over rows, so it stays on the device that holds the row.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Num, UInt8, UInt32

from avmae_jax.ops import spectrogram
from avmae_jax.structs import Array, Batch, Modality

STORED = 'stored'  # The convention of data that holds log-mels already.
_FLIP = 0  # What is drawn from a row's key for which purpose; further draws take further numbers.


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Flips and scales pixels, turns sound into normalised log-mel.

    Attributes:
      flip: mirror half of the rows left to right in training; picture and video of a row alike.
      convention: of the log-mel, a key of `ops.spectrogram.CONVENTIONS`, or 'stored' when the data holds
        log-mels.
      num_spec_frames: cut or fill up spectrograms to this many frames; None for all there are.
      audio_mean, audio_std: of the log-mel, in nats.
      rgb_mean, rgb_std: of RGB in [0, 1], for ImageNet-style standardisation; without them pixels are
        scaled to [-1, 1].
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

    def __post_init__(self):
        if self.convention != STORED:
            if self.convention not in spectrogram.CONVENTIONS:
                known = sorted([*spectrogram.CONVENTIONS, STORED])
                raise ValueError(f'log-mel convention must be one of {known}; got {self.convention!r}.')
            self.log_mel_convention  # noqa: B018  Its settings are checked here and not in the middle of a trace.
        if not self.audio_std > 0:
            raise ValueError(f'audio_std must be above 0; got {self.audio_std}.')
        if len(self.rgb_mean) != 3 or len(self.rgb_std) != 3 or not min(self.rgb_std) > 0:
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
                inputs[modality] = self._normalised_log_mel(media)
            else:
                pixels = flip_rows(media, batch.seed) if train and self.flip else jnp.asarray(media)
                inputs[modality] = (pixels.astype(jnp.float32) / 255 - self._rgb(pixels, self.rgb_mean)) / self._rgb(
                    pixels, self.rgb_std
                )
        return inputs

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
    # The implementation is named, so that a run with another default generator flips the same rows.
    keys = jax.random.wrap_key_data(jnp.asarray(seed), impl='threefry2x32')
    flipped = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, _FLIP)))(keys)
    flipped = flipped.reshape((-1,) + (1,) * (pixels.ndim - 1))
    return jnp.where(flipped, pixels[..., ::-1, :], pixels)

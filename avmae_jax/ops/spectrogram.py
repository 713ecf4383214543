"""Waveform -> log-mel spectrogram, in the conventions of the published models.

Works on numpy and jax arrays alike and imports no jax, so that preparation measures its statistics in
worker processes with the very function that training runs inside the jitted step.

Why the Fourier transform is a matrix product: XLA cannot split its FFT over devices (it gathers the
whole batch on each of them), and products partition by row. It is float32 at the highest precision,
because in bfloat16 quiet bands come out wrong by up to 3.9 nats. Window and phase are folded into the
matrix; with the phase counted from the middle of the frame, cosines see only the even part of a frame
and sines only its odd part, which halves the product. On one CPU core a clip of 10 s costs 2.5 ms at
512 points, where jax's FFT costs 1 ms and numpy's 2.8 ms.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import MappingProxyType

import numpy as np
from jaxtyping import Float32, Num

from avmae_jax.structs import Array


@dataclasses.dataclass(frozen=True)
class Convention:
    """Everything that decides the value of a log-mel bin. Power spectra, natural logarithm.

    Attributes:
      window: 'hamming' or 'hann', symmetric.
      fft_length: in points; longer than the window, it interpolates the spectrum.
      centred: frame i lies around the middle of hop i and the ends are reflected, so that a waveform
        has exactly one frame a hop. Otherwise only whole windows count, from sample 0 on.
      remove_dc: subtract each frame's mean. (AST also subtracts the clip's, which then changes nothing.)
      pre_emphasis: x[i] - pre_emphasis * x[i - 1] within each frame; 0 for none.
      floor: smallest energy; the logarithm is taken of max(energy, floor).
      pad_value: log-mel of the frames that fill a spectrogram up to a wanted length.
    """

    sample_rate: int = 16_000
    window_seconds: float = 0.025
    hop_seconds: float = 0.010
    window: str = 'hamming'
    fft_length: int = 512
    num_mel_bins: int = 128
    min_hz: float = 20.0
    max_hz: float = 8_000.0
    centred: bool = True
    remove_dc: bool = False
    pre_emphasis: float = 0.0
    floor: float = 1e-6
    pad_value: float = 0.0

    def __post_init__(self):
        if self.window not in WINDOWS:
            raise ValueError(f'window must be one of {sorted(WINDOWS)}; got {self.window!r}.')
        if self.fft_length < self.window_samples:
            raise ValueError(f'fft_length must be at least the window of {self.window_samples}; got {self.fft_length}.')
        if not 0 <= self.min_hz < self.max_hz <= self.sample_rate / 2:
            raise ValueError(
                f'mel bands must lie in 0..{self.sample_rate / 2:g} Hz, half of sample_rate={self.sample_rate}; '
                f'got min_hz={self.min_hz:g}, max_hz={self.max_hz:g}.'
            )

    @property
    def window_samples(self) -> int:
        return round(self.window_seconds * self.sample_rate)

    @property
    def hop_samples(self) -> int:
        return round(self.hop_seconds * self.sample_rate)

    def num_frames(self, num_samples: int) -> int:
        """How many frames a waveform of `num_samples` gives, before padding."""
        if self.centred:
            return num_samples // self.hop_samples
        return max(0, 1 + (num_samples - self.window_samples) // self.hop_samples)


WINDOWS = MappingProxyType({'hamming': np.hamming, 'hann': np.hanning})

CONVENTIONS = MappingProxyType(
    {
        # Ours: 100 frames a second exactly. 1,024 points, because at 512 the lowest triangles are narrower than
        # the distance of two points: one of the 128 bands is empty, others see 3 % of a point. The floor lies
        # above what rounding to int16 leaves in the widest band (1.3e-7); padding is silence.
        'avmae': Convention(fft_length=1024, pad_value=math.log(1e-6)),
        # torchaudio.compliance.kaldi.fbank as AST, SSAST, AudioMAE, CAV-MAE and MAViL call it: 998 frames of 10 s,
        # filled up with zeros to 1,024 *before* normalising. AudioMAE: mean=-4.2677393, std=2 * 4.5689974;
        # CAV-MAE: mean=-5.081, std=4.4849.
        'kaldi': Convention(
            window='hann', centred=False, remove_dc=True, pre_emphasis=0.97, floor=float(np.finfo(np.float32).eps)
        ),
    }
)


def get_convention(name: str, **changes) -> Convention:
    """The convention of that name, with fields replaced."""
    if name not in CONVENTIONS:
        raise ValueError(f'log-mel convention must be one of {sorted(CONVENTIONS)}; got {name!r}.')
    return dataclasses.replace(CONVENTIONS[name], **changes)


def log_mel(
    waveform: Num[Array, 'b l'], convention: Convention, num_frames: int | None = None
) -> Float32[Array, 'b s f']:
    """Log-mel spectrogram of each row, in the kind of array that came in.

    Args:
      waveform: int16, or floats in [-1, 1], at the convention's sample rate.
      num_frames: cut, or filled up with `pad_value`, to this many frames.
    """
    xp = waveform.__array_namespace__()
    num_rows, num_samples = waveform.shape
    frames = _cut_frames(_as_float32(waveform, xp), convention, xp)
    if convention.remove_dc:
        frames = frames - xp.mean(frames, axis=-1, keepdims=True)
    if convention.pre_emphasis:
        previous = xp.concat([frames[..., :1], frames[..., :-1]], axis=-1)  # The first sample stands for its own.
        frames = frames - np.float32(convention.pre_emphasis) * previous
    energies = _matmul(_power_spectrum(frames, convention, xp), mel_filters(convention), xp)
    spectrogram = xp.log(xp.maximum(energies, np.float32(convention.floor)))
    if num_frames is None:
        return spectrogram
    missing = num_frames - spectrogram.shape[1]
    if missing <= 0:
        return spectrogram[:, :num_frames]
    silence = xp.full((num_rows, missing, convention.num_mel_bins), convention.pad_value, dtype=np.float32)
    return xp.concat([spectrogram, silence], axis=1)


@functools.lru_cache(maxsize=8)
def mel_filters(convention: Convention) -> np.ndarray:
    """[points f] weights of the mel bands: triangles of height 1 on the mel scale, evenly spaced.

    The last point, half the sample rate, is left out: every triangle has ended there.
    """
    edges = np.linspace(_mel(convention.min_hz), _mel(convention.max_hz), convention.num_mel_bins + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    point = _mel(np.arange(convention.fft_length // 2) * convention.sample_rate / convention.fft_length)[:, None]
    rising, falling = (point - left) / (centre - left), (right - point) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


def _mel(hz):
    return 1127.0 * np.log1p(np.asarray(hz, np.float64) / 700.0)


def _as_float32(waveform, xp):
    if waveform.dtype == np.int16:
        return waveform.astype(np.float32) * np.float32(1 / 32768)
    if not xp.isdtype(waveform.dtype, 'real floating'):
        raise ValueError(f'a waveform is int16, or floats in [-1, 1]; got {waveform.dtype}.')
    return waveform.astype(np.float32)


def _cut_frames(waveform, convention: Convention, xp):
    """[b l] -> overlapping frames [b s window].

    Frames are put together from whole hops laid side by side, not gathered by index: slices and a
    concatenation, which every backend does at the speed of memory.
    """
    window, hop = convention.window_samples, convention.hop_samples
    if convention.centred:
        before, after = (window - hop) // 2, window - hop - (window - hop) // 2
        if waveform.shape[1] <= after:
            raise ValueError(
                f'a waveform needs more than {after} samples for its ends to be reflected; got {waveform.shape[1]}.'
            )
        waveform = xp.concat([waveform[:, before:0:-1], waveform, waveform[:, -2 : -2 - after : -1]], axis=1)
    num_rows, num_samples = waveform.shape
    num_frames = max(0, 1 + (num_samples - window) // hop)
    hops_a_window = -(-window // hop)
    wanted = (num_frames + hops_a_window - 1) * hop if num_frames else 0
    if wanted > num_samples:
        waveform = xp.concat([waveform, xp.zeros((num_rows, wanted - num_samples), dtype=np.float32)], axis=1)
    hops = xp.reshape(waveform[:, :wanted], (num_rows, -1, hop))
    shifted = [hops[:, i : i + num_frames] for i in range(hops_a_window)]
    return xp.concat(shifted, axis=-1)[..., :window]


@functools.lru_cache(maxsize=8)
def _fourier_halves(convention: Convention) -> tuple[np.ndarray, np.ndarray]:
    """Windowed cosines and sines for the first half of a frame, phase counted from its middle: [window/2 points]."""
    window = convention.window_samples
    if window % 2:
        raise ValueError(f'a window of an even number of samples is wanted; window_seconds gives {window}.')
    from_middle = np.arange(window // 2)[:, None] - (window - 1) / 2
    phase = 2 * np.pi * from_middle * np.arange(convention.fft_length // 2) / convention.fft_length
    weight = WINDOWS[convention.window](window)[: window // 2, None]
    return (weight * np.cos(phase)).astype(np.float32), (weight * np.sin(phase)).astype(np.float32)


def _power_spectrum(frames, convention: Convention, xp):
    """[b s window] -> |DFT|^2 at the points below half the sample rate."""
    half = convention.window_samples // 2
    cosines, sines = _fourier_halves(convention)
    first, second = frames[..., :half], xp.flip(frames[..., half:], axis=-1)
    return _matmul(first + second, cosines, xp) ** 2 + _matmul(first - second, sines, xp) ** 2


def _matmul(a, b: np.ndarray, xp):
    if isinstance(a, np.ndarray):
        return a @ b
    return xp.matmul(a, b, precision='highest')

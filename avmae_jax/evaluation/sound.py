"""A log-mel made audible: what was given, what was left of it and what the model made of it, to be listened to.

A log-mel has lost the phase, and the pitch within a band. The power of each frequency is taken from the pseudo-inverse
of the mel filters, and the phase from Griffin and Lim's iterations (IEEE TASSP 1984; with the momentum of Perraudin
et al., WASPAA 2013): the waveform whose frames overlap best. So even the sound of a true log-mel is somewhat hollow;
that of a prediction is to be compared with it, not with the recording.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float

from avmae_jax.evaluation.pictures import PatchedMedia, layers
from avmae_jax.ops.preprocess import STORED, Preprocess
from avmae_jax.ops.spectrogram import WINDOWS, Convention, mel_filters

NUM_ITERATIONS = 24
MOMENTUM = 0.99


def can_be_heard(preprocess: Preprocess) -> bool:
    """Stored log-mels do not say how they were made."""
    return preprocess.convention != STORED


def sounds_of_clip(media: PatchedMedia, clip: int, preprocess: Preprocess) -> dict[str, Float[np.ndarray, 'l']]:
    """'input', 'left', 'reconstructed' and, where there is one, 'inpainted' -> waveform in [-1, 1].

    What is hidden (or was not painted) is silent. Hidden patches of 'reconstructed' are as predicted, the others true.
    """
    convention = preprocess.log_mel_convention
    silence = math.log(convention.floor)
    rows = {}
    for name, (spectrogram, hidden) in layers(media, clip, num_channels=1).items():
        log_mel = preprocess.undo({'audio': spectrogram[..., 0]})['audio']
        rows[name.partition(':')[0]] = log_mel if hidden is None else np.where(hidden, silence, log_mel)
    num_frames = _count_frames(rows['input'], convention)
    return {name: to_waveform(log_mel[:num_frames], convention) for name, log_mel in rows.items()}


def _count_frames(log_mel: Float[np.ndarray, 's f'], convention: Convention) -> int:
    """Without those that fill a spectrogram up; in some conventions they would be loud."""
    real = ~np.isclose(log_mel, convention.pad_value, atol=1e-3).all(axis=1)
    return int(np.flatnonzero(real)[-1]) + 1 if real.any() else len(log_mel)


def to_waveform(log_mel: Float[np.ndarray, 's f'], convention: Convention) -> Float[np.ndarray, 'l']:
    """A waveform with (about) this log-mel."""
    energies = np.maximum(np.exp(np.asarray(log_mel, np.float64)) - convention.floor, 0.0)
    power = np.maximum(energies @ _inverse_filters(convention), 0.0)
    if convention.pre_emphasis:
        points = np.arange(convention.fft_length // 2)
        gain = np.abs(1 - convention.pre_emphasis * np.exp(-2j * np.pi * points / convention.fft_length)) ** 2
        power = power / gain
    # Nothing is known of the last point, half the sample rate.
    frames = _find_phase(np.pad(np.sqrt(power), ((0, 0), (0, 1))), convention)
    if convention.centred:
        before = (convention.window_samples - convention.hop_samples) // 2
        frames = frames[before : before + len(log_mel) * convention.hop_samples]
    return frames.astype(np.float32)


@functools.lru_cache(maxsize=8)
def _inverse_filters(convention: Convention) -> np.ndarray:
    """[f points]: the power of each point from the energies of the bands."""
    return np.linalg.pinv(mel_filters(convention).astype(np.float64))


def _find_phase(magnitude: Float[np.ndarray, 's p'], convention: Convention) -> Float[np.ndarray, 'l']:
    # Any phase will do to begin with, as long as it is the same every time.
    phase = np.exp(2j * np.pi * np.random.default_rng(0).random(magnitude.shape))
    before = np.zeros_like(phase)
    for _ in range(NUM_ITERATIONS):
        spectrum = _spectrum(_overlap(magnitude * phase, convention), convention, len(magnitude))
        ahead = spectrum + MOMENTUM * (spectrum - before)
        before = spectrum
        phase = ahead / np.maximum(np.abs(ahead), 1e-12)
    return _overlap(magnitude * phase, convention)


def _spectrum(waveform: np.ndarray, convention: Convention, num_frames: int) -> np.ndarray:
    """[l] -> [s p] of its windowed frames."""
    window, hop = convention.window_samples, convention.hop_samples
    frames = np.lib.stride_tricks.sliding_window_view(waveform, window)[: (num_frames - 1) * hop + 1 : hop]
    return np.fft.rfft(frames * WINDOWS[convention.window](window), convention.fft_length)


def _overlap(spectrum: np.ndarray, convention: Convention) -> np.ndarray:
    """[s p] -> [l]: the waveform whose windowed frames are nearest to the inverse transforms."""
    window, hop = convention.window_samples, convention.hop_samples
    shape = WINDOWS[convention.window](window)
    frames = np.fft.irfft(spectrum, convention.fft_length)[:, :window] * shape
    waveform, weight = np.zeros((2, (len(frames) - 1) * hop + window))
    for i, frame in enumerate(frames):
        waveform[i * hop : i * hop + window] += frame
        weight[i * hop : i * hop + window] += shape**2
    return waveform / np.maximum(weight, 1e-3)

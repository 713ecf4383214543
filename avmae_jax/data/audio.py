"""Sound of a clip: cut to the window, padded with silence; the device makes the log-mel.

Prepared clips hold int16 samples. Legacy records hold a log-mel already, which is cut in its time bins.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Num


def write_waveform(
    waveform: Num[np.ndarray, 'stored'], start: int | float, sample_rate: int, out: Num[np.ndarray, 'l']
):
    """The samples from `start` seconds on; silence where the clip has ended."""
    first = max(0, round(start * sample_rate))
    part = waveform[first : first + len(out)]
    out[: len(part)] = part
    out[len(part) :] = 0


def write_spectrogram(
    spectrogram: Float32[np.ndarray, 'stored f'],
    start: int | float,
    bins_per_second: int,
    out: Float32[np.ndarray, 's f'],
):
    """The stored log-mel from `start` seconds on; begins anew where it is too short, as the reference does."""
    first = int(start * bins_per_second + 1e-6)
    out[...] = spectrogram[(first + np.arange(len(out))) % len(spectrogram)]

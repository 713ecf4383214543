"""Mean and deviation of picture and sound over a dataset, added up so that the order of work cannot show.

Pixels are counted in whole numbers. Log-mels are summed in float64 clip by clip, and the sums of clips are
added in the order of the records, whoever measured them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from avmae_jax.ops import spectrogram

CONVENTIONS = ('avmae', 'kaldi')
MIN_SAMPLES = 400  # One window of 25 ms.
PIXEL_STRIDE = 4  # Every fourth pixel each way: the mean moves in its fourth digit, the time by 15/16.


@dataclasses.dataclass
class Sums:
    """Count, sum and sum of squares: of R, G, B in 0..255, and of the log-mel in each convention."""

    pixels: int = 0
    rgb: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])
    rgb_squared: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])
    mel: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # convention -> [count, sum, squares]

    def add_frame(self, rgb: np.ndarray, repeats: int = 1) -> None:
        pixels = rgb[::PIXEL_STRIDE, ::PIXEL_STRIDE].reshape(-1, 3).astype(np.int64)
        self.pixels += len(pixels) * repeats
        self.rgb = [a + int(b) * repeats for a, b in zip(self.rgb, pixels.sum(0), strict=True)]
        squares = (pixels**2).sum(0)
        self.rgb_squared = [a + int(b) * repeats for a, b in zip(self.rgb_squared, squares, strict=True)]

    def add_waveform(self, waveform: np.ndarray) -> None:
        if len(waveform) < MIN_SAMPLES:
            return
        for name in CONVENTIONS:
            mel = log_mel(waveform, name)
            if mel.size:
                self.mel[name] = [float(mel.size), float(mel.sum()), float((mel**2).sum())]

    def add(self, other: Sums) -> None:
        self.pixels += other.pixels
        self.rgb = [a + b for a, b in zip(self.rgb, other.rgb, strict=True)]
        self.rgb_squared = [a + b for a, b in zip(self.rgb_squared, other.rgb_squared, strict=True)]
        for name, values in other.mel.items():
            self.mel[name] = [a + b for a, b in zip(self.mel.get(name, [0.0] * 3), values, strict=True)]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def statistics(self, picture: str) -> dict[str, Any]:
        """As `DatasetInfo.statistics` has them; `picture` is 'video' or 'image'."""
        found: dict[str, Any] = {}
        if self.pixels:
            mean = np.array(self.rgb, np.float64) / self.pixels
            variance = np.array(self.rgb_squared, np.float64) / self.pixels - mean**2
            found[picture] = {
                'mean': [round(float(x), 6) for x in mean / 255],
                'std': [round(float(x), 6) for x in np.sqrt(np.maximum(variance, 0)) / 255],
            }
        for name, (count, total, squares) in sorted(self.mel.items()):
            average = total / count
            deviation = max(squares / count - average**2, 0.0) ** 0.5
            found.setdefault('audio', {})[name] = {'mean': round(average, 5), 'std': round(deviation, 5)}
        return found


def log_mel(waveform: np.ndarray, convention: str) -> np.ndarray:
    """float64 [s f] of an int16 waveform, in the very function that training runs on the device."""
    mel = spectrogram.log_mel(waveform[None], spectrogram.get_convention(convention))
    return np.asarray(mel[0], np.float64)

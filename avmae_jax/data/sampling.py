"""Which moment of a clip: one window in seconds, shared by picture and sound.

Training: the modality that wants the longest span decides the window, which starts uniformly anywhere in the
clip; the shorter spans start uniformly inside the window. So the picture always lies within the sound that is
heard (or the sound within the picture that is seen), whatever their lengths.

Evaluation: every modality has a slack, what the clip is longer than its span; each starts at the same fraction
of its own slack: 0.5 for the middle, 0 ... 1 for several clips spread over time. The shorter span again lies
within the longer one, and a legacy clip whose picture and log-mel differ in length is cut as the public
reference cuts it.

Positions in frames are the starts in seconds times the stored rate; the index-space functions at the end are
those of the reference (DMVR), whose numbers the tests compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from avmae_jax.structs import Modality

_ROUNDING = 1e-6  # Of a frame: 0.16 s at 12.5 frames a second must be 2 frames, not 1.9999999.
_MASK64 = (1 << 64) - 1


class Draws:
    """Random numbers that are a function of (seed, epoch, record, view) alone.

    Philox is keyed, not seeded: streams of different keys never meet, and only its raw bits and their plain
    conversion to [0, 1) are used, which numpy keeps fixed between releases.
    """

    def __init__(self, seed: int, epoch: int, record: int, view: int):
        key = np.array([seed & _MASK64, epoch & _MASK64], np.uint64)
        counter = np.array([0, 0, record & _MASK64, view & _MASK64], np.uint64)
        self._bits = np.random.Philox(key=key, counter=counter)
        first = int(self._bits.random_raw())
        self.device_seed = np.array([first >> 32, first & 0xFFFFFFFF], np.uint32)

    def uniform(self, low: int | float = 0.0, high: int | float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def below(self, limit: int) -> int:
        """A whole number in [0, limit)."""
        return int(self.uniform() * limit)


def random_starts(spans: Mapping[Modality, int | float], duration: int | float, draws: Draws) -> dict[Modality, float]:
    """Start in seconds of each modality's span within one window of a clip.

    Spans that are longer than the clip start at its beginning; the transforms wrap or pad what is missing.
    """
    longest = max(spans.values())
    window = draws.uniform() * max(0.0, duration - longest)
    available = min(longest, duration)
    return {
        modality: window + (0.0 if span == longest else draws.uniform() * max(0.0, available - span))
        for modality, span in spans.items()
    }


def spread_fractions(num_clips: int) -> Float64[np.ndarray, 'clips']:
    """The fractions of slack at which evaluation clips start: the middle for one, first to last for several."""
    return np.array([0.5]) if num_clips == 1 else np.linspace(0.0, 1.0, num_clips)


def frame_indices(
    start: int | float, num_frames: int, frame_seconds: int | float, fps: int | float, num_stored: int
) -> Int64[np.ndarray, 't']:
    """The stored frame that is shown at each wanted time; begins anew where the clip is too short."""
    return _indices(start * fps, num_frames, frame_seconds * fps, num_stored)


def sequence_indices(offset: int, num_steps: int, stride: int | float, length: int) -> Int64[np.ndarray, 't']:
    """`num_steps` places from `offset` on; a sequence that is too short begins anew."""
    return _indices(offset, num_steps, stride, length)


def _indices(offset: Any, num_steps: int, stride: int | float, length: int) -> np.ndarray:
    return np.floor(offset + np.arange(num_steps) * stride + _ROUNDING).astype(np.int64) % length


def fraction_start(fraction: int | float, span: int | float, length: int | float) -> float:
    """Where a span starts at this fraction of the slack; in the unit of its arguments."""
    return fraction * max(0.0, length - span)


# -- The reference's ways to place a sequence, in indices --


def middle_indices(length: int, num_steps: int, stride: int) -> Int64[np.ndarray, 't']:
    return sequence_indices(max(0, length - num_steps * stride) // 2, num_steps, stride, length)


def spread_indices(length: int, num_clips: int, num_steps: int, stride: int) -> Int64[np.ndarray, 'clips t']:
    slack = max(0, length - num_steps * stride)
    # In float32, as the reference does: its truncation decides which frame is meant.
    offsets = np.linspace(np.float32(0), np.float32(slack), num_clips, dtype=np.float32).astype(np.int64)
    return np.stack([sequence_indices(int(offset), num_steps, stride, length) for offset in offsets])


def proportional_indices(length: int, num_steps: int, stride: int, proportion: int | float) -> Int64[np.ndarray, 't']:
    """Starts at a proportion of the whole length (not of the slack), as the reference keeps streams in step."""
    return sequence_indices(int(np.round(proportion * length)), num_steps, stride, length)

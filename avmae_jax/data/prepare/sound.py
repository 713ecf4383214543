"""Sound of a file: mono, 16 kHz, int16, each sample at its time."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import av
import numpy as np
from av.audio.resampler import AudioResampler

from avmae_jax.data.prepare import decode

SAMPLE_RATE = 16_000
GAP_SECONDS = 0.1  # Sound whose time stamps jump by more is put at its time, else end to end.
SILENT_SAMPLE = 4  # int16 samples up to this (-78 dBFS) are the noise of a decoder, not a sound.


@dataclasses.dataclass
class Sound:
    """Mono int16 at `SAMPLE_RATE`, from the clip's start on; `seconds` is where it ended, or was cut."""

    waveform: np.ndarray
    seconds: float
    problems: list[decode.Problem]


class _Resampler:
    """Frames of any rate, format and channel count -> mono int16 blocks at `SAMPLE_RATE`."""

    def __init__(self):
        self._resampler: AudioResampler | None = None
        self._key: tuple | None = None
        self._refused: set[tuple] = set()  # What ffmpeg does not mix, such as 7 channels without places.

    def __call__(self, frame: av.AudioFrame) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(samples that were still due from before a change of format, samples of this frame)."""
        key = _format_key(frame)
        if key in self._refused:
            frame = _mix_down(frame)
            key = _format_key(frame)
        rest: list[np.ndarray] = []
        if key != self._key:
            rest = self.flush()
            self._resampler, self._key = AudioResampler(format='s16', layout='mono', rate=SAMPLE_RATE), key
        frame.pts = None  # Times are kept by the caller; the resampler would insert silence by its own rules.
        assert self._resampler is not None
        try:
            return rest, [self._samples(block) for block in self._resampler.resample(frame)]
        except (av.error.FFmpegError, ValueError, OSError):
            self._resampler = self._key = None
            if frame.layout.nb_channels == 1:
                raise
            self._refused.add(key)
            return rest, self(frame)[1]

    def flush(self) -> list[np.ndarray]:
        if self._resampler is None:
            return []
        blocks = [self._samples(block) for block in self._resampler.resample(None)]
        self._resampler = self._key = None
        return blocks

    @staticmethod
    def _samples(block: av.AudioFrame) -> np.ndarray:
        return block.to_ndarray().reshape(-1).astype(np.int16)


def _format_key(frame: av.AudioFrame) -> tuple:
    return frame.format.name, frame.layout.name, frame.rate


def _mix_down(frame: av.AudioFrame) -> av.AudioFrame:
    """The mean of the channels where ffmpeg does not know how they are placed, or cannot mix so many."""
    samples = frame.to_ndarray()
    channels = frame.layout.nb_channels
    if not frame.format.is_planar:
        samples = samples.reshape(-1, channels).T
    if samples.dtype == np.uint8:
        samples = samples.astype(np.float32) / 128 - 1
    elif samples.dtype.kind == 'i':
        samples = samples.astype(np.float32) / np.iinfo(np.dtype(samples.dtype.str)).max
    mono = np.nan_to_num(samples.astype(np.float32)).mean(0, keepdims=True)
    mixed = av.AudioFrame.from_ndarray(np.ascontiguousarray(mono), format='fltp', layout='mono')
    mixed.rate = frame.rate
    return mixed


def read_sound(path: str, start: float, end: float | None, max_seconds: float) -> Sound:
    """The sound from `start` to `end` (None: to the end of the file, at most `max_seconds`)."""
    stop = start + max_seconds if end is None else min(end, start + max_seconds)
    problems: list[decode.Problem] = []
    with contextlib.closing(decode.attempts(path, 'audio', start)) as attempts:
        for container, stream, seek in attempts:
            sound = _read_sound_stream(container, stream, seek, start, stop, end is not None)
            if sound is not None and len(sound.waveform):
                return sound
            problems = sound.problems if sound is not None else problems
            if any(problem.reason == 'beyond_end' for problem in problems):
                break  # To decode an hour from the front would find the same.
    for problem in problems:
        if problem.reason == 'beyond_end':
            raise decode.MediaError('beyond_end', problem.detail)
    raise decode.MediaError('no_audio', '; '.join(p.detail for p in problems)[:200] or 'no sound decodes')


def _read_sound_stream(
    container: av.container.InputContainer, stream: Any, seek: bool, start: float, stop: float, bounded: bool
) -> Sound | None:
    damage: list[str] = []
    blocks: list[tuple[int, np.ndarray]] = []  # (sample from the clip's start, samples)
    if stream.codec_context is None:
        return Sound(np.zeros(0, np.int16), 0.0, [decode.Problem('damaged', 'its codec is unknown')])
    zero = decode.first_time(container)
    try:
        # A little earlier than asked: lossy codecs need a packet or two to settle.
        decode.start_stream(container, stream, start + zero - 0.2 if seek else 0.0)
    except (av.error.FFmpegError, OSError, ValueError):
        return None
    claimed = decode.header_seconds(container)
    resampler = _Resampler()
    position: int | None = None
    ended, last_end = True, 0.0
    first = True

    def put(samples: list[np.ndarray]) -> None:
        nonlocal position
        for block in samples:
            assert position is not None
            blocks.append((position, block))
            position += len(block)

    expected: float | None = None  # When the next frame begins if nothing is missing.
    frames = decode.decoded(container, stream, stop + zero, damage, from_front=not seek)
    for frame in decode.in_order(frames, damage):
        if frame.rate <= 0 or frame.samples <= 0:
            continue
        time = frame.time - zero if frame.time is not None else (expected if expected is not None else 0.0)
        if first and seek and time > start + GAP_SECONDS:
            return None
        first = False
        if expected is None or abs(time - expected) > GAP_SECONDS:
            if position is not None:
                put(resampler.flush())
            position = round((time - start) * SAMPLE_RATE)
        else:
            time = expected
        if time >= stop:
            ended = False
            if not blocks and last_end == 0.0:
                return Sound(np.zeros(0, np.int16), 0.0, [decode.Problem('late', f'the sound begins at {time:.2f} s')])
            break
        expected = last_end = time + frame.samples / frame.rate
        try:
            rest, samples = resampler(frame)
        except (av.error.FFmpegError, ValueError, OSError) as error:
            damage.append(decode.error_text(error))
            continue
        put(rest)
        put(samples)
    if position is not None:
        put(resampler.flush())
    seconds = min(last_end, stop) - start
    length = max(0, int(seconds * SAMPLE_RATE + 0.5))
    if not blocks:
        return Sound(np.zeros(0, np.int16), 0.0, [decode.Problem('damaged', detail) for detail in damage[:1]])
    if length == 0:
        return Sound(np.zeros(0, np.int16), 0.0, [decode.Problem('beyond_end', f'the sound ends at {last_end:.2f} s')])
    problems = []
    if damage:
        problems.append(decode.Problem('damaged', f'{len(damage)} times: {damage[0]}'))
    if ended and not bounded:
        problems += decode.length_problems(claimed, last_end)
    return Sound(_lay_out(blocks, length), seconds, problems)


def _lay_out(blocks: list[tuple[int, np.ndarray]], length: int) -> np.ndarray:
    """Blocks at their places in `length` samples; what no block covers is silent."""
    waveform = np.zeros(length, np.int16)
    for position, block in blocks:
        begin, end = max(position, 0), min(position + len(block), length)
        if end > begin:
            waveform[begin:end] = block[begin - position : end - position]
    return waveform


def is_silent(waveform: np.ndarray) -> bool:
    return not len(waveform) or int(np.abs(waveform.astype(np.int32)).max()) <= SILENT_SAMPLE

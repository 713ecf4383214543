"""What training and evaluation look at in a clip: the cut of each modality, and all of them together.

`View` turns a stored clip into rows of a batch, written straight into the memory the batch will lie in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from avmae_jax.data import audio, sampling, video
from avmae_jax.data.sampling import Draws
from avmae_jax.structs import JOINT_ORDER, Clip, Modality

MAX_SECONDS = 86_400  # A day.
MAX_SIDE = 2**14  # Pixels.


class ArraySpec(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class VideoView:
    """`num_frames` frames, `frame_seconds` apart, as squares of `crop_size` pixels.

    Attributes:
      frame_seconds: 0.16 is the recipe's stride of 4 at 25 frames a second.
      short_side: the smaller side of the picture before the crop.
      crop, eval_crop: names in `video.CROPS`, or dicts of a name and settings.
    """

    num_frames: int = 16
    frame_seconds: int | float = 0.16
    short_side: int = 256
    crop_size: int = 224
    crop: str | Mapping = 'random'
    eval_crop: str | Mapping = 'central'

    def __post_init__(self):
        if self.num_frames < 1:
            raise ValueError(f'num_frames must be at least 1; got {self.num_frames}.')
        _check_crop(self)
        _check_seconds('frame_seconds', self.frame_seconds)

    @property
    def seconds(self) -> float:
        return self.num_frames * self.frame_seconds

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_frames, self.crop_size, self.crop_size, 3)


@dataclasses.dataclass(frozen=True)
class ImageView:
    """One picture as a square: an image of an image dataset, or a frame of a clip (of its middle, in evaluation)."""

    short_side: int = 256
    crop_size: int = 224
    crop: str | Mapping = 'random'
    eval_crop: str | Mapping = 'central'

    def __post_init__(self):
        _check_crop(self)

    seconds = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.crop_size, self.crop_size, 3)


@dataclasses.dataclass(frozen=True)
class AudioView:
    """The sound of `seconds`; as stored: samples, or the log-mel of legacy records."""

    seconds: int | float = 10.0

    def __post_init__(self):
        _check_seconds('seconds', self.seconds)


def _check_seconds(name: str, seconds: int | float) -> None:
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f'{name} must be above 0 and at most {MAX_SECONDS}; got {seconds}.')


def _check_crop(view: VideoView | ImageView) -> None:
    if not 1 <= view.crop_size <= view.short_side:
        raise ValueError(f'crop_size must lie between 1 and short_side={view.short_side}; got {view.crop_size}.')
    if view.short_side > MAX_SIDE:
        raise ValueError(f'short_side must be at most {MAX_SIDE}; got {view.short_side}.')
    video.make_crop(view.crop), video.make_crop(view.eval_crop)


@dataclasses.dataclass(frozen=True)
class SoundFormat:
    """How the datasets at hand store sound: `sample_rate` in Hz, or (bins a second, mel bins) of a log-mel."""

    sample_rate: int = 0
    spectrogram_shape: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class View:
    """The wanted modalities, each with its cut; None leaves a modality out.

    Attributes:
      share_window: the views of one clip show the same moment, so that each frame is decoded once for all of
        them, and differ in their crops and in all that is drawn on the device. False draws a window for each;
        frames that windows happen to share are still decoded once.
    """

    video: VideoView | None = None
    audio: AudioView | None = None
    image: ImageView | None = None
    share_window: bool = True

    def __post_init__(self):
        if not self.parts:
            raise ValueError('a View needs at least one of video, audio and image.')

    @property
    def parts(self) -> dict[Modality, VideoView | AudioView | ImageView]:
        return {modality: part for modality in JOINT_ORDER if (part := getattr(self, modality)) is not None}

    def layout(self, sound: SoundFormat) -> dict[Modality, ArraySpec]:
        """Shape and dtype of one row of each modality."""
        found = {}
        for modality, part in self.parts.items():
            if not isinstance(part, AudioView):
                found[modality] = ArraySpec(part.shape, np.dtype(np.uint8))
            elif sound.spectrogram_shape is not None:
                bins, mels = sound.spectrogram_shape
                found[modality] = ArraySpec((round(part.seconds * bins), mels), np.dtype(np.float32))
            else:
                found[modality] = ArraySpec((round(part.seconds * sound.sample_rate),), np.dtype(np.int16))
        return found

    @property
    def eval_crops(self) -> int:
        """Squares that evaluation cuts from each frame."""
        pictures = [part for part in (self.video, self.image) if part is not None]
        crops = [video.make_crop(part.eval_crop).num_crops for part in pictures]
        if len(set(crops)) > 1:
            raise ValueError(f'eval_crop of video and image must cut the same number of squares; got {crops}.')
        return crops[0] if crops else 1

    def write_train(
        self, clip: Clip, draws: Sequence[Draws], rows: Sequence[Mapping[Modality, np.ndarray]], sound: SoundFormat
    ) -> dict[Modality, bool]:
        """Fills one row for each of `draws`, the views of this clip; returns which modalities the clip has."""
        spans = {modality: part.seconds for modality, part in self.parts.items()}
        # Where one modality ends before the other, the window is drawn from the time that has both.
        lengths = [stored_seconds(clip, modality, sound) for modality in spans if has_modality(clip, modality)]
        duration = min(lengths, default=clip.duration)
        starts: list[Mapping[Modality, int | float]] = []
        for k, draw in enumerate(draws):
            starts.append(starts[0] if k and self.share_window else sampling.random_starts(spans, duration, draw))
        return self._write(clip, starts, [1] * len(starts), list(draws), rows, sound)

    def write_eval(
        self, clip: Clip, num_clips: int, rows: Sequence[Mapping[Modality, np.ndarray]], sound: SoundFormat
    ) -> dict[Modality, bool]:
        """Fills num_clips * eval_crops rows: moments spread over the clip, and for each its crops."""
        starts: list[dict[Modality, float]] = []
        for fraction in sampling.spread_fractions(num_clips):
            starts.append({})
            for modality, part in self.parts.items():
                length = stored_seconds(clip, modality, sound)
                starts[-1][modality] = sampling.fraction_start(float(fraction), part.seconds, length)
        return self._write(clip, starts, [self.eval_crops] * num_clips, [None] * num_clips, rows, sound)

    def _write(self, clip, starts, num_crops, draws, rows, sound) -> dict[Modality, bool]:
        present = {}
        for modality, part in self.parts.items():
            outs = [row[modality] for row in rows]
            present[modality] = has_modality(clip, modality)
            if not present[modality]:
                for out in outs:
                    out[...] = 0
            elif isinstance(part, AudioView):
                at = iter(outs)
                for start, count in zip(starts, num_crops, strict=True):
                    for _ in range(count):
                        _write_sound(clip, start[modality], sound, next(at))
            else:
                _write_picture(clip, part, [start[modality] for start in starts], draws, outs)
        return present


def has_modality(clip: Clip, modality: Modality) -> bool:
    """False where the clip lacks it, or where preparation filled it."""
    if modality == 'audio':
        return bool(clip.has.get('audio')) and (clip.waveform is not None or clip.spectrogram is not None)
    return bool(clip.has.get('image', clip.has.get('video'))) and clip.num_frames > 0


def stored_seconds(clip: Clip, modality: Modality, sound: SoundFormat) -> float:
    """How long one modality lasts; legacy clips may store more seconds of log-mel than of picture."""
    if modality != 'audio':
        return clip.num_frames / clip.fps if clip.fps else 0.0
    if clip.spectrogram is not None and sound.spectrogram_shape is not None:
        return len(clip.spectrogram) / sound.spectrogram_shape[0]
    if clip.waveform is not None and clip.sample_rate:
        return len(clip.waveform) / clip.sample_rate
    return 0.0


def _write_sound(clip: Clip, start: float, sound: SoundFormat, out: np.ndarray) -> None:
    if sound.spectrogram_shape is not None:
        if clip.spectrogram is None or clip.spectrogram.shape[1:] != out.shape[1:]:
            raise video.DamagedMediaError(f'clip {clip.id!r} has no log-mel of {out.shape[1]} bins.')
        audio.write_spectrogram(clip.spectrogram, start, sound.spectrogram_shape[0], out)
    else:
        if clip.waveform is None or clip.sample_rate != sound.sample_rate:
            raise video.DamagedMediaError(
                f'clip {clip.id!r} has sound at {clip.sample_rate} Hz in a dataset of {sound.sample_rate} Hz.'
            )
        audio.write_waveform(clip.waveform, start, sound.sample_rate, out)


def _write_picture(
    clip: Clip,
    part: VideoView | ImageView,
    starts: Sequence[float],
    draws: Sequence[Draws | None],
    outs: Sequence[np.ndarray],
) -> None:
    """Decodes every frame that any row wants once, and cuts it for all rows that want it."""
    moving = isinstance(part, VideoView)
    num_frames, frame_seconds = (part.num_frames, part.frame_seconds) if isinstance(part, VideoView) else (1, 0.0)
    wanted = [sampling.frame_indices(start, num_frames, frame_seconds, clip.fps, clip.num_frames) for start in starts]
    places: dict[int, list[tuple[int, int]]] = {}
    for window, indices in enumerate(wanted):
        for at, index in enumerate(indices.tolist()):
            places.setdefault(index, []).append((window, at))
    boxes: list[list[video.Box]] = []
    crop = video.make_crop(part.crop if draws[0] is not None else part.eval_crop)
    size: tuple[int, ...] = ()
    for index, frame in video.decode_frames(clip, places, part.short_side):
        if frame.shape != size:
            if size:
                raise video.DamagedMediaError(f'the frames of clip {clip.id!r} differ in size.')
            size = frame.shape
            boxes = [crop.boxes(size[0], size[1], part.short_side, part.crop_size, draw) for draw in draws]
        for window, at in places[index]:
            for k, box in enumerate(boxes[window]):
                out = outs[window * crop.num_crops + k]
                video.cut(frame, box, out[at] if moving else out)

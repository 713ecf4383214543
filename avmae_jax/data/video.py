"""Frames of a clip: decode, resize the smallest side, crop; uint8 throughout.

Flips, normalisation and everything else in floating point happens on the device: on the host they would cost
milliseconds a clip and four times the transfer. Decoded JPEGs equal TensorFlow's bit for bit (its fast DCT with
fancy upsampling). Resizing is bilinear without antialiasing as TensorFlow does it, but rounds to whole values
where TensorFlow cuts the fraction off: at most one level of 255 apart.
"""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import av
import cv2
import numpy as np
import simplejpeg
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from avmae_jax.data.sampling import Draws
from avmae_jax.data.tfrecord import DamagedRecordError
from avmae_jax.structs import Clip

cv2.setNumThreads(0)  # Our threads work on a clip each; OpenCV's own would only take turns with them.
_scratch = threading.local()


class DamagedMediaError(DamagedRecordError):
    """A record whose bytes are those that were written, but whose media do not decode."""


# -- Crops: each turns the size of the stored frames into the places to cut --


class Box(NamedTuple):
    """Take `source` (top, left, height, width), resize it to `resized` (height, width), cut a square at `corner`."""

    source: tuple[int, int, int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]


@runtime_checkable
class Crop(Protocol):
    """Places to cut squares of `crop_size` from frames that are resized to `short_side`."""

    num_crops: int

    def boxes(self, height: int, width: int, short_side: int, crop_size: int, draws: Draws | None) -> list[Box]: ...


def smallest_side_to(height: int, width: int, short_side: int) -> tuple[int, int]:
    """The size at which the smaller side is `short_side`; rounds down as the reference does."""
    return max(short_side, height * short_side // width), max(short_side, width * short_side // height)


@dataclasses.dataclass(frozen=True)
class CentralCrop:
    """The middle of the picture, for evaluation."""

    num_crops = 1

    def boxes(self, height: int, width: int, short_side: int, crop_size: int, draws: Draws | None) -> list[Box]:
        high, wide = smallest_side_to(height, width, short_side)
        return [Box((0, 0, height, width), (high, wide), ((high - crop_size) // 2, (wide - crop_size) // 2))]


@dataclasses.dataclass(frozen=True)
class ThreeCrops:
    """Three squares along the longer side: its beginning, middle and end, for evaluation."""

    num_crops = 3

    def boxes(self, height: int, width: int, short_side: int, crop_size: int, draws: Draws | None) -> list[Box]:
        high, wide = smallest_side_to(height, width, short_side)
        down, right = high - crop_size, wide - crop_size
        if right >= down:
            corners = [(down // 2, left) for left in (0, right // 2, right)]
        else:
            corners = [(top, right // 2) for top in (0, down // 2, down)]
        return [Box((0, 0, height, width), (high, wide), corner) for corner in corners]


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A square anywhere in the resized picture; with a range of scales, resized by a random factor first.

    Attributes:
      scale: (smallest, largest) factor on the resized picture; (0.9, 1.33) is the recipe's for finetuning.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    num_crops = 1

    def __post_init__(self):
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f'scale of a random crop takes two rising factors above 0; got {self.scale}.')

    def boxes(self, height: int, width: int, short_side: int, crop_size: int, draws: Draws | None) -> list[Box]:
        assert draws is not None
        if self.scale[0] != self.scale[1]:
            short_side = max(crop_size, round(short_side * draws.uniform(*self.scale)))
        high, wide = smallest_side_to(height, width, short_side)
        corner = (draws.below(high - crop_size + 1), draws.below(wide - crop_size + 1))
        return [Box((0, 0, height, width), (high, wide), corner)]


@dataclasses.dataclass(frozen=True)
class ResizedCrop:
    """A random part of the picture, of random area and shape, resized to the square (Inception; MAE on images).

    Attributes:
      area: (smallest, largest) share of the picture's area.
      aspect: largest width / height; its inverse is the smallest.
    """

    area: tuple[float, float] = (0.2, 1.0)
    aspect: float = 4 / 3
    num_crops = 1

    def __post_init__(self):
        if len(self.area) != 2 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f'area of a resized crop takes two rising shares in (0, 1]; got {self.area}.')
        if self.aspect < 1:
            raise ValueError(f'aspect of a resized crop must be at least 1; got {self.aspect}.')

    def boxes(self, height: int, width: int, short_side: int, crop_size: int, draws: Draws | None) -> list[Box]:
        assert draws is not None
        for _ in range(10):
            area = height * width * draws.uniform(*self.area)
            aspect = float(np.exp(draws.uniform(-np.log(self.aspect), np.log(self.aspect))))
            high, wide = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
            if 0 < high <= height and 0 < wide <= width:
                break
        else:
            high = wide = min(height, width)
        source = (draws.below(height - high + 1), draws.below(width - wide + 1), high, wide)
        return [Box(source, (crop_size, crop_size), (0, 0))]


CROPS = {'random': RandomCrop, 'resized': ResizedCrop, 'central': CentralCrop, 'three': ThreeCrops}


def make_crop(crop: str | Mapping) -> Crop:
    """A crop by its name in CROPS, or by {'name': ..., and its settings}."""
    settings = {'name': crop} if isinstance(crop, str) else dict(crop)
    name = settings.pop('name', None)
    if name not in CROPS:
        raise ValueError(f'crop must be one of {sorted(CROPS)}; got {name!r}.')
    for key, value in settings.items():
        settings[key] = tuple(value) if isinstance(value, list) else value
    return CROPS[name](**settings)


def cut(frame: UInt8[np.ndarray, 'H W 3'], box: Box, out: UInt8[np.ndarray, 'h w 3']) -> None:
    """Writes the square that `box` stands for."""
    top, left, high, wide = box.source
    part = frame[top : top + high, left : left + wide]
    if box.resized == out.shape[:2]:
        if part.shape == out.shape:
            out[...] = part
        else:
            cv2.resize(part, out.shape[1::-1], dst=out, interpolation=cv2.INTER_LINEAR)
        return
    if part.shape[:2] != box.resized:
        part = cv2.resize(part, box.resized[::-1], interpolation=cv2.INTER_LINEAR)
    top, left = box.corner
    out[...] = part[top : top + out.shape[0], left : left + out.shape[1]]


# -- Decoding --


def decode_frames(clip: Clip, indices: Iterable[int], short_side: int) -> Iterator[tuple[int, np.ndarray]]:
    """(index, uint8 [H W 3]) of stored frames, in ascending order; an array is valid until the next one is asked for.

    Args:
      short_side: what the frames will be resized to. JPEGs of more than twice that size are decoded at a half,
        a quarter or an eighth, which is faster and free of the aliasing that plain bilinear resizing has.
    """
    wanted = sorted(set(indices))
    try:
        if clip.h264:
            yield from _decode_h264(clip.h264, wanted, clip.fps)
        else:
            for index in wanted:
                yield index, decode_image(clip.frames[index], short_side)
    except (ValueError, IndexError, cv2.error, av.error.FFmpegError) as error:
        raise DamagedMediaError(f'the picture of clip {clip.id!r} cannot be decoded: {error}') from error


def decode_image(data: bytes | memoryview, short_side: int = 0) -> UInt8[np.ndarray, 'H W 3']:
    """A JPEG, or any other still image OpenCV reads, as RGB; in a buffer of this thread that the next call reuses."""
    is_jpeg = bytes(data[:2]) == b'\xff\xd8'
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data) if is_jpeg else (0, 0, '', '')
    if colours not in ('YCbCr', 'Gray', 'RGB'):  # PNG and others; JPEGs for print.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise ValueError('neither JPEG nor another image that OpenCV knows.')
        return image
    factor = 1
    while factor < 8 and short_side and min(height, width) >= 2 * factor * short_side:
        factor *= 2
    buffer = getattr(_scratch, 'buffer', None)
    if buffer is None or len(buffer) < height * width * 3:
        buffer = _scratch.buffer = np.empty(height * width * 3, np.uint8)
    # A gray JPEG comes out as three equal channels.
    return simplejpeg.decode_jpeg(
        data,
        colorspace='RGB',
        fastdct=True,
        min_height=-(-height // factor) if factor > 1 else 0,
        min_width=-(-width // factor) if factor > 1 else 0,
        min_factor=factor,
        buffer=buffer,
    )


def _decode_h264(data: bytes, wanted: list[int], fps: float) -> Iterator[tuple[int, np.ndarray]]:
    with av.open(io.BytesIO(data), mode='r') as container:
        if not container.streams.video:
            raise ValueError('there is no video stream')
        stream = container.streams.video[0]
        stream.thread_type = 'NONE'
        stream.codec_context.thread_count = 1  # Frame threading costs more than it gives here, and can hang.
        begin, unit = stream.start_time or 0, stream.time_base
        if unit is None:
            raise ValueError('the video stream has no unit of time')
        # Seeking goes back to the last keyframe; half a frame more, so that rounding does not miss that of `wanted`.
        container.seek(begin + int((wanted[0] + 0.5) / fps / unit), stream=stream)
        position = 0
        to_rgb = VideoReformatter()  # Kept for the clip: one for each frame would take a third of the time.
        for frame in container.decode(stream):
            if frame.pts is None:
                raise ValueError('a frame without a time')
            index = round(float((frame.pts - begin) * unit) * fps)
            # A picture that the encoder dropped is answered by the one that is shown in its place.
            while position < len(wanted) and index >= wanted[position]:
                yield wanted[position], to_rgb.reformat(frame, format='rgb24').to_ndarray()
                position += 1
            if position == len(wanted):
                return
    raise ValueError(f'it ends before frame {wanted[position]}')

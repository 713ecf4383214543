"""Media as people have them -> rows of a batch, cut as evaluation cuts stored clips; numpy, on the host."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import numpy as np
from av import AudioFrame
from av.audio.resampler import AudioResampler
from jaxtyping import Float32, Num, UInt8

from avmae_jax.data import audio, sampling, video
from avmae_jax.data.views import ImageView, VideoView
from avmae_jax.exports.trained import Trained
from avmae_jax.ops.preprocess import STORED
from avmae_jax.structs import Array, Modality


def make_rows(trained: Trained, media: dict[Modality, Any], fps: Any, sample_rate: Any) -> dict[Modality, Array]:
    """Rows of the shapes `trained.row_shapes`; what already has that shape is passed on untouched.

    Args:
      media: by modality; see `avmae_jax.pretrained`.
      fps, sample_rate: numbers of any kind, or None.
    """
    unknown = [m for m in media if m not in trained.modalities]
    if unknown or not media:
        given = ' and '.join(unknown) or 'nothing'
        raise ValueError(f'the model takes {" and ".join(trained.modalities)}; {given} was given.')
    if fps is not None and not (is_number(fps) and 0 < fps < math.inf):
        raise ValueError(f'fps must be a number above 0; got {fps!r}.')
    if sample_rate is not None and not (
        is_number(sample_rate) and 1000 <= sample_rate <= 1_000_000 and sample_rate % 1 == 0
    ):
        raise ValueError(f'sample_rate is a whole number from 1,000 to 1,000,000 a second; got {sample_rate!r}.')
    arrays = {m: as_array(m, x) for m, x in media.items()}
    rows = {
        m: sound_rows(trained, x, sample_rate) if m == 'audio' else picture_rows(trained, m, x, fps)
        for m, x in arrays.items()
    }
    lengths = {m: len(x) for m, x in rows.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f'as many clips of each modality are wanted; got {lengths}.')
    return rows


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def as_array(modality: Modality, media: Any) -> Array:
    """Of jax as it is; tensors of torch and lists become numpy's."""
    try:
        return media if isinstance(media, jax.Array) else np.asarray(media)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{modality} is no array: {error}') from error


def picture_rows(trained: Trained, modality: Modality, media: Any, fps: Any) -> Array:
    """Frames and crops of 'video' [b t h w 3] or 'image' [b h w 3]."""
    wanted, part = trained.row_shapes[modality], trained.view.parts[modality]
    assert isinstance(part, VideoView | ImageView)
    if media.dtype != np.uint8 or media.ndim != len(wanted) + 1 or media.shape[-1] != 3 or 0 in media.shape:
        axes = 'b t h w 3' if modality == 'video' else 'b h w 3'
        raise ValueError(f'{modality} is uint8 [{axes}], RGB in 0..255; got {media.dtype} {list(media.shape)}.')
    if isinstance(part, VideoView):
        if fps is not None:
            num_stored = media.shape[1]
            start = sampling.fraction_start(0.5, part.seconds, num_stored / fps)
            media = media[:, sampling.frame_indices(start, part.num_frames, part.frame_seconds, fps, num_stored)]
        if media.shape[1] != wanted[0]:
            raise ValueError(
                f'the model takes {wanted[0]} frames, {part.frame_seconds:g} s apart; got {media.shape[1]}. Give whole '
                'clips with their fps, and the frames are taken from them.'
            )
    if media.shape[1:] == wanted:
        return media
    return cut_middles(np.asarray(media), part.short_side, part.crop_size)


def cut_middles(
    frames: UInt8[np.ndarray, '*b H W 3'], short_side: int, crop_size: int
) -> UInt8[np.ndarray, '*b h w 3']:
    """Resizes every frame to `short_side` and cuts the square in its middle."""
    height, width = frames.shape[-3:-1]
    (box,) = video.CentralCrop().boxes(height, width, short_side, crop_size, None)
    cut = np.empty((*frames.shape[:-3], crop_size, crop_size, 3), np.uint8)
    for index in np.ndindex(frames.shape[:-3]):
        video.cut(frames[index], box, cut[index])
    return cut


def sound_rows(trained: Trained, media: Any, sample_rate: Any) -> Array:
    """The middle of sound [b l], or stored log-mels [b s f] as they are."""
    preprocess, wanted, part = trained.preprocess, trained.row_shapes['audio'], trained.view.audio
    assert part is not None
    if preprocess.convention == STORED:
        if media.shape[1:] != wanted or media.dtype != np.float32 or sample_rate is not None:
            raise ValueError(
                f'the model takes log-mels, float32 [b {wanted[0]} {wanted[1]}], and no sample_rate; got {media.dtype} '
                f'{list(media.shape)}.'
            )
        return media
    if media.ndim != 2 or 0 in media.shape or (media.dtype != np.int16 and np.dtype(media.dtype).kind != 'f'):
        raise ValueError(
            f'audio is float [b l] in [-1, 1], or int16, of one channel; got {media.dtype} {list(media.shape)}.'
        )
    # What lies on a device is not fetched for it.
    if isinstance(media, np.ndarray) and media.dtype != np.int16 and not np.isfinite(media).all():
        raise ValueError(f'audio has {np.sum(~np.isfinite(media)):,} samples that are NaN or infinite.')
    if sample_rate not in (None, preprocess.sample_rate):
        media = np.stack([resample(row, int(sample_rate), preprocess.sample_rate) for row in np.asarray(media)])
    if media.shape[1:] == wanted:
        return media
    media = np.asarray(media)
    start = sampling.fraction_start(0.5, part.seconds, media.shape[1] / preprocess.sample_rate)
    rows = np.empty((len(media), *wanted), media.dtype)
    for waveform, row in zip(media, rows, strict=True):
        audio.write_waveform(waveform, start, preprocess.sample_rate, row)
    return rows


def resample(waveform: Num[np.ndarray, 'l'], sample_rate: int, wanted: int) -> Float32[np.ndarray, 'm']:
    """The sound at another rate, by the resampler that `prepare` uses too (ffmpeg's)."""
    scale = np.float32(1 / 32768) if waveform.dtype == np.int16 else np.float32(1)
    frame = AudioFrame.from_ndarray(waveform.astype(np.float32)[None] * scale, format='fltp', layout='mono')
    frame.sample_rate = sample_rate
    resampler = AudioResampler(format='fltp', layout='mono', rate=wanted)
    blocks = [*resampler.resample(frame), *resampler.resample(None)]
    # It makes nothing of a sample or two.
    return np.concatenate([np.zeros(0, np.float32), *(block.to_ndarray().reshape(-1) for block in blocks)])

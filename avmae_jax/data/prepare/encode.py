"""RGB frames -> the bytes a record stores: a JPEG a frame, or one short-GOP h264 mp4. Same frames, same bytes."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import simplejpeg

H264_CRF = 23  # libx264's own default; 0.7 MB for 10 s at 256 x 340, 12.5 fps.


class JpegWriter:
    """One JPEG a frame; a frame that is shown several times is encoded once."""

    def __init__(self, quality: int):
        self._quality = quality
        self.frames: list[bytes] = []
        self.h264 = b''

    def write(self, rgb: np.ndarray, repeats: int) -> None:
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=self._quality, colorspace='RGB')
        self.frames += [data] * repeats

    def finish(self) -> None:
        pass


class H264Writer:
    """An mp4 without B-frames and with a key frame every `gop` frames, so that a window decodes from nearby."""

    def __init__(self, fps: float, gop: int):
        self._fps, self._gop = fps, gop
        self._file = io.BytesIO()
        self._container: Any = None
        self._stream: Any = None
        self._count = 0
        self.frames: list[bytes] = []
        self.h264 = b''

    def _open(self, height: int, width: int) -> Any:
        # bitexact: without it the muxer writes its version into the file.
        self._container = av.open(self._file, 'w', format='mp4', container_options={'fflags': '+bitexact'})
        stream = self._container.add_stream('libx264', rate=Fraction(self._fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
        stream.codec_context.thread_count = 1  # More threads, other bytes.
        stream.options = {
            'preset': 'medium',
            'crf': str(H264_CRF),
            'tune': 'fastdecode',
            'g': str(self._gop),
            'keyint_min': str(self._gop),
            'sc_threshold': '0',
            'bf': '0',
            'flags': '+bitexact+cgop',
        }
        return stream

    def write(self, rgb: np.ndarray, repeats: int) -> None:
        if self._stream is None:
            self._stream = self._open(*rgb.shape[:2])
        for _ in range(repeats):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format='rgb24')
            frame.pts = self._count
            frame.time_base = 1 / Fraction(self._fps).limit_denominator(1001)
            self._count += 1
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self.h264 = self._file.getvalue()


def make_writer(codec: str, fps: float, jpeg_quality: int, gop: int) -> JpegWriter | H264Writer:
    if codec == 'jpeg':
        return JpegWriter(jpeg_quality)
    return H264Writer(fps, gop)

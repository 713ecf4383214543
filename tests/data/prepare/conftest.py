"""Media files of every kind, written by PyAV in milliseconds: frame k of a video has gray level 20 + 10 k."""

import os
import pathlib
from fractions import Fraction

import av
import numpy as np
import pytest


def add_video(container, seconds=1.0, fps=10, size=(48, 64), codec='mpeg4', pix_fmt='yuv420p', times=None, gray=None):
    """A stream of flat frames; `times` in seconds makes the frame rate variable."""
    stream = container.add_stream(codec, rate=fps)
    stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
    stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
    packets = []
    for k, time in enumerate(times if times is not None else [k / fps for k in range(round(seconds * fps))]):
        level = (20 + 10 * k) % 240 if gray is None else gray
        frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), format='rgb24')
        frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
        packets += stream.encode(frame)
    packets += stream.encode(None)
    return packets


def tone(seconds, rate, hz=440.0, channels=1, loudness=0.5):
    """float32 [channels, samples] of a sine."""
    wave = loudness * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def add_sound(container, samples, rate=16000, layout='mono', codec='aac', sample_format='fltp'):
    stream = container.add_stream(codec, rate=rate, layout=layout)
    resampler = av.AudioResampler(format=stream.codec_context.format or sample_format, layout=layout, rate=rate)
    packets, at, size = [], 0, stream.codec_context.frame_size or 1024
    while at < samples.shape[1]:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, at : at + size]), 'fltp', layout)
        frame.rate, frame.pts = rate, at
        for part in resampler.resample(frame):
            packets += stream.encode(part)
        at += size
    packets += stream.encode(None)
    return packets


def write_media(path, video=None, sound=None, container_options=None, format=None):
    """A file with these streams: `video` and `sound` are arguments of add_video and add_sound, or lists of them."""
    with av.open(str(path), 'w', format=format, options=container_options or {}) as container:
        packets = []
        for arguments in [video] if isinstance(video, dict) else video or []:
            packets += add_video(container, **arguments)
        for arguments in [sound] if isinstance(sound, dict) else sound or []:
            packets += add_sound(container, **arguments)
        packets.sort(key=lambda packet: float(packet.dts * packet.time_base) if packet.dts is not None else 0.0)
        for packet in packets:
            container.mux(packet)
    return str(path)


class Media:
    """What the tests of this folder make their files with."""

    write = staticmethod(write_media)
    tone = staticmethod(tone)


@pytest.fixture(scope='session')
def media():
    return Media


@pytest.fixture(scope='session')
def shared_data(repository) -> pathlib.Path:
    """The folder with real media."""
    folder = pathlib.Path(os.environ.get('AVMAE_DATA', repository.parent / 'shared' / 'data'))
    if not folder.is_dir():
        pytest.skip(f'{folder} is not there; set AVMAE_DATA to the folder with the real clips.')
    return folder


@pytest.fixture(scope='session')
def plain_folder(media, tmp_path_factory) -> pathlib.Path:
    """Ten clips of one second with picture and sound, and clips.csv with two classes; never to be written to."""
    folder = tmp_path_factory.mktemp('plain')
    lines = ['path,label,split']
    for i in range(10):
        sound = {'samples': media.tone(1.0, 16000, hz=200 + 100 * i)}
        media.write(folder / f'clip{i}.mp4', video={'gray': 10 + 20 * i}, sound=sound)
        lines.append(f'clip{i}.mp4,{"odd" if i % 2 else "even"},{"test" if i >= 8 else "train"}')
    (folder / 'clips.csv').write_text('\n'.join(lines) + '\n')
    return folder

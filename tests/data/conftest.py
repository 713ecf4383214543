"""Clips of a few small frames whose content tells where they come from, datasets of them, and media files."""

import hashlib
import pathlib
from fractions import Fraction

import av
import numpy as np
import pytest
import simplejpeg

from avmae_jax.data import schema, tfrecord
from avmae_jax.data.prepare import encode
from avmae_jax.structs import Clip

FPS, SAMPLE_RATE = 10.0, 1000


def make_clip(i, seconds=2.0, codec='jpeg', size=(40, 56), fps=FPS, has=None, gop=4):
    """Frame k of clip i is all of one gray level, 40 + 10 k; sample j of its sound is j."""
    num_frames = int(round(seconds * fps))
    has = {'video': True, 'audio': True} if has is None else has
    writer = encode.make_writer(codec, fps, 95, gop)
    for k in range(num_frames):
        writer.write(np.full((*size, 3), 40 + 10 * k % 200, np.uint8), 1)
    writer.finish()
    waveform = np.arange(int(seconds * SAMPLE_RATE), dtype=np.int16)
    return Clip(
        id=f'clip{i}',
        frames=writer.frames,
        h264=writer.h264,
        num_frames=num_frames,
        fps=fps,
        waveform=waveform,
        spectrogram=None,
        sample_rate=SAMPLE_RATE,
        duration=seconds,
        has=has,
        labels={'label': [i % 3]},
    )


def make_textured_clip(i, seconds=1.0, size=(40, 56)):
    """Frames of noise, so that no two crops are alike."""
    rng = np.random.default_rng(i)
    clip = make_clip(i, seconds, size=size)
    frames = [simplejpeg.encode_jpeg(rng.integers(0, 255, (*size, 3)).astype(np.uint8)) for _ in clip.frames]
    return clip._replace(frames=frames)


def write_dataset(folder, clips, num_shards=2, name='toy', codec='jpeg'):
    """A prepared folder, as `prepare` leaves it."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for k in range(num_shards):
        part = clips[k * len(clips) // num_shards : (k + 1) * len(clips) // num_shards]
        records = [tfrecord.frame_record(schema.write_clip(clip)) for clip in part]
        path = folder / f'{name}-train.tfrecord-{k:05d}-of-{num_shards:05d}'
        path.write_bytes(b''.join(records))
        index = tfrecord.format_index([len(record) for record in records])
        pathlib.Path(f'{path}.index').write_text(index)
        shards.append(
            schema.ShardInfo(
                file=path.name,
                num_records=len(records),
                num_bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                framing_sha256=tfrecord.TFRecordFile(path, tfrecord.read_index(f'{path}.index')).framing_digest(),
                index_sha256=hashlib.sha256(index.encode()).hexdigest(),
            )
        )
    info = schema.DatasetInfo(
        name=name,
        modalities=('audio', 'video'),
        media=schema.MediaSettings(codec, FPS, 40, 95, SAMPLE_RATE, 2.0, 4),
        splits={'train': tuple(shards)},
        labels={'label': schema.LabelSet(('a', 'b', 'c'), False)},
        statistics={},
    )
    (folder / schema.INFO_FILE).write_text(info.to_json())
    return folder


def flip_byte(path, at):
    """Changes one byte of a file."""
    data = bytearray(pathlib.Path(path).read_bytes())
    data[at] ^= 0x10
    pathlib.Path(path).write_bytes(bytes(data))


class Toys:
    make_writer = staticmethod(lambda codec: encode.make_writer(codec, FPS, 95, 4))
    make_clip = staticmethod(make_clip)
    make_textured_clip = staticmethod(make_textured_clip)
    write_dataset = staticmethod(write_dataset)
    flip_byte = staticmethod(flip_byte)


@pytest.fixture(scope='session')
def toys():
    return Toys


@pytest.fixture(scope='session')
def toy_folder(tmp_path_factory):
    """Eleven textured clips of one second in two shards; never to be written to."""
    return write_dataset(tmp_path_factory.mktemp('toy') / 'toy', [make_textured_clip(i) for i in range(11)])


# -- Media files of every kind, written by PyAV in milliseconds: frame k of a video has gray level 20 + 10 k --


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
    """What tests make their files with."""

    write = staticmethod(write_media)
    tone = staticmethod(tone)


@pytest.fixture(scope='session')
def media():
    return Media

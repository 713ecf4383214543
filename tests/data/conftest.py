"""Clips of a few small frames whose content tells where they come from, and datasets of them."""

import hashlib
import pathlib

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

import csv
import gzip
import struct
import wave

import av
import numpy as np
import pytest


@pytest.fixture(scope='module')
def script(run_script):
    with run_script('scripts/build_avmnist.py') as names:
        yield names


@pytest.fixture
def downloads(tmp_path):
    """Four recordings by two speakers, and three images: of a 3, a 7 and a 3."""
    fsdd, mnist = tmp_path / 'recordings', tmp_path / 'mnist'
    fsdd.mkdir(), mnist.mkdir()
    for name in ('3_ann_0', '3_bob_12', '7_ann_5'):
        with wave.open(str(fsdd / f'{name}.wav'), 'wb') as file:
            file.setparams((1, 2, 8_000, 0, 'NONE', ''))
            file.writeframes((8_000 * np.sin(np.arange(3_000) * 0.3)).astype('<i2').tobytes())
    (fsdd / 'README').write_text('not a recording')
    images = np.zeros((3, 28, 28), np.uint8)
    images[:, 4:24, 12:16] = np.array([120, 180, 240], np.uint8).reshape(3, 1, 1)
    with gzip.open(mnist / 't10k-images-idx3-ubyte.gz', 'wb') as file:
        file.write(struct.pack('>HBB3I', 0, 8, 3, 3, 28, 28) + images.tobytes())
    (mnist / 't10k-labels-idx1-ubyte').write_bytes(struct.pack('>HBBI', 0, 8, 1, 3) + bytes([3, 7, 3]))
    return fsdd, mnist


def test_every_recording_gets_an_image_of_its_digit_once(script, downloads, tmp_path):
    table = script.build(*downloads, tmp_path / 'out', seed=0)
    rows = list(csv.DictReader(table.open()))
    assert [(row['label'], row['speaker'], row['split']) for row in rows] == [
        ('3', 'ann', 'test'),
        ('3', 'bob', 'train'),
        ('7', 'ann', 'train'),
    ]
    assert sorted(row['mnist_t10k_index'] for row in rows[:2]) == ['0', '2']
    assert rows[2]['mnist_t10k_index'] == '1'
    for row in rows:
        assert (tmp_path / 'out' / row['path']).exists()


def test_a_clip_is_a_moving_digit_and_a_word(script, downloads, tmp_path):
    script.build(*downloads, tmp_path / 'out', seed=1)
    (path,) = (tmp_path / 'out' / 'clips').glob('7_ann_5_*.mp4')
    with av.open(str(path)) as file:
        frames = np.stack([frame.to_ndarray(format='gray') for frame in file.decode(video=0)]).astype(float)
        assert float(file.streams.video[0].average_rate) == 12.5
    with av.open(str(path)) as file:
        sound = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=-1)
        assert file.streams.audio[0].rate == 16_000
    assert frames.shape == (16, 112, 112)
    assert 20_480 <= sound.shape[-1] <= 20_480 + 2 * 1_024  # AAC comes in whole blocks.
    centres = np.array([[(frame * axis).sum() / frame.sum() for axis in np.indices(frame.shape)] for frame in frames])
    steps = np.diff(centres, axis=0)
    assert np.abs(steps).max() > 0.2
    np.testing.assert_allclose(steps, np.broadcast_to(steps.mean(axis=0), steps.shape), atol=0.3)


def test_recordings_are_doubled_in_rate_and_nothing_else(script, downloads):
    samples = script.read_wav(downloads[0] / '3_ann_0.wav')
    assert samples.dtype == np.int16 and len(samples) == 6_000
    wanted = 8_000 * np.sin(np.arange(6_000) * 0.15)
    np.testing.assert_allclose(samples[500:-500], wanted[500:-500], atol=60)


def test_the_same_seed_gives_the_same_clips(script, downloads, tmp_path):
    for name in ('a', 'b'):
        script.build(*downloads, tmp_path / name, seed=3)
    for path in (tmp_path / 'a' / 'clips').iterdir():
        assert path.read_bytes() == (tmp_path / 'b' / 'clips' / path.name).read_bytes()


def test_what_is_not_a_download_is_said(script, downloads, tmp_path):
    fsdd, mnist = downloads
    with pytest.raises(ValueError, match='neither t10k-images'):
        script.build(fsdd, tmp_path, tmp_path / 'out', seed=0)
    with pytest.raises(ValueError, match='--fsdd is the folder'):
        script.build(mnist, mnist, tmp_path / 'out', seed=0)
    (mnist / 't10k-labels-idx1-ubyte').write_bytes(b'html')
    with pytest.raises(ValueError, match='IDX'):
        script.build(fsdd, mnist, tmp_path / 'out', seed=0)

"""Made-up clips: what is seen is what is heard, and the same seed gives the same clip."""

import csv
import dataclasses

import av
import numpy as np
import pytest

from avmae_jax.data.generate import LABELS, generate_clip, write_clips, write_mp4
from avmae_jax.data.generate.scene import LABELS as SCENE_LABELS
from avmae_jax.data.generate.scene import STEPS_PER_SECOND, simulate
from avmae_jax.data.generate.sound import synthesize

RATE = 32000


def decode(path):
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format='rgb24') for frame in file.decode(video=0)]
    with av.open(str(path)) as file:
        waveform = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1).T
    return np.stack(frames), waveform


def test_the_seed_alone_decides_pixels_and_samples():
    first, again = (generate_clip((3, 1), seconds=0.6, size=48) for _ in range(2))
    other = generate_clip((3, 2), seconds=0.6, size=48)
    np.testing.assert_array_equal(first.frames, again.frames)
    np.testing.assert_array_equal(first.waveform, again.waveform)
    assert (first.frames != other.frames).any() and (first.waveform != other.waveform).any()


def test_shapes_follow_the_arguments():
    clip = generate_clip(0, 'wood-roll', seconds=1.5, size=64, fps=10, sample_rate=16000)
    assert clip.frames.shape == (15, 64, 64, 3) and clip.waveform.shape == (24000, 2)
    assert clip.label == 'wood-roll'


def test_the_size_of_the_picture_leaves_the_sound_as_it_is():
    small, large = (generate_clip(5, 'metal-glide', seconds=0.5, size=size) for size in (32, 64))
    np.testing.assert_array_equal(small.waveform, large.waveform)


@pytest.mark.parametrize('label', LABELS)
def test_bodies_stay_where_they_can_be_seen(label):
    for seed in range(4):
        scene = simulate(np.random.default_rng(seed), label, 3.0)
        assert (scene.x > -0.01).all() and (scene.x < 1.01).all()
        assert (scene.y < 1.01).all() and np.isfinite(scene.angle).all()
        assert np.ptp(scene.x, axis=0).max() > 0.03 or np.ptp(scene.y, axis=0).max() > 0.03


def loudness(waveform, rate, bins_per_second=100):
    """[time] of the high-passed sound: clicks stand out from hums."""
    edges = np.abs(np.diff(waveform.astype(np.float32).mean(-1), 2, prepend=0, append=0))
    size = rate // bins_per_second
    return edges[: len(edges) // size * size].reshape(-1, size).mean(-1)


@pytest.mark.parametrize('material', ['wood', 'metal', 'rubber'])
def test_the_sound_begins_when_the_body_is_seen_to_touch_the_floor(material):
    found = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        scene = simulate(rng, f'{material}-bounce', 1.5)
        if len(scene.radius) > 1 or not scene.contacts:
            continue
        first = next(contact for contact in scene.contacts)
        # Seen: at the contact the body is at the floor or at a wall.
        step = round(first.seconds * STEPS_PER_SECOND)
        x, y, radius = scene.x[step, 0], scene.y[step, 0], scene.radius[0]
        gap = min(float(scene.ground(np.array(x))) - y - radius, x - radius, 1 - x - radius)
        assert abs(gap) < 0.02
        # Heard: the first onset far above the noise of the room.
        level = loudness(synthesize(rng, scene, 1.5, RATE), RATE)
        onset = int(np.argmax(level > 4 * np.median(level[:5]) + 1))
        assert abs(onset / 100 - first.seconds) < 0.03
        found += 1
    assert found >= 2


def test_sound_comes_from_the_side_where_the_contact_is():
    sides = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        scene = simulate(rng, 'wood-bounce', 1.0)
        contacts = [contact for contact in scene.contacts if contact.seconds < 0.9]
        if len(contacts) != 1 or abs(contacts[0].x - 0.5) < 0.2:
            continue
        start = round(contacts[0].seconds * RATE)
        left, right = np.abs(synthesize(rng, scene, 1.0, RATE)[start : start + 3200].astype(np.float32)).mean(0)
        sides.append((right > left) == (contacts[0].x > 0.5))
    assert len(sides) >= 2 and all(sides)


def test_small_bodies_sound_higher_than_large_ones():
    pitches = []
    for seed in range(200, 290):
        rng = np.random.default_rng(seed)
        scene = simulate(rng, 'metal-bounce', 1.0)
        if len(scene.radius) > 1 or not scene.contacts:
            continue
        waveform = synthesize(rng, scene, 1.0, RATE).astype(np.float32).mean(-1)
        spectrum = np.abs(np.fft.rfft(waveform[round(scene.contacts[0].seconds * RATE) :] * 1.0, RATE))
        pitches.append((scene.sizes[0], np.argmax(spectrum)))
    sizes, hz = np.array(pitches).T
    assert len(sizes) > 8
    assert np.corrcoef(np.log(sizes), np.log(hz))[0, 1] < -0.95


def test_the_same_scene_from_farther_away_is_quieter():
    near = simulate(np.random.default_rng(0), 'metal-roll', 0.5)
    far = dataclasses.replace(
        near,
        distance=near.distance * 1.5,
        radius=near.radius / 1.5,
        x=near.x / 1.5,
        y=near.y / 1.5,
        contacts=tuple(contact._replace(speed=contact.speed / 1.5) for contact in near.contacts),
    )
    levels = [synthesize(np.random.default_rng(1), scene, 0.5, RATE).astype(np.float32).std() for scene in (near, far)]
    assert 0.4 < levels[1] / levels[0] < 0.75  # 1.5**-1.5 is 0.54; loud sound is compressed.


def test_files_hold_what_was_generated(tmp_path):
    clip = generate_clip(1, 'rubber-bounce', seconds=1.0, size=96, fps=25)
    write_mp4(tmp_path / 'clip.mp4', clip.frames, clip.waveform, 25)
    frames, waveform = decode(tmp_path / 'clip.mp4')
    assert frames.shape == clip.frames.shape
    assert np.abs(frames.astype(float) - clip.frames).mean() < 8
    sent = clip.waveform[: len(waveform)].astype(np.float32) / 32768
    got = waveform[: len(sent)]
    for channel in range(2):
        assert np.corrcoef(sent[:, channel], got[:, channel])[0, 1] > 0.95  # In time to the sample, left and right.
    assert [path.name for path in tmp_path.iterdir()] == ['clip.mp4']


def test_sound_or_picture_alone_can_be_written(tmp_path):
    clip = generate_clip(1, seconds=0.5, size=32)
    write_mp4(tmp_path / 'sound.mp4', None, clip.waveform[:, :1], 25)
    write_mp4(tmp_path / 'picture.mp4', clip.frames, None, 25)
    with av.open(str(tmp_path / 'sound.mp4')) as file:
        assert [stream.type for stream in file.streams] == ['audio'] and file.streams.audio[0].channels == 1
    with av.open(str(tmp_path / 'picture.mp4')) as file:
        assert [stream.type for stream in file.streams] == ['video']


def test_a_folder_of_clips_is_listed_with_labels_and_splits_and_does_not_depend_on_processes(tmp_path):
    options = {'num_clips': 10, 'seed': 4, 'seconds': 0.4, 'size': 32}
    for folder, num_processes in (('a', 0), ('b', 2)):
        write_clips(tmp_path / folder, num_processes=num_processes, **options)
    rows = list(csv.DictReader((tmp_path / 'a' / 'clips.csv').open()))
    assert [row['label'] for row in rows] == [*LABELS, LABELS[0]]
    assert LABELS == SCENE_LABELS
    assert set(rows[0]) == {'path', 'label', 'split', 'start', 'end'}
    for row in rows:
        assert (tmp_path / 'a' / row['path']).read_bytes() == (tmp_path / 'b' / row['path']).read_bytes()


def test_every_class_is_in_both_splits(tmp_path):
    table = write_clips(tmp_path, 45, seconds=0.1, size=16, num_processes=0)
    splits = {}
    for row in csv.DictReader(table.open()):
        splits.setdefault(row['split'], set()).add(row['label'])
    assert splits == {'train': set(LABELS), 'test': set(LABELS)}


@pytest.mark.parametrize('wrong', [{'label': 'glass-bounce'}, {'seconds': 0}, {'size': 4}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate_clip(0, **wrong)

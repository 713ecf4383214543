import dataclasses
import json

import numpy as np
import pytest

from avmae_jax.data import schema


def same(left, right):
    for name in left._fields:
        a, b = getattr(left, name), getattr(right, name)
        equal = np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        assert equal, name


@pytest.mark.parametrize('codec', schema.CODECS)
def test_a_clip_is_read_as_it_was_written(toys, codec):
    clip = toys.make_clip(3, codec=codec)
    same(schema.read_clip(schema.write_clip(clip)), clip._replace(frames=list(clip.frames)))


def test_equal_clips_have_equal_bytes(toys):
    assert schema.write_clip(toys.make_clip(1)) == schema.write_clip(toys.make_clip(1))


def test_what_a_clip_lacks_stays_lacking(toys):
    clip = toys.make_clip(0)._replace(frames=[], num_frames=0, waveform=None, labels={'x': []}, has={'video': False})
    found = schema.read_clip(schema.write_clip(clip))
    assert list(found.frames) == [] and found.waveform is None and found.labels == {'x': []}
    assert found.has == {'video': False, 'audio': False}


def test_frames_are_copied_out_one_by_one(toys):
    clip = toys.make_clip(0)
    frames = schema.read_clip(schema.write_clip(clip)).frames
    assert isinstance(frames[3], bytes) and frames[3] == clip.frames[3]
    assert frames[-1] == clip.frames[-1] and frames[2:4] == clip.frames[2:4] and len(frames) == 20
    with pytest.raises(IndexError):
        frames[20]


def test_large_and_negative_numbers_survive():
    fields = {'a': [-1, 0, 2**62, -(2**63)], 'b': [0.5, -1e30], 'c': [b'', b'xyz']}
    found = schema.read_example(schema.write_example(fields))
    assert found['a'] == fields['a'] and list(found['c']) == fields['c']
    np.testing.assert_array_equal(found['b'], np.float32(fields['b']))


def test_bytes_that_are_no_clip_are_a_value_error(toys):
    record = schema.write_clip(toys.make_clip(0))
    rng = np.random.default_rng(0)
    attempts = [b'', b'\x0a', rng.bytes(500), record[: len(record) // 2], record[:-1]]
    for _ in range(300):
        damaged = bytearray(record[:600])
        for at in rng.integers(0, len(damaged), 5):
            damaged[at] = rng.integers(256)
        attempts.append(bytes(damaged))
    refused = 0
    for attempt in attempts:
        try:
            schema.read_clip(attempt)
        except ValueError:
            refused += 1
    assert refused > 290


def test_dataset_info_survives_its_json(toy_folder):
    info = schema.read_info(toy_folder)
    assert schema.DatasetInfo.from_json(info.to_json()) == info
    assert info.num_records('train') == 11
    changed = dataclasses.replace(info, labels={'label': schema.LabelSet(('a', 'c', 'b'), False)})
    assert changed.digest() != info.digest()
    measured = dataclasses.replace(info, longest_seconds=1.5)
    assert schema.DatasetInfo.from_json(measured.to_json()) == measured and measured.clip_seconds == 1.5
    assert info.clip_seconds == info.media.clip_seconds and 'longest_seconds' not in info.to_json()


def test_label_names_must_fit_their_digest(toy_folder):
    text = schema.read_info(toy_folder).to_json()
    with pytest.raises(ValueError, match='label'):
        schema.DatasetInfo.from_json(text.replace('"b"', '"d"'))


def test_a_folder_that_was_never_finished_is_named(tmp_path):
    with pytest.raises(ValueError, match='prepare'):
        schema.read_info(tmp_path)


def test_a_dataset_json_is_read_or_refused_by_its_name(toy_folder, tmp_path, broken_json):
    told = json.loads((toy_folder / schema.INFO_FILE).read_text())
    refused = 0
    for where, text in broken_json(told):
        (tmp_path / schema.INFO_FILE).write_text(text)
        try:
            info = schema.read_info(tmp_path)
        except ValueError as error:
            assert str(tmp_path / schema.INFO_FILE) in str(error), where
            refused += 1
        else:
            assert schema.DatasetInfo.from_json(info.to_json()) == info, where
    assert refused > 100

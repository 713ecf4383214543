import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from avmae_jax.data import schema, tfrecord
from avmae_jax.data.prepare import clips, job, manifest, shards, workers
from avmae_jax.data.prepare.statistics import Sums, log_mel

SETTINGS = clips.Settings(fps=5.0, short_side=32)


@pytest.fixture(scope='module')
def rows(plain_folder):
    return manifest.read_manifest([str(plain_folder / 'clips.csv')])


def contents(folder):
    """Every file that a reader sees, by its bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope='module')
def prepared(rows, tmp_path_factory):
    """Done in one go by one process."""
    folder = tmp_path_factory.mktemp('done') / 'plain'
    job.run(rows, SETTINGS, str(folder), 'plain', num_workers=1, num_shards=3)
    return folder


def test_clips_are_dealt_evenly_and_each_once():
    dealt = shards.deal(11, 4)
    assert [i for part in dealt for i in part] == list(range(11))
    assert {len(part) for part in dealt} == {2, 3}


@pytest.mark.parametrize('num_rows, bytes_per_clip, wanted', [(10, 1e5, 1), (300, 1e5, 16), (172_000, 2.4e6, 1613)])
def test_shards_are_large_but_never_few(num_rows, bytes_per_clip, wanted):
    assert job.count_shards(num_rows, bytes_per_clip, None, 256.0) == wanted


def test_dataset_json_tells_the_truth_about_every_shard(prepared):
    info = schema.read_info(prepared)
    assert info.modalities == ('audio', 'video') and info.num_records('train') == 8 and info.num_records('test') == 2
    assert info.labels['label'].names == ('even', 'odd')
    durations = [
        schema.read_clip(payload).duration
        for shard in [shard for split in info.splits.values() for shard in split]
        for _, _, payload in tfrecord.scan_records(prepared / shard.file)
    ]
    assert info.clip_seconds == info.longest_seconds == pytest.approx(max(durations))
    for shard in [shard for split in info.splits.values() for shard in split]:
        data = (prepared / shard.file).read_bytes()
        index_text = (prepared / f'{shard.file}.index').read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256 and len(data) == shard.num_bytes
        assert hashlib.sha256(index_text).hexdigest() == shard.index_sha256
        scanned = [(offset, size) for offset, size, _ in tfrecord.scan_records(prepared / shard.file)]
        index = tfrecord.read_index(prepared / f'{shard.file}.index')
        assert scanned == [tuple(int(x) for x in row) for row in index] and len(scanned) == shard.num_records
        file = tfrecord.TFRecordFile(prepared / shard.file, index)
        assert file.framing_digest() == shard.framing_sha256


def test_statistics_are_those_of_the_train_split_alone(prepared, rows):
    info = schema.read_info(prepared)
    sums = Sums()
    for row in rows.splits['train']:
        sums.add(clips.make_clip(row, SETTINGS).sums)
    assert info.statistics == sums.statistics('video')
    assert set(info.statistics['audio']) == {'avmae', 'kaldi'} and len(info.statistics['video']['mean']) == 3


def test_statistics_are_the_mean_and_deviation_of_all_values():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    waves = [rng.integers(-9000, 9000, n).astype(np.int16) for n in (8000, 4000)]
    sums = Sums()
    for frame in frames:
        sums.add_frame(frame)
    for wave in waves:
        one = Sums()
        one.add_waveform(wave)
        sums.add(one)
    found = sums.statistics('video')
    values = frames[:, ::4, ::4].reshape(-1, 3) / 255
    np.testing.assert_allclose(found['video']['mean'], values.mean(0), atol=1e-6)
    np.testing.assert_allclose(found['video']['std'], values.std(0), atol=1e-6)
    for name in ('avmae', 'kaldi'):
        mels = np.concatenate([log_mel(wave, name).reshape(-1) for wave in waves])
        assert found['audio'][name] == pytest.approx({'mean': mels.mean(), 'std': mels.std()}, abs=1e-4)


def test_any_number_of_processes_gives_the_same_bytes(prepared, rows, tmp_path):
    job.run(rows, SETTINGS, str(tmp_path / 'plain'), 'plain', num_workers=3, num_shards=3)
    assert contents(tmp_path / 'plain') == contents(prepared)


def test_a_second_run_does_nothing_and_a_missing_shard_alone_is_redone(prepared, rows, tmp_path):
    folder = tmp_path / 'plain'
    shutil.copytree(prepared, folder)
    assert job.run(rows, SETTINGS, str(folder), 'plain', num_workers=1, num_shards=3).clips_written == 0
    (folder / 'plain-train.tfrecord-00001-of-00003').unlink()
    assert job.run(rows, SETTINGS, str(folder), 'plain', num_workers=1).clips_written == 3
    assert contents(folder) == contents(prepared)


@pytest.mark.parametrize('damage', ['cut', 'index', 'side_file'])
def test_a_damaged_shard_is_made_again(prepared, rows, tmp_path, damage):
    folder = tmp_path / 'plain'
    shutil.copytree(prepared, folder)
    name = 'plain-train.tfrecord-00002-of-00003'
    victim = {
        'cut': folder / name,
        'index': folder / f'{name}.index',
        'side_file': folder / shards.STATE_FOLDER / f'{name}.json',
    }[damage]
    victim.write_bytes(victim.read_bytes()[:-20])
    assert job.run(rows, SETTINGS, str(folder), 'plain', num_workers=1).clips_written == 3
    assert contents(folder) == contents(prepared)


def test_a_process_killed_inside_a_shard_leaves_it_to_another_that_gives_the_same_bytes(prepared, rows, tmp_path):
    (tmp_path / shards.STATE_FOLDER).mkdir()
    name = 'plain-train.tfrecord-00000-of-00003'
    mine = [rows.splits['train'][i] for i in shards.deal(8, 3)[0]]
    task = shards.ShardTask(str(tmp_path), name, 'train', mine, SETTINGS, measure=True)

    class Killed(BaseException):
        pass

    done = []

    def report(row):
        done.append(row)
        raise Killed

    with pytest.raises(Killed):
        task.work([], report)
    partial = tmp_path / shards.STATE_FOLDER / f'{name}.partial'
    with open(partial, 'ab') as file:
        file.write(b'half a record')
    assert not (tmp_path / name).exists()
    task.work(done, lambda row: None)
    assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes()
    assert (tmp_path / shards.STATE_FOLDER / f'{name}.json').read_bytes() == (
        prepared / shards.STATE_FOLDER / f'{name}.json'
    ).read_bytes()


@pytest.mark.parametrize(
    'change, wanted',
    [
        ({'fps': 4.0}, 'fps was 5.0 and is now 4.0'),
        ({'modalities': ('video',)}, r"modalities was \('audio', 'video'\) and is now \('video',\)"),
        ({'missing_audio': 'skip'}, "missing_audio was 'fill' and is now 'skip'"),
    ],
)
def test_other_settings_are_refused_by_name(prepared, rows, change, wanted):
    settings = clips.Settings(**{'fps': 5.0, 'short_side': 32, **change})
    with pytest.raises(ValueError, match=wanted):
        job.run(rows, settings, str(prepared), 'plain', num_workers=1)


def test_other_clips_names_and_counts_are_refused(prepared, rows):
    fewer = rows._replace(splits={'train': rows.splits['train'][:5], 'test': rows.splits['test']})
    with pytest.raises(ValueError, match='the clips are others'):
        job.run(fewer, SETTINGS, str(prepared), 'plain', num_workers=1)
    with pytest.raises(ValueError, match="name was 'plain' and is now 'other'"):
        job.run(rows, SETTINGS, str(prepared), 'other', num_workers=1)
    with pytest.raises(ValueError, match='num_shards of train was 3 and is now 2'):
        job.run(rows, SETTINGS, str(prepared), 'plain', num_workers=1, num_shards=2)


def test_a_longer_time_limit_is_no_other_setting(prepared, rows):
    settings = clips.Settings(fps=5.0, short_side=32, timeout_seconds=5.0, memory_gb=4.0)
    assert job.run(rows, settings, str(prepared), 'plain', num_workers=1).clips_written == 0


def test_a_folder_with_other_things_in_it_is_refused(rows, tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match='new or empty folder'):
        job.run(rows, SETTINGS, str(tmp_path), 'plain', num_workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']


def test_failures_of_all_shards_are_listed_and_the_rest_is_stored(rows, plain_folder, tmp_path):
    media = tmp_path / 'media'
    shutil.copytree(plain_folder, media)
    (media / 'clip1.mp4').write_bytes(b'')
    (media / 'clip3.mp4').write_bytes((media / 'clip2.mp4').read_bytes()[:200])
    (media / 'clip5.mp4').unlink()
    found = manifest.read_manifest([str(media / 'clips.csv')])
    summary = job.run(found, SETTINGS, str(tmp_path / 'out'), 'plain', num_workers=2, num_shards=4)
    reasons = {failure.id: failure.reason for failure in summary.failures}
    assert reasons == {'clip1': 'empty', 'clip3': 'unreadable', 'clip5': 'missing'}
    assert summary.info.num_records('train') == 5
    text = (tmp_path / 'out/failures.csv').read_text()
    assert text.startswith('split,id,path,reason,outcome,detail\n') and len(text.splitlines()) == 4


def test_nothing_left_is_an_error_that_says_why(plain_folder, tmp_path):
    (tmp_path / 'a.mp4').write_bytes(b'')
    found = manifest.read_manifest([str(tmp_path)])
    with pytest.raises(ValueError, match="not one clip could be prepared: {'empty': 1}"):
        job.run(found, SETTINGS, str(tmp_path / 'out'), 'none', num_workers=1, num_shards=1)
    assert not (tmp_path / 'out' / schema.INFO_FILE).exists()


def test_clips_that_take_too_long_are_failures_and_the_job_ends(media, tmp_path):
    media.write(tmp_path / 'a.mp4', video={'seconds': 40.0, 'size': (240, 320)})  # A second of encoding.
    media.write(tmp_path / 'b.mp4', video={'seconds': 0.2})
    found = manifest.read_manifest([str(tmp_path)])
    settings = clips.Settings(codec='h264', modalities=('video',), timeout_seconds=0.15)
    summary = job.run(found, settings, str(tmp_path / 'out'), 'slow', num_workers=1, num_shards=1)
    assert [(failure.id, failure.reason) for failure in summary.failures] == [('a', 'timeout')]
    assert summary.info.num_records('train') == 1


def test_long_files_are_cut_into_clips(media, tmp_path):
    (tmp_path / 'in').mkdir()
    media.write(tmp_path / 'in/long.mp4', video={'seconds': 5.0}, sound={'samples': media.tone(5.0, 16000)})
    media.write(tmp_path / 'in/short.mp4', video={'seconds': 1.0}, sound={'samples': media.tone(1.0, 16000)})
    settings = clips.Settings(fps=5.0, short_side=32, clip_seconds=2.0)
    found = job.cut_rows(manifest.read_manifest([str(tmp_path / 'in')]), settings, num_workers=1)
    spans = {row.id: (row.start, row.end) for row in found.splits['train']}
    assert set(spans) == {'long@0', 'long@2', 'long@4', 'short'}  # The rest of 1 s is half a clip.
    assert spans['long@2'] == (2.0, 4.0) and spans['long@4'][1] == pytest.approx(5.0, abs=0.1)
    job.run(found, settings, str(tmp_path / 'out'), 'long', num_workers=1, num_shards=1)
    file = tmp_path / 'out/long-train.tfrecord-00000-of-00001'
    stored = {clip.id: clip for clip in (schema.read_clip(payload) for _, _, payload in tfrecord.scan_records(file))}
    counts = {name: clip.num_frames for name, clip in stored.items()}
    assert counts == {'long@0': 10, 'long@2': 10, 'long@4': 5, 'short': 5}


def test_spans_of_the_list_are_cut_too_without_asking_files(tmp_path):
    row = clips.ClipRow('a', 'nowhere', 10.0, 15.5, {})
    found = manifest.Manifest({'train': [row]}, {}, [], {'mp4': 1})
    cut = job.cut_rows(found, clips.Settings(clip_seconds=2.0), num_workers=1)
    assert sorted(row[2:4] for row in cut.splits['train']) == [(10.0, 12.0), (12.0, 14.0), (14.0, 15.5)]
    endless = found._replace(splits={'train': [row._replace(end=1e9)]})
    with pytest.raises(ValueError, match='clip_seconds=2 makes 499,999,995 clips of nowhere from 10 to 1e.09 s'):
        job.cut_rows(endless, clips.Settings(clip_seconds=2.0), num_workers=1)


# -- as tensorflow_datasets sees it --


@pytest.fixture(scope='module')
def builder(prepared):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(prepared))


def test_tensorflow_datasets_finds_splits_shards_and_classes(builder, prepared):
    info = schema.read_info(prepared)
    assert set(builder.info.splits) == {'train', 'test'}
    for split, shard_infos in info.splits.items():
        assert builder.info.splits[split].num_examples == info.num_records(split)
        assert builder.info.splits[split].shard_lengths == [shard.num_records for shard in shard_infos]
        names = [os.path.basename(path) for path in builder.info.splits[split].filenames]
        assert sorted(names) == [shard.file for shard in shard_infos]
    assert builder.info.features['label']['label'].feature.names == ['even', 'odd']


def test_tensorflow_datasets_reads_what_we_wrote(builder, prepared):
    for shard in schema.read_info(prepared).splits['train']:
        for _, _, payload in tfrecord.scan_records(prepared / shard.file):
            clip, example = schema.read_clip(payload), builder.info.features.deserialize_example_np(payload)
            assert example['id'].decode() == clip.id and list(example['frames']) == clip.frames
            np.testing.assert_array_equal(example['waveform'], clip.waveform)
            assert list(example['label']['label']) == clip.labels['label']
            assert example['num_frames'] == clip.num_frames and example['has_audio'] == 1


TWO_HEADS = {'verb': schema.LabelSet(('a',), False), 'noun': schema.LabelSet(('b', 'c'), True)}


@pytest.mark.parametrize('labels', [{}, TWO_HEADS])
def test_our_features_json_is_the_one_tensorflow_datasets_would_write(labels, tmp_path):
    import tensorflow_datasets as tfds

    info = schema.DatasetInfo('toy', ('video',), SETTINGS.media, {'train': ()}, labels, {})
    shards.write_tfds_metadata(tmp_path, info)
    features = tfds.features.FeaturesDict.from_config(str(tmp_path))
    (tmp_path / 'theirs').mkdir()
    features.save_config(str(tmp_path / 'theirs'))
    ours, theirs = (json.loads((folder / 'features.json').read_text()) for folder in (tmp_path, tmp_path / 'theirs'))
    assert ours == theirs


def test_a_clip_with_nothing_in_its_lists_is_still_an_example(tmp_path):
    import tensorflow_datasets as tfds

    labels = {'label': schema.LabelSet(('a',), False)}
    info = schema.DatasetInfo('toy', ('audio',), SETTINGS.media, {'train': ()}, labels, {})
    shards.write_tfds_metadata(tmp_path, info)
    clip = schema.Clip('a', [], b'', 0, 0.0, None, None, 16000, 1.0, {'video': False, 'audio': False}, {'label': []})
    example = tfds.features.FeaturesDict.from_config(str(tmp_path)).deserialize_example_np(schema.write_clip(clip))
    assert not len(example['frames']) and not len(example['waveform']) and not len(example['label']['label'])


def test_the_lock_of_a_folder_does_not_outlive_the_job(prepared, rows):
    workers.lock_folder(prepared / shards.STATE_FOLDER / 'lock', str(prepared), wait_seconds=0.2).close()

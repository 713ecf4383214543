import dataclasses
import os
import pickle
import shutil

import cv2
import numpy as np
import pytest
import simplejpeg

from avmae_jax.data import schema, sources, tfrecord


@pytest.fixture
def folder(toy_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(toy_folder, tmp_path / 'toy')


def shard(folder, k=0):
    return folder / f'toy-train.tfrecord-{k:05d}-of-00002'


def test_record_i_over_all_shards(toy_folder):
    source = sources.open_source(toy_folder)
    assert [source[i].id for i in range(len(source))] == [f'clip{i}' for i in range(11)]
    assert source.where(5).startswith(str(shard(toy_folder, 1))) and 'at byte 0' in source.where(5)
    with pytest.raises(IndexError):
        source[11]


def test_a_source_pickles_without_what_it_has_open(toy_folder):
    source = sources.open_source(toy_folder)
    source[7]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[7].id == 'clip7' and copy.info == source.info


def test_a_missing_shard_is_found_at_start(folder):
    shard(folder, 1).unlink()
    with pytest.raises(ValueError, match=r'(?s)1 of 2 shards.*00001-of-00002 is missing'):
        sources.open_source(folder)


def test_a_short_shard_is_found_at_start(folder):
    size = shard(folder).stat().st_size
    os.truncate(shard(folder), size - 7)
    with pytest.raises(ValueError, match=f'00000-of-00002 should have {size} bytes and has {size - 7}'):
        sources.open_source(folder, verify='size')


def test_an_exchanged_shard_of_equal_size_is_found_at_start(folder, toys):
    changed = schema.write_clip(toys.make_textured_clip(0))
    data = bytearray(shard(folder).read_bytes())
    payload = bytearray(changed)
    payload[-1] ^= 1  # A label, say; framed again, so that its checksum fits.
    framed = tfrecord.frame_record(bytes(payload))
    data[: len(framed)] = framed
    shard(folder).write_bytes(bytes(data))
    with pytest.raises(ValueError, match='should have the framing digest [0-9a-f]{64} and has'):
        sources.open_source(folder)


def test_an_index_of_other_records_is_found_at_start(folder):
    index = folder / f'{shard(folder).name}.index'
    index.write_text(index.read_text().replace('0 ', '1 ', 1))
    with pytest.raises(ValueError, match=r'\.index should have sha256'):
        sources.open_source(folder, verify='size')


def test_a_flipped_bit_in_a_payload_is_found_by_full_verification_and_when_it_is_read(folder, toys):
    toys.flip_byte(shard(folder), 3000)
    with pytest.raises(ValueError, match='should have sha256'):
        sources.open_source(folder, verify='full')
    source = sources.open_source(folder, verify='framing')
    with pytest.raises(tfrecord.DamagedRecordError, match='at byte 0'):
        source[0]
    assert source[1].id == 'clip1'


def test_all_that_is_wrong_is_listed_at_once(folder):
    shard(folder, 0).unlink()
    os.truncate(shard(folder, 1), 10)
    with pytest.raises(ValueError, match=r'(?s)2 of 2 shards.*00000-of.*missing.*00001-of.*has 10'):
        sources.open_source(folder)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'split': 'eval'}, r"no split 'eval'; it has \['train'\]"),
        ({'verify': 'quickly'}, 'verify must be one of'),
    ],
)
def test_wrong_arguments_are_answered_with_the_right_ones(toy_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        sources.open_source(toy_folder, **arguments)


@pytest.fixture
def folds(toys, tmp_path):
    """Seven clips in the splits fold1 (2), fold2 (2) and fold3 (3)."""
    folder = toys.write_dataset(tmp_path / 'folds', [toys.make_clip(i) for i in range(7)], num_shards=3)
    info = schema.read_info(folder)
    splits = {f'fold{k + 1}': (shard,) for k, shard in enumerate(info.splits['train'])}
    (folder / schema.INFO_FILE).write_text(dataclasses.replace(info, splits=splits).to_json())
    return folder


def test_splits_joined_by_plus_follow_one_another(folds):
    parts = [sources.open_source(folds, split) for split in ('fold3', 'fold1')]
    source = pickle.loads(pickle.dumps(sources.open_source(folds, 'fold3+fold1')))
    ids = [part[i].id for part in parts for i in range(len(part))]
    assert [source[i].id for i in range(len(source))] == ids and len(ids) == 5
    assert source.split == 'fold3+fold1' and source.info == parts[0].info == schema.read_info(folds)
    assert sources.read_labels(source) == sources.read_labels(parts[0]) + sources.read_labels(parts[1])
    assert source.where(3) == parts[1].where(0)


def test_a_part_that_is_no_split_or_comes_twice_is_refused(folds):
    with pytest.raises(ValueError, match=r"no split 'fold4'; it has \['fold1', 'fold2', 'fold3'\]"):
        sources.open_source(folds, 'fold1+fold4')
    with pytest.raises(ValueError, match=r"'fold1\+fold1' names a split twice"):
        sources.open_source(folds, 'fold1+fold1')


def test_a_path_that_is_no_dataset_is_explained(tmp_path):
    with pytest.raises(ValueError, match='prepare'):
        sources.open_source(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='prepare'):
        sources.open_source(tmp_path)


# -- SequenceExamples --


@pytest.fixture
def legacy_folder(reference, tmp_path):
    for name in ('train-0.tfrecord', 'train-1.tfrecord', 'test-0.tfrecord'):
        shutil.copy(reference / 'data' / 'tiny_dmvr.tfrecord', tmp_path / name)
    return tmp_path


LEGACY = sources.Legacy(spectrogram_shape=(10, 16), num_classes=5)


def test_legacy_files_are_chosen_by_folder_split_and_glob(legacy_folder):
    assert len(sources.open_source(legacy_folder, 'train', legacy=LEGACY)) == 6
    assert len(sources.open_source(legacy_folder, 'test', legacy=LEGACY)) == 3
    assert len(sources.open_source(legacy_folder, '', legacy=LEGACY)) == 9
    assert len(sources.open_source(legacy_folder / 'train-*', legacy=LEGACY)) == 6
    assert len(sources.open_source(legacy_folder, 'test+train', legacy=LEGACY)) == 9
    assert len(sources.open_source(legacy_folder, 'train+train-1', legacy=LEGACY)) == 6
    for split in ('valid', 'train+valid'):
        with pytest.raises(ValueError, match="no TFRecord files whose names contain 'valid'"):
            sources.open_source(legacy_folder, split, legacy=LEGACY)


def test_a_legacy_index_is_made_once_and_left_beside_its_file(legacy_folder):
    first = sources.open_source(legacy_folder, 'test', legacy=LEGACY)
    index = legacy_folder / 'test-0.tfrecord.index'
    np.testing.assert_array_equal(tfrecord.read_index(index), first.files[0].index)
    index.write_text('0 99\n')  # Of another file: made anew.
    assert len(sources.open_source(legacy_folder, 'test', legacy=LEGACY)) == 3


def test_a_log_mel_of_another_shape_is_refused(legacy_folder):
    with pytest.raises(ValueError, match=r'\(10, 17\)'):
        sources.open_source(legacy_folder, 'train', legacy=sources.Legacy(spectrogram_shape=(10, 17)))


# -- tensorflow_datasets --


def write_tfds(root, file_format):
    """An image dataset as tfds prepares it: half JPEG, half PNG; both splits are of the same file."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    name = f'toy_{file_format}'
    folder = root / name / '1.0.0'
    folder.mkdir(parents=True)
    records = []
    for i in range(6):
        image = np.full((20, 30, 3), 40 * i, np.uint8)
        data = simplejpeg.encode_jpeg(image) if i % 2 else cv2.imencode('.png', image)[1].tobytes()
        records.append(schema.write_example({'image': [data], 'label': [i % 3]}))
    path = folder / f'{name}-train.{file_format}-00000-of-00001'
    if file_format == 'tfrecord':
        path.write_bytes(b''.join(tfrecord.frame_record(record) for record in records))
    else:
        writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
        for record in records:
            writer.write(record)
        writer.close()
    template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    features = {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(names=['a', 'b', 'c'])}
    shutil.copy(path, folder / path.name.replace('-train.', '-validation.'))
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[6],
            num_bytes=path.stat().st_size,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name=name, split=split, filetype_suffix=file_format, template=template
            ),
        )
        for split in ('train', 'validation')
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict(features),
        split_infos=splits,
        filename_template=template,
        check_data=False,
    )
    return name


@pytest.mark.parametrize('file_format', ['tfrecord', 'array_record'])
def test_image_datasets_of_tfds_open_by_name(tmp_path, file_format):
    name = write_tfds(tmp_path, file_format)
    source = pickle.loads(pickle.dumps(sources.open_source(f'tfds:{name}', data_dir=tmp_path)))
    assert source.info.modalities == ('image',) and source.info.labels['label'].names == ('a', 'b', 'c')
    assert [source[i].labels['label'] for i in range(6)] == [[0], [1], [2], [0], [1], [2]]
    assert len({source[i].id for i in range(6)}) == 6
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'validation'\]"):
        sources.open_source(f'tfds:{name}', 'test', data_dir=tmp_path)
    both = sources.open_source(f'tfds:{name}', 'validation+train', data_dir=tmp_path)
    assert len(both) == 12 and both.where(0).split('-')[1] == source.where(0).split('-')[1].replace(
        'train', 'validation'
    )
    assert both.info == source.info  # What the dataset is does not hang on the split that is opened.


def test_a_dataset_that_tfds_never_prepared_is_named(tmp_path):
    with pytest.raises(ValueError, match="prepared no 'nowhere'"):
        sources.open_source('tfds:nowhere', data_dir=tmp_path)


def test_labels_are_read_without_the_media(toys, tmp_path, monkeypatch):
    clips = [toys.make_textured_clip(i) for i in range(5)]
    clips[2] = clips[2]._replace(labels={'label': [2, 0, 1], 'a longer name of a head': [300]})
    clips[3] = clips[3]._replace(labels={})
    source = sources.open_source(toys.write_dataset(tmp_path / 'toy', clips))
    read, pread = [], tfrecord.TFRecordFile.pread
    monkeypatch.setattr(
        tfrecord.TFRecordFile, 'pread', lambda self, at, size: read.append(size) or pread(self, at, size)
    )
    assert sources.read_labels(source) == [clip.labels.get('label', []) for clip in clips]
    assert sources.read_labels(source, 'a longer name of a head') == [[], [], [300], [], []]
    assert sum(read) / 2 < 0.2 * sum(file.index[:, 1].sum() for file in source.files)


def test_labels_of_other_sources_are_those_of_their_clips(toys, tmp_path):
    source = sources.open_source(toys.write_dataset(tmp_path / 'toy', [toys.make_clip(i) for i in range(4)]))
    other = sources.ShardedSource(source.files, lambda record: schema.read_clip(record), source.info, source.split)
    assert sources.read_labels(other) == sources.read_labels(source) == [[0], [1], [2], [0]]


def test_a_damaged_record_has_no_labels(toys, tmp_path):
    folder = toys.write_dataset(tmp_path / 'toy', [toys.make_clip(i) for i in range(3)], num_shards=1)
    source = sources.open_source(folder)
    toys.flip_byte(source.files[0].path, int(source.files[0].index[1, 0]) + tfrecord.HEADER_BYTES + 3)
    assert sources.read_labels(source)[::2] == [[0], [2]]
    other = sources.ShardedSource(source.files, lambda record: schema.read_clip(record), source.info, source.split)
    assert sources.read_labels(other) == [[0], [], [2]]

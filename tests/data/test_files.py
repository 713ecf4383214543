import dataclasses
import os
import pickle

import cv2
import numpy as np
import pytest

from avmae_jax.data import batches, files, schema, sources, views
from avmae_jax.data.prepare import clips, job, manifest

VIEW = views.View(
    video=views.VideoView(num_frames=3, frame_seconds=0.2, short_side=32, crop_size=24, eval_crop='central'),
    audio=views.AudioView(seconds=0.6),
)
SETTINGS = clips.Settings(fps=5.0, short_side=32, jpeg_quality=70, missing_video='fill')


@pytest.fixture(scope='module')
def folder(media, tmp_path_factory):
    """Whole, mute, blind and silent files, and files that are none."""
    folder = tmp_path_factory.mktemp('files')
    sound = {'samples': media.tone(1.3, 44100), 'rate': 44100}
    media.write(folder / 'whole.mp4', video={'seconds': 1.0}, sound=sound)
    media.write(folder / 'mute.mp4', video={'seconds': 1.6})
    media.write(folder / 'blind.wav', sound={'samples': media.tone(1.0, 16000), 'codec': 'pcm_s16le'})
    media.write(folder / 'silent.mp4', video={}, sound={'samples': np.zeros((1, 16000), np.float32)})
    (folder / 'rubbish.mp4').write_bytes(b'hello world\n' * 99)
    return folder


GOOD = ('whole.mp4', 'mute.mp4', 'blind.wav', 'silent.mp4')


def prepare(folder, output, names, settings):
    """A dataset of these files, each a class."""
    listed = folder / f'{output.name}.csv'
    listed.write_text('path,label\n' + ''.join(f'{name},{name}\n' for name in names))
    job.run(manifest.read_manifest([str(listed)]), settings, str(output), 'files', num_workers=1, num_shards=1)
    return sources.open_source(output)


@pytest.fixture(scope='module')
def prepared(folder, tmp_path_factory):
    return prepare(folder, tmp_path_factory.mktemp('prepared') / 'both', GOOD, SETTINGS)


def rows_by_clip(source, names, view=VIEW):
    """Name -> modality -> (rows, present) of an evaluation of three moments."""
    (batch,) = batches.eval_dataset(source, view, batch_size=3 * len(source), num_clips=3)
    assert (batch.weight == 1).all()
    return {
        name: {m: (batch.media[m][3 * i : 3 * i + 3], batch.present[m][3 * i : 3 * i + 3]) for m in batch.media}
        for i, name in enumerate(names)
    }


@pytest.mark.parametrize('codec', ['jpeg', 'h264'])
def test_a_file_gives_the_rows_of_its_prepared_clip_to_the_bit(folder, tmp_path, codec):
    prepared = prepare(folder, tmp_path / codec, GOOD, dataclasses.replace(SETTINGS, codec=codec, gop=3))
    names = [prepared.info.labels['label'].names[prepared[i].labels['label'][0]] for i in range(len(prepared))]
    wanted = rows_by_clip(prepared, names)
    with files.open_files([folder / name for name in GOOD], prepared.info, num_workers=2) as source:
        assert len(source) == 4 and isinstance(source, sources.Source)
        found = rows_by_clip(pickle.loads(pickle.dumps(source)), GOOD)
    assert found.keys() == wanted.keys()
    for name in GOOD:
        for m in ('video', 'audio'):
            for ours, theirs in zip(found[name][m], wanted[name][m], strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=f'{name} {m}')
    assert found['whole.mp4']['audio'][0].any() and found['whole.mp4']['video'][0].any()
    assert found['mute.mp4']['video'][1].all() and not found['mute.mp4']['audio'][1].any()
    assert found['blind.wav']['audio'][1].all() and not found['blind.wav']['video'][1].any()


def test_good_files_are_read_in_their_order_and_each_bad_one_is_told(folder, prepared):
    names = ['mute.mp4', 'rubbish.mp4', 'blind.wav', 'nowhere.mp4', 'whole.mp4', 'mute.mp4']
    paths = [str(folder / name) for name in names]
    with files.open_files(paths, prepared.info, num_workers=1) as source:
        good = [paths[i] for i in (0, 2, 4, 5)]
        assert list(source.paths) == good == [source[i].id for i in range(4)] == [source.where(i) for i in range(4)]
        assert [source[i].num_frames for i in range(4)] == [8, 0, 7, 8] and not source[0].labels
        outcomes = [(path.rpartition('/')[2], reason, outcome) for _, _, path, reason, outcome, _ in source.failures]
        assert outcomes == [
            ('mute.mp4', 'no_audio', 'filled'),
            ('rubbish.mp4', 'unreadable', 'skipped'),
            ('blind.wav', 'no_video', 'filled'),
            ('nowhere.mp4', 'missing', 'skipped'),
            ('mute.mp4', 'no_audio', 'filled'),
        ]
        lines = [files.describe(failure) for failure in source.failures]
        assert 'rubbish.mp4: not scored: no permission' in lines[1] and 'No such file' in lines[3]
        assert 'blind.wav: scored without it: no video stream' in lines[2]


def test_a_file_without_what_the_model_takes_is_told(folder, prepared):
    paths = [folder / name for name in GOOD]
    with files.open_files(paths, prepared.info, modalities=('audio',), num_workers=1) as source:
        assert [path.rpartition('/')[2] for path in source.paths] == ['whole.mp4', 'blind.wav']
        skipped = {f.path.rpartition('/')[2]: f.reason for f in source.failures if f.outcome == 'skipped'}
        assert skipped == {'mute.mp4': 'no_audio', 'silent.mp4': 'silent'}
        # The second of the source is the third of the files.
        assert source[1].id.endswith('blind.wav') and source[1].has == {'video': False, 'audio': True}
    with files.open_files([folder / 'rubbish.mp4'], prepared.info, num_workers=1) as source:
        assert len(source) == 0 and len(source.failures) == 1


def test_a_name_of_strange_bytes_can_be_read_and_printed(folder, prepared, tmp_path):
    strange = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9.wav')
    os.link(folder / 'blind.wav', strange)
    with files.open_files([strange, strange + '.lost'], prepared.info, num_workers=1) as source:
        assert source.paths == (f'{tmp_path}/caf\\udce9.wav',) and source[0].id == source.paths[0]
        assert [files.describe(failure).encode() for failure in source.failures]


def test_a_whole_file_is_one_clip_where_the_dataset_was_cut_into_several(folder, prepared):
    media = dataclasses.replace(prepared.info.media, clip_seconds=0.5)
    info = dataclasses.replace(prepared.info, media=media, splits={})
    assert files.settings_of(info).media == dataclasses.replace(media, clip_seconds=None)
    with files.open_files([folder / 'whole.mp4'], info, num_workers=1) as source:
        assert len(source) == 1 and source[0].duration == pytest.approx(1.3, abs=0.1)


def test_datasets_of_one_modality_take_files_that_have_it(folder, tmp_path):
    heard = prepare(folder, tmp_path / 'heard', ['blind.wav'], clips.Settings(modalities=('audio',)))
    assert files.settings_of(heard.info).media == heard.info.media
    with files.open_files([folder / name for name in GOOD], heard.info, num_workers=1) as source:
        assert [path.rpartition('/')[2] for path in source.paths] == ['whole.mp4', 'blind.wav']
        assert source[0].num_frames == 0
        np.testing.assert_array_equal(source[1].waveform, heard[0].waveform)
    for name in ('a.png', 'b.png'):
        cv2.imwrite(str(folder / name), np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8))
    seen = prepare(folder, tmp_path / 'seen', ['a.png', 'b.png'], clips.Settings(modalities=('image',), short_side=40))
    view = views.View(image=views.ImageView(short_side=40, crop_size=32))
    with files.open_files([folder / 'a.png', folder / 'whole.mp4'], seen.info, num_workers=1) as source:
        assert len(source) == 1 and [f.path for f in source.failures] == [str(folder / 'whole.mp4')]
        rows, present = rows_by_clip(source, ['a.png'], view)['a.png']['image']
        assert present.all()
        np.testing.assert_array_equal(rows, rows_by_clip(seen, ['a.png', 'b.png'], view)['a.png']['image'][0])


@pytest.mark.parametrize(
    'stored',
    [
        schema.MediaSettings('jpeg', 25.0, 0, 0, 0, None, 0),  # SequenceExamples: `sources._open_legacy`.
        schema.MediaSettings('jpeg', 25.0, 256, 85, 44100, None, 12),
    ],
)
def test_datasets_of_others_do_not_tell_how_files_become_clips(folder, prepared, stored):
    info = dataclasses.replace(prepared.info, media=stored)
    with pytest.raises(ValueError, match='stored log-mels.*--config.data.path'):
        with files.open_files([folder / 'whole.mp4'], info):
            pass


def test_what_cannot_be_is_refused(folder, prepared):
    with pytest.raises(ValueError, match='no files are given'):
        with files.open_files([], prepared.info):
            pass
    info = dataclasses.replace(prepared.info, modalities=('video',))
    with pytest.raises(ValueError, match=r"takes \['audio'\] and clips of files hold \['video'\]"):
        with files.open_files([folder / 'whole.mp4'], info, modalities=('audio',)):
            pass

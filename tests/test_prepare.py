import csv
import dataclasses
import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import cv2
import numpy as np
import pytest

from avmae_jax import prepare
from avmae_jax.data import schema, tfrecord
from avmae_jax.data.prepare import shards


def run(repository, *arguments, check=True):
    result = subprocess.run(
        [sys.executable, '-m', 'avmae_jax.prepare', '--num_workers=1', *arguments],
        cwd=repository, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if check:
        assert result.returncode == 0, result.stderr
    return result


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for label in ('cat', 'dog'):
        (folder / 'train' / label).mkdir(parents=True)
        for i in range(3):
            cv2.imwrite(str(folder / f'train/{label}/{i}.png'), rng.integers(0, 255, (60, 80, 3)).astype(np.uint8))
    return folder


@pytest.fixture(scope='module')
def sounds(tmp_path_factory):
    import wave

    folder = tmp_path_factory.mktemp('sounds')
    for i in range(4):
        with wave.open(str(folder / f'{i}.wav'), 'wb') as file:
            file.setparams((1, 2, 8000, 0, 'NONE', ''))
            file.writeframes((9000 * np.sin(np.arange(8000) * (i + 1) / 10)).astype('<i2').tobytes())
    return folder


def test_clips_become_a_dataset_and_the_command_says_what_to_do_next(repository, tiny_clips, tmp_path):
    folder = tmp_path / 'clips'
    out = run(repository, f'--input={tiny_clips}', f'--output={folder}', '--short-side=32', '--num_shards=2').stdout
    assert 'train: 9 clips in 2 shards' in out and 'test: 3 clips in 2 shards' in out
    assert f'python -m avmae_jax.train --config=configs/tiny.py --config.data.path={folder}' in out
    info = schema.read_info(folder)
    assert info.name == 'clips' and info.modalities == ('audio', 'video') and info.media.short_side == 32
    assert (folder / 'failures.csv').read_text() == 'split,id,path,reason,outcome,detail\n'
    again = run(repository, f'--input={tiny_clips}', f'--output={folder}', '--short_side=32').stdout
    assert 'nothing was missing' in again


def test_a_dry_run_writes_nothing_and_tells_counts_and_size(repository, tiny_clips, tmp_path):
    text = tiny_clips.read_text() + tiny_clips.read_text().splitlines()[-1].replace('.mp4', '_lost.mp4') + '\n'
    listed = tiny_clips.parent / 'more.csv'
    listed.write_text(text)
    out = run(repository, f'--input={listed}', f'--output={tmp_path / "out"}', '--dry-run').stdout
    assert 'test: 3 clips found, 1 of 4 missing' in out and 'files: 12 mp4' in out and 'about ' in out
    assert not (tmp_path / 'out').exists()


def test_a_folder_of_images_is_a_dataset_of_images(repository, images, tmp_path):
    out = run(repository, f'--input={images}', f'--output={tmp_path / "out"}', '--short_side=32', '--name=pets').stdout
    assert 'configs/pretrain/imagenet.py' in out
    info = schema.read_info(tmp_path / 'out')
    assert info.modalities == ('image',) and info.labels['label'].names == ('cat', 'dog') and info.media.fps == 0
    (shard,) = info.splits['train']
    stored = [schema.read_clip(payload) for _, _, payload in tfrecord.scan_records(tmp_path / 'out' / shard.file)]
    assert sorted(clip.id for clip in stored)[0] == 'train/cat/0' and {clip.num_frames for clip in stored} == {1}
    assert set(info.statistics) == {'image'}


def test_a_picture_of_absurd_size_is_told_and_not_unpacked(repository, images, tmp_path):
    small = (images / 'train/cat/0.png').read_bytes()
    header = b'IHDR' + struct.pack('>II', 60_000, 60_000) + small[24:29]
    bomb = small[:12] + header + struct.pack('>I', zlib.crc32(header)) + small[33:]
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/small.png').write_bytes(small)
    (tmp_path / 'in/bomb.png').write_bytes(bomb)
    out = run(repository, f'--input={tmp_path / "in"}', f'--output={tmp_path / "out"}').stdout
    assert 'train: 1 clips' in out and '1 skipped: too_large' in out


def test_a_folder_of_sounds_is_a_dataset_of_sounds(repository, sounds, tmp_path):
    out = run(repository, f'--input={sounds}', f'--output={tmp_path / "out"}', '--eval_fraction=0.5').stdout
    assert 'configs/tiny.py:modalities=audio' in out
    info = schema.read_info(tmp_path / 'out')
    assert info.modalities == ('audio',) and info.media.codec is None and set(info.splits) == {'train', 'test'}
    assert set(info.statistics) == {'audio'}


def test_the_sound_of_videos_alone(repository, tiny_clips, tmp_path):
    run(repository, f'--input={tiny_clips}', f'--output={tmp_path / "out"}', '--modalities=audio')
    assert schema.read_info(tmp_path / 'out').modalities == ('audio',)


@pytest.mark.parametrize(
    'arguments, wanted',
    [
        (['--output=out'], '--input and --output are needed'),
        (['--input=nowhere.csv', '--output=out'], 'nowhere.csv does not exist'),
        (['--input=clips.csv', '--output=ftp://bucket/dir'], 'no kind of store'),
        (['--input=clips.csv', '--output=out', '--name=Big-Data'], "got 'Big-Data'"),
        (['--input=clips.csv', '--output=out', '--fps=0'], 'fps must lie in [0.01, 1000]'),
        (['--input=clips.csv', '--output=out', '--num_shards=0'], 'num_shards must be at least 1'),
        (['--input=clips.csv', '--output=out', '--shard_mb=0'], 'shard_mb must be above 0'),
        (['--input=clips.csv', '--output=out', '--memory_gb=inf'], 'memory_gb must be at least 1'),
        (['--input=clips.csv', '--output=out', '--speed=9'], "Unknown command line flag 'speed'"),
        (['--input=clips.csv', '--output=out', 'fast'], "unknown argument 'fast'"),
    ],
)
def test_mistakes_are_told_in_one_line(repository, tiny_clips, tmp_path, arguments, wanted):
    arguments = [argument.replace('=clips.csv', f'={tiny_clips}') for argument in arguments]
    result = run(repository, *[a.replace('=out', f'={tmp_path / "out"}') for a in arguments], check=False)
    assert result.returncode == 2 and result.stderr.startswith('prepare: ') and wanted in result.stderr
    assert 'Traceback' not in result.stderr and not (tmp_path / 'out').exists()


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(repository, tiny_clips, tmp_path):
    rows = list(csv.DictReader(tiny_clips.open()))
    listed = tiny_clips.parent / 'many.csv'  # The same clips three times, by spans.
    with listed.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['path', 'start', 'end', 'label', 'split'])
        writer.writerows(
            [row['path'], k / 2, k / 2 + 0.5, row['label'], row['split']] for row in rows for k in range(3)
        )
    (tiny_clips.parent / 'broken.mp4').write_bytes(b'')
    with listed.open('a') as file:
        file.write(f'broken.mp4,0,1,{rows[0]["label"]},train\n')
    options = [f'--input={listed}', '--num_shards=6', '--name=same']
    run(repository, *options, f'--output={tmp_path / "whole"}')
    folder = tmp_path / 'killed'
    side_files = folder / shards.STATE_FOLDER
    for finished in (0, 2, 5):
        process = subprocess.Popen(
            [sys.executable, '-m', 'avmae_jax.prepare', '--num_workers=2', *options, f'--output={folder}'],
            cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if len(list(side_files.glob('*.partial'))) and len(list(side_files.glob('same-*.json'))) >= finished:
                break
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert finished == 5 or not (folder / schema.INFO_FILE).exists()
    run(repository, *options, f'--output={folder}', '--num_workers=3')
    assert contents(folder) == contents(tmp_path / 'whole')


@pytest.mark.parametrize(
    'path, wanted',
    [
        ('/a/AudioSet-2M', 'audioset_2m'),
        ('/a/2024 clips/', 'data_2024_clips'),
        ('x/..', None),
        ('gs://bucket', 'bucket'),
    ],
)
def test_names_suit_tensorflow_datasets(path, wanted):
    name = prepare.default_name(path)
    assert name.isidentifier() and name == name.lower() and (wanted is None or name == wanted)


def test_the_command_to_go_on_with_names_splits_that_there_are(tiny_dataset):
    info = schema.read_info(tiny_dataset)
    assert 'split' not in prepare.training_command(info, 'DIR')
    for splits, wanted in {
        ('fold1', 'fold2', 'fold3'): ' --config.data.split=fold1+fold2 --config.evaluation.split=fold3 ',
        ('train',): '.py --config.evaluation.every_steps=0 ',
        ('eval',): ' --config.data.split=eval --config.evaluation.every_steps=0 ',
        ('train', 'validation'): '.py --config.evaluation.split=validation ',
    }.items():
        assert wanted in prepare.training_command(dataclasses.replace(info, splits=dict.fromkeys(splits, ())), 'DIR')
    images = dataclasses.replace(info, modalities=('image',), splits=dict.fromkeys(('train', 'validation'), ()))
    assert 'split' not in prepare.training_command(images, 'DIR')


def test_flags_may_be_written_with_dashes():
    assert prepare._with_underscores(['prog', '--dry-run', '--media-dir=my-files', 'a-b', '--fps=-1']) == [
        'prog', '--dry_run', '--media_dir=my-files', 'a-b', '--fps=-1'
    ]  # fmt: skip


def test_the_page_names_every_flag(repository):
    page = (repository / 'docs/data.md').read_text()
    from absl import flags

    for flag in flags.FLAGS.flags_by_module_dict()['avmae_jax.prepare']:
        assert f'`--{flag.name}`' in page, flag.name

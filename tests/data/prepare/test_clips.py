import csv
import os
import pathlib

import cv2
import numpy as np
import pytest
import simplejpeg

from avmae_jax.data import schema
from avmae_jax.data.prepare import clips
from avmae_jax.data.prepare.clips import ClipRow, Settings

SMALL = {'fps': 5.0, 'short_side': 32}


def make(path, start=0.0, end=None, trimmed=False, **settings):
    row = ClipRow('a', str(path), start, end, {'label': (1,)}, trimmed)
    result = clips.make_clip(row, Settings(**{**SMALL, **settings}), 'train')
    clip = schema.read_clip(result.record) if result.record is not None else None
    return clip, {failure.reason: failure.outcome for failure in result.failures}


@pytest.fixture(scope='module')
def whole(media, tmp_path_factory):
    path = tmp_path_factory.mktemp('media') / 'whole.mp4'
    return media.write(path, video={'seconds': 2.0}, sound={'samples': media.tone(2.0, 16000)})


@pytest.fixture(scope='module')
def mute(media, tmp_path_factory):
    return media.write(tmp_path_factory.mktemp('media') / 'mute.mp4', video={'seconds': 1.0})


@pytest.fixture(scope='module')
def blind(media, tmp_path_factory):
    path = tmp_path_factory.mktemp('media') / 'blind.mp4'
    return media.write(path, sound={'samples': media.tone(1.0, 16000)})


@pytest.fixture(scope='module')
def silent(media, tmp_path_factory):
    path = tmp_path_factory.mktemp('media') / 'silent.mp4'
    return media.write(path, video={'seconds': 1.0}, sound={'samples': np.zeros((1, 16000), np.float32)})


def test_a_whole_file_becomes_frames_and_sound_of_the_same_length(whole):
    clip, problems = make(whole)
    assert not problems and clip.has == {'video': True, 'audio': True} and clip.labels == {'label': [1]}
    assert clip.num_frames == len(clip.frames) == 10 and clip.fps == 5.0
    assert clip.duration == pytest.approx(2.0, abs=0.07)  # An AAC track ends with a whole packet of 64 ms.
    assert len(clip.waveform) == pytest.approx(clip.duration * 16000, abs=1)
    assert simplejpeg.decode_jpeg(clip.frames[3]).shape == (32, 42, 3)


def test_the_h264_codec_stores_one_mp4_with_a_key_frame_every_gop(whole):
    import io

    import av

    clip, _ = make(whole, codec='h264', gop=4)
    assert not clip.frames and clip.num_frames == 10
    with av.open(io.BytesIO(clip.h264)) as container:
        frames = list(container.decode(video=0))
        assert [frame.key_frame for frame in frames] == [i % 4 == 0 for i in range(10)]
        assert float(container.streams.video[0].average_rate) == 5.0
    assert make(whole, codec='h264', gop=4)[0].h264 == clip.h264  # Same frames, same bytes.


def test_a_span_has_exactly_its_length(whole):
    clip, problems = make(whole, start=0.5, end=1.5)
    assert not problems and clip.num_frames == 5 and len(clip.waveform) == 16000


def test_missing_sound_is_filled_or_skipped(mute):
    clip, problems = make(mute)
    assert problems == {'no_audio': 'filled'} and clip.waveform is None and clip.has['audio'] is False
    assert make(mute, missing_audio='skip') == (None, {'no_audio': 'skipped'})


def test_missing_pictures_are_skipped_or_filled(blind):
    assert make(blind) == (None, {'no_video': 'skipped'})
    clip, problems = make(blind, missing_video='fill')
    assert problems == {'no_video': 'filled'} and clip.num_frames == 0 and clip.has == {'video': False, 'audio': True}


def test_silence_is_filled_kept_or_skipped(silent):
    clip, problems = make(silent)
    assert problems == {'silent': 'filled'} and clip.waveform is None
    clip, problems = make(silent, silent_audio='keep')
    assert problems == {'silent': 'kept'} and clip.has['audio'] and not clip.waveform.any()
    assert make(silent, silent_audio='skip') == (None, {'silent': 'skipped'})


def test_one_modality_alone_takes_only_its_own(whole, mute, blind):
    clip, problems = make(whole, modalities=('audio',))
    assert not problems and clip.num_frames == 0 and not clip.frames and clip.has == {'video': False, 'audio': True}
    clip, problems = make(whole, modalities=('video',))
    assert not problems and clip.waveform is None
    # Nothing would be left to fill.
    assert make(mute, modalities=('audio',), missing_audio='fill') == (None, {'no_audio': 'skipped'})
    assert make(blind, modalities=('video',), missing_video='fill') == (None, {'no_video': 'skipped'})


def test_a_start_behind_the_end_is_skipped(whole):
    assert make(whole, start=7.0, end=8.0, missing_video='fill') == (None, {'beyond_end': 'skipped'})


def test_a_file_that_ends_early_is_kept_or_skipped(whole):
    clip, problems = make(whole, start=1.0, end=5.0)
    assert problems == {'short': 'kept'} and clip.duration == pytest.approx(1.0, abs=0.1)
    assert make(whole, start=1.0, end=5.0, short='skip') == (None, {'short': 'skipped'})


def test_a_picture_that_ends_before_its_sound_is_told(media, tmp_path):
    path = media.write(tmp_path / 'a.mp4', video={'seconds': 1.0}, sound={'samples': media.tone(3.0, 16000)})
    clip, problems = make(path)
    assert problems == {'short': 'kept'} and clip.num_frames == 15 and clip.duration == pytest.approx(3.0, abs=0.1)
    assert clip.frames[-1] == clip.frames[5] != clip.frames[4]


def test_what_is_longer_than_max_seconds_is_cut(whole):
    clip, problems = make(whole, max_seconds=1.0)
    assert problems == {'long': 'kept'} and clip.num_frames == 5 and len(clip.waveform) == 16000


def test_a_file_cut_to_its_clip_is_told_from_the_whole_video(whole):
    # A list says 30-32 s; the file is 2 s long, so some tool has cut it already.
    clip, problems = make(whole, start=30.0, end=32.0, trimmed=True)
    assert not problems and clip.num_frames == 10
    clip, _ = make(whole, start=0.4, end=1.0, trimmed=True)  # The file is much longer: times count from its start.
    assert clip.num_frames == 3 and len(clip.waveform) == 9600


def test_truncated_media_keep_what_they_have_and_say_so(media, tmp_path):
    path = pathlib.Path(
        media.write(tmp_path / 'a.mkv', video={'seconds': 4.0}, sound={'samples': media.tone(4.0, 16000)})
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clip, problems = make(path)
    assert 0.5 < clip.duration < 3.5 and problems['short'] == 'kept'
    assert make(path, short='skip')[0] is None


def test_damage_is_kept_or_skipped(shared_data):
    path = shared_data / 'odd/corrupted_h264.mp4'
    clip, problems = make(path)
    assert problems['damaged'] == 'kept' and clip.num_frames == 25
    clip, problems = make(path, damaged='skip')
    assert clip is None and problems['damaged'] == 'skipped'


# What each file of the folder gives with pictures and sound wanted, none filled: (seconds, reasons).
ODD = {
    'vfr_yuv444_noaudio.mp4': (14.9, {'no_audio': 'filled'}),
    'corrupted_h264.mp4': (5.0, {'no_audio': 'filled', 'damaged': 'kept'}),
    'rotated90.mov': (0.1, {'no_audio': 'filled'}),
    'no_duration_vp9_opus.webm': (4.9, {'silent': 'filled', 'duration': 'kept'}),
    'audio_only.mp4': (None, {'no_video': 'skipped'}),
    'one_pixel_1fps.mp4': (5.0, {'no_audio': 'filled'}),
    'hevc_10bit.mp4': (1.0, {'no_audio': 'filled'}),
    'multi_stream_subs.mp4': (13.1, {}),
    'surround51.mp4': (5.3, {}),
    'yuv444_silent_audio.mp4': (14.0, {'silent': 'filled'}),
    'zero_bytes.webm': (None, {'empty': 'skipped'}),
    'truncated_60pct.mp4': (None, {'unreadable': 'skipped'}),
}


@pytest.mark.parametrize('name', ODD)
def test_odd_files_have_known_outcomes(shared_data, name):
    clip, problems = make(shared_data / 'odd' / name, fps=2.0)
    seconds, wanted = ODD[name]
    assert problems == wanted
    if seconds is None:
        assert clip is None
    else:
        assert clip.duration == pytest.approx(seconds, abs=0.1) and clip.num_frames == pytest.approx(2 * seconds, abs=1)


def test_every_odd_file_is_known(shared_data):
    with open(shared_data / 'odd/manifest.csv') as file:
        assert {row['file'] for row in csv.DictReader(file)} == set(ODD)


def test_things_that_are_no_files_are_told(tmp_path):
    (tmp_path / 'folder.mp4').mkdir()
    os.mkfifo(tmp_path / 'pipe.mp4')
    (tmp_path / 'loop.mp4').symlink_to(tmp_path / 'loop.mp4')
    (tmp_path / 'list.mp4').write_text('#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n')
    for name in ('folder.mp4', 'pipe.mp4', 'loop.mp4', 'list.mp4'):
        assert make(tmp_path / name) == (None, {'unreadable': 'skipped'}), name
    assert make(tmp_path / 'nowhere.mp4') == (None, {'missing': 'skipped'})


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_file_without_permission_is_told(tmp_path, whole):
    path = tmp_path / 'secret.mp4'
    path.write_bytes(pathlib.Path(whole).read_bytes())
    path.chmod(0)
    assert make(path) == (None, {'unreadable': 'skipped'})


@pytest.mark.parametrize('suffix', ['mp4', 'mkv', 'wav', 'mp3', 'flac', 'ts', 'gif', 'avi', 'ogg'])
@pytest.mark.parametrize('content', ['random', 'zeros', 'text'])
def test_rubbish_is_skipped_under_any_name(tmp_path, suffix, content):
    rng = np.random.default_rng(3)
    data = {'random': rng.bytes(20000), 'zeros': bytes(5000), 'text': b'hello world\n' * 100}[content]
    path = tmp_path / f'a.{suffix}'
    path.write_bytes(data)
    clip, problems = make(path)
    assert clip is None and set(problems) <= {'unreadable', 'no_media', 'no_audio', 'no_video'}


def test_a_wrong_extension_does_not_matter(whole, tmp_path):
    path = tmp_path / 'a.wav'
    path.write_bytes(pathlib.Path(whole).read_bytes())
    assert make(path)[0].frames == make(whole)[0].frames


@pytest.mark.parametrize('seed', range(12))
def test_bit_rot_never_raises(whole, tmp_path, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(pathlib.Path(whole).read_bytes())
    for at in rng.integers(0, len(data), rng.choice([3, 30, 300])):
        data[at] = rng.integers(256)
    path = tmp_path / 'a.mp4'
    path.write_bytes(data[: rng.integers(len(data) // 4, len(data))] if seed % 2 else data)
    _, problems = make(path, missing_video='fill')
    assert 'error' not in problems


def test_a_name_of_strange_bytes_is_read_and_written_down(whole, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9:%03d,"x"\n.mp4')
    with open(path, 'wb') as file:
        file.write(pathlib.Path(whole).read_bytes()[:100])
    row = ClipRow('a', path, 0.0, None, {})
    result = clips.make_clip(row, Settings(**SMALL), 'train')
    assert result.record is None
    text = clips.failures_csv(result.failures)
    (line,) = list(csv.DictReader(text.splitlines(keepends=True)))
    assert line['reason'] == 'unreadable' and 'caf\\udce9' in line['path']
    with open(path, 'wb') as file:
        file.write(pathlib.Path(whole).read_bytes())
    assert clips.make_clip(row, Settings(**SMALL), 'train').record is not None


def test_an_image_becomes_one_frame(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), np.full((64, 96, 3), 90, np.uint8))
    result = clips.make_clip(
        ClipRow('a', str(tmp_path / 'a.png'), 0.0, None, {}), Settings(modalities=('image',), short_side=32), 'train'
    )
    clip = schema.read_clip(result.record)
    assert clip.num_frames == 1 and clip.fps == 0.0 and clip.waveform is None and result.has['image']
    assert result.sums.statistics('image')['image']['mean'] == pytest.approx([90 / 255] * 3, abs=1e-3)
    (tmp_path / 'b.jpg').write_bytes(b'rubbish')
    row = ClipRow('b', str(tmp_path / 'b.jpg'), 0.0, None, {})
    result = clips.make_clip(row, Settings(modalities=('image',)))
    assert result.record is None and result.failures[0].reason == 'no_video'


def test_an_exception_of_a_library_is_a_failure_of_that_file(whole, monkeypatch):
    monkeypatch.setattr(clips.sound_lib, 'read_sound', lambda *a, **k: 1 / 0)
    assert make(whole) == (None, {'error': 'skipped'})


def test_a_clip_whose_record_needs_too_much_memory_is_a_failure_of_that_file(whole, monkeypatch):
    def write(clip):
        raise MemoryError

    monkeypatch.setattr(clips.schema, 'write_clip', write)
    assert make(whole) == (None, {'memory': 'skipped'})


@pytest.mark.parametrize(
    'setting, value',
    [
        ('codec', 'vp9'), ('fps', 0.0), ('short_side', 3), ('jpeg_quality', 0), ('gop', 0), ('clip_seconds', 0.0),
        ('damaged', 'fill'), ('missing_video', 'keep'), ('max_seconds', -1.0), ('timeout_seconds', 0.0), ('fps', 1e9),
        ('max_seconds', float('inf')), ('memory_gb', float('inf')), ('memory_gb', 0.01), ('fps', float('nan')),
    ],
)  # fmt: skip
def test_settings_say_what_they_want(setting, value):
    with pytest.raises(ValueError, match=setting):
        Settings(**{setting: value})


def test_the_page_tells_every_reason_and_its_option(repository):
    page = (repository / 'docs/data.md').read_text()
    for name, reason in clips.REASONS.items():
        assert f'| `{name}` | {reason.meaning} |' in page, name
        if reason.option:
            (line,) = (line for line in page.splitlines() if line.startswith(f'| `{name}` |'))
            assert f'`--{reason.option}`' in line and all(f'`{word}`' in line for word in clips.OUTCOMES[reason.option])

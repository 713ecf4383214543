"""Time stamps and lengths that files have wrong."""

import struct
import types
from fractions import Fraction

import numpy as np
import pytest

from avmae_jax.data import schema
from avmae_jax.data.prepare import clips, decode


def in_order(times):
    damage = []
    frames = [types.SimpleNamespace(time=time) for time in times]
    return [frame.time for frame in decode.in_order(iter(frames), damage)], damage


@pytest.mark.parametrize(
    'times',
    [
        [0.0, 0.1, 0.2, 0.15, 0.3],  # A little disorder is for the readers.
        [0.0, 60.0, 60.1, 120.0, 200.0],  # Slides.
        [None, 0.1, None],
        [-3.0, -2.9],
        [7.0],
    ],
)
def test_frames_whose_times_may_be_right_are_passed_on(times):
    assert in_order(times) == (times, [])


def test_a_single_time_far_ahead_is_passed_over_and_told():
    times, damage = in_order([0.0, 0.1, 26_000.0, 0.3, 0.4])
    assert times == [0.0, 0.1, 0.3, 0.4]
    assert damage == ['a time stamp of 26000.00 s amid those around 0.10 s']


def test_a_recording_appended_to_another_counts_only_where_it_is_longer():
    times, damage = in_order([0.0, 1.0, 2.0, 0.0, 1.5, 2.0, 3.0])
    assert times == [0.0, 1.0, 2.0, 3.0] and len(damage) == 3


def test_the_sound_of_an_appended_recording_is_not_put_over_that_of_the_first(media, tmp_path):
    quiet = {'samples': 0.01 * media.tone(2.0, 16000)}
    first = media.write(tmp_path / 'first.ts', video={'seconds': 2.0}, sound=quiet)
    second = media.write(tmp_path / 'second.ts', video={'seconds': 2.0}, sound={'samples': media.tone(2.0, 16000)})
    both = tmp_path / 'both.ts'
    both.write_bytes(open(first, 'rb').read() + open(second, 'rb').read())
    row = clips.ClipRow('a', str(both), 0.0, None, {})
    result = clips.make_clip(row, clips.Settings(fps=5.0, short_side=32))
    waveform = schema.read_clip(result.record).waveform
    assert 50 < np.abs(waveform.astype(np.int32)).max() < 500
    assert [failure.reason for failure in result.failures] == ['damaged']


def packets(*entries):
    """Of (stream, time); each a second long."""
    for stream, time in entries:
        yield types.SimpleNamespace(
            stream=types.SimpleNamespace(type='video'), stream_index=stream, pts=time, dts=time, duration=1,
            time_base=Fraction(1),
        )  # fmt: skip


def test_a_stream_is_waited_for_but_not_for_ever():
    def times(*entries):
        return [packet.dts for packet in decode.packets_of(0, packets(*entries), end=10.0)]

    others = [(1, seconds) for seconds in range(11, 70)]
    assert times((0, 0), *others, (0, 70)) == [0, 70]  # A picture that stands for a minute.
    assert times((0, 0), *((1, seconds) for seconds in range(3000)), (0, 3000)) == [0]
    assert times((0, 0), (1, 95443), (1, 1), (0, 1)) == [0, 1]  # A damaged time stamp.


@pytest.mark.parametrize(
    'entries, seconds',
    [
        ([(0, 0), (1, 0), (0, 4), (1, 3)], 5.0),
        ([(0, None), (0, None), (0, None)], 3.0),  # Bare h264 has no times.
        ([(0, 0), (0, 95443), (0, 1)], 2.0),  # A damaged time stamp.
        ([], 0.0),
    ],
)
def test_packets_tell_how_long_a_file_is(entries, seconds):
    assert decode.last_end(packets(*entries), zero=0.0) == seconds


def claim(path, seconds):
    """Has a Matroska file say that it is so long."""
    data = bytearray(open(path, 'rb').read())
    struct.pack_into('>d', data, data.index(b'\x44\x89\x88') + 3, seconds * 1000)
    open(path, 'wb').write(data)


@pytest.mark.parametrize('seconds', [36_000.0, 3e9, float('nan'), -1.0])
def test_a_length_that_cannot_be_right_is_counted(media, tmp_path, seconds):
    path = media.write(tmp_path / 'a.mkv', video={'seconds': 2.0}, sound={'samples': media.tone(1.0, 16000)})
    claim(path, seconds)
    assert decode.probe_seconds(path) == pytest.approx(2.0, abs=0.1)


def test_a_plausible_length_is_taken_as_it_stands(media, tmp_path):
    path = media.write(tmp_path / 'a.mkv', video={'seconds': 2.0})
    claim(path, 1.5)
    assert decode.probe_seconds(path) == 1.5


@pytest.mark.parametrize('format', ['adts', 'webm'])
def test_files_without_a_length_have_their_packets_counted(media, tmp_path, format):
    # ffmpeg guesses the length of bare AAC by its first packets, which are small where it begins with silence.
    samples = np.concatenate([np.zeros((1, 48000), np.float32), media.tone(1.0, 16000)], axis=1)
    streams = {
        'adts': {'sound': {'samples': samples}},
        'webm': {'video': {'seconds': 4.0, 'codec': 'libvpx-vp9'}, 'container_options': {'live': '1'}},
    }
    path = media.write(tmp_path / 'a', format=format, **streams[format])
    assert decode.probe_seconds(path) == pytest.approx(4.0, abs=0.15)


def test_a_matroska_file_that_begins_late_is_not_longer_for_that(media, tmp_path):
    path = media.write(tmp_path / 'a.mkv', video={'times': [5000.0 + k / 10 for k in range(20)]})
    assert decode.probe_seconds(path) == pytest.approx(2.0, abs=0.1)

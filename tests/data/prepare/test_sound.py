import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from avmae_jax.data.prepare import decode, sound


def loudest_hz(waveform):
    spectrum = np.abs(np.fft.rfft(waveform.astype(np.float64)))
    return np.argmax(spectrum) * sound.SAMPLE_RATE / len(waveform)


def read(path, start=0.0, end=None):
    return sound.read_sound(str(path), start, end, max_seconds=60.0)


@pytest.mark.parametrize('rate', [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize('layout, channels', [('mono', 1), ('stereo', 2), ('5.1', 6)])
def test_any_rate_and_layout_becomes_16_khz_mono(media, tmp_path, rate, layout, channels):
    samples = media.tone(1.0, rate, hz=440, channels=channels)
    path = media.write(tmp_path / 'a.mkv', sound={'samples': samples, 'rate': rate, 'layout': layout, 'codec': 'flac'})
    found = read(path)
    assert found.waveform.dtype == np.int16 and abs(len(found.waveform) - 16000) <= 2
    assert loudest_hz(found.waveform) == pytest.approx(440, abs=2)
    assert 3000 < np.abs(found.waveform.astype(np.int32)).max() < 32768


def test_eight_bit_sound_is_read(tmp_path):
    with wave.open(str(tmp_path / 'a.wav'), 'wb') as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes((128 + 100 * np.sin(2 * np.pi * 300 * np.arange(8000) / 8000)).astype(np.uint8).tobytes())
    assert loudest_hz(read(tmp_path / 'a.wav').waveform) == pytest.approx(300, abs=2)


@pytest.mark.parametrize('channels', [3, 7, 12])
def test_channels_without_known_places_are_averaged(tmp_path, channels):
    with wave.open(str(tmp_path / 'a.wav'), 'wb') as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(16000)
        one = (8000 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000)).astype('<i2')
        file.writeframes(np.repeat(one, channels).tobytes())
    found = read(tmp_path / 'a.wav')
    assert len(found.waveform) == 16000 and loudest_hz(found.waveform) == pytest.approx(500, abs=2)


def test_a_span_is_what_the_whole_file_has_there(media, tmp_path):
    samples = np.concatenate([media.tone(1.0, 16000, 300), media.tone(1.0, 16000, 900)], axis=1)
    path = media.write(tmp_path / 'a.wav', sound={'samples': samples, 'codec': 'pcm_s16le'})
    whole, part = read(path), read(path, 0.75, 1.5)
    assert part.seconds == pytest.approx(0.75)
    np.testing.assert_array_equal(part.waveform, whole.waveform[12000:24000])


def test_picture_and_sound_are_cut_from_the_same_moment(media, tmp_path):
    # Silence, then from 1 s on a tone: a span that starts at 0.5 s has it after 0.5 s.
    samples = np.concatenate([np.zeros((1, 16000), np.float32), media.tone(1.0, 16000)], axis=1)
    path = media.write(tmp_path / 'a.mp4', video={'seconds': 2.0}, sound={'samples': samples})
    loud = np.abs(read(path, 0.5, 1.5).waveform.astype(np.int32)) > 2000
    assert np.argmax(loud) == pytest.approx(8000, abs=400)


def test_sound_that_begins_late_keeps_its_place(media, tmp_path):
    # A container whose sound starts 0.5 s after its picture.
    path = str(tmp_path / 'a.mkv')
    media.write(tmp_path / 'plain.mkv', video={'seconds': 1.5}, sound={'samples': media.tone(1.0, 16000)})
    with av.open(str(tmp_path / 'plain.mkv')) as source, av.open(path, 'w') as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is None:
                continue
            delay = int(Fraction(1, 2) / packet.time_base) if packet.stream.type == 'audio' else 0
            packet.pts, packet.dts = packet.pts + delay, packet.dts + delay
            packet.stream = streams[packet.stream_index]
            target.mux(packet)
    with pytest.raises(decode.MediaError, match='no_audio: the sound begins at 0.5'):
        read(path, 0.0, 0.3)
    waveform = read(path).waveform.astype(np.int32)
    assert np.abs(waveform[:7500]).max() < 10 and np.abs(waveform[8600:]).max() > 5000


def test_a_start_behind_the_end_is_told(media, tmp_path):
    path = media.write(tmp_path / 'a.mp4', sound={'samples': media.tone(1.0, 16000)})
    with pytest.raises(decode.MediaError) as error:
        read(path, 5.0, 6.0)
    assert error.value.problem.reason == 'beyond_end'


def test_silence_is_what_no_sample_rises_above():
    assert sound.is_silent(np.zeros(100, np.int16)) and sound.is_silent(np.array([3, -4], np.int16))
    assert not sound.is_silent(np.array([0, -32768], np.int16))

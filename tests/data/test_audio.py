import numpy as np

from avmae_jax.data import audio


def test_sound_is_cut_at_the_sample():
    out = np.zeros(100, np.int16)
    audio.write_waveform(np.arange(1000, dtype=np.int16), 0.25, 1000, out)
    np.testing.assert_array_equal(out, np.arange(250, 350))


def test_where_the_clip_has_ended_there_is_silence():
    for start, heard in ((0.95, 50), (1.0, 0), (3.0, 0)):
        out = np.full(100, 7, np.int16)
        audio.write_waveform(np.arange(1, 1001, dtype=np.int16), start, 1000, out)
        assert np.count_nonzero(out) == heard and (out[heard:] == 0).all()


def test_a_log_mel_that_is_too_short_begins_anew():
    stored = np.arange(20, dtype=np.float32).reshape(10, 2)
    out = np.zeros((15, 2), np.float32)
    audio.write_spectrogram(stored, 0.0, 5, out)
    np.testing.assert_array_equal(out, stored[np.arange(15) % 10])
    audio.write_spectrogram(stored, 1.2, 5, out[:3])
    np.testing.assert_array_equal(out[:3], stored[6:9])

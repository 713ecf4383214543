import numpy as np
import pytest

from avmae_jax.evaluation import sound
from avmae_jax.evaluation.pictures import PatchedMedia
from avmae_jax.ops.preprocess import STORED, Preprocess
from avmae_jax.ops.spectrogram import CONVENTIONS, log_mel, mel_filters

RATE = 16_000


def make_tone(hz, seconds=0.6):
    return 0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


def dominant_hz(waveform):
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return spectrum.argmax() * RATE / len(waveform)


@pytest.mark.parametrize('name', CONVENTIONS)
@pytest.mark.parametrize('hz', [220.0, 1000.0, 3300.0])
def test_a_tone_is_still_in_its_mel_band_after_log_mel_and_back(name, hz):
    convention = CONVENTIONS[name]
    waveform = sound.to_waveform(log_mel(make_tone(hz)[None], convention)[0], convention)
    point_hz = RATE / convention.fft_length
    band = mel_filters(convention)[round(hz / point_hz)].argmax()
    low, high = np.flatnonzero(mel_filters(convention)[:, band])[[0, -1]] * point_hz
    assert low - point_hz <= dominant_hz(waveform) <= high + point_hz
    # As loud as before, too, but for the ends.
    assert np.std(waveform[1600:-1600]) == pytest.approx(0.3 / np.sqrt(2), rel=0.35)


@pytest.mark.parametrize('name', CONVENTIONS)
def test_silence_stays_silent(name):
    convention = CONVENTIONS[name]
    silent = log_mel(np.zeros((1, RATE // 2), np.float32), convention)[0]
    assert np.abs(sound.to_waveform(silent, convention)).max() < 1 / 2**16  # Nothing that a file of 16 bits can hold.


@pytest.mark.parametrize('name', CONVENTIONS)
def test_a_sound_found_for_a_log_mel_has_about_that_log_mel(name):
    convention = CONVENTIONS[name]
    rng = np.random.default_rng(0)
    steps = make_tone(400) + make_tone(1900) + 0.05 * rng.standard_normal(int(0.6 * RATE)).astype(np.float32)
    steps[: len(steps) // 2] *= 0.1
    wanted = log_mel(steps[None], convention)[0]
    found = log_mel(sound.to_waveform(wanted, convention)[None], convention)[0]
    assert found.shape == wanted.shape
    other = log_mel(rng.permutation(steps)[None], convention)[0]  # The same samples in disorder, to compare.
    assert np.abs(found - wanted)[5:-5].mean() < 0.25 * np.abs(other - wanted)[5:-5].mean()


def make_media(spectrogram, **more):
    """[s f], in one patch for each half of the time."""
    patches = spectrogram.reshape(2, -1)[None].astype(np.float32)
    return PatchedMedia(
        patches=patches, predicted=patches, hidden=np.array([[0]]), grid=(2, 1),
        patch=(len(spectrogram) // 2, spectrogram.shape[1]), **more,
    )  # fmt: skip


def test_what_was_hidden_is_silent_and_what_fills_up_is_left_out():
    preprocess = Preprocess(convention='kaldi', audio_mean=-4.0, audio_std=3.0)
    convention = preprocess.log_mel_convention
    spectrogram = log_mel(make_tone(500.0)[None], convention, 64)[0]  # 58 frames, and 6 that are loud.
    heard = sound.sounds_of_clip(make_media((spectrogram + 4.0) / 3.0), 0, preprocess)
    assert set(heard) == {'input', 'left', 'reconstructed'}
    assert {len(waveform) for waveform in heard.values()} == {57 * 160 + 400}
    np.testing.assert_array_equal(heard['input'], heard['reconstructed'])
    quiet, loud = heard['left'][: 30 * 160], heard['left'][34 * 160 : 56 * 160]
    assert np.std(quiet) < 0.02 * np.std(loud)


def test_log_mels_of_unknown_make_cannot_be_heard():
    assert sound.can_be_heard(Preprocess()) and not sound.can_be_heard(Preprocess(convention=STORED))

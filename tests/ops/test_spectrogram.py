import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.ops import spectrogram
from avmae_jax.ops.spectrogram import CONVENTIONS, log_mel

AVMAE, KALDI = CONVENTIONS['avmae'], CONVENTIONS['kaldi']


def make_waveforms(num_samples=16_000):
    """Noise, a decaying tone far above a silent rest, and a chirp: loud, sparse, and moving."""
    seconds = np.arange(num_samples) / 16_000
    noise = np.random.default_rng(0).standard_normal(num_samples) * 0.1
    tone = 0.3 * np.sin(2 * np.pi * 440 * seconds) * np.exp(-3 * seconds)
    chirp = 0.5 * np.sin(2 * np.pi * (100 + 3000 * seconds) * seconds)
    return np.stack([noise, tone, chirp]).astype(np.float32)


def float64_log_mel(waveform, convention):
    """The definition, one frame and one band at a time, with numpy's FFT."""
    window, hop = convention.window_samples, convention.hop_samples
    if convention.centred:
        before = (window - hop) // 2
        waveform = np.pad(waveform, (before, window - hop - before), mode='reflect')
    edges_hz = np.linspace(*(2595 * np.log10(1 + f / 700) for f in (convention.min_hz, convention.max_hz)), 130)
    edges = 700 * (10 ** (edges_hz / 2595) - 1)
    hz = np.fft.rfftfreq(convention.fft_length, 1 / convention.sample_rate)
    rows = []
    for start in range(0, len(waveform) - window + 1, hop):
        frame = waveform[start : start + window].astype(np.float64)
        if convention.remove_dc:
            frame = frame - frame.mean()
        emphasised = frame.copy()
        for i in range(window):
            emphasised[i] -= convention.pre_emphasis * frame[max(i - 1, 0)]
        power = np.abs(np.fft.rfft(emphasised * spectrogram.WINDOWS[convention.window](window), convention.fft_length))
        bands = []
        for band in range(128):
            mel = 1127 * np.log(1 + hz / 700)
            left, centre, right = 1127 * np.log(1 + edges[band : band + 3] / 700)
            weights = np.interp(mel, [left, centre, right], [0, 1, 0])
            bands.append(weights @ power**2)
        rows.append(np.log(np.maximum(bands, convention.floor)))
    return np.array(rows)


def assert_same_energy(got, wanted, *, tolerance):
    """Relative to the band, but for what float32 rounding of the loudest band of the frame leaves in quiet ones."""
    rounding = 1e-10 * np.exp(np.max(wanted, axis=-1, keepdims=True))
    assert (np.abs(np.exp(got) - np.exp(wanted)) <= tolerance * np.exp(wanted) + rounding).all()
    assert np.abs(got - wanted).mean() < 1e-4


@pytest.mark.parametrize('name', CONVENTIONS)
@pytest.mark.parametrize('num_samples', [4_000, 4_237])
def test_log_mel_agrees_with_a_float64_fft(name, num_samples):
    waveforms = make_waveforms(num_samples)
    got = log_mel(waveforms, CONVENTIONS[name])
    wanted = np.stack([float64_log_mel(row, CONVENTIONS[name]) for row in waveforms])
    assert got.dtype == np.float32
    assert_same_energy(got, wanted, tolerance=1e-4)


def test_kaldi_convention_agrees_with_kaldi():
    knf = pytest.importorskip('kaldi_native_fbank')
    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.window_type = 'hanning'
    options.mel_opts.num_bins = 128
    options.use_energy = False

    def kaldi(waveform):
        fbank = knf.OnlineFbank(options)
        fbank.accept_waveform(16_000, (waveform - waveform.mean()).tolist())
        fbank.input_finished()
        return np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])

    waveforms = make_waveforms()
    wanted = np.stack([kaldi(row) for row in waveforms])
    got = log_mel(waveforms, KALDI)
    assert_same_energy(got, wanted, tolerance=1e-3)  # Kaldi's mel scale is float32: its triangles are 3e-4 off.


def test_ten_seconds_have_a_thousand_frames_or_kaldis_998():
    ten_seconds = np.zeros((1, 160_000), np.int16)
    assert log_mel(ten_seconds, AVMAE).shape == (1, 1000, 128)
    assert log_mel(ten_seconds, KALDI).shape == (1, 998, 128)
    assert log_mel(ten_seconds, KALDI, num_frames=1024).shape == (1, 1024, 128)


@pytest.mark.parametrize('name', CONVENTIONS)
@pytest.mark.parametrize('num_samples', [399, 400, 401, 559, 560, 8_000])
def test_num_frames_foretells_the_length(name, num_samples):
    frames = log_mel(np.zeros((1, num_samples), np.float32), CONVENTIONS[name])
    assert frames.shape[1] == CONVENTIONS[name].num_frames(num_samples)


def test_wanted_length_cuts_or_fills_up():
    waveforms = make_waveforms(4_000)
    whole = log_mel(waveforms, KALDI)
    np.testing.assert_array_equal(log_mel(waveforms, KALDI, num_frames=5), whole[:, :5])
    longer = log_mel(waveforms, KALDI, num_frames=40)
    np.testing.assert_array_equal(longer[:, : whole.shape[1]], whole)
    assert (longer[:, whole.shape[1] :] == 0).all()
    silence = log_mel(np.zeros((1, 1_600), np.float32), AVMAE, num_frames=12)
    assert np.ptp(silence) < 1e-6  # Filled up with what silence sounds like.


@pytest.mark.parametrize('name', CONVENTIONS)
def test_jax_and_numpy_give_the_same_values(name):
    waveforms = make_waveforms(8_000)
    on_device = jax.jit(lambda x: log_mel(x, CONVENTIONS[name], num_frames=60))(waveforms)
    assert isinstance(on_device, jax.Array)
    on_host = log_mel(waveforms, CONVENTIONS[name], num_frames=60)
    np.testing.assert_allclose(on_device, on_host, atol=5e-3)
    assert np.abs(on_device - on_host).mean() < 2e-5


def test_int16_is_a_float_of_32768_parts():
    samples = np.round(make_waveforms(4_000) * 32_767).astype(np.int16)
    np.testing.assert_array_equal(log_mel(samples, AVMAE), log_mel(samples / np.float32(32_768), AVMAE))
    with pytest.raises(ValueError, match='int16'):
        log_mel(samples.astype(np.int32), AVMAE)


def test_no_band_of_ours_is_empty_and_rounding_to_int16_stays_below_the_floor():
    assert (spectrogram.mel_filters(AVMAE).sum(axis=0) > 0.5).all()
    rounding = np.random.default_rng(1).uniform(-0.5, 0.5, (1, 16_000)).astype(np.float32) / 32_768
    assert np.mean(log_mel(rounding, AVMAE) > np.log(AVMAE.floor) + 1e-3) < 0.001


def test_frame_i_of_ours_is_about_hop_i():
    click = np.zeros((1, 8_000), np.float32)
    click[0, 160 * 20 + 80] = 1
    assert log_mel(click, AVMAE).sum(axis=-1).argmax() == 20


def test_rows_stay_on_their_devices():
    if jax.device_count() < 2:
        pytest.skip('needs several devices')
    mesh = jax.make_mesh((jax.device_count(),), ('rows',), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P('rows'))
    step = jax.jit(lambda x: log_mel(x, AVMAE), in_shardings=rows, out_shardings=rows)
    program = step.lower(jax.ShapeDtypeStruct((jax.device_count(), 4_000), jnp.int16)).compile().as_text()
    assert 'all-gather' not in program and 'all-reduce' not in program


def test_loader_workers_need_no_jax_for_it():
    code = (
        'import numpy, sys; from avmae_jax.ops import spectrogram as s; '
        's.log_mel(numpy.zeros((1, 4000), numpy.int16), s.CONVENTIONS["kaldi"]); '
        'assert not {"jax", "tensorflow"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match="'avmae', 'kaldi'"):
        spectrogram.get_convention('mfcc')
    with pytest.raises(ValueError, match='max_hz=9000'):
        spectrogram.get_convention('kaldi', max_hz=9_000.0)
    with pytest.raises(ValueError, match='window must be one of'):
        dataclasses.replace(AVMAE, window='box')
    with pytest.raises(ValueError, match='more than 120 samples'):
        log_mel(np.zeros((1, 100), np.float32), AVMAE)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.ops import spectrogram
from avmae_jax.ops.preprocess import Preprocess
from avmae_jax.structs import Batch


def make_batch(num_rows=8, seed=0, **media):
    rng = np.random.default_rng(seed)
    if not media:
        media = {
            'video': rng.integers(0, 256, (num_rows, 2, 4, 6, 3), dtype=np.uint8),
            'audio': rng.integers(-3000, 3000, (num_rows, 1_600), dtype=np.int16),
            'image': rng.integers(0, 256, (num_rows, 4, 6, 3), dtype=np.uint8),
        }
    return Batch(
        media=media,
        present={m: np.ones(num_rows, bool) for m in media},
        labels={},
        record=np.arange(num_rows, dtype=np.int32),
        seed=rng.integers(0, 2**32, (num_rows, 2), dtype=np.uint32),
        weight=np.ones(num_rows, np.float32),
        damaged=np.zeros(num_rows, np.int32),
    )


def test_pixels_fill_minus_one_to_one():
    black_to_white = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1, 1) * np.ones((2, 1, 1, 1, 3), np.uint8)
    video = Preprocess()(make_batch(2, video=black_to_white), train=False)['video']
    assert video.dtype == jnp.float32
    np.testing.assert_allclose(video[:, 0, 0, 0, 0], [-1, 1])


def test_undo_undoes():
    batch = make_batch()
    preprocess = Preprocess(audio_mean=-3.0, audio_std=2.5, rgb_mean=(0.4, 0.5, 0.6), rgb_std=(0.2, 0.3, 0.4))
    media = preprocess.undo(preprocess(batch, train=False))
    np.testing.assert_allclose(media['video'], batch.media['video'] / 255, atol=1e-6)
    np.testing.assert_allclose(media['image'], batch.media['image'] / 255, atol=1e-6)
    log_mel = spectrogram.log_mel(batch.media['audio'], spectrogram.CONVENTIONS['avmae'])
    np.testing.assert_allclose(media['audio'], log_mel, atol=5e-3)


def test_half_of_the_rows_are_mirrored_in_training_only():
    batch = make_batch(64)
    plain = Preprocess()(batch, train=False)['video']
    trained = Preprocess()(batch, train=True)['video']
    mirrored = [np.array_equal(t, p[:, :, ::-1]) for t, p in zip(trained, plain, strict=True)]
    kept = [np.array_equal(t, p) for t, p in zip(trained, plain, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 20 < sum(mirrored) < 44
    np.testing.assert_array_equal(Preprocess(flip=False)(batch, train=True)['video'], plain)


def test_flip_is_a_function_of_the_row_alone():
    batch = make_batch(8)
    order = np.array([5, 2, 7])
    some = jax.tree.map(lambda x: x[order], batch)
    whole = Preprocess()(batch, train=True)
    alone = Preprocess()(some, train=True)
    np.testing.assert_array_equal(alone['video'], whole['video'][order])
    np.testing.assert_array_equal(alone['image'], whole['image'][order])


def test_log_mel_is_normalised_and_has_the_wanted_length():
    batch = make_batch()
    plain = Preprocess(convention='kaldi', num_spec_frames=16)(batch, train=False)['audio']
    assert plain.shape == (8, 16, 128)
    scaled = Preprocess(convention='kaldi', num_spec_frames=16, audio_mean=-4.0, audio_std=9.0)
    np.testing.assert_allclose(scaled(batch, train=False)['audio'], (plain + 4) / 9, atol=1e-6)


def test_stored_log_mel_is_only_normalised():
    stored = np.random.default_rng(0).standard_normal((2, 10, 64)).astype(np.float32)
    batch = make_batch(2, audio=stored)
    preprocess = Preprocess(convention='stored', num_mel_bins=64, num_spec_frames=10, audio_mean=1.102, audio_std=2.762)
    np.testing.assert_allclose(preprocess(batch, train=True)['audio'], (stored - 1.102) / 2.762, rtol=1e-5)


def test_the_convention_must_fit_the_data():
    waveforms = make_batch()
    with pytest.raises(ValueError, match='holds waveforms'):
        Preprocess(convention='stored')(waveforms, train=False)
    stored = make_batch(2, audio=np.zeros((2, 10, 128), np.float32))
    with pytest.raises(ValueError, match='holds stored log-mels'):
        Preprocess(convention='avmae')(stored, train=False)
    with pytest.raises(ValueError, match='ask for 20 of 128'):
        Preprocess(convention='stored', num_spec_frames=20)(stored, train=False)
    with pytest.raises(ValueError, match="'avmae', 'kaldi', 'stored'"):
        Preprocess(convention='mfcc')
    with pytest.raises(ValueError, match='audio_std'):
        Preprocess(audio_std=0.0)


def test_rows_stay_on_their_devices():
    if jax.device_count() < 2:
        pytest.skip('needs several devices')
    batch = make_batch(jax.device_count())
    mesh = jax.make_mesh((jax.device_count(),), ('rows',), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P('rows'))
    step = jax.jit(lambda x: Preprocess()(x, train=True), in_shardings=rows, out_shardings=rows)
    program = step.lower(batch).compile().as_text()
    assert 'all-gather' not in program and 'all-reduce' not in program
    alone = Preprocess()(batch, train=True)
    for modality, x in step(jax.device_put(batch, rows)).items():
        np.testing.assert_allclose(x, alone[modality], atol=5e-3)

import subprocess
import sys

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avmae_jax
from avmae_jax import experiment, subjects
from avmae_jax.data import video
from avmae_jax.evaluation import passes
from avmae_jax.evaluation.evaluator import Evaluator


@pytest.fixture(scope='module')
def runs(save_run, small_config, small_finetuning, tmp_path_factory):
    """Of an autoencoder and of a classifier; pictures are resized and cut."""
    changes = {'video.short_side': 40}
    return {
        'pretrained': save_run(tmp_path_factory.mktemp('run'), small_config('encoder=mid', **changes)),
        'finetuned': save_run(tmp_path_factory.mktemp('run'), small_finetuning('', **changes), seed=1),
    }


@pytest.fixture(scope='module')
def models(runs):
    return {name: avmae_jax.load_pretrained(run) for name, run in runs.items()}


def stored_media(evaluator):
    """Whole clips of the split, as somebody has them who knows nothing of this package; all are equally long."""
    clips = [evaluator.source[i] for i in range(len(evaluator.source))]
    length = min(clip.num_frames for clip in clips), min(len(clip.waveform) for clip in clips)
    assert all((clip.num_frames, len(clip.waveform)) == length for clip in clips)
    frames = np.stack([np.stack([video.decode_image(data).copy() for data in clip.frames]) for clip in clips])
    return {
        'video': frames,
        'audio': np.stack([clip.waveform for clip in clips]),
        'fps': clips[0].fps,
        'sample_rate': clips[0].sample_rate,
    }


def make_evaluator(run):
    return Evaluator(subjects.load_subject(run, overrides={}), split='test')


def test_features_are_those_that_evaluate_computes_of_the_same_clips(runs, models):
    evaluator, model = make_evaluator(runs['pretrained']), models['pretrained']
    media = stored_media(evaluator)
    with experiment.build_eval_stream(evaluator.subject.config, 'test', batch_size=8) as stream:
        (batch,) = list(stream)
    rows = model.rows(**media)
    for m, made in rows.items():  # The very bytes.
        np.testing.assert_array_equal(made, batch.media[m][: len(made)])
    step = passes.make_feature_step(evaluator.subject.model, evaluator.subject.preprocess)
    table = evaluator.collect(step, 'test', what='features')
    together = model.embed(**media)
    for m in ('video', 'audio'):
        np.testing.assert_allclose(together[m], table['together'][m], rtol=1e-4, atol=1e-5)
        rate = {name: media[name] for name in ('fps', 'sample_rate')}
        np.testing.assert_allclose(model.embed(**{m: media[m]}, **rate)[m], table['alone'][m], rtol=1e-4, atol=1e-5)


def test_scores_are_those_that_evaluate_computes_of_the_same_clips(runs, models):
    evaluator, model = make_evaluator(runs['finetuned']), models['finetuned']
    table = evaluator.logits()
    logits = model.classify(**stored_media(evaluator))['label']
    assert logits.shape == (3, len(model.labels['label'])) and np.ptp(logits) > 0.1
    np.testing.assert_allclose(logits, table['everything']['label'], rtol=1e-4, atol=1e-5)


def make_media(model, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = model.row_shapes
    media = {'video': rng.integers(0, 256, (batch, *shapes['video']), dtype=np.uint8)}
    return {**media, 'audio': rng.uniform(-1, 1, (batch, *shapes['audio'])).astype(np.float32)}


def test_numpy_and_jax_arrays_and_integers_and_floats_are_alike(models):
    model = models['pretrained']
    media = make_media(model)
    media['audio'] = np.round(media['audio'] * 32767).astype(np.int16)
    floats = {**media, 'audio': media['audio'].astype(np.float32) / 32768}
    wanted = model.encode(**media)
    for other in (floats, jax.tree.map(jnp.asarray, media), {**floats, 'audio': floats['audio'].tolist()}):
        jax.tree.map(np.testing.assert_array_equal, model.encode(**other), wanted)
    jitted = jax.jit(lambda media: model.embed(**media))(floats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jitted, model.embed(**floats))


def test_tokens_are_those_of_the_modalities_that_are_given(models):
    model = models['pretrained']
    media = make_media(model)
    both, alone = model.encode(**media), model.encode(audio=media['audio'])
    assert {m: x.shape for m, x in both.items()} == {'video': (2, 4, 16), 'audio': (2, 4, 16)}
    assert set(alone) == {'audio'} and not np.allclose(both['audio'], alone['audio'], atol=1e-3)  # They meet in 'mid'.


def test_rebuilding_leaves_what_was_visible_and_answers_for_the_rest(models):
    model = models['pretrained']
    media = make_media(model)
    found = model.reconstruct(**media, seed=3, mask_ratio={'video': 0.75})
    assert found['video'].hidden.sum(1).tolist() == [3, 3] and found['audio'].hidden.sum(1).tolist() == [2, 2]
    np.testing.assert_allclose(found['video'].media, media['video'] / 255, atol=1e-6)
    assert found['video'].media.shape == (2, *model.row_shapes['video'])
    for m in ('video', 'audio'):
        patches = [model.trained.model.tokenizers[m].cut(x) for x in (found[m].media, found[m].rebuilt)]
        same = np.isclose(*patches, atol=1e-6).all(axis=2)
        np.testing.assert_array_equal(same, ~np.asarray(found[m].hidden))
    again = model.reconstruct(**media, seed=3, mask_ratio={'video': 0.75})
    other = model.reconstruct(**media, seed=4, mask_ratio={'video': 0.75})
    np.testing.assert_array_equal(again['video'].hidden, found['video'].hidden)
    assert not np.array_equal(other['audio'].hidden, found['audio'].hidden)


def test_sound_of_another_rate_is_resampled_and_keeps_its_pitch(models):
    model = models['pretrained']
    log_mels = []
    for rate in (16_000, 44_100):
        time = np.arange(rate) / rate
        tone = np.sin(2 * np.pi * 880 * time).astype(np.float32)[None] / 2
        log_mels.append(model.inputs(audio=tone, sample_rate=rate)['audio'][0])
    loud = [np.asarray(x).argmax(1)[4:-4] for x in log_mels]
    np.testing.assert_array_equal(*loud)


def test_short_sound_is_filled_up_with_silence_and_long_sound_is_cut_in_its_middle(models):
    model = models['pretrained']
    (wanted,) = model.row_shapes['audio']
    sound = np.random.default_rng(0).uniform(-1, 1, (1, 2 * wanted + 100)).astype(np.float32)
    row = model.rows(audio=sound)['audio']
    np.testing.assert_array_equal(row, sound[:, (wanted + 100) // 2 :][:, :wanted])
    assert not model.rows(audio=sound[:, :1], sample_rate=np.int64(8000))['audio'].any()
    row = model.rows(audio=sound[:, :100])['audio']
    np.testing.assert_array_equal(row[:, :100], sound[:, :100])
    assert row.shape == (1, wanted) and not row[:, 100:].any()


def test_media_files_of_any_kind_come_through(models, tiny_clips):
    """From an mp4 with nothing but PyAV and this package."""
    with av.open(str(sorted(tiny_clips.parent.rglob('*.mp4'))[0])) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])
    features = models['pretrained'].embed(video=frames[None], fps=fps)
    assert features['video'].shape == (1, 16) and np.isfinite(features['video']).all()


@pytest.mark.parametrize(
    'media, message',
    [
        ({}, 'takes video and audio; nothing was given'),
        ({'image': np.zeros((1, 8, 8, 3), np.uint8)}, 'takes video and audio; image was given'),
        ({'video': np.zeros((1, 2, 32, 32, 3), np.float32)}, r'uint8 \[b t h w 3\].*got float32'),
        ({'video': np.zeros((2, 32, 32, 3), np.uint8)}, r'got uint8 \[2, 32, 32, 3\]'),
        ({'video': np.zeros((1, 2, 0, 32, 3), np.uint8)}, r'got uint8'),
        ({'video': np.zeros((1, 5, 32, 32, 3), np.uint8)}, 'takes 2 frames, 0.16 s apart; got 5'),
        ({'video': np.zeros((1, 5, 32, 32, 3), np.uint8), 'fps': 0.0}, 'fps must be a number above 0; got 0.0'),
        ({'audio': np.zeros(5, np.float32)}, r'audio is float \[b l\].*got float32 \[5\]'),
        ({'audio': np.full((1, 9), np.nan, np.float32)}, 'audio has 9 samples that are NaN or infinite'),
        ({'audio': np.zeros((1, 5), np.int32)}, 'got int32'),
        ({'video': np.zeros((1, 5, 32, 32, 3), np.uint8), 'fps': np.inf}, 'fps must be a number above 0; got inf'),
        ({'video': np.zeros((1, 5, 32, 32, 3), np.uint8), 'fps': '25'}, "fps must be .*; got '25'"),
        (
            {'audio': np.zeros((1, 5), np.float32), 'sample_rate': 0},
            'sample_rate is a whole number from 1,000 .*got 0',
        ),
        ({'audio': np.zeros((1, 5), np.float32), 'sample_rate': np.nan}, 'sample_rate is a whole number .*got nan'),
        ({'audio': np.zeros((1, 5), np.float32), 'sample_rate': [16000]}, r'sample_rate is .*; got \[16000\]'),
        ({'audio': [[1.0, 2.0], [1.0]]}, 'audio is no array'),
        ({'audio': np.zeros((1, 9000), np.float32), 'video': np.zeros((2, 2, 32, 32, 3), np.uint8)}, 'as many clips'),
    ],
)
def test_media_that_do_not_fit_are_told_what_would(models, media, message):
    with pytest.raises(ValueError, match=message):
        models['pretrained'].encode(**media)


def test_what_a_model_was_not_trained_for_is_refused(models):
    media = make_media(models['pretrained'])
    with pytest.raises(ValueError, match='was pretrained and has no classes'):
        models['pretrained'].classify(**media)
    with pytest.raises(ValueError, match='cannot rebuild'):
        models['finetuned'].reconstruct(**media)
    with pytest.raises(ValueError, match="knows no 'vidio'; name one of .*video"):
        models['pretrained'].reconstruct(**media, mask_ratio={'vidio': 0.5})
    with pytest.raises(ValueError, match='mask_ratio=0.5: give a ratio for each modality'):
        models['pretrained'].reconstruct(**media, mask_ratio=0.5)
    for ratio in (1.0, -0.1, float('nan')):
        with pytest.raises(ValueError, match=r'audio must be a number in \[0, 1\)'):
            models['pretrained'].reconstruct(**media, mask_ratio={'audio': ratio})


def test_activations_of_another_dtype(runs):
    half = avmae_jax.load_pretrained(runs['pretrained'], dtype='bfloat16')
    tokens = half.encode(**make_media(half))
    assert tokens['video'].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match='float16'):
        avmae_jax.load_pretrained(runs['pretrained'], dtype='float16')


def test_importing_the_package_imports_little():
    script = "import sys, avmae_jax; sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'flax')))"
    subprocess.run([sys.executable, '-c', script], check=True, timeout=60)

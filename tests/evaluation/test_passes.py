import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.evaluation import passes, reconstruction
from avmae_jax.models import decoders, encoders
from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute, stack_layers, unstack_layers
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import AudioTokenizer, VideoTokenizer
from avmae_jax.objectives import Inpainting, Objective, Reconstruction, Target
from avmae_jax.ops.preprocess import Preprocess
from avmae_jax.parallel.mesh import make_mesh
from avmae_jax.parallel.rules import batch_sharding
from avmae_jax.structs import Batch

NUM_CLIPS = 11
PREPROCESS = Preprocess(num_mel_bins=16, audio_mean=-8.0, audio_std=3.0)
SIZE = Size(width=16, num_heads=2, mlp_width=32, num_layers=2)


def make_clips():
    rng = np.random.default_rng(0)
    return {
        'video': rng.integers(0, 256, (NUM_CLIPS, 4, 8, 8, 3), dtype=np.uint8),
        'audio': rng.integers(-9000, 9000, (NUM_CLIPS, 1_280), dtype=np.int16),
    }


def make_batches(batch_size, damaged=(), rows_per_record=1):
    """All clips in order, each `rows_per_record` times; the last batch filled up with zeros of weight 0."""
    clips = make_clips()
    rows = np.repeat(np.arange(NUM_CLIPS), rows_per_record)
    for start in range(0, len(rows), batch_size):
        record = rows[start : start + batch_size]
        record = np.concatenate([record, np.full(batch_size - len(record), -1)]).astype(np.int32)
        real = record >= 0
        media = {m: np.where(real.reshape(-1, *[1] * (x.ndim - 1)), x[record], 0) for m, x in clips.items()}
        yield Batch(
            media={m: x.astype(clips[m].dtype) for m, x in media.items()},
            present={'video': real & (record != 2), 'audio': real},
            labels={'label': np.eye(3, dtype=np.float32)[record % 3]},
            record=record,
            seed=np.zeros((batch_size, 2), np.uint32),
            weight=(real & ~np.isin(record, damaged)).astype(np.float32),
            damaged=np.zeros(batch_size, np.int32),
        )


@functools.lru_cache
def make_model(encoder='separate', standardise='none', class_token=False, inpainting=False):
    sections = dict(size=SIZE, compute=Compute(dtype='float32', scan=False))
    sections |= dict(fusion_layer=1) if encoder == 'mid' else {}
    model = MaskedAutoencoder(
        tokenizers={
            'video': VideoTokenizer(patch=(2, 4, 4), class_token=class_token),
            'audio': AudioTokenizer(patch=(4, 4), class_token=class_token),
        },
        encoder=encoders.ENCODERS[encoder](**sections),
        decoder=decoders.DECODERS['shared'](size=SIZE, compute=sections['compute']),
    )
    target = {'video': Target(standardise=standardise)}
    terms = {'reconstruction': Reconstruction(target=target)}
    if inpainting:
        terms['inpainting'] = Inpainting(target=target)
    objective = Objective(mask_ratio={'video': 0.5, 'audio': 0.75}, terms=terms)

    @jax.jit
    def init(batch):
        inputs = PREPROCESS(batch, train=False)
        drawn = objective.draw(jax.random.key(0), model.grids(inputs), 1)
        params = model.init(jax.random.key(1), inputs, drawn.masks, drawn.places or None)['params']
        # Fresh decoders answer 0; these answer something.
        return jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)

    return model, objective, init(next(make_batches(1)))


def run(step, params, batch_size, num_devices=1, **kwargs):
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    return passes.run_pass(
        step, params, make_batches(batch_size, **kwargs), sharding=batch_sharding(mesh), num_records=NUM_CLIPS
    )


def test_every_clip_counts_once_on_any_number_of_devices():
    model, _, params = make_model('mid')
    step = passes.make_feature_step(model, PREPROCESS)
    alone = run(step, params, batch_size=1)
    np.testing.assert_array_equal(alone['record'], np.arange(NUM_CLIPS))
    spread = run(step, params, batch_size=8, num_devices=8)
    np.testing.assert_array_equal(spread['record'], np.arange(NUM_CLIPS))
    np.testing.assert_array_equal(spread['labels']['label'], np.eye(3)[np.arange(NUM_CLIPS) % 3])
    for name in ('alone', 'together'):
        for m in ('video', 'audio'):
            np.testing.assert_allclose(spread[name][m], alone[name][m], atol=1e-4)


def test_damaged_records_do_not_count():
    model, _, params = make_model()
    table = run(passes.make_feature_step(model, PREPROCESS), params, batch_size=4, damaged=[5])
    assert 5 not in table['record'] and len(table['record']) == NUM_CLIPS - 1


def test_rows_of_one_record_are_averaged():
    model, _, params = make_model()
    step = passes.make_feature_step(model, PREPROCESS)
    once, twice = run(step, params, batch_size=4), run(step, params, batch_size=4, rows_per_record=2)
    np.testing.assert_allclose(twice['alone']['video'], once['alone']['video'], atol=1e-5)
    np.testing.assert_array_equal(twice['present']['video'], once['present']['video'])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    'rows_per_record, batch_size, num_devices', [(1, 4, 1), (3, 6, 1), (4, 8, 8), (8, 8, 2), (8, 16, 8)]
)
def test_logits_of_the_rows_of_a_record_are_averaged(dtype, rows_per_record, batch_size, num_devices):
    """Several clips and crops; each row has logits of its own, and the last batch is not full."""
    assert rows_per_record == batch_size or (NUM_CLIPS * rows_per_record) % batch_size
    batches = list(make_batches(batch_size, rows_per_record=rows_per_record))
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 200, (len(batches) * batch_size, 2), dtype=np.uint32)  # Padding has logits too.
    batches = [b._replace(seed=seeds[i * batch_size :][:batch_size]) for i, b in enumerate(batches)]

    def step(params, batch):
        return {'logits': batch.seed.astype(dtype) * params, 'labels': batch.labels}

    mesh = make_mesh(devices=jax.devices()[:num_devices])
    table = passes.run_pass(
        step, jnp.asarray(0.5, dtype), batches, sharding=batch_sharding(mesh), num_records=NUM_CLIPS
    )
    wanted = 0.5 * seeds[: NUM_CLIPS * rows_per_record].reshape(NUM_CLIPS, rows_per_record, 2).mean(axis=1)
    np.testing.assert_allclose(table['logits'], wanted, rtol=1e-6)
    assert table['logits'].dtype == np.float32
    np.testing.assert_array_equal(table['labels']['label'], np.eye(3)[np.arange(NUM_CLIPS) % 3])


def test_features_leave_the_class_token_out():
    model, _, params = make_model(class_token=True)
    batch = next(make_batches(2))
    features = jax.jit(passes.make_feature_step(model, PREPROCESS))(params, batch)

    @jax.jit
    def encode(params, batch):
        video = PREPROCESS(batch, train=False)['video']
        return model.apply({'params': params}, {'video': video}, method='encode')['video']

    tokens = encode(params, batch)
    assert tokens.shape[1] == 1 + 8
    np.testing.assert_allclose(features['alone']['video'], tokens[:, 1:].mean(axis=1), atol=1e-5)


@pytest.mark.parametrize('scan', [False, True], ids=['loop', 'scan'])
@pytest.mark.parametrize('encoder', ['separate', 'early', 'mid'])
def test_features_after_a_layer_are_those_of_a_model_that_ends_there(encoder, scan):
    model, _, params = make_model(encoder)
    compute = Compute(dtype='float32', scan=scan)
    model = model.clone(encoder=model.encoder.clone(compute=compute, final_norm=False))
    params = stack_layers(params) if scan else params
    batch = next(make_batches(2))

    def features(*layers):
        return jax.jit(passes.make_feature_step(model, PREPROCESS, layers=layers))(params, batch)

    # One after the other: whether the layers were traced before makes no difference.
    first, last = features(1), features(2)
    np.testing.assert_allclose(last['layers']['2']['audio'], last['alone']['audio'], atol=1e-5)
    assert not np.allclose(first['layers']['1']['audio'], last['layers']['2']['audio'])
    assert list(last['layers']) == ['2']
    np.testing.assert_array_equal(features(1, 2)['layers']['1']['audio'], first['layers']['1']['audio'])
    if encoder != 'mid':
        size = dataclasses.replace(SIZE, num_layers=1)
        shorter = model.clone(encoder=model.encoder.clone(size=size, compute=Compute('float32', scan=False)))
        audio = PREPROCESS(batch, train=False)['audio']
        looped = {'params': unstack_layers(params)}
        tokens = jax.jit(lambda x: shorter.apply(looped, {'audio': x}, method='encode'))(audio)['audio']
        np.testing.assert_allclose(first['layers']['1']['audio'], tokens.mean(axis=1), atol=1e-5)
    with pytest.raises(ValueError, match='1..2; got 3'):
        features(3)


def test_modalities_that_never_meet_are_listed_once():
    for encoder, names in (
        ('separate', ['video', 'audio', 'both']),
        ('mid', ['video', 'audio', 'video (with audio)', 'audio (with video)', 'both (each alone)', 'both']),
    ):
        model, _, params = make_model(encoder)
        sets = passes.feature_sets(run(passes.make_feature_step(model, PREPROCESS), params, batch_size=4))
        assert list(sets) == names
        assert sets['both'][0].shape == (NUM_CLIPS, 32)
        assert sets['video'][1].sum() == sets['both'][1].sum() == NUM_CLIPS - 1  # Clip 2 has no picture.
        assert sets['audio'][1].all()


@functools.lru_cache
def reconstruct(standardise='none', batch_size=4):
    model, objective, params = make_model(standardise=standardise, inpainting=True)
    step = reconstruction.make_reconstruction_step(model, objective, PREPROCESS)
    errors = reconstruction.summarise(run(step, params, batch_size), PREPROCESS)
    return {(e.term, e.modality, e.unit): e for e in errors}, model, objective, params


@pytest.mark.parametrize(
    'standardise', ['channel', *(pytest.param(name, marks=pytest.mark.slow) for name in ('none', 'patch'))]
)
def test_error_is_the_loss_that_is_trained(standardise):
    errors, model, objective, params = reconstruct(standardise)
    (batch,) = make_batches(NUM_CLIPS)

    @jax.jit
    def train_loss(params, batch):
        inputs = PREPROCESS(batch, train=False)
        masks, places = reconstruction.draw_fixed(objective, model.grids(inputs), batch.record)
        return objective(model, params, None, inputs, batch, jax.random.key(0), masks=masks, places=places)[1].losses

    losses = train_loss(params, batch)
    unit = 'input' if standardise == 'none' else 'target'
    for term in ('reconstruction', 'inpainting'):
        assert errors[term, 'video', unit].mean == pytest.approx(float(losses[f'{term}/video']), rel=1e-4)
        assert errors[term, 'audio', 'input'].mean == pytest.approx(float(losses[f'{term}/audio']), rel=1e-4)
    assert errors['reconstruction', 'video', 'input'].num_clips == NUM_CLIPS - 1
    assert errors['inpainting', 'audio', 'input'].num_clips == NUM_CLIPS - 1
    assert errors['reconstruction', 'audio', 'input'].num_clips == NUM_CLIPS
    assert errors['reconstruction', 'video', 'raw'].true_scale == (standardise != 'none')


def test_raw_errors_are_in_rgb_and_nats():
    errors, *_ = reconstruct()
    for modality, deviation in (('video', 0.5), ('audio', 3.0)):
        normalised, raw = (errors['reconstruction', modality, unit] for unit in ('input', 'raw'))
        assert raw.mean == pytest.approx(normalised.mean * deviation**2)
        assert raw.baselines['nearest'] == pytest.approx(normalised.baselines['nearest'] * deviation**2)


def test_baselines_are_what_their_names_say():
    errors, model, objective, _ = reconstruct()
    (batch,) = make_batches(NUM_CLIPS)
    inputs = PREPROCESS(batch, train=False)
    masks, _ = reconstruction.draw_fixed(objective, model.grids(inputs), batch.record)
    patches = np.asarray(model.tokenizers['video'].cut(inputs['video']))
    kept, hidden = np.asarray(masks['video'].kept), np.asarray(masks['video'].hidden)
    grid = np.stack(np.unravel_index(np.arange(8), (2, 2, 2)), axis=-1)
    rows = [i for i in range(NUM_CLIPS) if i != 2]
    asked = {i: patches[i, hidden[i]].reshape(4, -1, 3) for i in rows}
    colour = np.concatenate([asked[i].reshape(-1, 3) for i in rows]).mean(axis=0)
    wanted = {name: [] for name in reconstruction.BASELINES}
    for i in rows:
        visible = patches[i, kept[i]].reshape(-1, 3).mean(axis=0)
        nearest = [
            patches[i, min(kept[i], key=lambda k: (((grid[k] - grid[h]) ** 2).sum(), list(kept[i]).index(k)))]
            for h in hidden[i]
        ]
        wanted['dataset mean'].append(((asked[i] - colour) ** 2).mean())
        wanted['clip mean'].append(((asked[i] - visible) ** 2).mean())
        wanted['nearest'].append(((asked[i] - np.reshape(nearest, asked[i].shape)) ** 2).mean())
        wanted['patch mean'].append(((asked[i] - asked[i].mean(axis=1, keepdims=True)) ** 2).mean())
    got = errors['reconstruction', 'video', 'input'].baselines
    assert got == pytest.approx({name: np.mean(values) for name, values in wanted.items()}, rel=1e-4)


def test_masks_depend_on_the_record_alone():
    errors = [reconstruct(batch_size=size)[0] for size in (4, 3)]
    for key, error in errors[0].items():
        assert errors[1][key].mean == pytest.approx(error.mean, rel=1e-5)

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.objectives import Classification
from avmae_jax.objectives.classification import Classified
from avmae_jax.ops import losses
from avmae_jax.ops.mixup import CutMix, Mixing, Mixup, blend
from avmae_jax.structs import Batch

ROWS, CLASSES = 6, 5
SEEDS = np.random.default_rng(0).integers(0, 2**32, (ROWS, 2), dtype=np.uint32)


class Linear:
    """Stands for a classifier: the logits of a modality are its inputs times the parameters."""

    def __init__(self, heads=('label',), pooled=False):
        self.heads, self.pooled, self.seen = heads, pooled, {}

    def apply(self, variables, inputs, *, train, present, rngs):
        self.seen = {'inputs': inputs, 'train': train, 'present': present, 'rngs': rngs}
        scores = {m: x.reshape(len(x), -1)[:, :CLASSES] * variables['params'][m] for m, x in inputs.items()}
        parts = {'joint': sum(scores.values())} if self.pooled else scores
        averaged = dict.fromkeys(self.heads, sum(parts.values()) / len(parts))
        return types.SimpleNamespace(logits=dict.fromkeys(self.heads, parts), averaged=averaged)


PARAMS = {'video': jnp.ones(()), 'audio': jnp.full((), 2.0)}


def make_inputs():
    rng = np.random.default_rng(1)
    return {
        m: rng.standard_normal((ROWS, *shape)).astype(np.float32)
        for m, shape in {'video': (1, 2, 3, 3), 'audio': (2, 4)}.items()
    }


def make_batch(labels=None, weight=None, video=True, audio=True):
    if labels is None:
        labels = {'label': np.eye(CLASSES, dtype=np.float32)[np.arange(ROWS) % CLASSES]}
    present = {'video': np.broadcast_to(video, ROWS), 'audio': np.broadcast_to(audio, ROWS)}
    weight = np.ones(ROWS, np.float32) if weight is None else np.asarray(weight, np.float32)
    return Batch({}, present, labels, np.arange(ROWS), SEEDS, weight, np.zeros(ROWS))


def score(objective, batch=None, model=None, params=PARAMS, inputs=None, **options):
    return objective(
        model or Linear(), params, None, inputs or make_inputs(), batch or make_batch(), jax.random.key(0), **options
    )


def logits_of(inputs):
    return {m: x.reshape(ROWS, -1)[:, :CLASSES] * PARAMS[m] for m, x in inputs.items()}


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
def test_the_loss_is_the_mean_over_modalities_of_means_over_rows(kind):
    loss, scored = score(Classification({'label': kind}, label_smoothing=0.3))
    element = {'softmax': losses.softmax_cross_entropy, 'sigmoid': losses.sigmoid_cross_entropy}[kind]
    labels = losses.smooth_labels(make_batch().labels['label'], 0.3)
    wanted = {m: element(logits, labels).mean() for m, logits in logits_of(make_inputs()).items()}
    assert loss == pytest.approx(float(wanted['video'] + wanted['audio']) / 2, rel=1e-5)
    assert set(scored.losses) == {'label/video', 'label/audio'}
    assert scored.losses['label/audio'] == pytest.approx(float(wanted['audio']), rel=1e-5)


def test_heads_add_up_by_their_weights():
    labels = {'verb': np.eye(CLASSES, dtype=np.float32)[np.arange(ROWS) % 5], 'noun': np.ones((ROWS, 5), np.float32)}
    model, heads = Linear(('verb', 'noun')), {'verb': 'softmax', 'noun': 'sigmoid'}
    loss, scored = score(Classification(heads), make_batch(labels), model)
    assert loss == pytest.approx(float(sum(scored.losses.values())) / 4, rel=1e-6)
    weighted, _ = score(Classification(heads, weight={'verb': 2.0, 'noun': 0.0}), make_batch(labels), model)
    assert weighted == pytest.approx(float(scored.losses['verb/video'] + scored.losses['verb/audio']), rel=1e-6)


def test_rows_that_lack_a_modality_do_not_count_for_it():
    inputs = make_inputs()
    there = np.arange(ROWS) != 2

    def loss(changed, **of):
        objective = Classification({'label': 'softmax'}, mixup=Mixup(0.5))
        return score(objective, make_batch(**of), inputs=changed)[1].losses

    changed = {**inputs, 'audio': inputs['audio'].copy()}
    changed['audio'][2] *= -5
    assert loss(changed, audio=there)['label/audio'] == loss(inputs, audio=there)['label/audio']
    assert loss(changed)['label/audio'] != loss(inputs)['label/audio']
    changed['video'] = inputs['video'].copy()
    changed['video'][2] *= -5
    padded = {'weight': there}
    jax.tree.map(np.testing.assert_array_equal, loss(changed, **padded), loss(inputs, **padded))


def test_a_clip_without_a_label_is_of_no_class_and_counts_for_none():
    labels = make_batch().labels['label'].copy()
    labels[3] = 0
    inputs = make_inputs()
    changed = {m: x.copy() for m, x in inputs.items()}
    for x in changed.values():
        x[3] *= -5
    unlabelled = make_batch({'label': labels})
    objective = Classification({'label': 'softmax'}, label_smoothing=0.1)
    assert score(objective, unlabelled, inputs=inputs)[0] == score(objective, unlabelled, inputs=changed)[0]
    # None of several independent classes is an answer.
    objective = Classification({'label': 'sigmoid'})
    assert score(objective, unlabelled, inputs=inputs)[0] != score(objective, unlabelled, inputs=changed)[0]


@pytest.mark.parametrize('per_modality', [False, True])
def test_labels_are_mixed_as_their_inputs_are(per_modality):
    model, inputs, batch = Linear(), make_inputs(), make_batch()
    _, scored = score(Classification({'label': 'softmax'}, mixup=Mixup(0.5, per_modality)), batch, model, inputs=inputs)
    for m, x in inputs.items():
        weight = scored.mixing.weight[m]
        np.testing.assert_allclose(model.seen['inputs'][m], blend(x, weight), rtol=1e-6)
        loss = losses.softmax_cross_entropy(logits_of(model.seen['inputs'])[m], blend(batch.labels['label'], weight))
        assert scored.losses[f'label/{m}'] == pytest.approx(float(loss.mean()), rel=1e-5)
    same = np.array_equal(scored.mixing.weight['video'], scored.mixing.weight['audio'])
    assert same != per_modality


def test_evaluation_neither_mixes_nor_smooths_nor_drops():
    model, objective = Linear(), Classification({'label': 'softmax'}, None, 0.3, Mixup(0.5), CutMix())
    plain, _ = score(Classification({'label': 'softmax'}))
    loss, scored = score(objective, model=model, train=False)
    assert loss == plain and scored.mixing is None
    assert model.seen['train'] is False and model.seen['rngs'] == {}
    assert score(objective, model=model)[0] != plain and 'drop_path' in model.seen['rngs']


def test_logits_of_all_modalities_together_have_one_label():
    pooled = Linear(pooled=True)
    loss, scored = score(Classification({'label': 'softmax'}, mixup=Mixup(0.5)), model=pooled)
    labels = blend(make_batch().labels['label'], scored.mixing.weight['audio'])
    wanted = losses.softmax_cross_entropy(sum(logits_of(pooled.seen['inputs']).values()), labels).mean()
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(ValueError, match='per_modality=False'):
        score(Classification({'label': 'softmax'}, mixup=Mixup(0.5, per_modality=True)), model=pooled)
    one = {'audio': make_inputs()['audio']}  # Of one modality there is but one share.
    score(Classification({'label': 'softmax'}, mixup=Mixup(0.5, per_modality=True)), model=pooled, inputs=one)


def test_it_is_differentiated_within_a_jitted_step():
    objective = Classification({'label': 'sigmoid'}, None, 0.3, Mixup(0.5, True), CutMix())
    step = jax.jit(jax.value_and_grad(lambda params: score(objective, params=params)[0]))
    loss, gradient = step(PARAMS)
    assert jnp.isfinite(loss) and all(g != 0 for g in gradient.values())


def test_settings_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match=r"heads.label must be one of \('softmax', 'sigmoid'\); got 'focal'"):
        Classification({'label': 'focal'})
    with pytest.raises(ValueError, match='label_smoothing must lie in'):
        Classification({'label': 'softmax'}, label_smoothing=1.0)
    with pytest.raises(ValueError, match='weight must name the heads'):
        Classification({'label': 'softmax'}, weight={'verb': 1.0})
    with pytest.raises(ValueError, match="'verb', which is none of the labels of the data: \\['label'\\]"):
        score(Classification({'verb': 'softmax'}))
    with pytest.raises(ValueError, match='scores 5 classes and the labels have 3'):
        score(Classification({'label': 'softmax'}), make_batch({'label': np.ones((ROWS, 3), np.float32)}))


@pytest.mark.parametrize('name', ['mixmod', 'shared'])
def test_steps_of_the_public_reference_mix_the_same_inputs_and_labels(reference, name):
    file = reference / 'steps' / f'finetune_sgd_layerwise_mixup_{name}.json'
    if not file.exists():
        pytest.skip(f'{file} is not there.')
    arrays, stored = np.load(file.with_suffix('.npz')), np.load(reference / 'mbt' / 'inputs.npz')
    if not any(key.startswith('step0/mixed_') for key in arrays.files):
        pytest.skip(f'{file.with_suffix(".npz")} holds no mixed labels and inputs.')
    for i in range(len(json.loads(file.read_text())['steps'])):
        shares = arrays[f'step{i}/mixup_weights']
        for theirs, share in zip(('rgb', 'spectrogram'), shares, strict=True):
            weight = jnp.full(len(stored['labels']), share)
            labels = blend(stored['labels'], weight)
            np.testing.assert_allclose(labels, arrays[f'step{i}/mixed_label/{theirs}'], atol=1e-6)
            if i == 0:
                mixed = blend(stored[f'input/{theirs}'], weight)
                np.testing.assert_allclose(mixed, arrays[f'step0/mixed_inputs/{theirs}'], atol=1e-5)


def test_a_mixing_may_be_given_from_outside():
    model, weight = Linear(), {'video': jnp.full(ROWS, 0.25), 'audio': jnp.full(ROWS, 1.0)}
    _, scored = score(Classification({'label': 'softmax'}), model=model, mixing=Mixing(weight))
    np.testing.assert_array_equal(model.seen['inputs']['audio'], make_inputs()['audio'])
    np.testing.assert_allclose(model.seen['inputs']['video'], blend(make_inputs()['video'], weight['video']), rtol=1e-6)
    assert scored.mixing.weight is weight


def test_accuracy_is_the_share_of_labelled_rows_that_count_whose_likeliest_class_is_theirs():
    objective = Classification({'label': 'softmax', 'tags': 'sigmoid'})
    targets = np.eye(CLASSES, dtype=np.float32)[[0, 1, 2, 3, 4, 0]]
    targets[4] = 0  # Without a label.
    batch = make_batch(labels={'label': targets, 'tags': targets}, weight=[1, 1, 1, 0, 1, 1])
    logits = np.eye(CLASSES, dtype=np.float32)[[0, 1, 0, 3, 4, 1]]
    scored = Classified({}, {}, types.SimpleNamespace(averaged={'label': logits, 'tags': logits}), None)
    # Right are rows 0 and 1, wrong 2 and 5; row 3 is padding.
    values, counts = objective.accuracies(scored, batch)
    assert set(values) == {'label/accuracy'} and values['label/accuracy'] == pytest.approx(0.5)
    assert counts == {'label/accuracy': 4}


def test_the_model_is_told_what_each_row_has():
    model, batch = Linear(), make_batch(audio=np.arange(ROWS) > 2)
    score(Classification({'label': 'softmax'}), batch, model)
    assert model.seen['present'] is batch.present

import json

import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.ops import losses


def test_what_has_no_weight_does_not_count():
    values, weight = jnp.asarray([[1.0, 2.0], [3.0, 99.0]]), jnp.asarray([[1.0, 1.0], [1.0, 0.0]])
    np.testing.assert_allclose(losses.masked_mean(values, weight), 2.0, rtol=1e-6)


def test_a_batch_in_which_nothing_counts_has_no_loss():
    assert losses.masked_mean(jnp.ones((2, 2)), jnp.zeros((2, 2))) == 0


def test_errors_are_added_up_in_float32_whatever_the_model_computes_in():
    error = losses.squared_error(jnp.ones((1, 1, 1000), jnp.bfloat16), jnp.zeros((1, 1, 1000)))
    assert error.dtype == jnp.float32 and error[0, 0] == 1000


def logits_and_labels(dtype=np.float32):
    rng = np.random.default_rng(0)
    return rng.standard_normal((5, 7)).astype(dtype), rng.random((5, 7)).astype(dtype)


def test_softmax_cross_entropy_is_minus_the_log_of_the_probability_of_the_class():
    logits, _ = logits_and_labels()
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    classes = np.array([3, 0, 6, 2, 2])
    loss = losses.softmax_cross_entropy(logits, jnp.eye(7)[classes])
    np.testing.assert_allclose(loss, -np.log(probabilities[np.arange(5), classes]), rtol=1e-5)


def test_sigmoid_cross_entropy_adds_up_one_decision_a_class():
    logits, labels = logits_and_labels()
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    wanted = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(1)
    np.testing.assert_allclose(losses.sigmoid_cross_entropy(logits, labels), wanted, rtol=1e-5)


@pytest.mark.parametrize('loss', [losses.softmax_cross_entropy, losses.sigmoid_cross_entropy])
def test_a_mixture_of_labels_costs_the_mixture_of_their_losses(loss):
    logits, _ = logits_and_labels()
    one, other = jnp.eye(7)[np.arange(5)], jnp.eye(7)[np.arange(5) + 2]
    mixed = loss(logits, 0.3 * one + 0.7 * other)
    np.testing.assert_allclose(mixed, 0.3 * loss(logits, one) + 0.7 * loss(logits, other), rtol=1e-5)


@pytest.mark.parametrize('loss', [losses.softmax_cross_entropy, losses.sigmoid_cross_entropy])
def test_large_logits_and_low_precision_lose_nothing(loss):
    large = jnp.asarray([[1e4, -1e4, 0.0]])
    assert jnp.isfinite(loss(large, jnp.asarray([[0.0, 1.0, 0.0]]))).all()
    assert loss(large, jnp.asarray([[1.0, 0.0, 0.0]])) < 1
    assert loss(large.astype(jnp.bfloat16), jnp.ones((1, 3), jnp.bfloat16)).dtype == jnp.float32


def test_smoothing_moves_a_share_of_each_label_to_all_classes_alike():
    smooth = losses.smooth_labels(jnp.asarray([[0.0, 1.0, 0.0, 0.0]]), 0.2)
    np.testing.assert_allclose(smooth, [[0.05, 0.85, 0.05, 0.05]], rtol=1e-6)
    np.testing.assert_array_equal(losses.smooth_labels(jnp.eye(3), 0.0), np.eye(3))


def test_losses_are_those_of_the_public_reference(reference):
    kinds = {'sigmoid_ce': losses.sigmoid_cross_entropy, 'softmax_ce': losses.softmax_cross_entropy}
    checked = 0
    for index in sorted((reference / 'mbt').glob('index_*.json')):
        variant = index.stem.removeprefix('index_')
        for entry in json.loads(index.read_text()):
            if entry['error'] is not None:
                continue
            file = reference / 'mbt' / f'{variant}__{entry["case"]}.json'
            case, arrays = json.loads(file.read_text()), np.load(file.with_suffix('.npz'))
            names = [n for n in arrays if n == 'logits_train' or n.startswith('logits_train/')]
            found = []
            for name in names:
                labels = arrays[_label_name(name, arrays)]
                smooth = losses.smooth_labels(labels, case['label_smoothing'])
                found.append(jnp.mean(kinds[case['loss_kind']](arrays[name], smooth)))
            assert sum(found) / len(found) == pytest.approx(case['loss'], rel=1e-5), file.name
            checked += 1
    assert checked


def _label_name(logits, arrays):
    modality = logits.removeprefix('logits_train').removeprefix('/')
    return f'labels_mixed/{modality}' if f'labels_mixed/{modality}' in arrays else 'labels'

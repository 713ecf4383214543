import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.ops import losses
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.parallel import rules


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


# -- InfoNCE over the batch of all devices --


def embeddings(batch, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, batch, 6)).astype(dtype)
    return tuple(x / np.linalg.norm(x, axis=-1, keepdims=True))


def plain_info_nce(queries, keys, *, temperature, counts=None):
    logits = jnp.einsum('bd,cd->bc', queries, keys) / temperature
    if counts is not None:
        logits = jnp.where(counts[None] | jnp.eye(len(keys), dtype=bool), logits, -jnp.inf)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.diagonal(logits)


def value_and_gradients(function, **fields):
    """Of a weighted mean, with respect to queries, keys and temperature."""

    def mean(queries, keys, temperature):
        rows = function(queries, keys, temperature=temperature, **fields)
        return jnp.mean(rows * jnp.linspace(0.5, 1.5, len(rows)))

    return jax.value_and_grad(mean, argnums=(0, 1, 2))


def assert_close(ours, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, expected)


@pytest.mark.parametrize('chunk_size', [3, 8, 100])
def test_info_nce_in_chunks_is_that_of_the_whole_table_of_similarities(chunk_size):
    given = (*embeddings(24), 0.07)
    expected = value_and_gradients(plain_info_nce)(*given)
    assert_close(value_and_gradients(losses.info_nce, chunk_size=chunk_size)(*given), expected)


def test_keys_that_do_not_count_are_no_negatives_but_everybody_has_its_own_key():
    queries, keys = embeddings(12)
    counts = np.arange(12) % 3 != 0
    ours = losses.info_nce(queries, keys, temperature=0.1, counts=jnp.asarray(counts), chunk_size=4)
    assert_close(ours, plain_info_nce(queries, keys, temperature=0.1, counts=counts))
    alone = losses.info_nce(queries, keys, temperature=0.1, counts=jnp.zeros(12, bool), chunk_size=4)
    np.testing.assert_allclose(alone, 0, atol=1e-6)


def test_info_nce_tells_bfloat16_embeddings_apart_and_does_not_overflow():
    queries, keys = (jnp.asarray(x, jnp.bfloat16) for x in embeddings(16))
    ours = losses.info_nce(queries, keys, temperature=1e-3, chunk_size=4)
    wide = [x.astype(jnp.float32) for x in (queries, keys)]
    assert ours.dtype == jnp.float32
    assert_close(ours, plain_info_nce(*wide, temperature=1e-3))


def test_info_nce_on_eight_devices_is_that_of_one_and_no_device_has_all_keys_or_similarities():
    mesh, batch, chunk_size = mesh_lib.make_mesh(replica=2), 64, 16
    rows, whole = rules.batch_sharding(mesh), jax.NamedSharding(mesh, jax.P())
    given = (*embeddings(batch), np.float32(0.07))
    spread = jax.jit(
        rules.on_mesh(value_and_gradients(losses.info_nce, chunk_size=chunk_size), mesh),
        in_shardings=(rows, rows, whole),
        out_shardings=(whole, (rows, rows, whole)),
    )
    assert_close(spread(*given), value_and_gradients(plain_info_nce)(*given))
    shapes = re.findall(r'f32\[([\d,]+)\]', spread.lower(*given).compile().as_text())
    sizes = {math.prod(int(n) for n in shape.split(',')) for shape in shapes}
    # A chunk of keys, and the similarities of this device's 8 queries to it; all keys would be 64 x 6.
    assert {chunk_size * 6, 8 * chunk_size} <= sizes and max(sizes) == 8 * chunk_size

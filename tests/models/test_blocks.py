import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.models.blocks import Compute, Stack, drop_rates, residual_scales, stack_layers, unstack_layers
from avmae_jax.models.sizes import DECODER_SIZES, SIZES, Size

SIZE = Size(width=16, num_heads=2, mlp_width=32, num_layers=3)
LOOP, SCAN = Compute('float32', scan=False), Compute('float32', scan=True)
X = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)


def init(compute):
    return Stack(SIZE, compute).init(jax.random.key(0), jnp.asarray(X))['params']


def value_and_gradients(compute, params, segments=None):
    def loss(params):
        return jnp.square(Stack(SIZE, compute).apply({'params': params}, jnp.asarray(X), segments)).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


def test_layers_in_a_loop_and_scanned_compute_the_same():
    params = init(LOOP)
    value, gradients = value_and_gradients(LOOP, params)
    scanned_value, scanned_gradients = value_and_gradients(SCAN, stack_layers(params))
    np.testing.assert_allclose(scanned_value, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        unstack_layers(scanned_gradients),
        gradients,
    )


def test_scanned_layers_make_a_program_of_the_same_length_however_many_there_are():
    def num_instructions(num_layers):
        stack = Stack(dataclasses.replace(SIZE, num_layers=num_layers), SCAN)
        params = jax.eval_shape(stack.init, jax.random.key(0), jnp.asarray(X))['params']
        gradient = jax.grad(lambda params: jnp.square(stack.apply({'params': params}, jnp.asarray(X))).sum())
        return jax.jit(gradient).lower(params).compile().as_text().count(' = ')

    assert abs(num_instructions(48) / num_instructions(12) - 1) < 0.02


def test_stacking_and_unstacking_undo_each_other():
    params = {'encoder': {'video': init(LOOP)}, 'other': {'kernel': jnp.ones(3)}}
    stacked = stack_layers(params)
    assert jax.tree.structure(stacked) == jax.tree.structure({'encoder': {'video': init(SCAN)}, 'other': {'kernel': 0}})
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)


@pytest.mark.parametrize('remat', ['dots', 'full'])
@pytest.mark.parametrize('compute', [LOOP, SCAN], ids=['loop', 'scan'])
def test_rematerialisation_changes_no_number(compute, remat):
    params = init(compute)
    value, gradients = value_and_gradients(compute, params)
    again, same = value_and_gradients(dataclasses.replace(compute, remat=remat), params)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, same)


def test_segments_do_not_see_each_other():
    params = init(LOOP)
    stack = Stack(SIZE, LOOP)
    whole = stack.apply({'params': params}, jnp.asarray(X), (2, 3))
    parts = [stack.apply({'params': params}, jnp.asarray(part)) for part in (X[:, :2], X[:, 2:])]
    np.testing.assert_allclose(whole, jnp.concatenate(parts, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('compute', [LOOP, SCAN], ids=['loop', 'scan'])
def test_each_residual_of_each_example_is_dropped_by_itself_and_the_first_layer_never(compute):
    size = dataclasses.replace(SIZE, num_layers=2)
    x = jnp.broadcast_to(X[:1], (64, *X.shape[1:]))
    stack = Stack(size, compute, final_norm=False, drop_rates=drop_rates(0.5, 2))
    params = stack.init(jax.random.key(0), x)['params']
    out, seen = stack.apply(
        {'params': params}, x, None, True, rngs={'drop_path': jax.random.key(0)}, mutable=['intermediates']
    )
    (first,), (second,) = seen['intermediates']['layer_0'], seen['intermediates']['layer_1']
    np.testing.assert_allclose(first, jnp.broadcast_to(first[:1], first.shape), rtol=1e-5, atol=1e-6)
    # Attention, MLP, both or neither: four outcomes, each about as often.
    outcomes = {tuple(np.round(row[0, :4], 3).tolist()) for row in np.asarray(second)}
    assert len(outcomes) == 4
    assert tuple(np.round(np.asarray(first)[0, 0, :4], 3).tolist()) in outcomes


def test_the_mean_of_a_residual_is_what_it_was():
    scales = residual_scales(jax.random.key(0), drop_rates(0.3, 4), 2, 4096)
    assert scales.shape == (4, 2, 4096) and set(np.unique(np.round(scales[3], 4))) == {0, np.float32(1.4286)}
    np.testing.assert_allclose(scales.mean(axis=(1, 2)), 1, atol=0.03)
    np.testing.assert_allclose((scales == 0).mean(axis=(1, 2)), [0.0, 0.1, 0.2, 0.3], atol=0.02)


def test_in_bfloat16_parameters_and_gradients_stay_float32():
    compute = Compute('bfloat16', scan=True)
    params = init(compute)
    out = Stack(SIZE, compute).apply({'params': params}, jnp.asarray(X))
    exact = Stack(SIZE, SCAN).apply({'params': params}, jnp.asarray(X))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.1)
    _, gradients = value_and_gradients(compute, params)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradients))} == {jnp.dtype('float32')}


def test_query_key_and_value_are_initialised_each_by_itself():
    kernel = init(LOOP)['layer_0']['attention']['qkv']['kernel']
    limit = (6 / (16 + 16)) ** 0.5  # Xavier-uniform for 16 -> 16, although the kernel is 16 -> 48.
    assert 0.9 * limit < np.abs(kernel).max() <= limit


def test_sizes_divide_into_heads_and_a_wrong_one_is_refused():
    assert all(size.width % size.num_heads == 0 for size in [*SIZES.values(), *DECODER_SIZES.values()])
    with pytest.raises(ValueError, match='multiple of num_heads'):
        Size(width=10, num_heads=3, mlp_width=4, num_layers=1)


@pytest.mark.parametrize('field, value', [('dtype', 'float16'), ('remat', 'some'), ('attention', 'flash')])
def test_an_unknown_way_of_computing_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Compute(**{field: value})

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.ops.dense import GELUS, NORM_EPSILON, dense, gelu, last_axis, layer_norm

RANDOM = np.random.default_rng(0)
X, KERNEL = RANDOM.normal(size=(2, 3, 4)).astype(np.float32), RANDOM.normal(size=(4, 5)).astype(np.float32)
BIAS, SCALE, SHIFT = (RANDOM.normal(size=n).astype(np.float32) for n in (5, 4, 4))
PROBE = {5: RANDOM.normal(size=(2, 3, 5)).astype(np.float32), 4: RANDOM.normal(size=(2, 3, 4)).astype(np.float32)}


def plain_dense(x, kernel, bias, dtype):
    return jnp.dot(x, kernel) + bias.reshape(1, 1, -1)


def plain_norm(x, scale, bias, dtype):
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred / jnp.sqrt(variance + NORM_EPSILON) * last_axis(scale, x) + last_axis(bias, x)


@pytest.mark.parametrize(
    'ours, plain, parts', [(dense, plain_dense, (KERNEL, BIAS)), (layer_norm, plain_norm, (SCALE, SHIFT))]
)
def test_values_and_written_out_gradients_are_those_of_autodiff(ours, plain, parts):
    def loss(function):
        return lambda *args: (function(*args, 'float32') * PROBE[parts[-1].shape[0]]).sum()

    np.testing.assert_allclose(ours(X, *parts, 'float32'), plain(X, *parts, 'float32'), rtol=1e-5, atol=1e-5)
    theirs = jax.grad(loss(plain), argnums=(0, 1, 2))(X, *parts)
    for got, wanted in zip(jax.grad(loss(ours), argnums=(0, 1, 2))(X, *parts), theirs, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_without_bias_has_no_gradient_for_one():
    gradient = jax.grad(lambda k: dense(jnp.asarray(X), k, None, 'float32').sum())(KERNEL)
    np.testing.assert_allclose(gradient, jax.grad(lambda k: jnp.dot(X, k).sum())(KERNEL), rtol=1e-5)


def test_in_bfloat16_weights_get_float32_gradients_that_were_never_rounded():
    # 4096 rows of which each adds 1/256: in bfloat16 the sum, 16, is exact, but one more row would be lost.
    x, kernel = jnp.ones((4097, 1), jnp.bfloat16), jnp.ones((1, 1))
    gradient = jax.grad(lambda k: (dense(x, k, None, 'bfloat16') * jnp.bfloat16(1 / 256)).sum())(kernel)
    assert gradient.dtype == jnp.float32
    assert gradient[0, 0] == 4097 / 256


def test_the_epsilon_of_a_norm_is_added_to_the_variance():
    flat = 1e-4 * X  # With a variance of about 1e-8.
    for epsilon in (1e-5, 1e-12):
        wanted = (flat - flat.mean(-1, keepdims=True)) / np.sqrt(flat.var(-1, keepdims=True) + epsilon) * SCALE + SHIFT
        np.testing.assert_allclose(layer_norm(flat, SCALE, SHIFT, 'float32', epsilon), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', GELUS)
def test_gelu_and_its_written_out_gradient_are_those_of_jax(kind):
    x = jnp.linspace(-6, 6, 101)
    plain = functools.partial(jax.nn.gelu, approximate=kind == 'tanh')
    np.testing.assert_allclose(GELUS[kind](x), plain(x), rtol=1e-5, atol=1e-6)
    ours, theirs = (jax.grad(lambda x, f=f: f(x).sum())(x) for f in (GELUS[kind], plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gelu_stores_its_input_and_nothing_else():
    x = jnp.ones((2, 3), jnp.bfloat16)
    _, backward = jax.vjp(gelu, x)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(backward)] == [(x.shape, x.dtype)]

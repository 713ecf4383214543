import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.ops import attention


def test_it_is_a_softmax_weighted_mean_of_values():
    qkv = np.random.default_rng(0).normal(size=(2, 5, 3, 3, 4)).astype(np.float32)
    query, key, value = np.moveaxis(qkv, 3, 0)
    logits = np.einsum('bnhe,bmhe->bhnm', query, key) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = np.einsum('bhnm,bmhe->bnhe', weights, value)
    np.testing.assert_allclose(attention.self_attention(jnp.asarray(qkv), 'xla'), wanted, rtol=1e-4, atol=1e-6)


def test_large_logits_in_bfloat16_do_not_overflow():
    qkv = jnp.full((1, 4, 1, 3, 8), 100, jnp.bfloat16)
    out = attention.self_attention(qkv, 'xla')
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 100)


def test_on_cpu_auto_means_plain_xla():
    assert attention.pick_implementation('auto', jnp.dtype('bfloat16'), 64) == 'xla'
    assert attention.pick_implementation('cudnn', jnp.dtype('bfloat16'), 64) == 'cudnn'
    with pytest.raises(ValueError, match='attention must be one of'):
        attention.pick_implementation('flash', jnp.dtype('bfloat16'), 64)


def test_softmax_and_its_written_out_gradient_are_those_of_jax():
    logits, probe = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 5), scale=5).astype(np.float32))
    np.testing.assert_allclose(attention.softmax(logits), jax.nn.softmax(logits), rtol=1e-5)
    ours, theirs = (jax.grad(lambda x, f=f: (f(x) * probe).sum())(logits) for f in (attention.softmax, jax.nn.softmax))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_softmax_stores_its_result_and_nothing_else():
    _, backward = jax.vjp(attention.softmax, jnp.ones((2, 3)))
    assert [leaf.shape for leaf in jax.tree.leaves(backward)] == [(2, 3)]

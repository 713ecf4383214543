from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from avmae_jax.ops import attention
from avmae_jax.parallel.mesh import make_mesh
from avmae_jax.parallel.rules import on_mesh


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


def pick(implementation='auto', num_tokens=2000, head_width=64):
    return attention.pick_implementation(implementation, jnp.dtype('bfloat16'), num_tokens, head_width)


def test_on_cpu_auto_means_plain_xla_and_blockwise_for_long_sequences():
    assert pick(num_tokens=300) == 'xla'
    assert pick() == 'blockwise'
    assert pick('cudnn') == 'cudnn'
    with pytest.raises(ValueError, match='attention must be one of'):
        pick('flash')


class Device(NamedTuple):
    device_kind: str


def devices_of(kind: str):
    mesh = jax.sharding.AbstractMesh((1,), ('data',), axis_types=(AxisType.Auto,), abstract_device=Device(kind))
    return jax.sharding.use_abstract_mesh(mesh)


def test_it_is_settled_by_the_devices_that_are_compiled_for(monkeypatch):
    with devices_of('TPU v5 lite'):
        assert pick() == 'splash'
        assert pick(num_tokens=300) == pick(head_width=256) == pick('xla') == 'xla'
    for installed in (True, False):
        monkeypatch.setattr(attention, 'cudnn_is_installed', lambda installed=installed: installed)
        with devices_of('NVIDIA H200'):  # Which is not here: a plan.
            assert pick() == ('cudnn' if installed else 'xla')
            assert attention.pick_implementation('auto', jnp.dtype('float32'), 300, 64) == 'xla'
    with devices_of('cpu'):
        assert pick() == 'blockwise'


def value_and_gradient(implementation, qkv, probe):
    def loss(x):
        out = attention.self_attention(x, implementation)
        return (out * probe).sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return out, gradient


@pytest.mark.parametrize(('num_tokens', 'head_width'), [(1, 64), (130, 16), (384, 80)])
@pytest.mark.parametrize('implementation', ['blockwise', 'splash'])
def test_other_kernels_compute_what_plain_attention_computes_and_so_do_their_gradients(
    implementation, num_tokens, head_width, monkeypatch
):
    monkeypatch.setattr(attention, 'BLOCK_QUERIES', 100)  # 2 x 65 and 4 x 96, and of 130 none is filled up.
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(2, num_tokens, 2, 3, head_width)).astype(np.float32))
    probe = jnp.asarray(np.random.default_rng(1).normal(size=(2, num_tokens, 2, head_width)).astype(np.float32))
    for ours, plain in zip(
        value_and_gradient(implementation, qkv, probe), value_and_gradient('xla', qkv, probe), strict=True
    ):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.mark.parametrize('block', [3, 10, 11, 50])
def test_blocks_of_queries_may_have_any_length(block, monkeypatch):
    qkv = jax.random.normal(jax.random.key(0), (1, 11, 2, 3, 4))
    probe = jax.random.normal(jax.random.key(1), (1, 11, 2, 4))
    monkeypatch.setattr(attention, 'BLOCK_QUERIES', block)
    for ours, plain in zip(
        value_and_gradient('blockwise', qkv, probe), value_and_gradient('xla', qkv, probe), strict=True
    ):
        np.testing.assert_allclose(ours, plain, atol=2e-6)


def test_blockwise_in_bfloat16_is_as_near_to_float32_as_plain_attention_is():
    qkv = jax.random.normal(jax.random.key(0), (2, 50, 2, 3, 24))
    exact = attention.self_attention(qkv, 'xla')
    plain, ours = (attention.self_attention(qkv.astype(jnp.bfloat16), name) for name in ('xla', 'blockwise'))
    assert ours.dtype == jnp.bfloat16
    assert jnp.abs(ours - exact).max() <= 1.5 * jnp.abs(plain - exact).max()


def test_blockwise_keeps_no_logits_for_the_gradient():
    qkv = jnp.ones((1, 64, 1, 3, 4))
    _, backward = jax.vjp(lambda x: attention.self_attention(x, 'blockwise'), qkv)
    assert max(leaf.size for leaf in jax.tree.leaves(backward)) <= qkv.size


@pytest.mark.parametrize('num_tokens', [4, 5])
def test_a_token_that_makes_a_sequence_even_for_cudnn_is_seen_by_nobody(num_tokens):
    qkv, probe = jax.random.normal(jax.random.key(0), (2, 2, num_tokens, 3, 3, 8))
    probe = probe[:, :, :, 0]

    def both(function):
        return jax.value_and_grad(lambda x: (function(x) * probe).sum())(qkv)

    for ours, plain in zip(
        both(lambda x: attention.of_jax(x, 'xla')), both(lambda x: attention.self_attention(x, 'xla')), strict=True
    ):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_each_device_runs_the_kernel_on_its_rows_and_heads():
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(4, 20, 2, 3, 8)).astype(np.float32))
    mesh = make_mesh(data=4, model=2)
    rows_and_heads = NamedSharding(mesh, PartitionSpec('data', None, 'model'))
    seen = []

    def kernel(part):
        seen.append(part.shape)
        return attention.self_attention(part, 'xla')

    out = jax.jit(
        on_mesh(lambda x: attention.on_each_device(kernel, x), mesh), in_shardings=rows_and_heads
    )(jax.device_put(qkv, rows_and_heads))  # fmt: skip
    assert seen == [(1, 20, 1, 3, 8)]
    assert out.sharding.is_equivalent_to(rows_and_heads, 4)
    np.testing.assert_allclose(out, attention.self_attention(qkv, 'xla'), atol=1e-6)


def test_softmax_and_its_written_out_gradient_are_those_of_jax():
    logits, probe = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 5), scale=5).astype(np.float32))
    np.testing.assert_allclose(attention.softmax(logits), jax.nn.softmax(logits), rtol=1e-5)
    ours, theirs = (jax.grad(lambda x, f=f: (f(x) * probe).sum())(logits) for f in (attention.softmax, jax.nn.softmax))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_softmax_stores_its_result_and_nothing_else():
    _, backward = jax.vjp(attention.softmax, jnp.ones((2, 3)))
    assert [leaf.shape for leaf in jax.tree.leaves(backward)] == [(2, 3)]

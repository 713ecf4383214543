"""Dot-product attention: plain, head by head, and the fused kernel of the backend where it applies."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float

from avmae_jax.ops.dims import split_along
from avmae_jax.structs import Array

IMPLEMENTATIONS = ('auto', 'xla', 'blockwise', 'cudnn', 'splash')
LANES = 128  # Of a TPU; sequences are padded to a multiple.
SPLASH_BLOCKS = (1024, 512, 384, 256, 128)
SPLASH_TOKENS = 768  # From here on splash takes over on TPU, see docs/performance.md.
BLOCKWISE_TOKENS = 512  # And blockwise on CPU.
BLOCK_QUERIES = 1024  # At a time, of one head.


def pick_implementation(implementation: str, dtype: jnp.dtype, num_tokens: int, head_width: int) -> str:
    """Settles 'auto' by the devices that the step is compiled for.

    cuDNN's fused kernel on NVIDIA GPUs in half precision, for long sequences splash on TPU and blockwise on CPU, plain
    XLA otherwise.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'attention must be one of {IMPLEMENTATIONS}; got {implementation!r}.')
    if implementation != 'auto':
        return implementation
    platform = target_platform()
    if platform == 'tpu':
        return 'splash' if num_tokens >= SPLASH_TOKENS and head_width <= LANES else 'xla'
    if platform == 'cpu':
        return 'blockwise' if num_tokens >= BLOCKWISE_TOKENS else 'xla'
    if platform != 'gpu' or not suits_cudnn(dtype, head_width):
        return 'xla'
    if jax.default_backend() != 'gpu':  # A plan, which asks for GPUs that have it.
        return 'cudnn' if cudnn_is_installed() else 'xla'
    capability = re.fullmatch(r'(\d+)\.\d+', str(getattr(jax.local_devices()[0], 'compute_capability', '')))
    return 'cudnn' if capability and int(capability[1]) >= 8 else 'xla'  # Of AMD's it is no number.


def suits_cudnn(dtype: jnp.dtype | str, head_width: int) -> bool:
    """Whether the kernel takes such heads: half precision, and a width that is a multiple of 8 up to 128."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= 128


def cudnn_is_installed() -> bool:
    """Whether its library is here, without which nothing compiles that uses it."""
    try:
        return importlib.util.find_spec('nvidia.cudnn') is not None
    except ModuleNotFoundError:
        return False


def target_platform() -> str:
    """Of the mesh that a function is compiled for, which may be of devices that are not here; or of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind  # 'cpu', 'TPU v5 lite', 'NVIDIA H200'; jax 0.10.0 has no `platform` here.
    return 'cpu' if kind == 'cpu' else 'tpu' if kind.startswith('TPU') else 'gpu'


@jax.custom_vjp
def softmax(logits: Float[Array, '*rows m']) -> Float[Array, '*rows m']:
    """Softmax over the last axis; its gradient needs nothing stored but the result."""
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _softmax_forward(logits):
    weights = softmax(logits)
    return weights, weights


def _softmax_backward(weights, gradient):
    scaled = gradient * weights
    return (scaled - weights * jnp.sum(scaled, axis=-1, keepdims=True),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def self_attention(qkv: Float[Array, 'b n h 3 e'], implementation: str = 'auto') -> Float[Array, 'b n h e']:
    """Every token looks at every token; no mask, because hidden tokens are simply not there."""
    picked = pick_implementation(implementation, qkv.dtype, qkv.shape[1], qkv.shape[-1])
    if picked == 'cudnn':
        return of_jax(qkv, 'cudnn')
    if picked == 'splash':
        return on_each_device(_splash, qkv)
    if picked == 'blockwise':
        return on_each_device(_blockwise, qkv)
    # One transposition for all three, and, in the gradient, one concatenation.
    query, key, value = (part[0] for part in jax.lax.split(qkv.transpose(3, 0, 2, 1, 4), (1, 1, 1), axis=0))
    # Logits and their normalisation in float32: in bfloat16 neighbouring logits become equal and sums drift.
    logits = jnp.einsum('bhne,bhme->bhnm', query, key, preferred_element_type=jnp.float32)
    weights = softmax(logits * qkv.shape[-1] ** -0.5).astype(value.dtype)
    return jnp.einsum('bhnm,bhme->bhne', weights, value).transpose(0, 2, 1, 3)


def _blockwise(qkv: Float[Array, 'b n h 3 e']) -> Float[Array, 'b n h e']:
    """One head after the other, and in it BLOCK_QUERIES queries: logits stay in a CPU's cache and are not kept.

    The gradient computes them once more, as FlashAttention does (Dao et al. 2022, algorithm 4).
    """
    rows, num_tokens, num_heads = qkv.shape[:3]
    heads = qkv.transpose(0, 2, 3, 1, 4).reshape(rows * num_heads, 3, num_tokens, -1)
    out = jax.lax.map(lambda head: _one_head(head, BLOCK_QUERIES), heads)
    return out.reshape(rows, num_heads, num_tokens, -1).transpose(0, 2, 1, 3)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _one_head(qkv: Float[Array, '3 n e'], block: int) -> Float[Array, 'n e']:
    return _one_head_forward(qkv, block)[0]


def _one_head_forward(qkv, block):
    query, key, value = qkv

    def of_some(queries):
        logits = _product(queries, key.T)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return _product(weights.astype(value.dtype), value) / total, largest + jnp.log(total)

    blocks = jax.lax.map(of_some, _in_blocks(query * query.shape[-1] ** -0.5, block))
    out, log_total = (x.reshape(-1, x.shape[-1])[: query.shape[0]] for x in blocks)
    out = out.astype(value.dtype)
    return out, (qkv, out, log_total)


def _one_head_backward(block, kept, gradient):
    (query, key, value), out, log_total = kept
    scale = query.shape[-1] ** -0.5
    mean = jnp.sum(gradient * out, axis=-1, keepdims=True, dtype=jnp.float32)

    def of_some(sums, parts):
        queries, gradients, log_totals, means = parts
        weights = jnp.exp(_product(queries, key.T) - log_totals)
        of_logits = (weights * (_product(gradients, value.T) - means)).astype(key.dtype)
        of_key, of_value = sums
        sums = of_key + _product(of_logits.T, queries), of_value + _product(weights.astype(value.dtype).T, gradients)
        return sums, _product(of_logits, key)

    zeros = jnp.zeros(key.shape, jnp.float32)
    # Queries that fill up the last block have a gradient of zero, and add nothing.
    parts = tuple(_in_blocks(x, block) for x in (query * scale, gradient, log_total, mean))
    (of_key, of_value), of_query = jax.lax.scan(of_some, (zeros, zeros), parts)
    of_query = of_query.reshape(-1, query.shape[-1])[: query.shape[0]] * scale
    return (jnp.stack([of_query, of_key, of_value]).astype(query.dtype),)


_one_head.defvjp(_one_head_forward, _one_head_backward)

_product = partial(jnp.matmul, preferred_element_type=jnp.float32)


def _in_blocks(x: Float[Array, 'n e'], block: int) -> Float[Array, 'blocks block e']:
    """Of equal size, at most `block` rows each; the last is filled up with zeros."""
    num_blocks = -(-x.shape[0] // block)
    rows = -(-x.shape[0] // num_blocks)
    return jnp.pad(x, ((0, num_blocks * rows - x.shape[0]), (0, 0))).reshape(num_blocks, rows, -1)


def of_jax(qkv: Float[Array, 'b n h 3 e'], implementation: Literal['cudnn', 'xla']) -> Float[Array, 'b n h e']:
    """jax's own attention. cuDNN's trains on sequences of even length alone, so an odd one gets a token nobody sees."""
    num_tokens = qkv.shape[1]
    odd = num_tokens % 2
    query, key, value = (jnp.pad(qkv[:, :, :, i], ((0, 0), (0, odd), (0, 0), (0, 0))) for i in range(3))
    seen = jnp.full(qkv.shape[0], num_tokens, jnp.int32) if odd else None
    out = jax.nn.dot_product_attention(
        query, key, value, query_seq_lengths=seen, key_value_seq_lengths=seen, implementation=implementation
    )
    return out[:, :num_tokens]


def _splash(qkv: Float[Array, 'b n h 3 e']) -> Float[Array, 'b n h e']:
    """jax's kernel for TPU, which keeps no logits: memory grows with the tokens and not with their square.

    Off TPU the kernel is interpreted, which is slow and there for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    num_tokens, num_heads, head_width = qkv.shape[1], qkv.shape[2], qkv.shape[-1]
    padding = -num_tokens % LANES
    length = num_tokens + padding
    block = max(size for size in SPLASH_BLOCKS if length % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    # Nothing is masked; what was padded is a segment by itself.
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, length))] * num_heads)
    kernel = splash_attention_kernel.make_splash_mha(
        mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=target_platform() != 'tpu'
    )
    segments = splash_attention_kernel.SegmentIds(*[(jnp.arange(length) >= num_tokens).astype(jnp.int32)] * 2)
    query, key, value = jnp.pad(qkv, ((0, 0), (0, padding), *[(0, 0)] * 3)).transpose(3, 0, 2, 1, 4)
    scaled = (query * head_width**-0.5).astype(query.dtype)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(scaled, key, value, segments)
    return out.transpose(0, 2, 1, 3)[:, :num_tokens]


def on_each_device(function: Callable[[Array], Array], qkv: Float[Array, 'b n h 3 e']) -> Float[Array, 'b n h e']:
    """A kernel knows nothing of meshes: each device runs it on its rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(qkv)
    spec = split_along(qkv.shape, ('batch', '', 'heads', '', ''), mesh)
    return jax.shard_map(function, in_specs=spec, out_specs=PartitionSpec(*spec[:3]), check_vma=False)(qkv)

"""Dot-product attention: plain, and the fused kernel of the backend where it applies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.structs import Array

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn')


def pick_implementation(implementation: str, dtype: jnp.dtype, head_width: int) -> str:
    """Settles 'auto': cuDNN's fused kernel on NVIDIA GPUs in half precision, plain XLA everywhere else."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'attention must be one of {IMPLEMENTATIONS}; got {implementation!r}.')
    if implementation != 'auto':
        return implementation
    half = dtype in (jnp.bfloat16, jnp.float16)
    if not half or head_width % 8 or head_width > 128 or jax.default_backend() != 'gpu':
        return 'xla'
    capability = getattr(jax.local_devices()[0], 'compute_capability', None)  # 'None' on AMD.
    return 'cudnn' if capability and float(capability) >= 8.0 else 'xla'


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
    if pick_implementation(implementation, qkv.dtype, qkv.shape[-1]) == 'cudnn':
        query, key, value = (qkv[:, :, :, i] for i in range(3))
        return jax.nn.dot_product_attention(query, key, value, implementation='cudnn')
    # One transposition for all three, and, in the gradient, one concatenation.
    query, key, value = (part[0] for part in jax.lax.split(qkv.transpose(3, 0, 2, 1, 4), (1, 1, 1), axis=0))
    # Logits and their normalisation in float32: in bfloat16 neighbouring logits become equal and sums drift.
    logits = jnp.einsum('bhne,bhme->bhnm', query, key, preferred_element_type=jnp.float32)
    weights = softmax(logits * qkv.shape[-1] ** -0.5).astype(value.dtype)
    return jnp.einsum('bhnm,bhme->bhne', weights, value).transpose(0, 2, 1, 3)

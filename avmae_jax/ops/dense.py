"""x @ kernel + bias, layer normalisation and GELU, with their gradients written out.

What autodiff derives is right but costs more than it must: it multiplies the transposed weight gradient and turns it
around, rounds it to the precision of the activations before it is added up over devices, takes a dozen passes over
the tokens for a norm, and stores half a dozen arrays for a GELU.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.structs import Array

NORM_EPSILON = 1e-6


def last_axis(vector: Float[Array, 'd'], like: Float[Array, '*rows d']) -> Float[Array, '*ones d']:
    """A vector with as many axes as `like`; broadcasting is written out here, so that a wrong rank is an error."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def rows_of(x: Float[Array, '*rows d']) -> Float[Array, 'r d']:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def spread(x: Float[Array, '*ones d'], shape: tuple[Any, ...], dtype: str) -> Float[Array, '*rows d']:
    """The same for every row, in `dtype`; the gradient is summed over rows, and over devices, in float32."""
    return jnp.broadcast_to(x, shape).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(
    x: Float[Array, '*rows d'], kernel: Float[Array, 'd e'], bias: Float[Array, 'e'] | None, dtype: str
) -> Float[Array, '*rows e']:
    """x @ kernel + bias in `dtype`; the gradients of kernel and bias come out in float32."""
    y = jnp.dot(x.astype(dtype), kernel.astype(dtype))
    return y if bias is None else y + last_axis(bias.astype(dtype), y)


def _dense_forward(x, kernel, bias, dtype):
    return dense(x, kernel, bias, dtype), (x, kernel, bias)


def _dense_backward(dtype, residuals, gradient):
    x, kernel, bias = residuals
    over_columns = (((gradient.ndim - 1,), (1,)), ((), ()))
    x_gradient = jax.lax.dot_general(gradient, kernel.astype(dtype), over_columns).astype(x.dtype)
    # x' g, not (g' x)': the result lies as the kernel lies. Accumulated, and then summed over devices, in float32.
    rows = rows_of(gradient)
    over_rows = (((0,), (0,)), ((), ()))
    kernel_gradient = jax.lax.dot_general(rows_of(x).astype(dtype), rows, over_rows, preferred_element_type=jnp.float32)
    bias_gradient = None if bias is None else jnp.sum(rows, axis=0, dtype=jnp.float32).astype(bias.dtype)
    return x_gradient, kernel_gradient.astype(kernel.dtype), bias_gradient


dense.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: Float[Array, '*rows d'],
    scale: Float[Array, 'd'],
    bias: Float[Array, 'd'],
    dtype: str,
    epsilon: float | int = NORM_EPSILON,
) -> Float[Array, '*rows d']:
    """Layer normalisation with statistics in float32 and the result in `dtype`; `epsilon` is added to the variance."""
    return _layer_norm_forward(x, scale, bias, dtype, epsilon)[0]


def _layer_norm_forward(x, scale, bias, dtype, epsilon):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (wide - mean) * inverse * last_axis(scale, x) + last_axis(bias, x)
    return y.astype(dtype), (x, scale, mean, inverse)


def _layer_norm_backward(dtype, epsilon, residuals, gradient):
    x, scale, mean, inverse = residuals
    gradient = gradient.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    scaled = gradient * last_axis(scale, x)
    along = jnp.mean(scaled * normed, axis=-1, keepdims=True)
    level = jnp.mean(scaled, axis=-1, keepdims=True)
    x_gradient = (scaled - level - normed * along) * inverse
    scale_gradient = jnp.sum(rows_of(gradient * normed), axis=0)
    return x_gradient.astype(x.dtype), scale_gradient, jnp.sum(rows_of(gradient), axis=0)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


GELU_SCALE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: Float[Array, '*rows d']) -> Float[Array, '*rows d']:
    """GELU in its tanh form, computed in float32; its gradient needs nothing stored but `x`."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + _gelu_tanh(wide))).astype(x.dtype)


def _gelu_tanh(x: Float[Array, '*rows d']) -> Float[Array, '*rows d']:
    return jnp.tanh(GELU_SCALE * (x + GELU_CUBE * x * x * x))


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, gradient):
    wide = x.astype(jnp.float32)
    tanh = _gelu_tanh(wide)
    inner = GELU_SCALE * (1 + 3 * GELU_CUBE * wide * wide)
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * inner
    return ((gradient * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def exact_gelu(x: Float[Array, '*rows d']) -> Float[Array, '*rows d']:
    """x times the normal distribution function of x, as PyTorch's GELU; else as `gelu`."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: Float[Array, '*rows d']) -> Float[Array, '*rows d']:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _exact_gelu_forward(x):
    return exact_gelu(x), x


def _exact_gelu_backward(x, gradient):
    wide = x.astype(jnp.float32)
    slope = _normal_cdf(wide) + wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return ((gradient * slope).astype(x.dtype),)


exact_gelu.defvjp(_exact_gelu_forward, _exact_gelu_backward)

GELUS = {'tanh': gelu, 'exact': exact_gelu}

"""Losses as functions of arrays: element-wise where they can be, reduction by the caller."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.structs import Array

EPSILON = 1e-8  # Keeps a batch in which nothing counts at a loss of zero (Scenic `av_mae`).


def squared_error(predicted: Float[Array, 'b n v'], target: Float[Array, 'b n v']) -> Float[Array, 'b n']:
    """Squared distance of each token's values, in float32 whatever the model computes in."""
    difference = predicted.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.sum(jnp.square(difference), axis=-1)


def masked_mean(values: Float[Array, 'b n'], weight: Float[Array, 'b n']) -> Float[Array, '']:
    """Mean over what counts; zero where nothing does."""
    return jnp.sum(values * weight) / (jnp.sum(weight) + EPSILON)

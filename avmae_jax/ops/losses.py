"""Losses as functions of arrays: element-wise where they can be, reduction by the caller."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.structs import Array

EPSILON = 1e-8  # Keeps a batch in which nothing counts at a loss of zero (Scenic `av_mae`).


def squared_error(predicted: Float[Array, 'b n v'], target: Float[Array, 'b n v']) -> Float[Array, 'b n']:
    """Squared distance of each token's values, in float32 whatever the model computes in."""
    difference = predicted.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.sum(jnp.square(difference), axis=-1)


def masked_mean(values: Float[Array, '*shape'], weight: Float[Array, '*shape']) -> Float[Array, '']:
    """Mean over what counts; zero where nothing does."""
    return jnp.sum(values * weight) / (jnp.sum(weight) + EPSILON)


def smooth_labels(labels: Float[Array, 'b c'], smoothing: int | float) -> Float[Array, 'b c']:
    """Takes a share of every label and spreads it over the classes: y * (1 - smoothing) + smoothing / classes."""
    return labels * (1 - smoothing) + smoothing / labels.shape[-1]


def softmax_cross_entropy(logits: Float[Array, 'b c'], labels: Float[Array, 'b c']) -> Float[Array, 'b']:
    """One class out of several; labels are probabilities."""
    return -jnp.sum(labels.astype(jnp.float32) * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def sigmoid_cross_entropy(logits: Float[Array, 'b c'], labels: Float[Array, 'b c']) -> Float[Array, 'b']:
    """Any number of classes, each by itself, summed over the classes (as in Scenic); labels lie in [0, 1]."""
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    # -y log p - (1 - y) log(1 - p), where the large parts of both cancel before they can overflow.
    return jnp.sum(jax.nn.softplus(logits) - labels * logits, axis=-1)

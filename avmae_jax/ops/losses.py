"""Losses as functions of arrays: element-wise where they can be, reduction by the caller."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from avmae_jax.ops.dims import constrain
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


def info_nce(
    queries: Float[Array, 'b d'],
    keys: Float[Array, 'b d'],
    *,
    temperature: Float[Array, ''] | float,
    counts: Bool[Array, 'b'] | None = None,
    chunk_size: int = 1024,
) -> Float[Array, 'b']:
    """-log of the share that key i has among all keys, for query i: the keys of the whole batch are its negatives.

    The batch is that of all devices. Keys go round in chunks, so no device holds all keys or all similarities, forward
    or backward. Gradients that are accumulated over parts of a batch know the negatives of their part alone.

    Args:
      queries, keys: of length 1, if similarity is to be that of directions. For both directions call it both ways.
      temperature: what similarities are divided by; may be learned.
      counts: keys that may be negatives, such as those of rows that have the modality; None: all.
      chunk_size: keys that are looked at at a time, about.
    """
    batch = len(keys)
    num_chunks = next(n for n in range(-(-batch // chunk_size), batch + 1) if batch % n == 0)
    queries = constrain(queries.astype(jnp.float32) / temperature, 'batch')
    keys = constrain(keys.astype(jnp.float32), 'batch')
    own = jnp.sum(queries * keys, axis=-1)
    row = jnp.arange(batch)

    @jax.checkpoint
    def add(so_far, chunk):
        """The logarithm of a sum, kept as its largest term and what it is multiplied by."""
        largest, factor = so_far
        some_keys, number, counted = chunk
        # In float32, bfloat16 units and all: the likest keys are those that must be told apart.
        logits = jnp.einsum('bd,cd->bc', queries, constrain(some_keys, ''), precision='highest')
        logits = jnp.where(counted[None] & (number[None] != row[:, None]), constrain(logits, 'batch'), -jnp.inf)
        now = jax.lax.stop_gradient(jnp.maximum(largest, jnp.max(logits, axis=-1)))
        factor = factor * jnp.exp(largest - now) + jnp.sum(jnp.exp(logits - now[:, None]), axis=-1)
        return (now, factor), None

    # Chunk i has every num_chunks-th key, so that each device gives some of its own to every chunk.
    chunks = jax.tree.map(
        lambda x: x.reshape(batch // num_chunks, num_chunks, *x.shape[1:]).swapaxes(0, 1),
        (keys, row, jnp.ones(batch, bool) if counts is None else counts),
    )
    constant = jax.lax.stop_gradient(own)
    (largest, factor), _ = jax.lax.scan(add, (constant, jnp.exp(own - constant)), chunks)
    return largest + jnp.log(factor) - own

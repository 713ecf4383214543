"""Chance, row by row: what is drawn for a row is a function of its seed alone, on any number of devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt32

from avmae_jax.structs import Array

# What is drawn from a row's key for which purpose. A number stays what it is, so that runs are repeated as they were.
FLIP, COLOR, SPEC_MASKS, TIME_SHIFT, LOST_MODALITY, MIXUP, CUTMIX, MASKS, RAND_AUGMENT, ERASING = range(10)


def row_keys(seed: UInt32[Array, 'b 2'], purpose: int) -> jax.Array:
    """A key for each row of a batch (`Batch.seed`) and purpose."""
    # The implementation is named, so that a run with another default generator draws the same.
    keys = jax.random.wrap_key_data(jnp.asarray(seed), impl='threefry2x32')
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


def uniform(seed: UInt32[Array, 'b 2'], purpose: int, *shape: int) -> Float[Array, 'b *shape']:
    """Numbers in [0, 1) for each row."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(row_keys(seed, purpose))


def per_row(values: Array, like: Array) -> Array:
    """One value for each row in a shape that goes with `like`, whose rows have any number of axes."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))

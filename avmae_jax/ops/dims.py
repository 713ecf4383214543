"""Names for the dimensions of activations, and the mesh axes they are split over.

Whoever computes something says what its dimensions are called; which devices there are is known to whoever compiles it
(`parallel/rules.py`: `on_mesh`). Without a mesh nothing happens, so a model read on a laptop is the model of the pod.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Shaped

from avmae_jax.structs import Array

# Dimension -> mesh axes, see parallel/mesh.py. What is not here, or does not divide, each device has whole.
SPLIT: Mapping[str, tuple[str, ...]] = {
    'batch': ('replica', 'data'),
    'heads': ('model',),  # Columns of queries, keys and values, head by head.
    'mlp': ('model',),
}


def split_along(shape: Sequence[int], names: Sequence[str], mesh: AbstractMesh) -> PartitionSpec:
    """Where an array whose dimensions have these names lies on a mesh; '' for a dimension that is never split."""
    axes = [SPLIT.get(name, ()) for name in names]
    fits = [size % math.prod(mesh.shape[a] for a in axis) == 0 for size, axis in zip(shape, axes, strict=True)]
    return PartitionSpec(*(axis if axis and fit else None for axis, fit in zip(axes, fits, strict=True)))


def constrain(x: Shaped[Array, '*shape'], first: str, last: str = '') -> Shaped[Array, '*shape']:
    """Says how the first and the last dimension of an activation are called; those between are never split.

    Without it the partitioner is free to split what it likes. From parameters that are split over the devices which
    share the batch, it made products in parts that every layer summed up over the tokens of the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    names = [first, *[''] * (x.ndim - 2), last][: x.ndim]
    return jax.lax.with_sharding_constraint(x, split_along(x.shape, names, mesh))

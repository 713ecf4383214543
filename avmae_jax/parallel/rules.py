"""Which dimension of which parameter lies on which mesh axis.

Two tables. `DIMENSIONS` names the dimensions of a parameter by its path: models hold plain arrays and know no
mesh. `RULES` says for each rule set which named dimension is split over which mesh axis. Optimiser moments and
moving averages have the paths of their parameters at the end of their own, so that one table serves the whole state.
Activations have a table of their own, the same under all rule sets (`ops/dims.py`): `on_mesh` brings it in.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from avmae_jax.parallel import mesh as mesh_lib

# First match wins. A scanned stack has one more dimension in front, which `dimension_names` calls 'layer'.
DIMENSIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r'attention/qkv/kernel$', ('width', 'heads')),
    (r'attention/qkv/bias$', ('heads',)),
    (r'attention/out/kernel$', ('heads', 'width')),
    (r'mlp/up/kernel$', ('width', 'mlp')),
    (r'mlp/up/bias$', ('mlp',)),
    (r'mlp/down/kernel$', ('mlp', 'width')),
    (r'embedding/kernel$', ('values', 'width')),
    (r'output_[a-z]+/kernel$', ('width', 'values')),
    (r'output_[a-z]+/bias$', ('values',)),
    (r'projection_[a-z]+/kernel$', ('encoder_width', 'width')),
    (r'representation/kernel$', ('width', 'representation')),
    (r'representation/bias$', ('representation',)),
    (r'head_[^/]+/kernel$', ('width', 'classes')),
    (r'head_[^/]+/bias$', ('classes',)),
    (r'bottlenecks$', ('token', 'width')),
    (r'(bias|scale|mask_token|modality_token|class_token|distillation_token)$', ('width',)),
    (r'positions[^/]*/(table|time|space)$', ('token', 'width')),
)

# Dimension name -> mesh axis, in the order in which they are tried: a parameter is split once over an axis, along
# the first of these dimensions that divides. The widest come first, so that a shard stays a large matrix.
# fsdp splits the state over `data` and gathers each layer where it is used; over `replica` it has copies, of which
# only gradients are exchanged (hybrid sharding: `data` inside a slice or node, `replica` across).
# tensor splits the work on a layer over `model`, by heads and by the middle of the MLP: two sums over tokens a layer,
# and two more backward.
RULES: Mapping[str, Mapping[str, str]] = {
    'replicated': {},
    'fsdp': {'mlp': 'data', 'heads': 'data', 'values': 'data', 'width': 'data', 'encoder_width': 'data'},
    'tensor': {'mlp': 'model', 'heads': 'model'},
    'fsdp_tensor': {'mlp': 'model', 'heads': 'model', 'values': 'data', 'width': 'data', 'encoder_width': 'data'},
}

MIN_SHARD_ELEMENTS = 2**14  # Below this a parameter, or that of a layer, is cheaper to keep whole than to gather.


def path_name(path: tuple[Any, ...]) -> str:
    """'encoder/block_0/mlp/kernel' from the key path that jax.tree_util gives."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def dimension_names(path: str, num_dims: int) -> tuple[str, ...] | None:
    """The names of the dimensions of the parameter at `path`, or None where no row of the table fits."""
    for pattern, names in DIMENSIONS:
        if re.search(pattern, path):
            missing = num_dims - len(names)
            if missing in (0, 1):
                return ('layer',) * missing + names
    return None


def partition_spec(
    path: str, shape: tuple[int, ...], rules: Mapping[str, str], mesh: Mesh, min_elements: int = MIN_SHARD_ELEMENTS
) -> PartitionSpec:
    """Where the parameter at `path` lies under one of `RULES`."""
    if not rules or math.prod(shape) < min_elements:
        return PartitionSpec()
    names = dimension_names(path, len(shape))
    if names is not None and names[0] == 'layer' and math.prod(shape[1:]) < min_elements:
        return PartitionSpec()  # Layers are gathered one by one.
    if names is None:
        logging.warning(
            'No row of DIMENSIONS in parallel/rules.py names the dimensions of %s %s: every device keeps all of it.',
            path,
            shape,
        )
        return PartitionSpec()
    axes: list[str | None] = [None] * len(shape)
    for name, axis in rules.items():
        if name not in names or axis in axes or mesh.shape[axis] == 1:
            continue
        dim = names.index(name)
        if shape[dim] % mesh.shape[axis] == 0:
            axes[dim] = axis
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def state_shardings(state: Any, mesh: Mesh, rules: str, min_elements: int = MIN_SHARD_ELEMENTS) -> Any:
    """A sharding for every array of `state` (arrays or ShapeDtypeStructs), in the same tree."""
    if rules not in RULES:
        raise ValueError(f'parallel.rules={rules!r} is none of {sorted(RULES)}.')
    whole, total = {}, 0

    def sharding(path, leaf):
        nonlocal total
        name, size = path_name(path), math.prod(leaf.shape)
        spec = partition_spec(name, leaf.shape, RULES[rules], mesh, min_elements)
        total += size
        if size >= min_elements and not any(spec):
            whole[name] = leaf.shape
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(sharding, state)
    num_whole = sum(math.prod(shape) for shape in whole.values())
    if num_whole > total / 2 and any(mesh.shape[axis] > 1 for axis in RULES[rules].values()):
        name, shape = max(whole.items(), key=lambda item: math.prod(item[1]))
        logging.warning(
            'parallel.rules=%s keeps %.0f %% of the state whole on every device, such as %s %s: none of its dimensions '
            'that may be split is a multiple of %s. Choose mesh sizes that divide the sizes of the model.',
            rules, 100 * num_whole / total, name, shape, {a: mesh.shape[a] for a in {*RULES[rules].values()}},
        )  # fmt: skip
    return shardings


def on_mesh(function: Callable[..., Any], mesh: Mesh | AbstractMesh) -> Callable[..., Any]:
    """`function`, to be jitted, whose activations lie on the mesh as `ops/dims.py` says."""

    @functools.wraps(function)
    def placed(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return placed


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over all devices that hold different rows; the other dimensions whole."""
    return NamedSharding(mesh, PartitionSpec(mesh_lib.BATCH_AXES))

"""Devices in a grid with named axes: the same three names on a laptop, a GPU node and a pod."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from avmae_jax.ops import dims

# replica: groups that hold a whole copy of the state each (slices, nodes); only gradients cross it.
# data: rows of the batch, and under fsdp the shards of the state within a group.
# model: dimensions of a layer (tensor parallelism); 1 unless a rule set uses it.
AXES = ('replica', 'data', 'model')
BATCH_AXES = dims.SPLIT['batch']


def make_mesh(replica: int = 1, data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; one of the three sizes may be -1: whatever is left.

    Where the devices lie in several TPU slices, `replica` must be a multiple of their number, so that only
    that axis crosses the slow network between them.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _fill_shape({'replica': replica, 'data': data, 'model': model}, len(devices))
    axis_types = (AxisType.Auto,) * len(AXES)
    num_slices = count_slices(devices)
    if num_slices > 1:
        if shape[0] % num_slices:
            raise ValueError(
                f'parallel.replica={shape[0]} must be a multiple of the {num_slices} slices the devices lie in.'
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // num_slices, *shape[1:]), (num_slices, 1, 1), devices=devices
        )
        return Mesh(grid, AXES, axis_types=axis_types)
    return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)


def count_slices(devices: Sequence[Any]) -> int:
    """Of TPUs. Hosts with GPUs are numbered so too; `replica`, the first axis, crosses them as they come in order."""
    return len({getattr(device, 'slice_index', 0) for device in devices if device.platform == 'tpu'}) or 1


def _fill_shape(sizes: dict[str, int], num_devices: int) -> tuple[int, ...]:
    given = ', '.join(f'parallel.{name}={size}' for name, size in sizes.items())
    unknown = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f'Mesh sizes are positive, and one of them may be -1 (the rest); got {given}.')
    if unknown:
        sizes = {**sizes, unknown[0]: num_devices // known}
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(f'{given} must multiply to the {num_devices} devices; set one of them to -1.')
    return tuple(sizes.values())


def layers_within_processes(devices: np.ndarray) -> bool:
    """Whether devices of a mesh that share a layer, along its last axis, are of one process."""
    return all(len({device.process_index for device in group}) == 1 for group in devices.reshape(-1, devices.shape[-1]))

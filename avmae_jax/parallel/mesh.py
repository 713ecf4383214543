"""Devices in a grid with named axes: the same three names on a laptop, a GPU node and a pod."""

from __future__ import annotations

import contextlib
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


def make_mesh(replica: int = 1, data: int = -1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices; one of the three sizes may be -1: whatever is left.

    Where the devices lie in several TPU slices, `replica` must be a multiple of their number, so that only
    that axis crosses the slow network between them. Devices that share a layer, along `model`, are of one process
    where that can be.
    """
    devices = list(jax.devices() if devices is None else devices)
    replica, data, model = _fill_shape({'replica': replica, 'data': data, 'model': model}, len(devices))
    slices = split_slices(devices)
    if replica % len(slices):
        raise ValueError(
            f'parallel.replica={replica} must be a multiple of the {len(slices)} slices the devices lie in.'
        )
    grids = [_grid((replica // len(slices), data, model), each) for each in slices]
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of a slice. jax lays the axes along those of the machine, so that neighbours are neighbours.

    It refuses what would cut an axis of the machine unless it is told to, and then cuts along rows where processes
    have squares.
    """
    for cut in (False, True):
        with contextlib.suppress(NotImplementedError):
            if cut:
                grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            else:
                grid = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices).devices
            if layers_within_processes(grid):
                return grid
    replica, data, model = shape
    own = sum(device.process_index == devices[0].process_index for device in devices)
    if own % model == 0:
        rows = math.gcd(own // model, data)
        if replica % (own // model // rows) == 0:
            inside = (own // model // rows, rows, model)
            across = (replica // inside[0], data // rows, 1)
            return mesh_utils.create_hybrid_device_mesh(inside, across, devices, process_is_granule=True)
    return np.asarray(devices).reshape(shape)


def split_slices(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices by TPU slice. Hosts with GPUs are numbered so too; `replica`, the first axis, crosses them as they
    come in order."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, 'slice_index', 0) if device.platform == 'tpu' else 0, []).append(device)
    return [slices[index] for index in sorted(slices)]


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

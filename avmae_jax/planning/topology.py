"""Machines that are not here, as devices that programs can be compiled for; and how fast they talk to each other."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from jax.experimental import topologies

from avmae_jax.ops.attention import cudnn_is_installed
from avmae_jax.planning import gpus
from avmae_jax.planning.chips import CHIPS, Chip
from avmae_jax.settings import choose_flag

# What libtpu wants to know of a machine with a TPU; without them it looks around, and complains.
LIBTPU_SETTINGS = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # Nothing is run, so that several processes may compile at a time.
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
    'TPU_LOG_DIR': 'disabled',
}
# A v4 has two cores that work as one, as those of later chips do by themselves.
TOPOLOGY_SETTINGS = {'v4': {'chip_config_name': 'megacore'}}

EXAMPLES = 'v5e:4x4, v5e:16x16, v5p:4x4x8, v6e:8x8, h200:8, h200:4x8'
HOP_SECONDS = 1e-6  # From a chip to its neighbour (Austin et al., How to Scale Your Model, 2025, chapter 2).
NETWORK_SECONDS = 20e-6  # From host to host and back; assumed.


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are joined.

    Attributes:
      name: 'v5e:16x16'.
      shape: of one slice: chips along each dimension of its torus; of GPUs hosts, and chips of each.
      num_slices: that are joined by the slower network between hosts.
      devices: one for each chip, to compile for; slice by slice.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    num_slices: int
    devices: tuple[Any, ...]

    @property
    def num_hosts(self) -> int:
        if not self.chip.torus_dims:
            return self.shape[0]
        return max(1, math.ceil(len(self.devices) / self.chip.host_chips))

    @property
    def host_threads(self) -> int:
        """Of each host; smaller machines have their share."""
        chips = len(self.devices) // self.num_hosts
        return round(self.chip.host_cpus * min(1.0, chips / self.chip.host_chips))

    @property
    def num_islands(self) -> int:
        """Groups of chips with links of their own: slices of TPUs, hosts with GPUs."""
        return self.num_slices if self.chip.torus_dims else self.num_hosts

    def apart(self, group: Sequence[Any]) -> bool:
        """Whether some of these devices reach each other over the network between hosts or slices alone."""
        place = 'slice_index' if self.chip.torus_dims else 'process_index'
        return len({getattr(device, place, None) or 0 for device in group}) > 1

    def reach(self, group: Sequence[Any]) -> tuple[float, float]:
        """(bytes/s, seconds): how fast each of a group of devices gets what the others have, and after what delay.

        The links along the dimensions in which the group's members differ are used at once: two where the dimension
        is a ring and the group all of it, one where it is a line. Between slices everything waits for the network, and
        so it does between hosts with GPUs, which a switch joins within a host.
        """
        if self.apart(group):
            return self.chip.network_bandwidth, NETWORK_SECONDS
        if not self.chip.torus_dims:
            return self.chip.link_bandwidth, HOP_SECONDS
        bandwidth, hops = 0.0, 0
        for dim, whole in enumerate(self.shape):
            extent = len({device.coords[dim] for device in group})
            ring = extent == whole and whole % self.chip.wraps_at == 0
            if extent > 1:
                bandwidth += self.chip.link_bandwidth * (2 if ring else 1)
                hops += extent // 2 if ring else extent - 1
        return bandwidth or self.chip.link_bandwidth, HOP_SECONDS * max(hops, 1)


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """'v5e:16x16' -> the chip, and chips along each dimension."""
    found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
    if not found:
        raise ValueError(f'--topology={name!r} is no topology: give a chip and a shape, such as {EXAMPLES}.')
    kind = choose_flag(CHIPS, 'topology', found[1])
    shape = tuple(int(size) for size in found[2].split('x'))
    if min(shape) < 1:
        raise ValueError(f'--topology={name!r}: every size must be at least 1.')
    if not kind.torus_dims:
        if len(shape) > 2 or not 1 <= shape[-1] <= kind.host_chips:
            raise ValueError(
                f'--topology={name!r}: of {found[1]} give chips of one host, such as {found[1]}:{kind.host_chips}, or '
                f'hosts and chips of each, such as {found[1]}:4x{kind.host_chips}; a host has at most '
                f'{kind.host_chips}.'
            )
        return kind, (1, *shape)[-2:]
    if len(shape) != kind.torus_dims:
        raise ValueError(
            f'--topology={name!r}: chips of {found[1]} lie in {kind.torus_dims} dimensions, not {len(shape)}; such as '
            f'{found[1]}:{"x".join(["4"] * kind.torus_dims)}.'
        )
    return kind, shape


def describe(name: str, num_slices: int = 1) -> Topology:
    """The topology of so many TPU slices, or of hosts with GPUs; nothing of it need be here but the compiler.

    Call it before jax uses a device: from then on jax uses the CPU of this machine.
    """
    kind, shape = parse(name)
    if num_slices < 1:
        raise ValueError(f'--num_slices={num_slices} must be at least 1.')
    jax.config.update('jax_platforms', 'cpu')
    if kind.torus_dims:
        platform, settings = 'tpu', _describe_tpu(name, kind, shape, num_slices)
    else:
        platform, settings = 'cuda', _describe_gpu(name, kind, shape, num_slices)
    try:
        found = topologies.get_topology_desc(platform=platform, **settings)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(f'--topology={name!r}: {error}') from error
    return Topology(name, kind, shape, num_slices, tuple(found.devices))


def _describe_tpu(name: str, kind: Chip, shape: tuple[int, ...], num_slices: int) -> dict[str, Any]:
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError("The TPU's compiler is not installed: pip install 'avmae_jax[plan]'.")
    for variable, value in LIBTPU_SETTINGS.items():
        os.environ.setdefault(variable, value)
    more: dict[str, Any] = dict(TOPOLOGY_SETTINGS.get(name.partition(':')[0], {}))
    if num_slices > 1:
        more['num_slices'] = num_slices
    if math.prod(shape) < kind.host_chips:  # As a v5e:1x1: the host has no more.
        more['chips_per_host_bounds'] = (*shape, 1)[:3]
    return {'topology_name': name, **more}


def _describe_gpu(name: str, kind: Chip, shape: tuple[int, ...], num_slices: int) -> dict[str, Any]:
    if num_slices > 1:
        raise ValueError(f'--num_slices={num_slices} is for TPUs; of GPUs write hosts and chips: {name}, {EXAMPLES}.')
    if not gpus.compiler_is_installed():
        raise ValueError("The compiler for NVIDIA GPUs is not installed: pip install 'avmae_jax[cuda]'.")
    if not cudnn_is_installed():
        logging.warning('Attention is planned as plain XLA, not as the kernel of cuDNN: pip install nvidia-cudnn-cu13.')
    hosts, chips = shape
    return {'topology_name': '', 'target_config': gpus.target_config(kind), 'topology': f'1x{hosts}x{chips}'}

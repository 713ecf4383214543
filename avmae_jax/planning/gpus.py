"""NVIDIA's GPUs as XLA's compiler wants to be told of them when none is there."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from avmae_jax.planning.chips import Chip

PLUGINS = ('jax_plugins.xla_cuda13', 'jax_plugins.xla_cuda12')


class Target(NamedTuple):
    """What code is generated for (NVIDIA's data sheets and CUDA C++ Programming Guide, table of compute capabilities).

    Attributes:
      capability: major and minor.
      cores: streaming multiprocessors.
      lanes: float32 units of each.
      shared_memory, block_shared_memory: bytes of each, and what one block may ask for of it.
      cache: bytes of L2.
      clock: GHz, boosted.
    """

    capability: tuple[int, int]
    cores: int
    lanes: int
    shared_memory: int
    block_shared_memory: int
    cache: int
    clock: float


_HOPPER = Target((9, 0), 132, 128, 228 * 1024, 227 * 1024, 50 * 2**20, 1.98)
TARGETS = {'NVIDIA H100 80GB HBM3': _HOPPER, 'NVIDIA H200': _HOPPER}


def compiler_is_installed() -> bool:
    """Whether jax's plugin for CUDA is here; it compiles without a GPU."""
    try:
        return any(importlib.util.find_spec(name) is not None for name in PLUGINS)
    except ModuleNotFoundError:  # No jax_plugins at all.
        return False


def target_config(chip: Chip) -> str:
    """A GpuTargetConfigProto of XLA, as text."""
    target = TARGETS[chip.kind]
    fields = {
        'threads_per_block_limit': 1024,
        'threads_per_warp': 32,
        'threads_per_core_limit': 2048,
        'registers_per_core_limit': 2**16,
        'registers_per_block_limit': 2**16,
        'block_dim_limit_x': 2**31 - 1,
        'block_dim_limit_y': 2**16 - 1,
        'block_dim_limit_z': 2**16 - 1,
        'thread_dim_limit_x': 1024,
        'thread_dim_limit_y': 1024,
        'thread_dim_limit_z': 64,
        'shared_memory_per_block': 48 * 1024,
        'shared_memory_per_block_optin': target.block_shared_memory,
        'shared_memory_per_core': target.shared_memory,
        'core_count': target.cores,
        'fpus_per_core': target.lanes,
        'l2_cache_size': target.cache,
        'clock_rate_ghz': target.clock,
        'memory_bandwidth': int(chip.memory_bandwidth),
        'device_memory_size': int(chip.memory_bytes),
        'name': f'"{chip.kind}"',
    }
    lines = [f'  {name}: {value}' for name, value in fields.items()]
    major, minor = target.capability
    return '\n'.join(
        [
            'gpu_device_info {',
            *lines,
            f'  cuda_compute_capability {{ major: {major} minor: {minor} }}',
            '}',
            'platform_name: "CUDA"',
            'dnn_version_info { major: 9 minor: 10 patch: 0 }',  # The oldest that jax 0.10 takes is 9.8.
            f'device_description_str: "{chip.kind}"',
        ]
    )

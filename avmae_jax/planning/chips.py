"""What the makers say of their chips, and where: the figures that a roofline is drawn with.

All figures are of one chip, not of a core of it. Bandwidths of links are in one direction; makers often state the sum
of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Chip(NamedTuple):
    """Attributes:
    kind: as jax names it, `device.device_kind`.
    memory_bytes: HBM that a program may fill. Of a TPU the compiler keeps some for itself, and says how much is left.
    memory_bandwidth: of HBM, bytes/s.
    flops_per_second: at most, in bfloat16 with float32 sums.
    link_bandwidth: bytes/s of one link to a neighbour, in one direction; of a GPU all it has to the chips of its host.
    torus_dims: dimensions of the torus, with two links each; 0 for a switch, over which each chip reaches every other.
    wraps_at: a dimension of the torus closes to a ring when it is a multiple of this long.
    network_bandwidth: bytes/s between hosts (GPU) or slices (TPU), of one chip's share.
    host_chips: chips of a host.
    host_cpus: hardware threads of a host.
    source: where these figures are from.
    """

    kind: str
    memory_bytes: float
    memory_bandwidth: float
    flops_per_second: float
    link_bandwidth: float
    torus_dims: int
    wraps_at: int
    network_bandwidth: float
    host_chips: int
    host_cpus: int
    source: str


GIB = 2.0**30
GCP = 'cloud.google.com/tpu/docs'

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        'v4': Chip(
            kind='TPU v4',
            memory_bytes=32 * GIB,
            memory_bandwidth=1.2e12,
            flops_per_second=275e12,
            link_bandwidth=50e9,  # 2,400 Gbps over six links.
            torus_dims=3,
            wraps_at=4,
            network_bandwidth=6.25e9,  # Not published; that of v5p, with as many chips a host.
            host_chips=4,
            host_cpus=240,
            source=f'{GCP}/v4; Jouppi et al., ISCA 2023',
        ),
        'v5e': Chip(
            kind='TPU v5 lite',
            memory_bytes=15.75 * GIB,  # Of 16; the compiler's own limit.
            memory_bandwidth=819e9,
            flops_per_second=197e12,
            link_bandwidth=50e9,  # 400 GB/s over four links and both directions.
            torus_dims=2,
            wraps_at=16,
            network_bandwidth=3.125e9,  # 6.4 Tbps a pod of 256.
            host_chips=4,
            host_cpus=112,
            source=f'{GCP}/v5e',
        ),
        'v5p': Chip(
            kind='TPU v5',
            memory_bytes=95 * GIB,
            memory_bandwidth=2765e9,
            flops_per_second=459e12,
            link_bandwidth=100e9,  # 1,200 GB/s over six links and both directions.
            torus_dims=3,
            wraps_at=4,
            network_bandwidth=6.25e9,  # 50 Gbps a chip.
            host_chips=4,
            host_cpus=208,
            source=f'{GCP}/v5p',
        ),
        'v6e': Chip(
            kind='TPU v6 lite',
            memory_bytes=31.25 * GIB,  # Of 32; the compiler's own limit.
            memory_bandwidth=1638e9,
            flops_per_second=918e12,
            link_bandwidth=100e9,  # 800 GB/s over four links and both directions.
            torus_dims=2,
            wraps_at=16,
            network_bandwidth=12.5e9,  # 25.6 Tbps a pod of 256.
            host_chips=4,
            host_cpus=180,
            source=f'{GCP}/v6e',
        ),
        'h100': Chip(
            kind='NVIDIA H100 80GB HBM3',
            memory_bytes=80e9,
            memory_bandwidth=3.35e12,
            flops_per_second=989e12,
            link_bandwidth=450e9,
            torus_dims=0,
            wraps_at=1,
            network_bandwidth=50e9,  # A 400 Gbps adapter for each chip.
            host_chips=8,
            host_cpus=224,
            source='NVIDIA H100 data sheet (SXM, dense); DGX H100 user guide',
        ),
        'h200': Chip(
            kind='NVIDIA H200',
            memory_bytes=141e9,
            memory_bandwidth=4.8e12,
            flops_per_second=989e12,
            link_bandwidth=450e9,
            torus_dims=0,
            wraps_at=1,
            network_bandwidth=50e9,
            host_chips=8,
            host_cpus=224,
            source='NVIDIA H200 data sheet (SXM, dense); DGX H200 user guide',
        ),
    }
)

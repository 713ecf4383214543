"""From a compiled step and the figures of a chip to memory, time and money."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from avmae_jax.planning import hlo
from avmae_jax.planning.topology import Topology

# CPU time of a clip on its way from a shard to the device (docs/performance.md, JPEG): 7.2 ms with 16 frames.
CLIP_CPU_SECONDS, FRAME_CPU_SECONDS = 0.3e-3, 0.43e-3

ASSUMPTIONS = (
    'Matrix products at the peak rate of the chip in bfloat16; no other arithmetic is counted.',
    'HBM at its peak bandwidth; what is fused stays on the chip.',
    'Computing, HBM and those collectives that the compiler runs beside computing hide each other perfectly: the '
    'slowest of the three counts. The other collectives add up.',
    'A collective uses the links along the dimensions of the torus that its devices span, in both directions, and '
    'nothing else is on them; GPUs of a host, their switch; between slices, or hosts with GPUs, the share of a chip in '
    'the network of its host.',
    'The input path keeps up, and nothing is evaluated or saved.',
)


def shard_bytes(tree: Any) -> int:
    """What one device holds of a tree of ShapeDtypeStructs that have shardings."""

    def size(leaf: Any) -> int:
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.dtype(leaf.dtype).itemsize
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on each chip.

    Attributes:
      parameters, optimizer, teacher, batch: what the step is given.
      temporary: activations, gradients and whatever else comes and goes; None where the compiler gave up.
      code: the program.
      wanted: what does not fit, as the compiler says; None where it fits.
      limit: what there is.
      donated: whether the new state takes the place of the old one.
    """

    parameters: int
    optimizer: int
    teacher: int
    batch: int
    temporary: int | None
    code: int
    wanted: float | None
    limit: float | int
    donated: bool

    @property
    def peak(self) -> float | int:
        if self.temporary is None:
            return self.wanted or math.inf
        state = self.parameters + self.optimizer + self.teacher
        return state * (1 if self.donated else 2) + self.batch + self.temporary + self.code

    @property
    def fits(self) -> bool:
        return self.temporary is not None and self.peak <= self.limit


def given_memory(state: Any, batch: Any, limit: float | int) -> Memory:
    """The part of the memory that is known without compiling."""
    return Memory(
        parameters=shard_bytes(state.params),
        optimizer=shard_bytes(state.opt_state),
        teacher=0 if state.teacher is None else shard_bytes(state.teacher),
        batch=shard_bytes(batch),
        temporary=None,
        code=0,
        wanted=None,
        limit=limit,
        donated=True,
    )


def compiled_memory(given: Memory, statistics: Any) -> Memory:
    """The same with what the compiler says of its program, `compiled.memory_analysis()`."""
    state = given.parameters + given.optimizer + given.teacher
    return dataclasses.replace(
        given,
        temporary=int(statistics.temp_size_in_bytes),
        code=int(statistics.generated_code_size_in_bytes),
        donated=statistics.alias_size_in_bytes >= 0.99 * state,  # All but a few scalars.
    )


def wanted_bytes(message: str) -> float | None:
    """Bytes that a program would have needed, out of the complaint of the compiler; None for any other complaint."""
    if 'RESOURCE_EXHAUSTED' not in message and 'Ran out of memory' not in message:
        return None
    units = {'K': 2.0**10, 'M': 2.0**20, 'G': 2.0**30, 'T': 2.0**40}
    found = re.findall(r'(\d+(?:\.\d+)?)([KMGT])', message)
    return max((float(number) * units[unit] for number, unit in found), default=math.inf)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives that are alike.

    Attributes:
      group_size: devices that take part in one.
      times: how often a step runs one.
      array_bytes: of a step, over all of them: see `hlo.Collective`.
      wire_bytes: what each device sends in a step.
      seconds: of a step.
      apart: whether they cross the network between slices of TPUs, or hosts with GPUs.
    """

    kind: str
    dtype: str
    group_size: int
    overlapped: bool
    apart: bool
    times: int
    array_bytes: int
    wire_bytes: float
    seconds: float


def traffic(found: Sequence[hlo.Collective], devices: Sequence[Any], topology: Topology) -> list[Traffic]:
    """Like collectives together, the slowest first.

    Args:
      devices: of the mesh, in its order.
    """
    table: dict[tuple[Any, ...], list[Any]] = {}
    for each in found:
        group = [devices[i] for i in each.group]
        bandwidth, latency = topology.reach(group)
        key = (each.kind, each.dtype, len(group), each.overlapped, topology.apart(group))
        row = table.setdefault(key, [0, 0, 0.0, 0.0])
        for i, value in enumerate((1, each.array_bytes, each.wire_bytes, each.wire_bytes / bandwidth + latency)):
            row[i] += each.times * value
    rows = [Traffic(*key, *row) for key, row in table.items()]
    return sorted(rows, key=lambda row: -row.seconds)


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a step, by what takes them: the least that each can take."""

    compute: float
    memory: float
    overlapped: float
    exposed: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.overlapped) + self.exposed

    @property
    def limit(self) -> str:
        """What a step waits for most."""
        parts = {'compute': self.compute, 'memory': self.memory, 'network': self.overlapped + self.exposed}
        return max(parts, key=lambda name: parts[name])


def step_time(topology: Topology, *, flops: float, memory_bytes: float | int, rows: Sequence[Traffic]) -> Time:
    """The roofline of a step.

    Args:
      flops: that each chip does, those that are done twice counted twice.
      memory_bytes: that each chip moves to and from its HBM.
    """
    return Time(
        compute=flops / topology.chip.flops_per_second,
        memory=memory_bytes / topology.chip.memory_bandwidth,
        overlapped=sum((row.seconds for row in rows if row.overlapped), 0.0),
        exposed=sum((row.seconds for row in rows if not row.overlapped), 0.0),
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """What follows from the time of a step for a whole run.

    Attributes:
      mfu: the share of the chips' peak that the model's own FLOPs take: no step can have more.
      host_clips_per_second: what the input path of each host must deliver.
      host_cores: CPU cores that this keeps busy.
      cost: in the currency of the price; None without one.
    """

    clips_per_second: float
    mfu: float
    host_clips_per_second: float
    host_cores: float
    days: float
    chip_hours: float
    cost: float | None


def whole_run(
    topology: Topology,
    *,
    step_seconds: float,
    batch_size: int,
    num_steps: int,
    step_flops: float,
    clip_cpu_seconds: float,
    price: float | None = None,
) -> Run:
    """Days, chip-hours and cost.

    Args:
      step_flops: of the model, over all chips, each counted once.
      clip_cpu_seconds: see `clip_cpu_seconds`.
      price: of an hour of a chip.
    """
    chips = len(topology.devices)
    clips_per_second = batch_size / step_seconds
    hours = num_steps * step_seconds / 3600
    return Run(
        clips_per_second=clips_per_second,
        mfu=step_flops / (step_seconds * chips * topology.chip.flops_per_second),
        host_clips_per_second=clips_per_second / topology.num_hosts,
        host_cores=clips_per_second / topology.num_hosts * clip_cpu_seconds,
        days=hours / 24,
        chip_hours=hours * chips,
        cost=None if price is None else hours * chips * price,
    )


def clip_cpu_seconds(num_frames: int, views_per_clip: int = 1) -> float:
    """CPU time that one row of a batch costs its host; frames are decoded once for all views of a clip."""
    return (CLIP_CPU_SECONDS + FRAME_CPU_SECONDS * num_frames) / views_per_clip


def by_seconds(time: Time, rows: Sequence[Traffic]) -> Mapping[str, float]:
    """Everything that takes time, by name."""
    parts = {'matrix products': time.compute, 'HBM': time.memory}
    for row in rows:
        name = f'{row.kind} {"beside computing" if row.overlapped else "alone"}'
        parts[name] = parts.get(name, 0.0) + row.seconds
    return parts

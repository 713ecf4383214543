"""A plan: what a step would take on a machine that is not here, as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from avmae_jax.evaluation import drawing
from avmae_jax.evaluation.tables import format_table
from avmae_jax.planning import estimate
from avmae_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run is spread: what a search varies.

    Attributes:
      mesh: axis -> size.
      rules: name of a set of sharding rules.
      accumulate_steps: parts that a batch is worked through in.
      remat: what the backward pass computes again.
    """

    mesh: Mapping[str, int]
    rules: str
    accumulate_steps: int
    remat: str

    def __str__(self) -> str:
        mesh = ' x '.join(f'{axis} {size}' for axis, size in self.mesh.items() if size > 1) or 'one device'
        return f'{self.rules}, {mesh}, accumulate {self.accumulate_steps}, remat {self.remat}'

    def flags(self) -> str:
        """The layout as flags of a command."""
        settings: dict[str, int | str] = {f'parallel.{axis}': size for axis, size in self.mesh.items()}
        settings |= {'parallel.rules': self.rules, 'optimizer.accumulate_steps': self.accumulate_steps}
        settings['model.compute.remat'] = self.remat
        return ' '.join(f'--config.{name}={value}' for name, value in settings.items())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run on a topology.

    Attributes:
      clip_flops: of the model, for one clip in training; by the mathematics.
      chip_flops: that each chip does in a step, with what rematerialisation repeats.
      memory_bytes: that each chip moves to and from its HBM in a step.
      collectives: None where the step does not fit, as all that follows from it.
      gradient_bytes: dtype -> bytes of gradients that are added up over devices.
      compile_seconds: on this machine; None where the state alone is too much to try.
      failure: what the compiler ended with, where that is not the memory.
    """

    title: str
    topology: Topology
    layout: Layout
    batch_size: int
    num_steps: int
    num_parameters: int
    clip_flops: float
    chip_flops: float
    memory: estimate.Memory
    compile_seconds: float | None = None
    memory_bytes: float | int | None = None
    collectives: tuple[estimate.Traffic, ...] | None = None
    gradient_bytes: Mapping[str, int] | None = None
    time: estimate.Time | None = None
    run: estimate.Run | None = None
    failure: str | None = None

    @property
    def verdict(self) -> str:
        """What a step waits for most, or why there is none."""
        if self.failure is not None:
            return 'does not compile'
        return self.time.limit if self.memory.fits and self.time is not None else 'does not fit'

    def to_json(self) -> dict[str, Any]:
        """For programs; bytes, seconds and FLOPs; None for bytes that nobody knows."""
        tree = {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != 'topology'
        }
        topology = self.topology
        tree['topology'] = {
            'name': topology.name,
            'num_slices': topology.num_slices,
            'chips': len(topology.devices),
            'hosts': topology.num_hosts,
            'chip': topology.chip._asdict(),
        }
        known = {name: getattr(self.memory, name) for name in ('wanted', 'peak')}
        tree['memory'] |= {name: size if size and math.isfinite(size) else None for name, size in known.items()}
        tree['memory']['fits'] = self.memory.fits
        if self.time is not None:
            tree['time'] |= {'step': self.time.step, 'limit': self.time.limit}
        tree['assumptions'] = list(estimate.ASSUMPTIONS)
        return tree


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def gib(size: float | int) -> str:
    if not math.isfinite(size):
        return 'unknown'
    return f'{size / 2**30:.2f} GiB' if size >= 2**28 else f'{size / 2**20:.2f} MiB'


def text(plan: Plan) -> str:
    """A plan for a terminal."""
    topology, memory = plan.topology, plan.memory
    slices = f'{topology.num_slices} slices of ' if topology.num_slices > 1 else ''
    lines = [
        f'{plan.title} on {slices}{topology.name}: {len(topology.devices)} chips, {topology.num_hosts} hosts; '
        f'{plan.layout}.',
        f'{plan.num_parameters / 1e6:.1f} M parameters, batch {plan.batch_size}, {plan.num_steps:,} steps, '
        f'{plan.clip_flops / 1e9:.4g} GFLOP a clip. '
        + ('Not compiled.' if plan.compile_seconds is None else f'Compiled in {plan.compile_seconds:.0f} s.'),
        '',
        format_table(_memory_rows(memory)),
        '',
    ]
    if plan.failure is not None:
        return '\n'.join([*lines, f'It does not compile: {plan.failure}'])
    if not memory.fits or plan.time is None or plan.run is None or plan.collectives is None:
        wanted = 'more' if math.isinf(memory.peak) else gib(memory.peak)
        lines.append(f'It does not fit: {wanted} are wanted and {gib(memory.limit)} are there.')
        lines.append(_what_needs_less(plan))
        return '\n'.join(lines)
    if not memory.donated:
        lines.append('The state is not donated: old and new one lie side by side.')
    head = ['collective', 'dtype', 'devices', 'times', 'MiB', 'beside computing', 'network', 'ms']
    table = [
        [row.kind, row.dtype, str(row.group_size), str(row.times), f'{row.array_bytes / 2**20:.1f}',
         'yes' if row.overlapped else 'no', 'between hosts' if row.apart else 'links',
         f'{row.seconds * 1e3:.2f}']
        for row in plan.collectives
    ]  # fmt: skip
    lines += [format_table([head, *table]) if table else 'No collectives.', '']
    summed = ', '.join(f'{gib(size)} in {dtype}' for dtype, size in (plan.gradient_bytes or {}).items())
    lines.append(f'Gradients added up over devices in a step: {summed or "none"}.')
    time, run = plan.time, plan.run
    lines += [
        f'HBM traffic {gib(plan.memory_bytes or 0)}, {plan.chip_flops / 1e12:.3g} TFLOP a chip and step.',
        f'A step takes at least {time.step * 1e3:.1f} ms: matrix products {time.compute * 1e3:.1f}, HBM '
        f'{time.memory * 1e3:.1f}, collectives beside them {time.overlapped * 1e3:.1f}, alone '
        f'{time.exposed * 1e3:.1f}; the limit is {time.limit}.',
        f'At most {run.clips_per_second:,.0f} clips/s, MFU {100 * run.mfu:.0f} %. Each host must feed '
        f'{run.host_clips_per_second:,.0f} clips/s, about {run.host_cores:.1f} CPU cores of its '
        f'{topology.host_threads} threads.',
        f'The whole run: at least {run.days:.2f} days, {run.chip_hours:,.0f} chip-hours'
        + (f', {run.cost:,.0f} in the currency of the price.' if run.cost is not None else '.'),
        '',
        'Assumed: ' + ' '.join(estimate.ASSUMPTIONS),
    ]
    return '\n'.join(lines)


def _what_needs_less(plan: Plan) -> str:
    if plan.compile_seconds is None:
        return 'The state, its gradients and the batch are too much by themselves: take more chips or a smaller batch.'
    return (
        'More chips, parallel.rules=fsdp, optimizer.accumulate_steps or model.compute.remat=full need less; --search '
        'tries them.'
    )


def _memory_rows(memory: estimate.Memory) -> list[list[str]]:
    temporary = 'too much' if memory.temporary is None else gib(memory.temporary)
    rows = [['HBM of a chip', 'size']]
    rows += [[name.replace('_', ' '), gib(size)] for name, size in _parts(memory).items() if name != 'temporary']
    return [
        *rows,
        ['activations and gradients', temporary],
        ['peak', gib(memory.peak)],
        ['there is', gib(memory.limit)],
    ]


def _parts(memory: estimate.Memory) -> dict[str, float | int]:
    parts: dict[str, float | int] = {
        'parameters': memory.parameters,
        'optimizer': memory.optimizer,
        'teacher': memory.teacher,
        'batch': memory.batch,
        'program': memory.code,
        'temporary': memory.temporary or 0,
    }
    return {name: size for name, size in parts.items() if size}


def ranking(plans: Sequence[Plan]) -> str:
    """Those that fit, the fastest first, and then those that do not."""
    head = ['layout', 'peak', 'ms a step', 'clips/s', 'MFU %', 'limit']
    rows = []
    for plan in sorted(plans, key=rank):
        figures = ['-', '-', '-']
        if plan.memory.fits and plan.time and plan.run:
            figures = [f'{plan.time.step * 1e3:.1f}', f'{plan.run.clips_per_second:,.0f}', f'{100 * plan.run.mfu:.0f}']
        rows.append([str(plan.layout), gib(plan.memory.peak), *figures, plan.verdict])
    return format_table([head, *rows])


def rank(plan: Plan) -> tuple[bool, float | int]:
    """The smaller the better."""
    fits = plan.memory.fits and plan.time is not None
    return (not fits, plan.time.step if fits and plan.time else plan.memory.peak)


# -- The picture --


def picture(plan: Plan) -> drawing.Picture:
    """Memory and time by part: a bar for each, with its name and size, and a line at what there is."""
    memory = plan.memory
    parts = dict(_parts(memory))
    if memory.temporary is None and math.isfinite(memory.peak):
        parts['all together'] = memory.peak
    peak = f'{memory.peak / 2**30:.2f}' if math.isfinite(memory.peak) else 'unknown'
    charts = [
        drawing.caption(f'{plan.title} on {plan.topology.name}: {plan.layout}', WIDTH, scale=0.5),
        bars(
            {name.replace('temporary', 'activations and gradients'): size / 2**30 for name, size in parts.items()},
            f'HBM of a chip, GiB: {peak} of {memory.limit / 2**30:.2f}',
            limit=memory.limit / 2**30,
        ),
    ]
    if plan.time is not None and plan.collectives is not None:
        seconds = estimate.by_seconds(plan.time, plan.collectives)
        charts.append(
            bars(
                {name: 1e3 * value for name, value in seconds.items()},
                f'A step, ms, at least: {1e3 * plan.time.step:.1f}',
                limit=1e3 * plan.time.step,
            )
        )
    return drawing.below(charts, gap=8)


WIDTH, BAR = 760, 18


def bars(values: Mapping[str, float | int], title: str, limit: float | int) -> drawing.Picture:
    """Horizontal bars from a common start, and a dashed line at `limit`."""
    left = 12 + max(drawing.text_width(name) for name in values)
    right = WIDTH - 80
    most = max(limit, *values.values()) or 1.0
    paper = drawing.blank(34 + (BAR + 8) * len(values) + 8, WIDTH)
    drawing.put_text(paper, title, 4, 18, scale=0.45)

    def place(value: float | int) -> int:
        return left + round((right - left) * value / most)

    for i, (name, value) in enumerate(values.items()):
        top = 34 + i * (BAR + 8)
        colour = drawing.LINE_COLOURS[i % len(drawing.LINE_COLOURS)]
        paper[top : top + BAR, left : max(place(value), left + 1)] = np.array(colour, np.uint8)
        drawing.put_text(paper, name, left - 6 - drawing.text_width(name), top + 13)
        drawing.put_text(paper, f'{value:.3g}', place(value) + 6, top + 13)
    for y in range(28, len(paper) - 4, 8):
        cv2.line(paper, (place(limit), y), (place(limit), y + 4), drawing.INK, 1)
    return paper

"""The tables of docs/performance.md that say how models of every size spread over chips that are not there.

    python benchmarks/plan_sizes.py --output=PLANS                                         # H200; needs avmae_jax[cuda]
    python benchmarks/plan_sizes.py --output=PLANS --topologies=v5e:4x4,v5e:16x16 --sizes=L     # needs avmae_jax[plan]

Each row is one `python -m avmae_jax.plan`, kept in PLANS/NAME and not made again: on a core some 50 s for GPUs, three
minutes for TPUs. Writes PLANS/results.md: sizes by machine and sharding rules with a constant number of clips a chip
(weak scaling), and one size with a constant batch (strong scaling).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from avmae_jax.evaluation.tables import format_markdown
from avmae_jax.progress import progress

REPOSITORY = Path(__file__).resolve().parent.parent
CHIPS = {
    'h200:2x8': 16, 'h200:8x8': 64, 'h200:32x8': 256, 'h200:128x8': 1024,
    'v5e:4x4': 16, 'v5e:8x8': 64, 'v5e:16x16': 256, '4 x v5e:16x16': 1024,
}  # fmt: skip
GROUPS = {'h200': 8, 'v5e': 16}  # Chips that hold one copy of a state that is split.
RULES = ('fsdp', 'tensor', 'replicated')
CLIPS = 16  # A chip, where that is constant.
STRONG = 1024  # Clips, where the batch is constant.

_OUTPUT = flags.DEFINE_string('output', None, 'Folder for the plans and results.md.')
_SIZES = flags.DEFINE_list('sizes', ['B', 'L', 'H', 'g'], 'Of configs/pretrain/audioset.py.')
_TOPOLOGIES = flags.DEFINE_list('topologies', ['h200:2x8', 'h200:32x8'], f'Of weak scaling: any of {"; ".join(CHIPS)}.')


class Row(NamedTuple):
    """A plan to be made.

    Attributes:
      rules: one of RULES.
      batch_size: clips a step, on all chips.
    """

    size: str
    topology: str
    rules: str
    batch_size: int

    def name(self) -> str:
        return f'{self.size}-{self.topology}-{self.rules}-{self.batch_size}'.replace(' ', '').replace(':', '-')

    def command(self, output: Path) -> list[str]:
        slices, _, shape = self.topology.rpartition(' x ')
        chips = CHIPS[self.topology]
        # A decoder of size B has six heads, which two devices can share and four cannot.
        model = (2 if self.size == 'B' else 4) if self.rules == 'tensor' else 1
        data = {'replicated': chips, 'fsdp': GROUPS[shape.partition(':')[0]], 'tensor': chips // model}[self.rules]
        return [
            *(sys.executable, '-m', 'avmae_jax.plan', f'--config=configs/pretrain/audioset.py:size={self.size}'),
            *(f'--topology={shape}', f'--num_slices={slices or 1}', f'--config.parallel.rules={self.rules}'),
            f'--config.parallel.replica={chips // data // model}',
            *(f'--config.parallel.data={data}', f'--config.parallel.model={model}'),
            *('--config.model.compute.remat=full', f'--config.batch_size={self.batch_size}', f'--output={output}'),
        ]


def make_plan(row: Row, folder: Path) -> dict[str, Any]:
    """The plan as JSON, from the folder where it was made before."""
    output = folder / row.name()
    if not (output / 'plan.json').exists():
        done = subprocess.run(
            row.command(output),
            cwd=REPOSITORY,
            env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not (output / 'plan.json').exists():
            sys.exit(f'plan_sizes: {row.name()} ended with {done.returncode}: {done.stdout[-2000:]}')
    return json.loads((output / 'plan.json').read_text())


HEAD = ['size', 'M parameters', 'chips', 'rules', 'clips a chip', 'HBM, GiB', 'state, GiB', 'ms a step', 'clips/s',
        'a chip', 'MFU, at most', 'collectives, MiB', 'alone, ms', 'limit']  # fmt: skip


def cells(row: Row, plan: dict[str, Any]) -> list[str]:
    memory, chips = plan['memory'], CHIPS[row.topology]
    state = sum(memory[part] for part in ('parameters', 'optimizer', 'teacher')) / 2**30
    known = [row.size, f'{plan["num_parameters"] / 1e6:,.0f}', f'{chips:,}', row.rules, f'{row.batch_size / chips:g}']
    known += ['-' if memory['peak'] is None else f'{memory["peak"] / 2**30:.1f}', f'{state:.2f}']
    if plan['run'] is None or not memory['fits']:
        why = 'does not fit' if plan['failure'] is None else 'does not compile'
        return [*known, *['-'] * (len(HEAD) - len(known) - 1), why]
    run, time = plan['run'], plan['time']
    moved = sum(each['array_bytes'] for each in plan['collectives']) / 2**20
    return [
        *known,
        f'{time["step"] * 1e3:.1f}',
        f'{run["clips_per_second"]:,.0f}',
        f'{run["clips_per_second"] / chips:.1f}',
        f'{100 * run["mfu"]:.0f} %',
        f'{moved:,.0f}',
        f'{time["exposed"] * 1e3:.1f}',
        time['limit'],
    ]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
    unknown = sorted(set(_TOPOLOGIES.value) - set(CHIPS))
    if unknown:
        sys.exit(f'plan_sizes: --topologies={",".join(unknown)}: there are {"; ".join(CHIPS)}.')
    folder = Path(_OUTPUT.value).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    weak = [
        Row(size, topology, rules, CLIPS * CHIPS[topology])
        for size in _SIZES.value
        for topology in _TOPOLOGIES.value
        for rules in RULES
    ]
    kind = _TOPOLOGIES.value[0].split()[-1].partition(':')[0]
    strong = [Row('L', topology, 'fsdp', STRONG) for topology in CHIPS if kind in topology]
    tables = {'Constant clips a chip': weak, f'A constant batch of {STRONG:,}': strong}
    plans: dict[Row, dict[str, Any]] = {}
    # What is worth most first: the tables are written after each plan.
    for row in progress(sorted({*weak, *strong}, key=lambda row: (RULES.index(row.rules), row)), 'compiling', 'plans'):
        plans[row] = make_plan(row, folder)
        found = {
            title: format_markdown([HEAD, *(cells(row, plans[row]) for row in rows if row in plans)])
            for title, rows in tables.items()
        }
        (folder / 'results.md').write_text('\n'.join(f'{title}\n\n{table}' for title, table in found.items()))
    print((folder / 'results.md').read_text())


if __name__ == '__main__':
    flags.mark_flags_as_required(['output'])
    app.run(main)

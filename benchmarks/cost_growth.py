"""How the cost of a training step grows: with tokens that are kept, frames, clips of a batch, and layers.

    python benchmarks/cost_growth.py --output=GROWTH
    python benchmarks/cost_growth.py --output=GROWTH --axes frames,layers --steps 10

Each point is a run of benchmarks/step_time.py in a process of its own, kept in GROWTH and not made again; points of an
axis are made in turns with those of the others, so that what else the machine does falls on all. On a CPU it is CPU
time that counts, on a GPU or TPU wall time. Fitted is cost = fixed + slope * x ** exponent; a power alone would take
what every step costs anyway for slow growth. Writes GROWTH/growth.png and growth.md, with the exponents of the FLOPs
beside those that were measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avmae_jax.evaluation import drawing
from avmae_jax.evaluation.tables import format_markdown

STEP_TIME = Path(__file__).parent / 'step_time.py'
BASE = ['--encoder', 'separate', '--audio', '--scan', '--batch', '2']
# Axis -> (what is on it, values, flags of step_time.py for a value).
AXES = {
    'kept': ('share of tokens kept', (0.1, 0.2, 0.4, 0.6, 0.8), lambda x: ['--video-mask-ratio', f'{1 - x:.2f}']),
    'frames': ('frames', (4, 8, 16, 32, 48), lambda x: ['--video', f'{x}', '112', '112']),
    'batch': ('clips of a batch', (1, 2, 4, 8, 16), lambda x: ['--batch', f'{x}']),
    'layers': ('layers of the encoder', (3, 6, 12, 24, 48), lambda x: ['--layers', f'{x}']),
}  # fmt: skip


def measure(flags: Sequence[str], file: Path) -> dict:
    """The result of step_time.py, from the file where it was made before."""
    if not file.exists():
        done = subprocess.run([sys.executable, STEP_TIME, *flags], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f'cost_growth: {" ".join(flags)} ended with {done.returncode}: {done.stderr[-2000:]}')
        file.write_text(done.stdout)
    return json.loads(file.read_text())


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """(fixed, slope, exponent) with the least squared relative error; the fixed part is not negative."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    best = (np.inf, (0.0, 0.0, 0.0))
    for exponent in np.arange(0.2, 3.0, 0.01):
        columns = np.stack([np.ones_like(xs), xs**exponent], axis=1) / ys[:, None]
        fixed, slope = np.linalg.lstsq(columns, np.ones_like(ys), rcond=None)[0]
        if fixed < 0:
            fixed, slope = 0.0, float(columns[:, 1].sum() / (columns[:, 1] ** 2).sum())
        error = float(np.square(columns @ [fixed, slope] - 1).sum())
        if error < best[0]:
            best = (error, (float(fixed), float(slope), float(exponent)))
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--axes', default=','.join(AXES), help='any of %(default)s')
    parser.add_argument('--steps', type=int, default=6)
    args = parser.parse_args()
    axes = args.axes.split(',')
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        parser.error(f'--axes {",".join(unknown)}: there are {", ".join(AXES)}.')
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[float, dict]] = {axis: {} for axis in axes}
    for values in itertools.zip_longest(*(AXES[axis][1] for axis in axes)):
        for axis, value in zip(axes, values, strict=True):
            print(f'{axis} {value}', file=sys.stderr, flush=True)
            flags = [*BASE, *AXES[axis][2](value), '--steps', str(args.steps)]
            found[axis][value] = measure(flags, args.output / f'{axis}-{value}.json')
    table = [['axis', 'values', 'cost of a step, ms', 'exponent', 'fixed part, ms', 'exponent of the FLOPs']]
    charts = []
    for axis, points in found.items():
        name, x = AXES[axis][0], list(points)
        seconds = 'cpu_seconds' if next(iter(points.values()))['device'] == 'cpu' else 'seconds'
        cost = [1e3 * point[seconds] for point in points.values()]
        fixed, slope, exponent = fit(x, cost)
        flops = fit(x, [point['xla_flops'] for point in points.values()])[2]
        numbers = ', '.join(f'{value:g}' for value in x), ', '.join(f'{value:.0f}' for value in cost)
        table.append([name, *numbers, f'{exponent:.2f}', f'{fixed:.0f}', f'{flops:.2f}'])
        fine = np.linspace(x[0], x[-1], 40)
        curves = {
            'measured': drawing.Curve(x, cost),
            'fitted': drawing.Curve(fine.tolist(), (fixed + slope * fine**exponent).tolist()),
        }
        title = f'ms a step by {name}: {fixed:.0f} + {slope:.3g} x^{exponent:.2f}'
        charts.append(drawing.draw_curves(curves, title, x_name=name))
    drawing.write_png(args.output / 'growth.png', drawing.below(charts, gap=8))
    text = format_markdown(table)
    (args.output / 'growth.md').write_text(text)
    print(f'{text}\nThe plots are in {args.output / "growth.png"}.')


if __name__ == '__main__':
    main()

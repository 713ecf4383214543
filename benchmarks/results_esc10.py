"""The ESC-10 table of docs/results.md: official 5-fold accuracy from scratch, and pretrained on the other folds' sound.

    python benchmarks/results_esc10.py --data=esc10_shards --output=RESULTS
    python benchmarks/results_esc10.py --data=... --output=... --seeds=0 --rows=scratch

For each seed an encoder is pretrained for every fold, on the sound of the four others, and `avmae_jax.crossvalidate`
runs the five folds from scratch and from these; the rows of 60 epochs finetune for half as long again. Runs go on where
they were interrupted. Writes RESULTS/results.md; runs lie in RESULTS/seed-SEED/ROW/FOLD. For plain baselines see
benchmarks/baselines_esc10.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from avmae_jax import jobs
from avmae_jax.data import schema
from avmae_jax.evaluation.tables import format_markdown

REPOSITORY = Path(__file__).resolve().parent.parent
# Rates that fall with depth are for layers that know something; fresh ones do not learn at a rate as high.
_FRESH = ['--config.optimizer.layer_decay=1.0', '--config.optimizer.base_learning_rate=0.008']
_LONGER = ['--config.num_epochs=60.0']
# Row -> arguments of the config, whether it starts from what was pretrained, further settings.
ROWS = {
    'scratch': ('', False, _FRESH),
    'pretrained': ('', True, []),
    'scratch-60-epochs': ('', False, [*_FRESH, *_LONGER]),
    'pretrained-60-epochs': ('', True, _LONGER),
    'pretrained-probe': ('probe=linear', True, []),
}

_DATA = flags.DEFINE_string('data', None, 'The prepared clips: splits fold1 to fold5.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder for runs and tables.')
_ROWS = flags.DEFINE_list('rows', [], f'Any of {", ".join(ROWS)}; all if not given.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1'], 'Of parameters and the order of clips.')
_NUM_JOBS = flags.DEFINE_integer('jobs', 2, 'Runs at a time.')


def pretraining(data: str, folds: Sequence[str], seed: int, folder: Path) -> list[jobs.Job]:
    """For every fold a run on the sound of the others."""
    found = []
    for fold in folds:
        rest = '+'.join(other for other in folds if other != fold)
        command = [sys.executable, '-m', 'avmae_jax.train', '--config=configs/esc10.py', f'--config.data.path={data}']
        command += [f'--config.data.split={rest}', f'--config.seed={seed}', f'--workdir={folder / fold}']
        found.append(jobs.Job(f'seed {seed}, pretraining without {fold}', folder / fold, {'train': command}))
    return found


def finetuning(data: str, row: str, seed: int, folder: Path, pretrained: Path) -> jobs.Job:
    """One cross-validation."""
    arguments, starts, settings = ROWS[row]
    command = [sys.executable, '-m', 'avmae_jax.crossvalidate', f'--config=configs/finetune/esc10.py:{arguments}']
    command += [f'--config.data.path={data}', f'--config.seed={seed}', *settings, f'--workdir={folder}']
    if starts:
        command.append(f'--config.start.path={pretrained}/{{fold}}')
    return jobs.Job(f'seed {seed}, {row}', folder, {'crossvalidate': command})


def table(output: Path, rows: Sequence[str], seeds: Sequence[int]) -> str:
    """Markdown: a line a row; the mean over folds of each seed, and over seeds."""
    lines = [['', *(f'seed {seed}' for seed in seeds), 'mean', 'deviation between folds']]
    for row in rows:
        files = [output / f'seed-{seed}' / row / 'crossvalidation.json' for seed in seeds]
        found = [json.loads(file.read_text())['results']['scores'] for file in files if file.exists()]
        top = [next(score for score in scores if score['metric'] == 'top-1') for scores in found]
        if top:
            cells = [f'{score["mean"]:.3f}' for score in top] + ['-'] * (len(seeds) - len(top))
            deviation = np.mean([score['standard_deviation'] for score in top])
            lines.append([row, *cells, f'{np.mean([score["mean"] for score in top]):.3f}', f'{deviation:.3f}'])
    return format_markdown(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
    rows = _ROWS.value or list(ROWS)
    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        sys.exit(f'results_esc10: --rows={",".join(unknown)}: there are {", ".join(ROWS)}.')
    output, data = Path(_OUTPUT.value).absolute(), str(Path(_DATA.value).absolute())
    folds, seeds = list(schema.read_info(data).splits), [int(seed) for seed in _SEEDS.value]
    folders = {seed: output / f'seed-{seed}' for seed in seeds}
    if any(ROWS[row][1] for row in rows):
        encoders = [job for seed in seeds for job in pretraining(data, folds, seed, folders[seed] / 'pretraining')]
        jobs.run_jobs(encoders, _NUM_JOBS.value, cwd=REPOSITORY)
    chains = [
        finetuning(data, row, seed, folders[seed] / row, folders[seed] / 'pretraining')
        for row in rows
        for seed in seeds
    ]
    jobs.run_jobs(chains, _NUM_JOBS.value, cwd=REPOSITORY)
    (output / 'results.md').write_text(table(output, rows, seeds))
    print(f'\n{(output / "results.md").read_text()}\nWritten to {output / "results.md"}')


if __name__ == '__main__':
    flags.mark_flags_as_required(['data', 'output'])
    app.run(main)

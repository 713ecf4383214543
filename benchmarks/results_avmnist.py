"""The table of docs/results.md: what each encoder learns from spoken and written digits, over several seeds.

    python benchmarks/results_avmnist.py --data=avmnist_shards --output=RESULTS
    python benchmarks/results_avmnist.py --data=... --output=... --rows=separate,mid --seeds=0 --num_epochs=20

Each row and seed is one run of `avmae_jax.train` on configs/avmnist.py and two of `avmae_jax.evaluate`: of the trained
parameters and of those the run began with. Their commands are printed; what they say goes to log.txt of the run.
`--jobs` runs go side by side, each on its share of the cores: with small models that is faster than one on all of them.
Runs go on where they were interrupted, and what is finished is not done again. Writes RESULTS/results.md and
results.json; runs lie in RESULTS/ROW-seed-SEED.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from avmae_jax import jobs
from avmae_jax.evaluation import results_file
from avmae_jax.evaluation.tables import format_markdown

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = 'configs/avmnist.py'
ROWS = {  # Name -> arguments of the config.
    'separate': 'encoder=separate',
    'shared': 'encoder=shared',
    'early': 'encoder=early',
    'mid': 'encoder=mid',
    'inpainting': 'encoder=separate,objective=inpainting',
    'both': 'encoder=separate,objective=both',
    'mid-decoder-separate': 'encoder=mid,decoder=separate',
    'mid-decoder-joint': 'encoder=mid,decoder=joint',
}
FEATURES = ('video', 'audio', 'both')
TRAINED, FRESH = 'pretrained', 'random init'

_DATA = flags.DEFINE_string('data', None, 'The prepared clips.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder for runs and tables.')
_ROWS = flags.DEFINE_list('rows', ['separate', 'shared', 'early', 'mid', 'inpainting'], f'Any of {", ".join(ROWS)}.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Of parameters, masks and the order of clips.')
_NUM_EPOCHS = flags.DEFINE_float('num_epochs', None, 'Instead of those of the config.')
_JOBS = flags.DEFINE_integer('jobs', 2, 'Runs at a time.')
_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Run nothing; make the tables of what is there.')


def commands(row: str, seed: int, data: str, folder: Path, num_epochs: float | None) -> dict[str, list[str]]:
    """What to run, in order."""
    python = [sys.executable, '-m']
    train = [*python, 'avmae_jax.train', f'--config={CONFIG}:{ROWS[row]}', f'--config.data.path={data}']
    train += [f'--config.seed={seed}', f'--workdir={folder}']
    if num_epochs is not None:
        train.append(f'--config.num_epochs={num_epochs}')
    evaluate = [*python, 'avmae_jax.evaluate', f'--workdir={folder}']
    return {'train': train, TRAINED: evaluate, FRESH: [*evaluate, '--random_init', '--num_pictures=0']}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """'pretrained' and 'random init' -> the results of the newest evaluation, where there is one."""
    found = {}
    for name, subject in ((TRAINED, 'step'), (FRESH, 'random-init-seed')):
        if files := results_file.find(folder, 'test', subject=subject):
            found[name] = json.loads(files[-1].read_text())
    return found


def figures(content: Mapping[str, Any]) -> dict[str, float]:
    """The columns of the table, from the results of one evaluation."""
    results, values = content['results'], {}
    for score in results['classification']:
        if score['features'] in FEATURES:
            values[f'{score["features"]} {score["method"]}'] = score['value']
    for found in results['retrieval']:
        if found['method'] == 'canonical correlation':
            values[f'{found["query"]} -> {found["candidates"]} R@10'] = found['scores']['recall@10']
    for error in results['reconstruction']:
        if error['unit'] == 'input' and error['term'] == 'reconstruction':
            values[f'{error["modality"]} error'] = error['mean']
    return values


def chance(content: Mapping[str, Any]) -> dict[str, float]:
    """The same columns for guessing, and for the mean of all clips in place of a reconstruction."""
    results, values = content['results'], {}
    for score in results['classification']:
        values[f'{score["features"]} {score["method"]}'] = score['chance']
    for found in results['retrieval']:
        values[f'{found["query"]} -> {found["candidates"]} R@10'] = found['chance']['recall@10']
    for error in results['reconstruction']:
        if error['unit'] == 'input':
            values[f'{error["modality"]} error'] = error['baselines'].get('dataset mean', float('nan'))
    return values


def table(entries: Iterable[tuple[str, str, Mapping[str, Any]]]) -> str:
    """Markdown: mean and standard deviation over seeds of each (row, kind)."""
    entries = list(entries)
    grouped: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row, kind, content in entries:
        grouped.setdefault((row, kind), []).append(figures(content))
    columns = list(dict.fromkeys(name for values in grouped.values() for one in values for name in one))
    lines = [['encoder', 'parameters', 'seeds', *columns]]
    order = [(row, kind) for kind in (FRESH, TRAINED) for row in ROWS]
    for row, kind in (key for key in order if key in grouped):
        values = grouped[row, kind]
        cells = [mean_and_deviation([one[name] for one in values if name in one]) for name in columns]
        lines.append([row, kind, str(len(values)), *cells])
    guess = chance(entries[0][2])
    lines.insert(1, ['', 'chance', '', *(f'{guess[name]:.3f}' if name in guess else '' for name in columns)])
    return format_markdown(lines)


def mean_and_deviation(values: list[float]) -> str:
    if not values:
        return ''
    return f'{np.mean(values):.3f}' + (f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else '')


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
    unknown = sorted(set(_ROWS.value) - set(ROWS))
    if unknown:
        sys.exit(f'results_avmnist: --rows={",".join(unknown)}: there are {", ".join(ROWS)}.')
    output, data = Path(_OUTPUT.value).absolute(), str(Path(_DATA.value).absolute())
    runs = {(row, seed): output / f'{row}-seed-{seed}' for seed in map(int, _SEEDS.value) for row in _ROWS.value}
    if not _TABLE_ONLY.value:
        chains = [
            jobs.Job(f'{row}, seed {seed}', folder, commands(row, seed, data, folder, _NUM_EPOCHS.value))
            for (row, seed), folder in runs.items()
        ]
        # Tables after each run, so that there is something to look at while others go on.
        jobs.run_jobs(chains, _JOBS.value, cwd=REPOSITORY, finished=lambda _: write_tables(runs, output))
    write_tables(runs, output)
    print(f'\n{(output / "results.md").read_text()}\nWritten to {output / "results.md"} and results.json')


def write_tables(runs: Mapping[tuple[str, int], Path], output: Path) -> None:
    found = [(row, kind, content) for (row, _), folder in runs.items() for kind, content in read(folder).items()]
    if not found:
        sys.exit(f'results_avmnist: {output} holds no evaluation yet.')
    (output / 'results.md').write_text(table(found))
    flat = [{'row': row, 'kind': kind, **content} for row, kind, content in found]
    (output / 'results.json').write_text(json.dumps(flat, indent=1) + '\n')


if __name__ == '__main__':
    flags.mark_flags_as_required(['data', 'output'])
    app.run(main)

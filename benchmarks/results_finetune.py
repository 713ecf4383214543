"""The finetuning tables of docs/results.md: spoken and written digits from scratch and from each pretrained encoder.

    python benchmarks/results_finetune.py --data=avmnist_shards --pretrained=RESULTS --output=FINETUNED
    python benchmarks/results_finetune.py --data=... --pretrained=... --output=... --tables=fusion --seeds=0
    python benchmarks/results_finetune.py --data=... --pretrained=... --output=... --tables=augment --starts=scratch,mid

RESULTS is what benchmarks/results_avmnist.py wrote: the runs of a seed start from RESULTS/ENCODER-seed-SEED.
Three tables, each over several seeds:

  labels   scratch and the four starts, for sound, picture and both, with all labels, 10 % and 1 % of them
  augment  the same starts for the sound, shifted and masked at random, with 10 % and 1 % of the labels and more steps
  fusion   with all labels, both modalities, from scratch and from what `separate` pretrained: bottlenecks, no exchange
           (late), concatenation from the layer of the bottlenecks on, and one sequence from the first layer on (early)

Each run is one of `avmae_jax.train` on configs/finetune/avmnist.py and one of `avmae_jax.evaluate`; runs go on where
they were interrupted, and what is finished is not done again. Writes FINETUNED/results.md and results.json; runs lie in
FINETUNED/NAME.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from avmae_jax import jobs
from avmae_jax.evaluation import results_file
from avmae_jax.evaluation.tables import format_markdown

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = 'configs/finetune/avmnist.py'
SCRATCH = 'scratch'
STARTS = (SCRATCH, 'separate', 'shared', 'early', 'mid')
MODALITIES = {'sound': 'audio', 'picture': 'video', 'both': 'video+audio'}
# Share of the labels -> epochs: 504, 240 and 100 steps of 32 clips.
EPOCHS = {1.0: 6.0, 0.1: 30.0, 0.01: 100.0}
AUGMENTED_EPOCHS = {0.1: 90.0, 0.01: 400.0}  # 720 and 400 steps.
FUSIONS = {
    'bottleneck': 'fusion=bottleneck',
    'late': 'fusion=late',
    'concatenation': 'fusion=concatenation',
    'early': 'encoder=early',
}
TABLES = ('labels', 'augment', 'fusion')

_DATA = flags.DEFINE_string('data', None, 'The prepared clips.')
_PRETRAINED = flags.DEFINE_string('pretrained', None, 'What benchmarks/results_avmnist.py wrote.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder for runs and tables.')
_TABLES = flags.DEFINE_list('tables', list(TABLES), f'Any of {", ".join(TABLES)}.')
_STARTS = flags.DEFINE_list(
    'starts', list(STARTS), f'Of the tables `labels` and `augment`: any of {", ".join(STARTS)}.'
)
_LABELS = flags.DEFINE_list('labels', ['0.01', '0.1', '1'], 'Shares of the labels, of the table `labels`.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1'], 'Of parameters, the order of clips and the choice of labels.')
_JOBS = flags.DEFINE_integer('jobs', 2, 'Runs at a time.')
_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Run nothing; make the tables of what is there.')


class Run(NamedTuple):
    """One line's figure of one seed.

    Attributes:
      start: one of STARTS.
      given: one of MODALITIES.
      labels: share of the labels that is trained on.
      fusion: one of FUSIONS.
      augment: as in the config.
    """

    start: str
    seed: int
    given: str = 'both'
    labels: float = 1.0
    fusion: str = 'bottleneck'
    augment: str = 'none'

    @property
    def name(self) -> str:
        kind = self.fusion if self.augment == 'none' else f'{self.fusion}-augmented'
        return f'{self.start}-{self.given}-{self.labels:g}-{kind}-seed-{self.seed}'

    @property
    def epochs(self) -> float:
        return (EPOCHS if self.augment == 'none' else AUGMENTED_EPOCHS)[self.labels]


def runs_of(
    tables: Sequence[str],
    seeds: Sequence[int],
    shares: Sequence[float] = tuple(EPOCHS),
    starts: Sequence[str] = STARTS,
) -> Iterator[Run]:
    """Few labels first, as their runs are short and say most."""
    for seed in seeds:
        if 'labels' in tables:
            for labels in sorted(shares):
                for given in MODALITIES:
                    for start in starts:
                        yield Run(start, seed, given, labels)
        if 'augment' in tables:
            for labels in sorted(AUGMENTED_EPOCHS):
                for start in starts:
                    yield Run(start, seed, 'sound', labels, augment='sound')
        if 'fusion' in tables:
            for fusion in FUSIONS:
                for start in (SCRATCH, 'separate'):
                    yield Run(start, seed, fusion=fusion)


def commands(run: Run, data: str, pretrained: Path, folder: Path) -> dict[str, list[str]]:
    """What to run, in order."""
    python = [sys.executable, '-m']
    arguments = f'modalities={MODALITIES[run.given]},{FUSIONS[run.fusion]}'
    if run.augment != 'none':
        arguments += f',augment={run.augment}'
    train = [*python, 'avmae_jax.train', f'--config={CONFIG}:{arguments}', f'--config.data.path={data}']
    train += [f'--config.seed={run.seed}', f'--config.data.subset_ratio={run.labels}']
    train += [f'--config.num_epochs={run.epochs}', f'--config.optimizer.warmup_epochs={run.epochs / 10}']
    if run.start == SCRATCH:
        # Rates that fall with depth are for layers that know something; fresh ones do not learn at a rate as high.
        train += ['--config.optimizer.layer_decay=1.0', '--config.optimizer.base_learning_rate=0.008']
    else:
        train += [f'--config.start.path={pretrained / f"{run.start}-seed-{run.seed}"}']
    train += ['--config.evaluation.every_steps=0', f'--workdir={folder}']
    return {'train': train, 'evaluate': [*python, 'avmae_jax.evaluate', f'--workdir={folder}', '--what=benchmark']}


def accuracy(folder: Path) -> float | None:
    """Top-1 on the test split, of the last evaluation."""
    found = results_file.find(folder, 'test')
    if not found:
        return None
    scores = json.loads(found[-1].read_text())['results']['benchmark']['scores']
    return next(score['value'] for score in scores if score['metric'] == 'top-1')


def compute(folder: Path) -> dict[str, float]:
    """GFLOP a clip and the clips a second of training, as the run wrote them down."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    rates = [line['clips_per_second'] for line in lines if 'clips_per_second' in line]
    text = (folder / 'train.log').read_text()
    flops = re.search(r'([\d.]+) GFLOP a clip', text)
    return {'clips_per_second': float(np.median(rates)), 'gflop': float(flops[1]) if flops else float('nan')}


def mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return '-'
    return f'{np.mean(values):.3f}' + (f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else '')


def labels_table(found: Mapping[Run, float]) -> list[list[str]]:
    """A line a start, a column for each modality and share of the labels."""
    columns = [(given, labels, 'none') for labels in sorted(EPOCHS, reverse=True) for given in MODALITIES]
    columns += [('sound', labels, 'sound') for labels in AUGMENTED_EPOCHS]
    titles = {'none': '', 'sound': ', augmented'}
    lines = [['start', *(f'{given}, {100 * labels:g} %{titles[augment]}' for given, labels, augment in columns)]]
    for start in STARTS:
        cells = []
        for column in columns:
            wanted = (start, 'bottleneck', *column)
            values = [v for r, v in found.items() if (r.start, r.fusion, r.given, r.labels, r.augment) == wanted]
            cells.append(mean_and_deviation(values))
        lines.append([start, *cells])
    return lines


def fusion_table(found: Mapping[Run, float], output: Path) -> list[list[str]]:
    """A line a way to fuse: accuracy from scratch and pretrained, and what it computes."""
    lines = [['fusion', SCRATCH, 'separate', 'GFLOP a clip', 'clips a second']]
    for fusion in FUSIONS:
        chosen = {r: v for r, v in found.items() if r.fusion == fusion and r.given == 'both' and r.labels == 1}
        if not chosen:
            continue
        cells = [mean_and_deviation([v for r, v in chosen.items() if r.start == s]) for s in (SCRATCH, 'separate')]
        costs = [compute(output / run.name) for run in chosen]
        speed = np.mean([cost['clips_per_second'] for cost in costs])
        lines.append([fusion, *cells, f'{costs[0]["gflop"]:.3f}', f'{speed:.0f}'])
    return lines


def write_tables(runs: Sequence[Run], output: Path) -> None:
    found: dict[Run, Any] = {run: accuracy(output / run.name) for run in runs}
    found = {run: value for run, value in found.items() if value is not None}
    if not found:
        sys.exit(f'results_finetune: {output} holds no evaluation yet.')
    text = f'{format_markdown(labels_table(found))}\n{format_markdown(fusion_table(found, output))}'
    (output / 'results.md').write_text(text)
    rows = [{**run._asdict(), 'top-1': value, **compute(output / run.name)} for run, value in found.items()]
    (output / 'results.json').write_text(json.dumps(rows, indent=1) + '\n')


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
    unknown = sorted(set(_TABLES.value) - set(TABLES))
    wrong = [share for share in _LABELS.value if share not in map('{:g}'.format, EPOCHS)]
    if wrong:
        sys.exit(f'results_finetune: --labels={",".join(wrong)}: there are {", ".join(map("{:g}".format, EPOCHS))}.')
    if unknown:
        sys.exit(f'results_finetune: --tables={",".join(unknown)}: there are {", ".join(TABLES)}.')
    if strange := sorted(set(_STARTS.value) - set(STARTS)):
        sys.exit(f'results_finetune: --starts={",".join(strange)}: there are {", ".join(STARTS)}.')
    output, data = Path(_OUTPUT.value).absolute(), str(Path(_DATA.value).absolute())
    pretrained = Path(_PRETRAINED.value).absolute()
    runs = list(
        dict.fromkeys(
            runs_of(
                _TABLES.value, [int(seed) for seed in _SEEDS.value], [float(x) for x in _LABELS.value], _STARTS.value
            )
        )
    )
    if not _TABLE_ONLY.value:
        chains = [
            jobs.Job(run.name, output / run.name, commands(run, data, pretrained, output / run.name)) for run in runs
        ]
        jobs.run_jobs(chains, _JOBS.value, cwd=REPOSITORY, finished=lambda _: write_tables(runs, output))
    write_tables(runs, output)
    print(f'\n{(output / "results.md").read_text()}\nWritten to {output / "results.md"} and results.json')


if __name__ == '__main__':
    flags.mark_flags_as_required(['data', 'pretrained', 'output'])
    app.run(main)

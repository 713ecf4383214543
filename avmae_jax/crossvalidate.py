"""VERB: cross-validation: for each fold, trains on all the others and tests on it.

    python -m avmae_jax.crossvalidate --config=configs/finetune/esc50.py --config.data.path=DIR --workdir=RUN
    python -m avmae_jax.crossvalidate ... --config.start.path=pretrained/{fold} --jobs=2

The folds are the splits of the dataset, or those of them that `--folds` names. For each one these are run:

    python -m avmae_jax.train --config=... --config.data.split=REST --config.evaluation.split=FOLD --workdir=RUN/FOLD
    python -m avmae_jax.evaluate --workdir=RUN/FOLD --split=FOLD --what=benchmark

where REST is the other folds, joined by '+'. `--config` and all settings are handed on to the first, {fold} in them
replaced by the name of the fold. What they say is in RUN/FOLD/log.txt. The last checkpoint is what counts: none is
chosen by the fold it is tested on.

Prints the mean and deviation over the folds, and writes RUN/crossvalidation.json. The same command goes on where an
earlier one was interrupted or failed.

Exit codes: 0 done; 2 a setting is wrong, or a file cannot be read or written; 75 stopped by SIGTERM; 130 interrupted;
else that of the command that failed (65, 70, ...: see `avmae_jax.train`).
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from absl import app, flags

from avmae_jax import experiment, jobs, settings
from avmae_jax.data import schema, sources
from avmae_jax.evaluation import benchmarks, results_file, tables

EXIT_SETTINGS, EXIT_PREEMPTED, EXIT_INTERRUPTED = 2, 75, 130
OF_FOLD = ('config.data.split', 'config.evaluation.split')  # What each fold has its own value of.

_CONFIG = flags.DEFINE_string('config', '', 'File with get_config(), and its arguments after a colon.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder for the runs, one a fold, and the results.')
_FOLDS = flags.DEFINE_list('folds', [], 'Splits that are the folds; all of the dataset if not given.')
_NUM_CLIPS = flags.DEFINE_integer(
    'num_clips',
    None,
    'Moments of each record whose logits are averaged; config.evaluation.num_clips if not given.',
    lower_bound=1,
)
_JOBS = flags.DEFINE_integer(
    'jobs', 1, 'Folds at a time, each on its share of the cores; leave it at 1 on a GPU or TPU.'
)


def choose_folds(path: str, wanted: Sequence[str]) -> list[str]:
    """The splits that are wanted, or all; checked against what lies at `config.data.path`."""
    datasets = {each: schema.read_info(each) for each in experiment.split_paths(path)}
    folds = list(wanted or next(iter(datasets.values())).splits)
    for each, info in datasets.items():
        sources.check_splits(each, '+'.join(folds), info.splits)
    if len(folds) < 2:
        raise ValueError(f'cross-validation needs at least 2 folds; there is {folds[0]} alone.')
    return folds


def fold_job(
    fold: str, folds: Sequence[str], *, arguments: Sequence[str], workdir: Path, num_clips: int | None
) -> jobs.Job:
    """Training without a fold, and its test.

    Args:
      arguments: --config=... and all settings, as given.
    """
    folder = workdir / fold
    python = [sys.executable, '-m']
    others = '+'.join(other for other in folds if other != fold)
    own = [f'--{name}={value}' for name, value in zip(OF_FOLD, (others, fold), strict=True)]
    given = [argument.replace('{fold}', fold) for argument in arguments]
    train = [*python, 'avmae_jax.train', *given, *own, f'--workdir={folder}']
    evaluate = [*python, 'avmae_jax.evaluate', f'--workdir={folder}', f'--split={fold}', '--what=benchmark']
    asked = [] if num_clips is None else [f'--num_clips={num_clips}']
    return jobs.Job(fold, folder, {'train': train, 'evaluate': [*evaluate, *asked]})


def read_fold(fold: str, workdir: Path, num_clips: int | None) -> tuple[Path, dict[str, Any], list[str]]:
    """(file, content, ids of the records) of a fold's newest evaluation."""
    files = [
        Path(file) for file in results_file.find(workdir / fold, fold, asked=results_file.asked(num_clips=num_clips))
    ]
    if not files:
        raise ValueError(f'{workdir / fold} holds no evaluation; remove {workdir / fold / jobs.DONE} and run again.')
    content = json.loads(files[-1].read_text())
    if 'benchmark' not in content['results']:
        raise ValueError(f'{files[-1]} holds no benchmark: has the dataset labels?')
    with np.load(files[-1].with_name(f'{files[-1].stem}-logits.npz')) as arrays:
        return files[-1], content, arrays['ids'].tolist()


def combine(folds: Sequence[str], workdir: Path, num_clips: int | None) -> dict[str, Any]:
    """What crossvalidation.json holds: the results of all folds together, and what each one is of."""
    found = {fold: read_fold(fold, workdir, num_clips) for fold in folds}
    digests = {fold: content['data']['digest'] for fold, (_, content, _) in found.items()}
    if len(set(digests.values())) > 1:
        told = ', '.join(f'{fold} {digest[:16]}...' for fold, digest in digests.items())
        raise ValueError(f'the folds were tested on datasets of different content ({told}); begin a new --workdir.')
    results = benchmarks.combine_folds(
        {fold: content['results']['benchmark'] for fold, (_, content, _) in found.items()},
        {fold: ids for fold, (_, _, ids) in found.items()},
    )
    return {
        'results': results,
        'folds': {
            fold: {
                'file': str(file.relative_to(workdir)),
                **{name: content[name] for name in ('subject', 'data', 'versions')},
            }
            for fold, (file, content, _) in found.items()
        },
    }


def crossvalidate(
    config: str,
    given: Mapping[str, str],
    *,
    workdir: Path,
    folds: Sequence[str] = (),
    num_clips: int | None = None,
    num_at_once: int = 1,
) -> None:
    """Runs what is missing, prints the table and writes the results.

    Args:
      given: settings as written, 'config.data.path' -> 'esc50'.
      num_clips: moments of a record; None: as many as the config says.
    """
    if twice := [name for name in OF_FOLD if name in given]:
        raise ValueError(f'--{twice[0]}={given[twice[0]]}: each fold has its own; choose among the splits by --folds.')
    if not given.get('config.data.path'):
        raise ValueError('--config.data.path is needed: the dataset whose splits are the folds.')
    if num_at_once < 1:
        raise ValueError(f'--jobs={num_at_once} must be at least 1.')
    folds = choose_folds(given['config.data.path'], folds)
    arguments = [f'--config={config}', *(f'--{name}={value}' for name, value in given.items())]
    jobs.run_jobs(
        [fold_job(fold, folds, arguments=arguments, workdir=workdir, num_clips=num_clips) for fold in folds],
        num_at_once,
    )
    content = {'config': config, 'settings': dict(given), **combine(folds, workdir, num_clips)}
    path = workdir / 'crossvalidation.json'
    path.write_text(json.dumps(content, indent=1) + '\n')
    print(f'\n{tables.fold_table(content["results"])}\nWritten to {path}', flush=True)


def main(argv: list[str], given: Mapping[str, str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: fail(EXIT_PREEMPTED, 'stopped by SIGTERM; the same command goes on.'))
    try:
        if len(argv) > 1:
            raise ValueError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
        for flag in (_CONFIG, _WORKDIR):
            if not flag.value:
                raise ValueError(f'--{flag.name} is needed; --help lists the flags.')
        if '://' in _WORKDIR.value:
            raise ValueError(
                f'--workdir={_WORKDIR.value} must be a folder of this machine: it keeps the logs of the runs.'
            )
        crossvalidate(
            _CONFIG.value,
            given,
            workdir=Path(_WORKDIR.value),
            folds=_FOLDS.value,
            num_clips=_NUM_CLIPS.value,
            num_at_once=_JOBS.value,
        )
    except jobs.JobFailedError as error:
        fail(error.exit_code, error)
    except (ValueError, OSError) as error:
        fail(EXIT_SETTINGS, error)
    except KeyboardInterrupt:
        fail(EXIT_INTERRUPTED, 'interrupted; the same command goes on.')


def fail(code: int, error: object) -> NoReturn:
    print(f'crossvalidate: {error}', file=sys.stderr, flush=True)
    sys.exit(code)


def run_main() -> None:
    argv, _ = settings.split_overrides(sys.argv)
    given = dict(argument.lstrip('-').partition('=')[::2] for argument in sys.argv if argument not in argv)
    app.run(lambda rest: main(rest, given), argv=argv, flags_parser=settings.flags_parser('crossvalidate'))


if __name__ == '__main__':
    run_main()

"""The table of few labels of docs/results.md: what frozen features tell from three labelled clips a class.

    python benchmarks/results_few_labels.py --data=avmnist_shards --runs=RESULTS/mid-seed-0,RESULTS/mid-seed-1

Finetuning on 30 clips says more of those clips than of the start. Here nothing is trained: features of all training
clips, without their labels, are whitened; a class is the mean of the labelled ones, and a test clip belongs to the
class whose mean is nearest by cosine (SimpleShot, arXiv 1911.04623). That costs nothing, so that the labelled
clips are drawn many times, the same ones for every run and for the parameters the run began with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from jaxtyping import Float, Int

from avmae_jax import subjects
from avmae_jax.evaluation import passes, probes
from avmae_jax.evaluation.evaluator import Evaluator
from avmae_jax.evaluation.tables import format_markdown

_DATA = flags.DEFINE_string('data', None, 'The prepared clips.')
_RUNS = flags.DEFINE_list('runs', None, 'Folders of pretraining runs.')
_LABELS = flags.DEFINE_list('labels', ['3', '27'], 'Labelled clips a class.')
_DRAWS = flags.DEFINE_integer('draws', 100, 'Choices of the labelled clips.', lower_bound=1)


def draw(labels: Int[np.ndarray, 'm'], num_labels: int, num_draws: int) -> Int[np.ndarray, 'draws c k']:
    """Rows of `num_labels` clips of each class, for every draw; no clip twice in one."""
    rows = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    if (fewest := min(map(len, rows))) < num_labels:
        raise ValueError(f'--labels={num_labels}: a class has only {fewest} clips.')
    generator = np.random.default_rng(0)
    return np.stack(
        [np.stack([generator.choice(of, num_labels, replace=False) for of in rows]) for _ in range(num_draws)]
    )


def accuracies(
    train: Float[np.ndarray, 'm d'],
    test: Float[np.ndarray, 'n d'],
    test_labels: Int[np.ndarray, 'n'],
    drawn: Int[np.ndarray, 'draws c k'],
) -> Float[np.ndarray, 'draws']:
    """Share of the test clips that are nearest to the mean of their class, for every draw."""
    train, test = (_unit(x) for x in probes.whiten(train, test, shrinkage=probes.NearestNeighbours.shrinkage))
    means = _unit(train[drawn].mean(axis=2))
    return (np.einsum('nd,tcd->tnc', test, means).argmax(axis=-1) == test_labels).mean(axis=1)


def _unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def score_features(tables: Mapping[str, Any], counts: list[int], num_draws: int) -> dict[tuple[str, int], np.ndarray]:
    """(modality given, labels a class) -> accuracy of each draw; `both` are features side by side, of both given."""
    labels = {role: next(iter(table['labels'].values())).argmax(axis=1) for role, table in tables.items()}
    sets = {role: passes.feature_sets(table) for role, table in tables.items()}
    found = {}
    for name in [name for name in ('video', 'audio', 'both') if name in sets['train']]:
        train, in_train = sets['train'][name]
        test, in_test = sets['test'][name]
        for count in counts:
            drawn = draw(labels['train'][in_train], count, num_draws)
            found[name, count] = accuracies(train[in_train], test[in_test], labels['test'][in_test], drawn)
    return found


def table_of(scores: Mapping[str, tuple[Mapping[Any, np.ndarray], Mapping[Any, np.ndarray]]]) -> str:
    """Markdown: a line a run; random -> trained, means over draws, and in how many of them the trained is above."""
    columns = list(next(iter(scores.values()))[0])
    lines = [['', *(f'{name}, {count} a class' for name, count in columns)]]
    for run, (random, trained) in scores.items():
        above = {column: 100 * np.mean(trained[column] > random[column]) for column in columns}
        cells = [f'{random[c].mean():.3f} → {trained[c].mean():.3f} ({above[c]:.0f} %)' for c in columns]
        lines.append([run, *cells])
    return format_markdown(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
    if wrong := [count for count in _LABELS.value if not count.isdecimal() or int(count) < 1]:
        raise ValueError(f'--labels={",".join(wrong)}: numbers of clips are wanted, such as 3,27.')
    counts = [int(count) for count in _LABELS.value]
    scores = {}
    for run in _RUNS.value:
        found = []
        for random_init in (True, False):
            overrides = {'data.path': str(Path(_DATA.value).absolute())}
            subject = subjects.load_subject(run, overrides=overrides, random_init=random_init)
            tables = Evaluator(subject, split='test').features()
            found.append(score_features(tables, counts, _DRAWS.value))
        scores['/'.join(Path(run).absolute().parts[-2:])] = (found[0], found[1])
        print(f'\n{table_of(scores)}', flush=True)


if __name__ == '__main__':
    flags.mark_flags_as_required(['data', 'runs'])
    try:
        app.run(main)
    except ValueError as error:
        sys.exit(f'results_few_labels: {error}')

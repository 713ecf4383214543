"""From the logits of a split to the numbers that papers print for AudioSet, VGGSound, ESC-50 and EPIC-KITCHENS-100.

Results are plain dicts that JSON can hold: 'kind', 'scores' (dicts of head, subset, metric, value, chance and
num_records), 'classes' (head -> a list with one dict a class) and 'notes' (what was left out, in words). What is not
defined is None, as the average precision of a class that no record is of; nothing is ever NaN.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, Shaped

from avmae_jax.evaluation import drawing, metrics, tables
from avmae_jax.structs import Array


class Head(NamedTuple):
    """What is known of the records of a split under one head.

    Attributes:
      logits: of every record, its several clips and crops averaged.
      targets: multi-hot; a row without a class is unlabelled, and not counted.
      names: of the classes.
    """

    logits: Float[Array, 'n c']
    targets: Shaped[Array, 'n c']
    names: Sequence[str]


Heads = Mapping[str, Head]


def score(kind: str, heads: Heads, **settings: Any) -> dict[str, Any]:
    """Everything that a benchmark of this kind counts.

    Args:
      kind: 'multi-label', 'single-label' or 'verb-noun'.
      settings: of `verb_noun`; the others have none.
    """
    if kind not in KINDS:
        raise ValueError(f'benchmark kind is {kind!r}; there are {", ".join(KINDS)}.')
    if not heads:
        raise ValueError('the data has no labels to score.')
    return KINDS[kind]({name: _checked(name, head) for name, head in heads.items()}, **settings)


def _checked(name: str, head: Head) -> Head:
    logits, targets = np.asarray(head.logits, np.float32), np.asarray(head.targets) > 0
    if logits.ndim != 2 or logits.shape != targets.shape or logits.shape[1] != len(head.names):
        shapes = f'{list(logits.shape)}, targets {list(targets.shape)} and {len(head.names)} class names'
        raise ValueError(f'head {name}: logits {shapes} do not fit; all must have the same classes and records.')
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise ValueError(f'head {name}: the logits of {len(broken)} of {len(logits)} records are not finite.')
    if not targets.any():
        raise ValueError(f'head {name}: none of the {len(targets)} records has a class; choose a labelled split.')
    return Head(logits, targets, tuple(head.names))


def _labelled(head: Head) -> Bool[np.ndarray, 'n']:
    return head.targets.any(axis=1)


def _labels(name: str, head: Head) -> Int[np.ndarray, 'n']:
    """The one class of each record; 0 where there is none."""
    several = head.targets.sum(axis=1) > 1
    if several.any():
        raise ValueError(
            f"head {name}: {several.sum()} records have several classes; the benchmark kind 'multi-label' would do."
        )
    return head.targets.argmax(axis=1)


def _unlabelled_note(counted: Bool[np.ndarray, 'n']) -> list[str]:
    missing = len(counted) - int(counted.sum())
    return [f'{missing:,} of {len(counted):,} records have no label and are not counted.'] if missing else []


def _score(head: str, subset: str, metric: str, value: float, chance: float, num_records: int) -> dict[str, Any]:
    about = {'head': head, 'subset': subset, 'metric': metric}
    return {**about, 'value': float(value), 'chance': float(chance), 'num_records': int(num_records)}


# -- Several classes a record: AudioSet --


def multi_label(heads: Heads) -> dict[str, Any]:
    """Means over classes of average precision and ROC AUC, and the d-prime of that mean AUC.

    d-prime is taken of the mean, not averaged, as by those who introduced it to AudioSet (Hershey et al., ICASSP 2017)
    and by AST and PANNs after them; that of each class is among the classes.
    """
    scores, classes, notes = [], {}, []
    for name, head in heads.items():
        counted = _labelled(head)
        notes += _unlabelled_note(counted)
        logits, targets = head.logits[counted], head.targets[counted]
        num_records = len(logits)
        precisions, aucs = metrics.average_precisions(logits, targets), metrics.roc_aucs(logits, targets)
        positives = targets.sum(axis=0)
        pairs = positives * (num_records - positives)
        mean_precision = float(np.mean(list(precisions.values())))
        scores.append(_score(name, 'all', 'mAP', mean_precision, metrics.mean_positive_rate(targets), num_records))
        if aucs:
            mean_auc = float(np.mean(list(aucs.values())))
            scores.append(_score(name, 'all', 'AUC', mean_auc, 0.5, num_records))
            distance = metrics.d_prime(mean_auc, int(pairs.sum()))
            scores.append(_score(name, 'all', 'd-prime', distance, 0.0, num_records))
        notes += _left_out(name, 'no record', [c for c in range(len(positives)) if not positives[c]], head.names)
        full = [c for c in range(len(positives)) if positives[c] == num_records]
        notes += _left_out(name, 'every record (of AUC and d-prime)', full, head.names)
        classes[name] = [
            {
                'class': c,
                'name': class_name,
                'num_records': int(positives[c]),
                'average_precision': precisions.get(c),
                'auc': aucs.get(c),
                'd_prime': metrics.d_prime(aucs[c], int(pairs[c])) if c in aucs else None,
            }
            for c, class_name in enumerate(head.names)
        ]
    return {'kind': 'multi-label', 'scores': scores, 'classes': classes, 'notes': notes}


def _left_out(head: str, having: str, classes: Sequence[int], names: Sequence[str]) -> list[str]:
    if not classes:
        return []
    some = ', '.join(names[c] for c in classes[:5]) + (', ...' if len(classes) > 5 else '')
    return [f'{head}: {len(classes)} of {len(names)} classes have {having} and are left out: {some}.']


# -- One class a record: VGGSound, ESC-50 --


def single_label(heads: Heads) -> dict[str, Any]:
    """Top-1 and top-5 accuracy, and the mean over the classes that occur of their accuracy."""
    scores, classes, notes = [], {}, []
    for name, head in heads.items():
        counted = _labelled(head)
        notes += _unlabelled_note(counted)
        logits, labels = head.logits[counted], _labels(name, head)[counted]
        scores += _top_k(name, 'all', metrics.ranks(logits, labels), labels, ks=(1, 5))
        mean = metrics.mean_class_accuracy(logits, labels)
        num_present = len(np.unique(labels))
        scores.append(_score(name, 'all', 'mean class accuracy', mean, 1 / num_present, len(labels)))
        classes[name] = _confused_classes(logits, labels, head.names)
        notes += _left_out(name, 'no record', np.setdiff1d(np.arange(len(head.names)), labels).tolist(), head.names)
    return {'kind': 'single-label', 'scores': scores, 'classes': classes, 'notes': notes}


def _top_k(head, subset, ranks, labels, ks) -> list[dict[str, Any]]:
    before, equal = ranks
    values = {k: metrics.hits(before, equal, k).mean() for k in ks}
    return [_score(head, subset, f'top-{k}', values[k], metrics.majority_rate(labels, k), len(labels)) for k in ks]


def _confused_classes(logits, labels, names) -> list[dict[str, Any]]:
    accuracies = metrics.class_accuracies(logits, labels)
    counts = metrics.confusion_matrix(logits, labels)
    rows = []
    for c, name in enumerate(names):
        wrong = counts[c].copy()
        wrong[c] = 0
        mistaken = int(wrong.argmax()) if wrong.any() else None
        rows.append(
            {
                'class': c,
                'name': name,
                'num_records': int(counts[c].sum().round()),
                'accuracy': accuracies.get(c),
                'mistaken_for': None if mistaken is None else names[mistaken],
                'mistaken_ratio': None if mistaken is None else float(wrong[mistaken] / counts[c].sum()),
            }
        )
    return rows


def confusion(name: str, head: Head) -> Float[np.ndarray, 'c c']:
    """[true class, class named] -> labelled records, of a head with one class a record."""
    head = _checked(name, head)
    counted = _labelled(head)
    return metrics.confusion_matrix(head.logits[counted], _labels(name, head)[counted])


def combine_folds(folds: Mapping[str, Mapping[str, Any]], tested: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Cross-validation: mean and standard deviation over folds, and accuracy over all records together.

    The deviation is that of the folds' values with n - 1 below. 'pooled' takes all folds as one test set, so that a
    larger fold counts more; with ESC-50's equal folds it is the mean.

    Args:
      folds: name of the fold -> what `single_label` gave for it.
      tested: name of the fold -> ids of the records it was tested on; none may be in two.
    """
    if len(folds) < 2:
        raise ValueError(f'cross-validation needs at least 2 folds; got {len(folds)}.')
    if set(folds) != set(tested):
        raise ValueError(f'results are of the folds {", ".join(folds)}, record ids of {", ".join(tested)}.')
    fold_of: dict[str, str] = {}
    for fold, ids in tested.items():
        for record_id in ids:
            if record_id in fold_of:
                raise ValueError(f'record {record_id} was tested in the folds {fold_of[record_id]} and {fold}.')
            fold_of[record_id] = fold
    first = next(iter(folds.values()))
    for fold, results in folds.items():
        if results['kind'] != 'single-label':
            raise ValueError(f"folds are combined for the kind 'single-label'; fold {fold} is {results['kind']!r}.")
        if _head_names(results) != _head_names(first):
            raise ValueError(f'fold {fold} has other heads or classes than fold {next(iter(folds))}.')
    scores = []
    for i, about in enumerate(first['scores']):
        rows = [results['scores'][i] for results in folds.values()]
        values = np.array([row['value'] for row in rows])
        num_records = np.array([row['num_records'] for row in rows])
        if about['metric'] == 'mean class accuracy':
            pooled = _pooled_class_accuracy([results['classes'][about['head']] for results in folds.values()])
        else:
            pooled = float(values @ num_records / num_records.sum())
        scores.append(
            {
                'head': about['head'],
                'metric': about['metric'],
                'mean': float(values.mean()),
                'standard_deviation': float(values.std(ddof=1)),
                'pooled': pooled,
                'chance': float(np.mean([row['chance'] for row in rows])),
                'num_records': int(num_records.sum()),
                'folds': {fold: float(value) for fold, value in zip(folds, values, strict=True)},
            }
        )
    return {'kind': 'folds', 'scores': scores}


def _head_names(results: Mapping[str, Any]) -> dict[str, list[str]]:
    return {head: [row['name'] for row in rows] for head, rows in results['classes'].items()}


def _pooled_class_accuracy(folds: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    accuracies = []
    for rows in zip(*folds, strict=True):
        num_records = sum(row['num_records'] for row in rows)
        if num_records:
            accuracies.append(sum((row['accuracy'] or 0) * row['num_records'] for row in rows) / num_records)
    return float(np.mean(accuracies))


# -- A verb and a noun a record: EPIC-KITCHENS-100 --


def verb_noun(
    heads: Heads,
    *,
    tail: Mapping[str, Bool[Array, '_c']] | None = None,
    unseen: Bool[Array, 'n'] | None = None,
) -> dict[str, Any]:
    """Top-1 and top-5 of verb, noun and action, and top-1 on the challenge's two subsets.

    As github.com/epic-kitchens/C1-Action-Recognition counts (`utils/metrics.py`): the tail of verbs are the records
    whose verb is a tail class, that of nouns likewise, and that of actions those of either.

    Args:
      tail: 'verb', 'noun' -> which classes are rare: `read_tail_classes` or `metrics.tail_classes`.
      unseen: records of participants that are not in the training split: `unseen_rows`.
    """
    if set(heads) != {'verb', 'noun'}:
        raise ValueError(f"kind 'verb-noun' needs the heads verb and noun; the data has {', '.join(heads)}.")
    counted = _labelled(heads['verb']) & _labelled(heads['noun'])
    if not counted.any():
        raise ValueError('no record has both a verb and a noun.')
    labels = {name: _labels(name, heads[name])[counted] for name in ('verb', 'noun')}
    logits = {name: heads[name].logits[counted] for name in labels}
    ranks = {name: metrics.ranks(logits[name], labels[name]) for name in labels}
    ranks['action'] = metrics.action_ranks(logits['verb'], logits['noun'], labels['verb'], labels['noun'])
    classes = {name: _confused_classes(logits[name], labels[name], heads[name].names) for name in labels}
    labels['action'] = labels['verb'] * len(heads['noun'].names) + labels['noun']

    notes = _unlabelled_note(counted)
    scores = [row for name in ranks for row in _top_k(name, 'all', ranks[name], labels[name], ks=(1, 5))]
    for subset, rows in (
        ('unseen participants', _of_unseen(unseen, counted)),
        ('tail classes', _of_tail(tail, labels, heads)),
    ):
        if rows is None:
            notes.append(f'{subset}: not told which they are.')
            continue
        for name, chosen in rows.items():
            if not chosen.any():
                notes.append(f'{subset}, {name}: there is no such record.')
                continue
            before, equal = ranks[name]
            scores += _top_k(name, subset, (before[chosen], equal[chosen]), labels[name][chosen], ks=(1,))
    return {'kind': 'verb-noun', 'scores': scores, 'classes': classes, 'notes': notes}


def _of_unseen(unseen, counted) -> dict[str, np.ndarray] | None:
    if unseen is None:
        return None
    if len(unseen) != len(counted):
        raise ValueError(f'unseen tells of {len(unseen)} records; there are {len(counted)}.')
    return dict.fromkeys(('verb', 'noun', 'action'), np.asarray(unseen, bool)[counted])


def _of_tail(tail, labels, heads) -> dict[str, np.ndarray] | None:
    if tail is None:
        return None
    rows = {}
    for name in ('verb', 'noun'):
        if name not in tail or len(tail[name]) != len(heads[name].names):
            told = len(tail[name]) if name in tail else 'none'
            raise ValueError(f'tail must tell of all {len(heads[name].names)} {name} classes; it tells of {told}.')
        rows[name] = np.asarray(tail[name], bool)[labels[name]]
    return {**rows, 'action': rows['verb'] | rows['noun']}


KINDS: Mapping[str, Callable[..., dict[str, Any]]] = {
    'multi-label': multi_label,
    'single-label': single_label,
    'verb-noun': verb_noun,
}


def participants(record_ids: Sequence[str]) -> list[str]:
    """Who cooks in each record: 'P01' of the narration 'P01_11_0'."""
    found = []
    for record_id in record_ids:
        match = re.fullmatch(r'(P\d+)_\d+_\d+', record_id)
        if match is None:
            raise ValueError(f'{record_id!r} is no narration id of EPIC-KITCHENS-100, such as P01_11_0.')
        found.append(match[1])
    return found


def unseen_rows(record_ids: Sequence[str], unseen: Collection[str]) -> Bool[np.ndarray, 'n']:
    """The records of participants in `unseen`: `read_unseen_participants`, or those that training has not."""
    return np.array([participant in unseen for participant in participants(record_ids)], bool)


def read_unseen_participants(path: epath.PathLike) -> frozenset[str]:
    """Of EPIC_100_unseen_participant_ids_validation.csv, which lies beside the published annotations."""
    return frozenset(_read_column(path, 'participant_id'))


def read_tail_classes(path: epath.PathLike, head: str, num_classes: int) -> Bool[np.ndarray, '_c']:
    """Of EPIC_100_tail_verbs.csv or EPIC_100_tail_nouns.csv, which lie beside the published annotations."""
    tail = np.zeros(num_classes, bool)
    for cell in _read_column(path, head):
        if not cell.isdigit() or int(cell) >= num_classes:
            raise ValueError(f'{path}: {cell!r} is no {head} class; there are 0 to {num_classes - 1}.')
        tail[int(cell)] = True
    return tail


def read_subsets(folder: epath.Path, ids: Sequence[str], num_classes: Mapping[str, int]) -> dict[str, Any]:
    """What `verb_noun` takes of the challenge's subsets, from the files that lie beside its annotations."""
    unseen = read_unseen_participants(folder / 'EPIC_100_unseen_participant_ids_validation.csv')
    tail = {
        head: read_tail_classes(folder / f'EPIC_100_tail_{head}s.csv', head, count)
        for head, count in num_classes.items()
    }
    return {'tail': tail, 'unseen': unseen_rows(ids, unseen)}


def _read_column(path: epath.PathLike, column: str) -> list[str]:
    lines = list(csv.DictReader(epath.Path(path).read_text().splitlines()))
    if not lines or column not in lines[0]:
        raise ValueError(f'{path} has no column {column!r} with something in it.')
    return [(line[column] or '').strip() for line in lines]


# -- Files for people --


def write_details(stem: epath.PathLike, results: Mapping[str, Any], heads: Heads) -> list[epath.Path]:
    """STEM-HEAD-classes.csv, and STEM-HEAD-confusion.png where a record has one class; what was written."""
    stem, written = epath.Path(stem), []
    for name, rows in results['classes'].items():
        path = stem.parent / f'{stem.name}-{name}-classes.csv'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tables.class_csv(rows))
        written.append(path)
        if results['kind'] != 'multi-label':
            path = stem.parent / f'{stem.name}-{name}-confusion.png'
            title = f'{stem.name}, {name}'
            drawing.write_png(path, drawing.draw_confusion(confusion(name, heads[name]), heads[name].names, title))
            written.append(path)
    return written

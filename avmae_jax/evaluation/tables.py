"""Results as aligned text for a terminal; every number beside what guessing gives."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from avmae_jax.evaluation.reconstruction import BASELINES


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first row is the head, cells that look like numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [all(_is_number(row[i]) for row in rows[1:]) for i in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return ('  ' + '   '.join(cells)).rstrip()

    rule = '  ' + '   '.join('-' * width for width in widths)
    return '\n'.join([line(rows[0]), rule, *map(line, rows[1:])])


def format_markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head."""
    lines = [rows[0], ['---'] * len(rows[0]), *rows[1:]]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def _is_number(cell: str) -> bool:
    return not cell or cell == '-' or cell.lstrip('-')[:1].isdigit()


def reconstruction_table(errors: Sequence[Mapping[str, Any]]) -> str:
    """One line a term, modality and unit."""
    units = {'input': 'as the model sees it', 'target': 'standardised patches'}
    raw = {'audio': 'nats of log-mel', 'video': 'RGB in [0, 1]', 'image': 'RGB in [0, 1]'}
    rows = [['term', 'modality', 'unit', 'model', '+-', *BASELINES, 'clips']]
    for error in errors:
        unit = raw[error['modality']] if error['unit'] == 'raw' else units[error['unit']]
        rows.append(
            [
                error['term'],
                error['modality'],
                unit,
                f'{error["mean"]:.5f}' + ('*' if error['true_scale'] else ''),
                f'{error["standard_error"]:.5f}',
                *(f'{error["baselines"][name]:.5f}' if name in error['baselines'] else '-' for name in BASELINES),
                f'{error["num_clips"]:,}',
            ]
        )
    note = '\n  * given the true mean and deviation of each patch, for which the model was not asked'
    starred = any(error['true_scale'] for error in errors)
    return 'Hidden patches: mean squared error, lower is better\n' + format_table(rows) + (note if starred else '')


def classification_table(scores: Sequence[Mapping[str, Any]]) -> str:
    """One line a head and set of features; k-NN and probe side by side."""
    lines: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for score in scores:
        lines.setdefault((score['head'], score['features']), {})[score['method']] = score
    methods = list(dict.fromkeys(score['method'] for score in scores))
    rows = [['labels', 'features', 'metric', *methods, 'chance', 'train clips', 'test clips']]
    for (head, features), by_method in lines.items():
        any_score = next(iter(by_method.values()))
        rows.append(
            [
                head,
                features,
                any_score['metric'],
                *(f'{by_method[m]["value"]:.3f}' if m in by_method else '-' for m in methods),
                f'{any_score["chance"]:.3f}',
                f'{any_score["num_train"]:,}',
                f'{any_score["num_test"]:,}',
            ]
        )
    return 'Classes from frozen features, higher is better\n' + format_table(rows)


def retrieval_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line a direction and way of comparing, and chance below."""
    ks = [name for name in results[0]['scores'] if name.startswith('recall@')]
    rows = [['query -> candidates', 'compared by', *ks, 'median rank']]
    chance = results[0]['chance']
    for result in results:
        scores = result['scores']
        cells = [*(f'{scores[k]:.3f}' for k in ks), f'{scores["median_rank"]:.1f}']
        rows.append([f'{result["query"]} -> {result["candidates"]}', result['method'], *cells])
    rows.append(['', 'chance', *(f'{chance[k]:.3f}' for k in ks), f'{chance["median_rank"]:.1f}'])
    return f'Finding the other modality of a clip among {results[0]["num_candidates"]:,}\n' + format_table(rows)


def benchmark_table(results: Mapping[str, Any]) -> str:
    """One line a head, subset and metric of what `benchmarks.score` gave, and below what was left out."""
    rows = [['labels', 'subset', 'metric', 'score', 'chance', 'clips']]
    for score in results['scores']:
        values = [f'{score["value"]:.4f}', f'{score["chance"]:.4f}', f'{score["num_records"]:,}']
        rows.append([score['head'], score['subset'], score['metric'], *values])
    return f'Benchmark, {results["kind"]}, higher is better\n' + '\n  '.join([format_table(rows), *results['notes']])


def modality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a metric, one column for each thing the model was given, of what `classes.modality_rows` gave."""
    ways = list(dict.fromkeys(row['given'] for row in rows))
    lines: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row['head'], row['subset'], row['metric']), {})[row['given']] = row
    cells = [['labels', 'subset', 'metric', *ways, 'chance']]
    for about, by_way in lines.items():
        values = [f'{by_way[way]["value"]:.4f}' if way in by_way else '-' for way in ways]
        cells.append([*about, *values, f'{next(iter(by_way.values()))["chance"]:.4f}'])
    return 'Benchmark by what the model was given, higher is better\n' + format_table(cells)


def fold_table(results: Mapping[str, Any]) -> str:
    """One line a head and metric of what `benchmarks.combine_folds` gave."""
    folds = list(results['scores'][0]['folds'])
    rows = [['labels', 'metric', 'mean', '+-', 'pooled', 'chance', *folds, 'clips']]
    for score in results['scores']:
        values = [score[key] for key in ('mean', 'standard_deviation', 'pooled', 'chance')]
        values += [score['folds'][fold] for fold in folds]
        rows.append([score['head'], score['metric'], *(f'{v:.4f}' for v in values), f'{score["num_records"]:,}'])
    title = f'Cross-validation over {len(folds)} folds, higher is better; +- is the deviation between folds'
    return title + '\n' + format_table(rows)


def class_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a class for a spreadsheet; what is not defined is an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows({key: f'{v:.6f}' if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    return file.getvalue()


TABLES: Mapping[str, Callable[[Any], str]] = {
    'reconstruction': reconstruction_table,
    'benchmark': benchmark_table,
    'modalities': modality_table,
    'classification': classification_table,
    'retrieval': retrieval_table,
}


def describe(results: Mapping[str, Any]) -> str:
    """The tables of all kinds of results that there are."""
    return '\n\n'.join(TABLES[kind](rows) for kind, rows in results.items() if rows)

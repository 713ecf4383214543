"""Whole benchmarks from logits: what is counted, what is left out, and that the results say so."""

import csv
import json
import os
import pathlib

import cv2
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from avmae_jax.data import catalogue
from avmae_jax.evaluation import benchmarks, metrics, tables
from avmae_jax.evaluation.benchmarks import Head


def one_hot(labels, num_classes):
    """A label of -1 is none."""
    return (np.asarray(labels)[:, None] == np.arange(num_classes)).astype(np.float32)


def make_head(num_records=60, num_classes=6, seed=0, labels=None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_records) if labels is None else labels
    logits = rng.standard_normal((len(labels), num_classes)).astype(np.float32)
    return Head(logits, one_hot(labels, num_classes), [f'class {c}' for c in range(num_classes)])


def values(results, subset='all'):
    return {(s['head'], s['metric']): s['value'] for s in results['scores'] if s['subset'] == subset}


def through_json(results):
    """As it comes back from a file; a NaN or an infinity is an error."""
    return json.loads(json.dumps(results, allow_nan=False))


def test_multi_label_counts_the_classes_that_can_be_counted():
    rng = np.random.default_rng(0)
    targets = (rng.random((80, 7)) < 0.3).astype(np.float32)
    targets[:, 2], targets[:, 5] = 0, 1
    logits = rng.integers(0, 12, (80, 7)).astype(np.float32)
    results = benchmarks.score('multi-label', {'label': Head(logits, targets, list('abcdefg'))})
    assert through_json(results) == results
    scores = values(results)
    present, both = [0, 1, 3, 4, 5, 6], [0, 1, 3, 4, 6]
    assert scores['label', 'mAP'] == pytest.approx(
        sklearn_metrics.average_precision_score(targets[:, present], logits[:, present], average='macro')
    )
    assert scores['label', 'AUC'] == pytest.approx(
        sklearn_metrics.roc_auc_score(targets[:, both], logits[:, both], average='macro')
    )
    assert scores['label', 'd-prime'] == pytest.approx(metrics.d_prime(scores['label', 'AUC'], 10**9))
    rows = results['classes']['label']
    assert [row['auc'] is None for row in rows] == [c in (2, 5) for c in range(7)]
    assert [row['num_records'] for row in rows] == targets.sum(axis=0).tolist()
    assert rows[2]['average_precision'] is None and rows[5]['average_precision'] == 1
    assert any('1 of 7 classes have no record' in note and 'c.' in note for note in results['notes'])
    assert any('every record' in note and 'f.' in note for note in results['notes'])


def test_perfect_multi_label_scores_are_finite():
    targets = one_hot([0, 1, 0, 2, -1], 3)
    results = benchmarks.score('multi-label', {'label': Head(targets[:4], targets[:4], 'abc')})
    assert values(through_json(results))['label', 'AUC'] == 1
    assert np.isfinite(values(results)['label', 'd-prime'])
    # One class that all have: there is an average precision, and nothing to tell it from.
    results = benchmarks.score('multi-label', {'label': Head(np.ones((3, 1)), np.ones((3, 1)), 'a')})
    assert list(values(through_json(results))) == [('label', 'mAP')]


def test_records_without_a_label_do_not_count():
    head = make_head(40)
    longer = Head(np.concatenate([head.logits, np.ones((3, 6))]), np.pad(head.targets, ((0, 3), (0, 0))), head.names)
    for kind in ('multi-label', 'single-label'):
        alone, with_them = (benchmarks.score(kind, {'label': h}) for h in (head, longer))
        assert with_them['scores'] == alone['scores'] and with_them['classes'] == alone['classes']
        assert with_them['notes'] == ['3 of 43 records have no label and are not counted.', *alone['notes']]
    np.testing.assert_array_equal(benchmarks.confusion('label', longer), benchmarks.confusion('label', head))


def test_single_label_is_top_1_top_5_and_the_mean_over_classes_that_occur():
    head = make_head(labels=np.random.default_rng(5).integers(0, 7, 99), num_classes=9)
    head = head._replace(logits=head.logits + head.targets)  # Most are right.
    results = benchmarks.score('single-label', {'label': head})
    assert through_json(results) == results
    labels, predicted = head.targets.argmax(1), head.logits.argmax(1)
    recalls = sklearn_metrics.recall_score(labels, predicted, labels=np.arange(7), average=None)
    assert values(results) == pytest.approx(
        {
            ('label', 'top-1'): sklearn_metrics.accuracy_score(labels, predicted),
            ('label', 'top-5'): sklearn_metrics.top_k_accuracy_score(labels, head.logits, k=5, labels=np.arange(9)),
            ('label', 'mean class accuracy'): recalls.mean(),
        }
    )
    rows = results['classes']['label']
    assert [row['accuracy'] for row in rows] == pytest.approx([*recalls, None, None])
    wrong = benchmarks.confusion('label', head) * (1 - np.eye(9))
    for c in range(7):
        assert rows[c]['mistaken_for'] == f'class {wrong[c].argmax()}'
        assert rows[c]['mistaken_ratio'] == wrong[c].max() / rows[c]['num_records']
    assert any('2 of 9 classes have no record' in note for note in results['notes'])


def test_always_naming_the_most_frequent_classes_is_chance():
    labels = np.array([0] * 5 + [1] * 3 + [2] * 2 + [3])
    head = Head(np.tile(np.arange(5, 0, -1.0), (11, 1)), one_hot(labels, 5), 'abcde')  # There is no e.
    for row in benchmarks.score('single-label', {'label': head})['scores']:
        assert row['value'] == pytest.approx(row['chance'])


def test_bad_input_is_told_what_is_wrong():
    head = make_head(8)
    with pytest.raises(ValueError, match="'multilabel'; there are multi-label, single-label"):
        benchmarks.score('multilabel', {'label': head})
    with pytest.raises(ValueError, match='no labels'):
        benchmarks.score('single-label', {})
    with pytest.raises(ValueError, match='5 class names do not fit'):
        benchmarks.score('single-label', {'label': head._replace(names=head.names[:5])})
    with pytest.raises(ValueError, match='2 of 8 records are not finite'):
        broken = head.logits.copy()
        broken[2:4, 1] = np.nan, np.inf
        benchmarks.score('single-label', {'label': head._replace(logits=broken)})
    with pytest.raises(ValueError, match='none of the 8 records has a class'):
        benchmarks.score('multi-label', {'label': head._replace(targets=np.zeros((8, 6)))})
    with pytest.raises(ValueError, match="8 records have several classes; .* 'multi-label' would do"):
        benchmarks.score('single-label', {'label': head._replace(targets=np.ones((8, 6)))})
    with pytest.raises(ValueError, match='needs the heads verb and noun; the data has label'):
        benchmarks.score('verb-noun', {'label': head})


# -- Folds --


def fold_results(sizes, num_classes=6):
    heads = {str(i + 1): make_head(n, num_classes, seed=i) for i, n in enumerate(sizes)}
    folds = {fold: benchmarks.score('single-label', {'label': head}) for fold, head in heads.items()}
    return heads, folds, {fold: [f'{fold}-{i}' for i in range(len(head.logits))] for fold, head in heads.items()}


@pytest.mark.parametrize('sizes', [(40,) * 5, (40, 11, 3, 25, 30)], ids=['equal', 'unequal'])
def test_folds_are_averaged_and_pooled(sizes):
    heads, folds, tested = fold_results(sizes)
    combined = {row['metric']: row for row in benchmarks.combine_folds(folds, tested)['scores']}
    together = Head(*(np.concatenate([h[i] for h in heads.values()]) for i in (0, 1)), heads['1'].names)
    everything = values(benchmarks.score('single-label', {'label': together}))
    for metric, row in combined.items():
        found = np.array([values(results)['label', metric] for results in folds.values()])
        assert list(row['folds'].values()) == found.tolist()
        assert row['mean'] == pytest.approx(found.mean())
        assert row['standard_deviation'] == pytest.approx(np.sqrt(np.sum((found - found.mean()) ** 2) / 4))
        assert row['pooled'] == pytest.approx(everything['label', metric])
        assert row['num_records'] == sum(sizes)
    if len(set(sizes)) == 1:
        assert combined['top-1']['pooled'] == pytest.approx(combined['top-1']['mean'])
    assert tables.fold_table(benchmarks.combine_folds(folds, tested)).splitlines()[1].split()[-6:-1] == list(folds)


def test_folds_that_share_a_record_or_differ_are_refused():
    _, folds, tested = fold_results((8, 9))
    with pytest.raises(ValueError, match='record 1-3 was tested in the folds 1 and 2'):
        benchmarks.combine_folds(folds, {**tested, '2': [*tested['2'], '1-3']})
    with pytest.raises(ValueError, match='at least 2 folds; got 1'):
        benchmarks.combine_folds({'1': folds['1']}, {'1': tested['1']})
    with pytest.raises(ValueError, match='of the folds 1, 2, record ids of 1'):
        benchmarks.combine_folds(folds, {'1': tested['1']})
    other = benchmarks.score('single-label', {'label': make_head(9, 5)})
    with pytest.raises(ValueError, match='fold 2 has other heads or classes than fold 1'):
        benchmarks.combine_folds({**folds, '2': other}, tested)
    several = benchmarks.score('multi-label', {'label': make_head(9)})
    with pytest.raises(ValueError, match="fold 2 is 'multi-label'"):
        benchmarks.combine_folds({**folds, '2': several}, tested)


# -- EPIC-KITCHENS-100 --


def kitchen_heads(num_records=400, seed=0):
    heads = {'verb': make_head(num_records, 7, seed), 'noun': make_head(num_records, 8, seed + 1)}
    # Often right, so that there is something to count.
    return {name: head._replace(logits=head.logits + head.targets) for name, head in heads.items()}


def challenge_scores(heads, tail, unseen):
    """The challenge's accuracies counted record by record, pair by pair."""
    labels = {name: head.targets.argmax(1) for name, head in heads.items()}
    right: dict = {
        ('verb', 1): [],
        ('verb', 5): [],
        ('noun', 1): [],
        ('noun', 5): [],
        ('action', 1): [],
        ('action', 5): [],
    }
    for i in range(len(unseen)):
        probability = {
            n: np.exp(h.logits[i].astype(float)) / np.exp(h.logits[i].astype(float)).sum() for n, h in heads.items()
        }
        order = {name: np.argsort(-p) for name, p in probability.items()}
        pairs = [(v, n) for v in order['verb'] for n in order['noun']]
        pairs.sort(key=lambda pair: -probability['verb'][pair[0]] * probability['noun'][pair[1]])
        for k in (1, 5):
            for name in ('verb', 'noun'):
                right[name, k].append(labels[name][i] in order[name][:k])
            right['action', k].append((labels['verb'][i], labels['noun'][i]) in pairs[:k])
    rare = {name: np.isin(labels[name], np.flatnonzero(tail[name])) for name in labels}
    rare['action'] = rare['verb'] | rare['noun']
    scores = {('all', name, k): np.mean(r) for (name, k), r in right.items()}
    for name in rare:
        scores['unseen participants', name, 1] = np.mean(np.array(right[name, 1])[unseen])
        scores['tail classes', name, 1] = np.mean(np.array(right[name, 1])[rare[name]])
    return scores


def test_verb_noun_is_what_the_challenge_counts():
    heads = kitchen_heads()
    rng = np.random.default_rng(9)
    tail, unseen = {'verb': rng.random(7) < 0.3, 'noun': rng.random(8) < 0.4}, rng.random(400) < 0.2
    results = benchmarks.score('verb-noun', heads, tail=tail, unseen=unseen)
    assert through_json(results) == results and results['notes'] == []
    found = {(s['subset'], s['head'], int(s['metric'][-1])): s['value'] for s in results['scores']}
    wanted = challenge_scores(heads, tail, unseen)
    assert found == pytest.approx(wanted)
    assert 0.1 < wanted['all', 'action', 1] < wanted['all', 'action', 5] < 0.95
    counted = {(s['subset'], s['head']): s['num_records'] for s in results['scores']}
    assert counted['unseen participants', 'action'] == unseen.sum()
    assert counted['tail classes', 'action'] > max(counted['tail classes', n] for n in ('verb', 'noun'))


def test_a_record_needs_both_verb_and_noun_and_subsets_that_are_not_there_are_said():
    heads = kitchen_heads(50)
    shorter = {name: Head(head.logits[4:], head.targets[4:], head.names) for name, head in heads.items()}
    heads['verb'].targets[:2], heads['noun'].targets[1:4] = 0, 0
    unseen = np.arange(50) % 3 == 0
    tail = {'verb': np.zeros(7, bool), 'noun': np.ones(8, bool)}
    results = benchmarks.score('verb-noun', heads, unseen=unseen, tail=tail)
    assert results['scores'] == benchmarks.score('verb-noun', shorter, unseen=unseen[4:], tail=tail)['scores']
    assert results['notes'] == [
        '4 of 50 records have no label and are not counted.',
        'tail classes, verb: there is no such record.',
    ]
    assert {s['head'] for s in results['scores'] if s['subset'] == 'tail classes'} == {'noun', 'action'}
    untold = benchmarks.score('verb-noun', shorter)
    assert {s['subset'] for s in untold['scores']} == {'all'} and len(untold['notes']) == 2
    with pytest.raises(ValueError, match='tell of all 7 verb classes; it tells of 3'):
        benchmarks.score('verb-noun', shorter, tail={'verb': np.ones(3, bool), 'noun': np.ones(8, bool)})
    with pytest.raises(ValueError, match='tells of 9 records; there are 46'):
        benchmarks.score('verb-noun', shorter, unseen=np.ones(9, bool))


def test_published_lists_tell_tail_classes_and_unseen_participants(tmp_path):
    (tmp_path / 'tail.csv').write_text('verb\n2\n4\n')
    np.testing.assert_array_equal(benchmarks.read_tail_classes(tmp_path / 'tail.csv', 'verb', 5), [0, 0, 1, 0, 1])
    with pytest.raises(ValueError, match="'4' is no verb class; there are 0 to 3"):
        benchmarks.read_tail_classes(tmp_path / 'tail.csv', 'verb', 4)
    with pytest.raises(ValueError, match="no column 'noun'"):
        benchmarks.read_tail_classes(tmp_path / 'tail.csv', 'noun', 5)
    (tmp_path / 'unseen.csv').write_text('participant_id\nP18\nP32\n')
    unseen = benchmarks.read_unseen_participants(tmp_path / 'unseen.csv')
    assert benchmarks.unseen_rows(['P18_01_3', 'P01_11_0', 'P32_102_77'], unseen).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="'clip7' is no narration id"):
        benchmarks.participants(['P01_11_0', 'clip7'])


def test_the_published_validation_list_has_participants_in_its_ids_and_a_tail_like_the_published_one():
    repository = pathlib.Path(__file__).resolve().parents[2]
    folder = pathlib.Path(os.environ.get('AVMAE_DATA', repository.parent / 'shared' / 'data')) / 'labels'
    path = folder / 'epic100' / 'EPIC_100_validation.csv'
    if not path.exists():
        pytest.skip(f'{path} is not there; set AVMAE_DATA to the folder with the published tables.')
    rows = list(csv.DictReader(path.open()))
    ids = [row['narration_id'] for row in rows]
    assert benchmarks.participants(ids) == [row['participant_id'] for row in rows]
    # Validation is not training, but its tail must be much the same as that of EPIC_100_tail_verbs.csv.
    num_verbs = catalogue.DATASETS['epic'].num_classes['verb']
    counts = np.bincount([int(row['verb_class']) for row in rows], minlength=num_verbs)
    published = ~np.isin(np.arange(num_verbs), [*range(10), 11])
    assert (metrics.tail_classes(counts) == published).mean() > 0.95


# -- For people --


def test_details_are_a_table_and_a_picture_of_each_head(tmp_path):
    heads = kitchen_heads(30)
    results = benchmarks.score('verb-noun', heads)
    written = benchmarks.write_details(tmp_path / 'out' / 'validation-000100', results, heads)
    assert sorted(path.name for path in written) == [
        f'validation-000100-{name}-{what}'
        for name in ('noun', 'verb')
        for what in ('classes.csv', 'confusion.png')
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / 'out' / 'validation-000100-verb-classes.csv').open()))
    assert [row['name'] for row in rows] == list(heads['verb'].names)
    assert [float(row['accuracy']) for row in rows] == pytest.approx(
        [row['accuracy'] for row in results['classes']['verb']], abs=1e-6
    )
    assert cv2.imread(str(tmp_path / 'out' / 'validation-000100-noun-confusion.png')).shape[0] > 8 * 40
    several = benchmarks.score('multi-label', {'label': make_head(labels=np.array([0, 1, 2, 0]))})
    (path,) = benchmarks.write_details(tmp_path / 'several', several, {'label': make_head()})
    lines = path.read_text().splitlines()
    assert lines[0] == 'class,name,num_records,average_precision,auc,d_prime' and lines[6] == '5,class 5,0,,,'


def test_the_table_has_every_score_and_what_was_left_out():
    results = benchmarks.score('single-label', {'label': make_head(labels=np.array([0, 1, 2, 0]))})
    lines = tables.benchmark_table(results).splitlines()
    assert len(lines) == 1 + 2 + 3 + 1
    assert lines[3].split()[:3] == ['label', 'all', 'top-1'] and lines[3].endswith(' 4')
    assert '3 of 6 classes have no record' in lines[-1]


def test_numbers_below_zero_stand_to_the_right_too():
    assert tables.format_table([['score'], ['-0.5'], ['1.25']]).splitlines()[2] == '   -0.5'

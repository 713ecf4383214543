import itertools
import math

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as sklearn_metrics

from avmae_jax.evaluation import metrics


@pytest.mark.parametrize('levels', [2, 3, 1000])
def test_average_precision_is_sklearns_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    for num_rows in (1, 2, 7, 200):
        scores = rng.integers(0, levels, num_rows).astype(np.float32)
        positive = rng.random(num_rows) < 0.3
        positive[rng.integers(num_rows)] = True
        wanted = sklearn_metrics.average_precision_score(positive, scores)
        assert metrics.average_precision(scores, positive) == pytest.approx(wanted, abs=1e-12)


def test_mean_average_precision_leaves_out_classes_without_rows():
    rng = np.random.default_rng(0)
    targets = (rng.random((50, 6)) < 0.2).astype(np.float32)
    targets[:, 4] = 0
    scores = rng.standard_normal((50, 6)).astype(np.float32)
    rest = [0, 1, 2, 3, 5]
    wanted = sklearn_metrics.average_precision_score(targets[:, rest], scores[:, rest], average='macro')
    assert metrics.mean_average_precision(scores, targets) == pytest.approx(wanted, abs=1e-12)
    with pytest.raises(ValueError, match='no row has a label'):
        metrics.mean_average_precision(scores, np.zeros_like(targets))


def retrieve(similarity, **kwargs):
    """Where query i asks for candidate i."""
    return metrics.retrieval(*metrics.ranks(similarity, np.arange(len(similarity))), **kwargs)


def test_scores_that_say_nothing_get_chance():
    targets = (np.random.default_rng(0).random((40, 5)) < 0.2).astype(np.float32)
    equal = np.zeros((40, 5), np.float32)
    assert metrics.mean_average_precision(equal, targets) == pytest.approx(metrics.mean_positive_rate(targets))
    nothing = np.zeros((37, 37), np.float32)
    assert retrieve(nothing) == pytest.approx(metrics.retrieval_chance(37))
    assert metrics.retrieval_chance(4)['recall@10'] == 1


@pytest.mark.parametrize('levels', [2, 3, 1000])
def test_roc_auc_is_sklearns_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    for num_rows in (2, 3, 7, 200):
        scores = rng.integers(0, levels, num_rows).astype(np.float32)
        positive = rng.random(num_rows) < 0.3
        positive[:2] = [True, False]
        wanted = sklearn_metrics.roc_auc_score(positive, scores)
        assert metrics.roc_auc(scores, positive) == pytest.approx(wanted, abs=1e-12)
    for positive in (np.ones(4), np.zeros(4)):
        with pytest.raises(ValueError, match='of 4 are of it'):
            metrics.roc_auc(np.arange(4.0), positive)


def test_classes_without_rows_or_without_others_have_no_auc():
    rng = np.random.default_rng(0)
    targets = (rng.random((50, 6)) < 0.2).astype(np.float32)
    targets[:, 4], targets[:, 1] = 0, 1
    scores = rng.integers(0, 9, (50, 6)).astype(np.float32)
    aucs = metrics.roc_aucs(scores, targets)
    assert list(aucs) == [0, 2, 3, 5]
    rest = list(aucs)
    wanted = sklearn_metrics.roc_auc_score(targets[:, rest], scores[:, rest], average=None)
    np.testing.assert_allclose(list(aucs.values()), wanted, atol=1e-12)
    assert list(metrics.average_precisions(scores, targets)) == [0, 1, 2, 3, 5]


def test_only_the_order_of_scores_counts():
    rng = np.random.default_rng(3)
    logits = rng.integers(-20, 20, (60, 5)).astype(np.float32) / 8
    targets = rng.random((60, 5)) < 0.4
    for transform in (lambda x: 1 / (1 + np.exp(-x)), lambda x: 3 * x - 100, lambda x: x**3):
        changed = transform(logits.astype(np.float64))
        assert metrics.average_precisions(changed, targets) == metrics.average_precisions(logits, targets)
        assert metrics.roc_aucs(changed, targets) == metrics.roc_aucs(logits, targets)
    for name, auc in metrics.roc_aucs(-logits, targets).items():
        assert auc == pytest.approx(1 - metrics.roc_aucs(logits, targets)[name])


def test_d_prime_is_the_distance_of_two_normal_curves_and_always_finite():
    for auc in (0.03, 0.5, 0.76, 0.999):
        wanted = math.sqrt(2) * scipy.stats.norm.ppf(auc)
        assert metrics.d_prime(auc, num_pairs=10**6) == pytest.approx(wanted, abs=1e-9)
    # Curves that far apart have that AUC.
    assert scipy.stats.norm.cdf(metrics.d_prime(0.9, 10**6) / math.sqrt(2)) == pytest.approx(0.9)
    for num_pairs in (1, 2, 10, 10**12):
        best, worst = metrics.d_prime(1.0, num_pairs), metrics.d_prime(0.0, num_pairs)
        assert math.isfinite(best) and worst == -best
        assert best >= metrics.d_prime(1 - 0.5 / num_pairs, num_pairs)  # One pair of equals is no better.
    assert metrics.d_prime(1.0, 10) < metrics.d_prime(1.0, 1000)  # More rows say more.


def test_single_label_scores_are_sklearns():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 7, 99), rng.standard_normal((99, 8)).astype(np.float32)  # The last never occurs.
    predicted = scores.argmax(axis=1)
    assert metrics.top_k_accuracy(scores, labels) == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    for k in (1, 3, 5):
        wanted = sklearn_metrics.top_k_accuracy_score(labels, scores, k=k, labels=np.arange(8))
        assert metrics.top_k_accuracy(scores, labels, k) == pytest.approx(wanted)
    recalls = sklearn_metrics.recall_score(labels, predicted, labels=np.arange(7), average=None)
    assert list(metrics.class_accuracies(scores, labels).values()) == pytest.approx(recalls.tolist())
    assert metrics.mean_class_accuracy(scores, labels) == pytest.approx(recalls.mean())
    wanted = sklearn_metrics.confusion_matrix(labels, predicted, labels=np.arange(8))
    np.testing.assert_array_equal(metrics.confusion_matrix(scores, labels), wanted)


def test_k_beyond_the_number_of_classes_finds_everything():
    scores, labels = np.eye(3, dtype=np.float32), np.array([2, 0, 1])
    assert [metrics.top_k_accuracy(scores, labels, k) for k in (1, 3, 5)] == [0, 1, 1]
    assert metrics.majority_rate(np.array([3, 3, 0, 1])) == 0.5
    assert [metrics.majority_rate(np.array([3, 3, 0, 1]), k) for k in (2, 5)] == [0.75, 1]


def test_top_k_of_ties_is_the_mean_over_their_orders():
    scores, labels = np.array([[2, 2, 2, 1, 3], [0, 0, 0, 0, 0]], np.float32), np.array([1, 4])
    for k in (1, 2, 3, 4):
        found = []
        for order in itertools.permutations(range(5)):
            rank = [sorted(range(5), key=lambda c: (-row[c], order[c])).index(y) for row, y in zip(scores, labels)]  # noqa: B905
            found.append(np.mean(np.array(rank) < k))
        assert metrics.top_k_accuracy(scores, labels, k) == pytest.approx(np.mean(found))


def test_the_diagonal_of_a_confusion_matrix_is_what_accuracy_counts_ties_included():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 3, (40, 4)).astype(np.float32), rng.integers(0, 4, 40)
    counts = metrics.confusion_matrix(scores, labels)
    np.testing.assert_allclose(counts.sum(axis=1), np.bincount(labels, minlength=4))
    assert np.trace(counts) / 40 == pytest.approx(metrics.top_k_accuracy(scores, labels))


def test_the_first_k_actions_are_those_of_all_pairs_by_probability():
    rng = np.random.default_rng(2)
    verb_scores, noun_scores = (rng.standard_normal((300, c)).astype(np.float32) for c in (5, 7))
    verbs, nouns = rng.integers(0, 5, 300), rng.integers(0, 7, 300)
    pairs = np.einsum('nv,no->nvo', scipy.special.softmax(verb_scores, 1), scipy.special.softmax(noun_scores, 1))
    place = (-pairs.reshape(300, -1)).argsort(axis=1)
    for rows_at_once in (7, 300):
        ranks = metrics.action_ranks(verb_scores, noun_scores, verbs, nouns, rows_at_once)
        for k in (1, 5):
            wanted = (place[:, :k] == (verbs * 7 + nouns)[:, None]).any(axis=1)
            np.testing.assert_array_equal(metrics.hits(*ranks, k), wanted)
    # An action is right at first exactly where verb and noun both are.
    both = (verb_scores.argmax(1) == verbs) & (noun_scores.argmax(1) == nouns)
    np.testing.assert_array_equal(metrics.hits(*ranks, 1), both)


def test_a_pair_may_be_among_the_first_k_though_the_restriction_to_100_cuts_others_off():
    """What the challenge keeps of 300 nouns and 97 verbs always holds the first five pairs."""
    rng = np.random.default_rng(4)
    verb_scores, noun_scores = (rng.standard_normal((20, c)).astype(np.float32) for c in (97, 300))
    verbs, nouns = rng.integers(0, 97, 20), rng.integers(0, 300, 20)
    verbs[:10], nouns[:10] = verb_scores[:10].argmax(1), np.argsort(-noun_scores[:10], 1)[:, 2]
    cut = np.where(np.argsort(np.argsort(-noun_scores, 1), 1) < 100, noun_scores, -np.inf)
    everything, kept = (metrics.action_ranks(verb_scores, x, verbs, nouns)[0] for x in (noun_scores, cut))
    np.testing.assert_array_equal(everything < 5, (kept < 5) & np.isfinite(cut[np.arange(20), nouns]))
    assert 0 < (everything < 5).sum() < 20


def test_tail_classes_are_the_smallest_with_no_more_than_a_fifth_of_the_rows():
    counts = np.array([50, 0, 30, 8, 7, 5])
    np.testing.assert_array_equal(metrics.tail_classes(counts), [False, True, False, True, True, True])
    np.testing.assert_array_equal(metrics.tail_classes(np.array([80, 7, 7, 7])), [False] + [False] * 3)
    np.testing.assert_array_equal(metrics.tail_classes(np.array([80, 7, 7, 6])), [False] + [True] * 3)
    counts = np.random.default_rng(0).integers(0, 500, 97)
    tail = metrics.tail_classes(counts)
    assert counts[tail].sum() <= 0.2 * counts.sum() < counts[tail].sum() + counts[~tail].min()
    assert counts[tail].max() < counts[~tail].min()
    with pytest.raises(ValueError, match='need training rows'):
        metrics.tail_classes(np.zeros(4, int))


def test_recall_counts_queries_whose_own_candidate_is_among_the_first_k():
    similarity = np.random.default_rng(0).standard_normal((30, 30)).astype(np.float32)
    place = np.array([list(np.argsort(-row)).index(i) + 1 for i, row in enumerate(similarity)])
    results = retrieve(similarity)
    for k in (1, 5, 10):
        assert results[f'recall@{k}'] == pytest.approx(np.mean(place <= k))
    assert results['median_rank'] == np.median(place)
    assert retrieve(np.eye(30, dtype=np.float32)) == {
        'recall@1': 1, 'recall@5': 1, 'recall@10': 1, 'median_rank': 1,
    }  # fmt: skip


def test_a_tie_counts_as_the_mean_over_its_orders():
    similarity = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 1]], np.float32)
    results = retrieve(similarity, ks=(1, 2))
    assert results['recall@1'] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert results['recall@2'] == 1
    assert results['median_rank'] == 1.5

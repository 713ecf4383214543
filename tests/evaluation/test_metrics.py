import numpy as np
import pytest
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


def test_accuracy_is_sklearns():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 99), rng.integers(0, 4, 99)
    assert metrics.accuracy(predicted, labels) == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    assert metrics.majority_rate(np.array([3, 3, 0, 1])) == 0.5


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

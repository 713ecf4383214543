import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from avmae_jax.evaluation import probes


def make_rows(num_rows, num_classes=4, width=6, seed=0, spread=1.5):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(42).standard_normal((num_classes, width)) + 3  # Off the origin, as features are.
    labels = rng.integers(0, num_classes, num_rows)
    x = centres[labels] + spread * rng.standard_normal((num_rows, width))
    return x.astype(np.float32), labels, np.eye(num_classes, dtype=np.float32)[labels]


def test_nearest_neighbours_vote_as_in_sklearn():
    train, labels, targets = make_rows(200)
    test, _, _ = make_rows(60, seed=1)
    whitened = PCA(whiten=True).fit(train)
    reference = KNeighborsClassifier(20, metric='cosine', weights=lambda distance: np.exp(-distance / 0.07))
    wanted = reference.fit(whitened.transform(train), labels).predict_proba(whitened.transform(test))
    got = probes.NearestNeighbours(rows_at_once=25, shrinkage=0.0)(train, targets, test)
    np.testing.assert_allclose(got / got.sum(axis=1, keepdims=True), wanted, atol=1e-4)


def test_loud_directions_do_not_outvote_those_that_tell_classes():
    train, _, targets = make_rows(400, spread=0.5)
    test, labels, _ = make_rows(100, seed=1, spread=0.5)
    rng = np.random.default_rng(2)
    train, test = (np.hstack([x, 50 * rng.standard_normal((len(x), 2), np.float32)]) for x in (train, test))
    accuracy = {
        shrinkage: (probes.NearestNeighbours(shrinkage=shrinkage)(train, targets, test).argmax(axis=1) == labels).mean()
        for shrinkage in (0.01, 1e6)  # A large one leaves the directions as loud as they are.
    }
    assert accuracy[0.01] > accuracy[1e6] + 0.2


def test_with_fewer_rows_than_neighbours_all_vote():
    train, _, targets = make_rows(5)
    scores = probes.NearestNeighbours()(train, targets, train)
    assert scores.shape == (5, 4) and np.isfinite(scores).all()


def test_a_row_of_zeros_has_no_neighbours_but_no_nan():
    train = np.zeros((6, 3), np.float32)
    assert np.isfinite(probes.NearestNeighbours(3)(train, np.eye(6, dtype=np.float32), train)).all()


def test_logistic_regression_finds_sklearns_optimum():
    train, labels, targets = make_rows(300)
    (x,) = probes.standardise(train)
    for l2 in (1.0, 0.01):
        reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=2000).fit(x, labels)
        got = probes.fit_logistic(x, targets, l2=l2, multi=False)
        np.testing.assert_allclose(got['kernel'], reference.coef_.T, atol=2e-3)


def test_several_classes_a_row_are_independent_questions():
    train, labels, targets = make_rows(300)
    targets[:, 0] = labels >= 2
    (x,) = probes.standardise(train)
    got = probes.fit_logistic(x, targets, l2=0.01, multi=True)
    for c in range(4):
        reference = LogisticRegression(C=100 / len(x), tol=1e-8, max_iter=2000).fit(x, targets[:, c])
        np.testing.assert_allclose(got['kernel'][:, c], reference.coef_[0], atol=2e-3)


@pytest.mark.parametrize('multi', [False, True])
def test_probe_finds_classes_and_needs_a_strong_penalty_for_noise(multi):
    train, _, targets = make_rows(400, spread=0.5)
    test, _, test_targets = make_rows(100, seed=1, spread=0.5)
    scores, settings = probes.LinearProbe()(train, targets, test, multi=multi)
    score = probes.judge(scores, test_targets, multi=multi, settings=settings)
    assert score.value > 0.95 > 0.4 > score.chance
    noise = np.random.default_rng(0).standard_normal((100, 80)).astype(np.float32)
    _, of_noise = probes.LinearProbe()(noise, targets[:100], noise, multi=multi)
    assert of_noise['l2'] > settings['l2']


def test_a_feature_that_never_changes_is_left_out():
    train = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    train[:, 1] = 1.2345e3
    test = np.zeros((2, 3), np.float32)
    standard, other = probes.standardise(train, test)
    assert (standard[:, 1] == 0).all() and (other[:, 1] == 0).all()
    np.testing.assert_allclose(standard[:, [0, 2]].std(axis=0), 1, rtol=1e-5)


def test_heldout_rows_are_the_same_for_every_model():
    np.testing.assert_array_equal(probes.heldout_rows(100, 0.2), probes.heldout_rows(100, 0.2))
    assert probes.heldout_rows(100, 0.2).sum() == 20
    with pytest.raises(ValueError, match='2 training rows'):
        probes.heldout_rows(1, 0.2)

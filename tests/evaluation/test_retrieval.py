import numpy as np
import pytest
from sklearn.cross_decomposition import CCA

from avmae_jax.evaluation import metrics, retrieval


def make_pair(num_rows, seed, common=5, noise=0.1):
    """Two modalities that see the same few causes through different maps, among much else of their own."""
    maps = np.random.default_rng(42)
    first_map, second_map = maps.standard_normal((common, 12)), maps.standard_normal((common, 9))
    own = maps.standard_normal((6, 12)) * 3
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((num_rows, common))
    first = causes @ first_map + rng.standard_normal((num_rows, 6)) @ own
    second = causes @ second_map
    return tuple((x + noise * rng.standard_normal(x.shape) + 2).astype(np.float32) for x in (first, second))


def recall(pair):
    return metrics.retrieval(*retrieval.ranks(*pair))


def test_correlation_finds_what_two_modalities_share():
    train, test = make_pair(500, 0), make_pair(100, 1)
    pair, settings = retrieval.CanonicalCorrelation()(train, test)
    assert recall(pair)['recall@1'] > 0.8
    assert recall(pair[::-1])['recall@1'] > 0.8
    assert settings['shrinkage'] <= 0.3


def test_unrelated_modalities_stay_at_chance():
    rng = np.random.default_rng(0)
    train, test = ([rng.standard_normal((n, 8)).astype(np.float32) for _ in range(2)] for n in (300, 100))
    pair, settings = retrieval.CanonicalCorrelation()(tuple(train), tuple(test))
    assert recall(pair)['recall@10'] < 0.2
    assert recall(pair)['median_rank'] > 35


def test_without_shrinkage_it_is_sklearns_cca():
    train, test = make_pair(400, 0, noise=1.0), make_pair(50, 1, noise=1.0)
    (first, _), _ = retrieval.CanonicalCorrelation(shrinkage=(0.0,))(train, test)
    reference = CCA(n_components=2, max_iter=5000, tol=1e-10).fit(*train)
    wanted = reference.transform(test[0])
    for i in range(2):
        assert abs(np.corrcoef(first[:, i], wanted[:, i])[0, 1]) > 0.999


def test_plain_cosines_need_equal_widths():
    assert retrieval.plain(make_pair(20, 0), make_pair(10, 1)) is None
    same = tuple(np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32) for _ in range(2))
    assert [x.shape for x in retrieval.plain(same, same)] == [(20, 4)] * 2


@pytest.mark.parametrize('rows_at_once', [1, 7, 100])
def test_blocks_do_not_change_ranks(rows_at_once):
    pair = tuple(np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32) for _ in range(2))
    whole, blocks = retrieval.ranks(*pair), retrieval.ranks(*pair, rows_at_once=rows_at_once)
    np.testing.assert_array_equal(whole[0], blocks[0])


def test_features_that_are_all_alike_find_nothing():
    train = tuple(np.ones((40, 3), np.float32) for _ in range(2))
    pair, _ = retrieval.CanonicalCorrelation()(train, train)
    assert recall(pair) == pytest.approx(metrics.retrieval_chance(40))

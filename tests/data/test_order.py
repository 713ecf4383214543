import time

import numpy as np
import pytest

from avmae_jax.data import order


def whole(num_records, *key):
    return [order.shuffle(place, num_records, *key) for place in range(num_records)]


@pytest.mark.parametrize('num_records', [1, 2, 3, 10, 97, 1000, 65_537])
def test_every_record_comes_once_an_epoch(num_records):
    assert sorted(whole(num_records, 3, 0, 1)) == list(range(num_records))


def test_the_order_is_the_one_that_runs_were_begun_with():
    assert whole(11, 0, 0, 0) == [0, 3, 2, 7, 10, 4, 1, 9, 8, 5, 6]
    assert [order.shuffle(place, 2_000_000, 2**62, 1, 5) for place in (0, 1, 1_999_999)] == [1781214, 1886882, 1764029]


def test_keys_give_different_orders():
    assert len({tuple(whole(50, *key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (2**62, 7))}) == 5


def test_a_record_comes_to_every_place_alike():
    counts = np.zeros((20, 20), int)
    for seed in range(4000):
        counts[np.arange(20), whole(20, seed)] += 1
    # 200 expected in each cell; six standard deviations.
    assert counts.min() > 115 and counts.max() < 285


def test_neighbours_are_parted():
    found = np.array(whole(100_000, 1))
    assert np.mean(np.abs(np.diff(found)) < 100) < 0.004
    assert abs(np.corrcoef(found, np.arange(100_000))[0, 1]) < 0.02


def test_two_million_records_cost_no_more_than_ten():
    order.shuffle(0, 2_000_000, 0)
    began = time.thread_time()
    for place in range(1_900_000, 1_910_000):
        order.shuffle(place, 2_000_000, 0, place // 1000)
    assert (time.thread_time() - began) / 10_000 < 1e-4

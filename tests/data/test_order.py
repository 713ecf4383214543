import time

import numpy as np
import pytest

from avmae_jax.data import order


@pytest.mark.parametrize('num_records', [1, 2, 3, 10, 97, 1000, 65_537])
def test_every_record_comes_once_an_epoch(num_records):
    found = order.shuffle(np.arange(num_records), num_records, 3, 0, 1)
    np.testing.assert_array_equal(np.sort(found), np.arange(num_records))


def test_a_place_is_computed_without_the_others():
    whole = order.shuffle(np.arange(1000), 1000, 5)
    for places in ([7], [999, 0], [3, 3, 500]):
        np.testing.assert_array_equal(order.shuffle(np.array(places), 1000, 5), whole[places])


def test_keys_give_different_orders():
    orders = {tuple(order.shuffle(np.arange(50), 50, *key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (2**62, 7))}
    assert len(orders) == 5


def test_a_record_comes_to_every_place_alike():
    counts = np.zeros((20, 20), int)
    for seed in range(4000):
        counts[np.arange(20), order.shuffle(np.arange(20), 20, seed)] += 1
    # 200 expected in each cell; six standard deviations.
    assert counts.min() > 115 and counts.max() < 285


def test_neighbours_are_parted():
    found = order.shuffle(np.arange(100_000), 100_000, 1)
    assert np.mean(np.abs(np.diff(found)) < 100) < 0.004
    assert abs(np.corrcoef(found, np.arange(100_000))[0, 1]) < 0.02


def test_two_million_records_cost_no_more_than_ten():
    places = np.arange(1_900_000, 1_900_512)
    order.shuffle(places, 2_000_000, 0)
    began = time.thread_time()
    for epoch in range(20):
        order.shuffle(places, 2_000_000, 0, epoch)
    assert (time.thread_time() - began) / 20 < 0.02

import collections
import itertools
import pickle
import time

import numpy as np
import pytest

from avmae_jax import experiment
from avmae_jax.data import balance, batches, mixing, sources, views

VIEW = views.View(video=views.VideoView(num_frames=2, frame_seconds=0.2, short_side=40, crop_size=24))


def test_a_clip_weighs_the_sum_of_one_over_the_counts_of_its_classes():
    labels = [[0], [0], [0, 1], [0], [], [3]]
    weights = balance.clip_weights(labels, num_classes=5, offset=0.5)
    np.testing.assert_allclose(weights, [1 / 4.5, 1 / 4.5, 1 / 4.5 + 1 / 1.5, 1 / 4.5, 0, 1 / 1.5])
    assert balance.clip_weights(labels, 5, offset=0.0)[5] == 1


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match=r'\[0, num_classes=3\); got 0 to 3'):
        balance.clip_weights([[0], [3]], 3)
    with pytest.raises(ValueError, match='offset must not be below 0'):
        balance.clip_weights([[0]], 3, offset=-1)


def epoch_counts(weights, *key):
    order = balance.WeightedOrder(weights)
    drawn = collections.Counter(order.record(place, *key) for place in range(len(weights)))
    return np.array([drawn[i] for i in range(len(weights))])


def test_each_epoch_gives_a_clip_its_weights_worth_of_places_but_for_rounding():
    weights = np.random.default_rng(0).gamma(0.5, size=97)
    weights[[0, 40, 96]] = 0
    wanted = weights / weights.sum() * 97
    total = np.zeros(97)
    for epoch in range(200):
        counts = epoch_counts(weights, 3, 0, epoch)
        assert (np.floor(wanted) <= counts).all() and (counts <= np.ceil(wanted)).all()
        total += counts
    # Rounding goes up as often as it must: the mean is right within four standard deviations.
    assert np.abs(total / 200 - wanted).max() < 4 * 0.5 / 200**0.5
    assert not total[[0, 40, 96]].any()


def test_equal_weights_give_every_clip_once_an_epoch():
    for epoch in range(5):
        assert (epoch_counts(np.full(101, 0.3), 1, 0, epoch) == 1).all()


def test_classes_come_alike_however_rare_they_are():
    rng = np.random.default_rng(0)
    labels = [[int(c)] for c in rng.choice(4, size=2000, p=[0.9, 0.07, 0.025, 0.005])]
    order = balance.WeightedOrder(balance.clip_weights(labels, 4))
    drawn = collections.Counter(labels[order.record(place, 0, 0, 0)][0] for place in range(2000))
    assert all(abs(drawn[c] - 500) < 60 for c in range(4))


def test_the_same_clip_comes_at_places_far_apart():
    order = balance.WeightedOrder([100.0] + [1.0] * 99)
    places = [place for place in range(100) if order.record(place, 0, 0, 0) == 0]
    assert 49 <= len(places) <= 51
    assert np.mean(np.diff(places) == 1) < 0.75 and places[0] < 10 and places[-1] > 90


def test_two_million_clips_cost_microseconds_a_place():
    order = balance.WeightedOrder(np.random.default_rng(0).random(2_000_000))
    order.record(0, 0, 0, 0)
    began = time.thread_time()
    for place in range(1_990_000, 2_000_000):
        order.record(place, 0, 0, place // 1000)
    assert (time.thread_time() - began) / 10_000 < 2e-4


def test_weights_that_leave_nothing_are_refused():
    for weights in ([], [0.0, 0.0], [1.0, -1.0], [1.0, np.nan]):
        with pytest.raises(ValueError, match='not all 0'):
            balance.WeightedOrder(weights)


# -- In the stream of clips --


@pytest.fixture(scope='module')
def source(toy_folder):
    return sources.open_source(toy_folder)


@pytest.fixture(scope='module')
def weighted(source):
    weights = np.where(np.arange(len(source)) == 4, 8.0, 1.0)  # One clip in 11 has 8 of 18.
    return mixing.Mixture([source], clip_weights=[weights])


def records(source, **options):
    options = {'batch_size': 6, 'seed': 0, 'num_steps': 11, **options}
    with batches.train_stream(source, VIEW, **options) as stream:
        return [(batch.record.tolist(), batch.seed.tolist()) for batch in stream]


def test_a_heavy_clip_comes_more_often_and_is_another_one_each_time(weighted):
    steps = records(weighted)
    drawn = [(r, tuple(s)) for record, seed in steps for r, s in zip(record, seed, strict=True)]
    count = collections.Counter(r for r, _ in drawn)
    assert 24 <= count[4] <= 30  # 66 * 8 / 18 = 29.3 in six epochs, each rounded.
    assert len(set(drawn)) == len(drawn)


def test_the_stream_is_the_same_on_any_number_of_hosts_and_goes_on_anywhere(weighted):
    whole = records(weighted)
    for host_count in (2, 3):
        parts = [records(weighted, host_index=h, host_count=host_count) for h in range(host_count)]
        for step, (record, seed) in enumerate(whole):
            assert sum((part[step][0] for part in parts), []) == record
            assert sum((part[step][1] for part in parts), []) == seed
    assert records(weighted, start_step=7) == whole[7:]
    assert records(pickle.loads(pickle.dumps(weighted))) == whole


def test_datasets_without_clip_weights_stay_as_they_were(source, weighted):
    plain, both = mixing.Mixture([source, source], (1, 2)), mixing.Mixture([source, source], (1, 2), [None, None])
    assert [plain.place(p, 5) for p in range(100)] == [both.place(p, 5) for p in range(100)]
    half = mixing.Mixture([source, source], (1, 1), [None, np.eye(11)[3]])
    seen = [half.place(p, 5) for p in range(44)]
    assert sorted(place.record for place in seen if place.record < 11) == sorted(list(range(11)) * 2)
    assert {place.record for place in seen if place.record >= 11} == {11 + 3}


def test_weights_for_another_number_of_clips_are_refused(source):
    with pytest.raises(ValueError, match=r'got \[3\] numbers for \[11\] clips'):
        mixing.Mixture([source], clip_weights=[np.ones(3)])
    with pytest.raises(ValueError, match='one number a clip for each dataset'):
        mixing.Mixture([source], clip_weights=[None, None])


# -- Few labels --

LABELS = [[0]] * 40 + [[1]] * 20 + [[2]] * 3 + [[0, 2]] * 2 + [[]] * 5


def test_a_subset_takes_the_same_share_of_each_class_and_one_at_least():
    chosen = balance.stratified(LABELS, 0.3, seed=0)
    assert (np.diff(chosen) > 0).all()
    taken = collections.Counter(tuple(LABELS[i]) for i in chosen)
    # Clips of two classes count for the rarer one: five of class 2, of which 0.3 are 1.5.
    assert taken[(0,)] == 12 and taken[(1,)] == 6 and taken[(2,)] + taken[(0, 2)] == 2 and taken[()] == 2
    least = balance.stratified(LABELS, 0.001, seed=0)
    assert len(least) == 4 and len({min(LABELS[i], default=-1) for i in least} - {-1, 0, 1, 2}) == 0
    assert balance.stratified(LABELS, 1, seed=0).tolist() == list(range(len(LABELS)))


def test_smaller_subsets_are_part_of_larger_ones_and_seeds_differ():
    sizes = [set(balance.stratified(LABELS, ratio, seed=3).tolist()) for ratio in (0.05, 0.2, 0.5, 0.9)]
    for smaller, larger in itertools.pairwise(sizes):
        assert smaller < larger
    assert len({tuple(balance.stratified(LABELS, 0.2, seed)) for seed in range(8)}) == 8


@pytest.mark.parametrize('ratio', [0, -0.1, 1.1])
def test_a_share_is_above_none_and_at_most_all(ratio):
    with pytest.raises(ValueError, match=r'must lie in \(0, 1\]'):
        balance.stratified(LABELS, ratio, seed=0)


def test_a_subset_is_a_source_of_some_of_the_clips(source):
    subset = balance.Subset(source, [7, 2])
    assert len(subset) == 2 and subset[0].id == source[7].id and subset[1].id == source[2].id
    assert subset.where(1) == source.where(2) and subset.info is source.info
    assert sources.read_labels(subset) == [sources.read_labels(source)[i] for i in (7, 2)]
    assert {records for batch, _ in records(mixing.Mixture([subset])) for records in batch} == {0, 1}


def test_training_draws_from_as_many_clips_as_the_config_says_and_as_often(small_finetuning, toy_folder):
    def opened(**changes):
        return experiment.open_train_sources(small_finetuning(**{'data.path': str(toy_folder), **changes}))

    whole, half = opened(), opened(**{'data.subset_ratio': 0.5})
    labels = [indices[0] for indices in sources.read_labels(whole.sources[0])]
    assert collections.Counter(labels) == {0: 4, 1: 4, 2: 3}
    indices = balance.stratified([[label] for label in labels], 0.5, seed=0)
    assert [half[i].id for i in range(len(half))] == [whole[int(i)].id for i in indices] and len(half) == 6
    balanced, few = (
        opened(**{'data.balanced_by': 'label'}),
        opened(**{'data.balanced_by': 'label', 'data.subset_ratio': 0.6}),
    )
    assert len(balanced) == 11 and len(few) == 6  # Two of each.
    drawn = collections.Counter(labels[balanced.place(place, seed=0).record] for place in range(100 * 11))
    np.testing.assert_allclose([drawn[label] for label in range(3)], 100 * 11 / 3, rtol=0.03)


@pytest.mark.parametrize(
    ('setting', 'value', 'words'),
    [
        ('data.balanced_by', 'verb', r"config.data.balanced_by='verb' is none of the labels of the data: \['label'\]"),
        ('data.subset_ratio', 0.0, r'config.data.subset_ratio: the share must lie in'),
    ],
)
def test_what_the_data_cannot_give_is_told_by_its_setting(small_finetuning, setting, value, words):
    with pytest.raises(ValueError, match=words):
        experiment.open_train_sources(small_finetuning(**{setting: value}))

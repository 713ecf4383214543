import collections

import pytest

from avmae_jax.data import mixing, sources


class Numbered:
    """A dataset of which only the length matters."""

    def __init__(self, source, length):
        self.info, self.split, self.spectrogram_shape = source.info, source.split, None
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        raise NotImplementedError

    def where(self, index):
        return f'record {index}'


@pytest.fixture
def numbered(toy_folder):
    source = sources.open_source(toy_folder)
    return lambda *lengths: [Numbered(source, length) for length in lengths]


@pytest.mark.parametrize('weights', [(1, 1), (3, 1), (0.7, 0.2, 0.1), (1, 2**-20), (1 / 3, 2 / 3), (5, 3, 2, 1)])
def test_weights_are_met_at_every_moment(numbered, weights):
    mixture = mixing.Mixture(numbered(*[10] * len(weights)), weights)
    drawn = [0] * len(weights)
    for place in range(2000):
        k, before = mixture.draw(place)
        assert before == drawn[k]  # Each dataset is gone through in order, without holes.
        drawn[k] += 1
        for count, weight in zip(drawn, weights, strict=True):
            assert abs(count - (place + 1) * weight / sum(weights)) < len(weights)


def test_places_are_computed_without_those_before(numbered):
    mixture = mixing.Mixture(numbered(7, 50), (2, 3))
    whole = [mixture.place(p, seed=4) for p in range(500)]
    assert [mixture.place(p, seed=4) for p in reversed(range(300, 320))] == whole[300:320][::-1]
    assert mixture.place(10**12, seed=4).epoch > 10**9


def test_each_dataset_is_gone_through_once_an_epoch_of_its_own(numbered):
    mixture = mixing.Mixture(numbered(7, 20), (1, 1))
    seen = collections.Counter(mixture.place(p, seed=0) for p in range(280))
    assert set(seen.values()) == {1}  # No record twice in an epoch.
    epochs = {epoch for epoch, record in seen if record < 7}
    assert epochs == set(range(20))
    for epoch in epochs:
        assert {record for e, record in seen if e == epoch and record < 7} == set(range(7))


def test_without_weights_every_record_counts_alike(numbered):
    mixture = mixing.Mixture(numbered(30, 10))
    counts = collections.Counter(mixture.place(p, seed=0).record for p in range(400))
    assert set(counts.values()) == {10}


def test_records_are_numbered_through(numbered):
    mixture = mixing.Mixture(numbered(3, 4))
    assert len(mixture) == 7
    assert [mixture.dataset_of(i) for i in (0, 2, 3, 6)] == [(0, 0), (0, 2), (1, 0), (1, 3)]
    assert mixture.next_record(2) == 0 and mixture.next_record(6) == 3  # Within the dataset.


@pytest.mark.parametrize('weights', [(1,), (1, 0), (1, -2)])
def test_wrong_weights_are_refused(numbered, weights):
    with pytest.raises(ValueError, match='weights must be one positive number'):
        mixing.Mixture(numbered(3, 3), weights)


def test_an_empty_dataset_is_refused(numbered):
    with pytest.raises(ValueError, match='no records'):
        mixing.Mixture(numbered(3, 0))

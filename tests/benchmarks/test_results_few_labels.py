import numpy as np
import pytest


@pytest.fixture(scope='module')
def benchmark(run_script):
    with run_script('benchmarks/results_few_labels.py') as names:
        yield names


def clips(num_rows, *, seed=0, apart=1.0):
    """Three classes, told apart by two quiet directions of eight; the others are louder."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=num_rows)
    features = generator.normal(size=(num_rows, 8)) * [0.05, 0.05, *[3.0] * 6]
    features[:, :2] += apart * np.array([[0, 1], [1, -1], [-1, -1]])[labels]
    return features, labels


def test_every_draw_has_as_many_clips_of_each_class_and_none_twice(benchmark):
    labels = clips(100)[1]
    drawn = benchmark.draw(labels, 5, 20)
    assert drawn.shape == (20, 3, 5)
    assert (labels[drawn] == np.arange(3)[:, None]).all()
    assert all(len(set(one.ravel())) == 15 for one in drawn)
    assert len({tuple(np.sort(one.ravel())) for one in drawn}) == 20
    np.testing.assert_array_equal(drawn, benchmark.draw(labels, 5, 20))


def test_quiet_directions_tell_classes_and_noise_does_not(benchmark):
    (train, train_labels), (test, test_labels) = clips(600), clips(200, seed=1)
    drawn = benchmark.draw(train_labels, 20, 10)
    assert benchmark.accuracies(train, test, test_labels, drawn).min() > 0.9
    nothing = benchmark.accuracies(clips(600, apart=0)[0], clips(200, seed=1, apart=0)[0], test_labels, drawn)
    assert abs(nothing.mean() - 1 / 3) < 0.06
    # Without their labels all training clips have a say: few labelled ones alone could not be whitened.
    assert benchmark.accuracies(train[:40], test, test_labels, benchmark.draw(train_labels[:40], 1, 10)).mean() > 0.5


def test_a_run_of_one_modality_has_the_columns_of_that_one(benchmark):
    def table(num_rows, seed):
        features, labels = clips(num_rows, seed=seed)
        present = np.arange(num_rows) % 5 > 0  # Clips without sound are left out.
        features[~present] = np.nan
        return {
            'alone': {'audio': features}, 'present': {'audio': present}, 'layers': {},
            'labels': {'label': np.eye(3)[labels]},
        }  # fmt: skip

    found = benchmark.score_features({'train': table(600, 0), 'test': table(200, 1)}, [20], 5)
    assert list(found) == [('audio', 20)] and found['audio', 20].min() > 0.9


def test_a_class_with_too_few_clips_is_refused(benchmark):
    with pytest.raises(ValueError, match='--labels=30: a class has only'):
        benchmark.draw(clips(60)[1], 30, 2)


def test_the_table_says_how_often_the_trained_is_above(benchmark):
    random, trained = ({('audio', 3): np.array(values)} for values in ([0.1, 0.2, 0.3, 0.2], [0.2, 0.3, 0.2, 0.3]))
    text = benchmark.table_of({'RESULTS/mid-seed-0': (random, trained)})
    assert '| RESULTS/mid-seed-0 | 0.200 → 0.250 (75 %) |' in text and 'audio, 3 a class' in text

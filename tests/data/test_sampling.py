import numpy as np
import pytest

from avmae_jax.data import sampling


def draw_starts(spans, duration, count=300):
    return [sampling.random_starts(spans, duration, sampling.Draws(0, 0, i, 0)) for i in range(count)]


@pytest.mark.parametrize('spans', [{'video': 2.56, 'audio': 8.0}, {'video': 5.0, 'audio': 1.0}])
def test_the_shorter_span_lies_within_the_longer_one_and_both_in_the_clip(spans):
    short, long = sorted(spans, key=spans.get)
    for starts in draw_starts(spans, duration=10.0):
        assert 0 <= starts[long] and starts[long] + spans[long] <= 10.0 + 1e-9
        assert starts[long] <= starts[short]
        assert starts[short] + spans[short] <= starts[long] + spans[long] + 1e-9


def test_windows_start_anywhere_in_the_clip_alike():
    starts = np.array([s['audio'] for s in draw_starts({'video': 2.0, 'audio': 4.0}, duration=10.0, count=2000)])
    counts, _ = np.histogram(starts, bins=6, range=(0, 6))
    assert counts.min() > 260 and counts.max() < 410


def test_a_clip_that_is_too_short_is_seen_and_heard_from_its_beginning():
    for starts in draw_starts({'video': 2.0, 'audio': 8.0}, duration=3.0):
        assert starts['audio'] == 0.0 and 0 <= starts['video'] <= 1.0
    for starts in draw_starts({'video': 2.0, 'audio': 8.0}, duration=1.0):
        assert starts == {'audio': 0.0, 'video': 0.0}


def test_evaluation_places_the_shorter_span_within_the_longer_one():
    for fraction in sampling.spread_fractions(5):
        audio = sampling.fraction_start(float(fraction), 8.0, 10.0)
        video = sampling.fraction_start(float(fraction), 2.5, 10.0)
        assert audio <= video and video + 2.5 <= audio + 8.0


def test_evaluation_clips_reach_from_the_beginning_to_the_end():
    starts = [sampling.fraction_start(float(f), 2.0, 10.0) for f in sampling.spread_fractions(5)]
    assert starts == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert sampling.fraction_start(float(sampling.spread_fractions(1)[0]), 2.0, 10.0) == 4.0


@pytest.mark.parametrize('fps', [10.0, 12.5, 23.976, 25.0, 29.97, 30.0, 60.0])
def test_frames_are_those_shown_at_the_wanted_times_at_any_rate(fps):
    num_stored = int(10 * fps)
    indices = sampling.frame_indices(1.0, 16, 0.16, fps, num_stored)
    times = 1.0 + 0.16 * np.arange(16)
    assert (indices / fps <= times + 1e-6).all() and (times < (indices + 1) / fps).all()


def test_a_stride_of_whole_frames_is_kept_exactly():
    for start in np.linspace(0, 7, 50):
        assert set(np.diff(sampling.frame_indices(float(start), 16, 0.16, 12.5, 125))) == {2}
        assert set(np.diff(sampling.frame_indices(float(start), 16, 0.16, 25.0, 250))) == {4}


def test_too_few_frames_begin_anew():
    np.testing.assert_array_equal(sampling.frame_indices(0.0, 6, 0.1, 10.0, 4), [0, 1, 2, 3, 0, 1])


def test_draws_depend_on_seed_epoch_record_and_view_and_on_nothing_else():
    def numbers(*key):
        draws = sampling.Draws(*key)
        return (*draws.device_seed.tolist(), draws.uniform(), draws.uniform(), draws.below(1000))

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**62, 5, 2_000_000, 3)]
    assert len({numbers(*key) for key in keys}) == len(keys)
    assert numbers(3, 2, 1, 0) == numbers(3, 2, 1, 0)


def test_draws_stay_as_they_are_between_releases():
    # A changed number here means that resumed runs and repeated experiments see other data.
    draws = sampling.Draws(7, 2, 12345, 1)
    assert draws.device_seed.tolist() == [2115247112, 3181133114]
    assert [draws.below(1000), draws.below(1000)] == [271, 601]


def test_draws_are_uniform():
    numbers = np.array([sampling.Draws(0, 0, i, 0).uniform() for i in range(4000)])
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert abs(numbers.mean() - 0.5) < 0.02 and counts.min() > 320 and counts.max() < 480

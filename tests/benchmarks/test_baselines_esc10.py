import runpy
from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture(scope='module')
def baselines(repository):
    return SimpleNamespace(**runpy.run_path(str(repository / 'benchmarks/baselines_esc10.py'), run_name='baselines'))


def waveform(kind, seed):
    """Two seconds of a tone that is steady, or swells twice a second, or of noise."""
    rng, time = np.random.default_rng(seed), np.arange(32_000) / 16_000
    tone = np.sin(2 * np.pi * rng.uniform(300, 600) * time) + 0.01 * rng.normal(size=len(time))
    kinds = {'steady': tone, 'swells': tone * np.sin(2 * np.pi * time) ** 4, 'noise': rng.normal(size=len(time))}
    return (3_000 * kinds[kind]).astype(np.int16)


@pytest.fixture(scope='module')
def clips(baselines):
    """Three clips of each of three classes in each of four folds."""
    kinds = ['steady', 'swells', 'noise'] * 3
    described = [
        baselines.describe(waveform(kind, 100 * fold + i)) for fold in range(4) for i, kind in enumerate(kinds)
    ]
    return baselines.Clips(
        features={group: np.stack([one[group] for one in described]) for group in described[0]},
        labels=np.array(kinds * 4),
        folds=np.repeat([f'fold{k + 1}' for k in range(4)], len(kinds)),
    )


def test_silence_behind_a_sound_is_left_out(baselines):
    sound = waveform('noise', 0)
    frames = baselines.sounding_log_mel(sound)
    padded = baselines.sounding_log_mel(np.concatenate([sound, np.zeros(48_000, np.int16)]))
    assert abs(len(padded) - len(frames)) <= 2  # At the seam a frame sees some of both.
    np.testing.assert_array_equal(padded[:198], frames[:198])
    assert all(np.isfinite(found).all() for found in baselines.describe(np.zeros(16_000, np.int16)).values())


def test_rhythm_tells_how_fast_a_sound_swells(baselines):
    swelling = baselines.rhythm(baselines.sounding_log_mel(waveform('swells', 0)))
    octaves = swelling.reshape(-1, baselines.NUM_RHYTHM_BANDS).mean(1)
    edges = baselines.RHYTHM_EDGES
    (found,) = [k for k in range(len(octaves)) if edges[k] <= 2 / (100 / 512) < edges[k + 1]]  # Two a second.
    assert octaves.argmax() == found


def test_easy_classes_are_told_apart_in_every_fold(baselines, clips):
    rows = {}
    for classifier, features in (('SVM', 'MFCC'), ('k-NN', 'all')):
        folds, inner = {}, {}
        for fold in sorted(set(clips.folds)):
            test = clips.folds == fold
            search = baselines.fit(clips, features, classifier, ~test)
            folds[fold] = search.score(baselines.join(clips, features)[test], clips.labels[test])
            inner[fold] = search.best_score_
        rows[classifier, features] = {'classifier': classifier, 'features': features, 'folds': folds, 'inner': inner}
        assert min(folds.values()) > 0.8
    lines = baselines.table([*rows.values(), baselines.choose_features(rows, 'SVM')]).splitlines()
    assert lines[0].split() == ['classifier', 'features', 'mean', '+-', 'fold1', 'fold2', 'fold3', 'fold4']
    assert len(lines) == 5


def test_nothing_is_chosen_by_the_fold_that_is_tested(baselines, clips):
    train = clips.folds != 'fold1'
    honest = baselines.fit(clips, 'MFCC', 'SVM', train)
    spoiled = clips._replace(
        labels=np.where(train, clips.labels, 'noise'),
        features={group: np.where(train[:, None], found, 0) for group, found in clips.features.items()},
    )
    again = baselines.fit(spoiled, 'MFCC', 'SVM', train)
    inputs = baselines.join(clips, 'MFCC')[~train]
    assert honest.best_params_ == again.best_params_
    np.testing.assert_array_equal(honest.predict(inputs), again.predict(inputs))
    assert honest.n_splits_ == 3  # A fold within the training folds is left out at a time.


def test_features_are_chosen_by_the_other_folds_alone(baselines):
    rows = {
        ('SVM', 'MFCC'): {
            'features': 'MFCC',
            'folds': {'fold1': 0.5, 'fold2': 0.6},
            'inner': {'fold1': 0.9, 'fold2': 0.1},
        },
        ('SVM', 'all'): {
            'features': 'all',
            'folds': {'fold1': 1.0, 'fold2': 0.7},
            'inner': {'fold1': 0.8, 'fold2': 0.2},
        },
    }
    chosen = baselines.choose_features(rows, 'SVM')
    assert chosen['folds'] == {'fold1': 0.5, 'fold2': 0.7} and chosen['chosen'] == {'fold1': 'MFCC', 'fold2': 'all'}

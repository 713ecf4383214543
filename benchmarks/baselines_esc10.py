"""What simple features and plain classifiers reach on ESC-10, in its official five folds: the line to be above.

    python benchmarks/baselines_esc10.py --data=esc10          a folder with esc10.csv and audio/

Each clip becomes one vector: what its log-mel bands, its cepstrum and the rhythm of its bands are like over time. A
support-vector machine, k nearest neighbours and a random forest are trained on four folds and tested on the fifth. All
that is chosen (C, gamma, k, the features where it says so) is chosen by cross-validation over the four, each left out
once, so that takes of one recording, which share a fold, never stand on both sides. Takes about a minute of one core;
prints a table and, as its last line, the same as JSON. Needs scikit-learn (pip install -e '.[test]').
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from scipy.fft import dct
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from avmae_jax.data.prepare import manifest, sound
from avmae_jax.evaluation import tables
from avmae_jax.ops import spectrogram
from avmae_jax.progress import progress

CONVENTION = spectrogram.get_convention('avmae', num_mel_bins=40)
NUM_COEFFICIENTS = 20  # Of the cepstrum; the higher ones tell of single bands.
QUANTILES = (10, 25, 50, 75, 90)  # Per cent.
NUM_RHYTHM_BANDS = 8  # Groups of mel bands whose rise and fall is looked at.
RHYTHM_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # Octaves, in points of 512 at 100 frames a second: 0.2 to 50 Hz.
MIN_FRAMES = 10

# Name -> groups of features, side by side.
FEATURES = {
    'log-mel': ('log-mel',),
    'MFCC': ('MFCC',),
    'MFCC + rhythm': ('MFCC', 'rhythm'),
    'all': ('log-mel', 'MFCC', 'rhythm'),
}
C = (1, 3, 10, 30, 100)
GAMMA = (0.1, 0.3, 1.0)  # Over the number of features.
NEIGHBOURS = (1, 3, 5, 7, 11)

_DATA = flags.DEFINE_string('data', '', 'Folder of ESC-10: esc10.csv and audio/.')


class Clips(NamedTuple):
    """Attributes:
    features: group -> [n k].
    labels: class of each clip.
    folds: the fold each one is of, 'fold1' to 'fold5'.
    """

    features: Mapping[str, np.ndarray]
    labels: np.ndarray
    folds: np.ndarray


# -- Features --


def sounding_log_mel(waveform: np.ndarray) -> np.ndarray:
    """[s f] without the frames of digital silence with which ESC fills its clips up to 5 s."""
    frames = spectrogram.log_mel(waveform[None], CONVENTION)[0]
    sounding = frames.max(axis=1) > np.log(CONVENTION.floor) + 1e-3
    return frames[sounding] if sounding.sum() >= MIN_FRAMES else frames


def over_time(frames: np.ndarray) -> np.ndarray:
    """Mean, deviation and quantiles of each column of [s k], and the size of its steps from frame to frame."""
    steps = np.diff(frames, axis=0)
    quantiles = np.percentile(frames, QUANTILES, axis=0)
    return np.concatenate([frames.mean(0), frames.std(0), *quantiles, steps.std(0), np.abs(steps).mean(0)])


def rhythm(frames: np.ndarray) -> np.ndarray:
    """How strongly groups of bands rise and fall, by octave of the rate at which they do."""
    groups = frames.reshape(len(frames), NUM_RHYTHM_BANDS, -1).mean(axis=2)
    tapered = (groups - groups.mean(0)) * np.hanning(len(groups))[:, None]
    power = np.abs(np.fft.rfft(tapered[:512], 512, axis=0)) ** 2 / len(groups)
    octaves = [power[a:b].mean(0) for a, b in zip(RHYTHM_EDGES[:-1], RHYTHM_EDGES[1:], strict=True)]
    return np.log(np.concatenate(octaves) + 1e-3)


def describe(waveform: np.ndarray) -> dict[str, np.ndarray]:
    """Group -> features of one clip of int16 at 16 kHz."""
    frames = sounding_log_mel(waveform)
    cepstrum = dct(frames, norm='ortho', axis=1)[:, :NUM_COEFFICIENTS]
    return {'log-mel': over_time(frames), 'MFCC': over_time(cepstrum), 'rhythm': rhythm(frames)}


def read_clips(folder: Path) -> Clips:
    found = manifest.read_manifest([str(folder / 'esc10.csv')])
    rows = [(split, row) for split in sorted(found.splits) for row in found.splits[split]]
    described = []
    for _, row in progress(rows, what='reading', unit='clips'):
        described.append(describe(sound.read_sound(row.path, row.start, row.end, max_seconds=60.0).waveform))
    return Clips(
        features={group: np.stack([one[group] for one in described]) for group in described[0]},
        labels=np.array([found.labels['label'].names[row.labels['label'][0]] for _, row in rows]),
        folds=np.array([split for split, _ in rows]),
    )


# -- Classifiers --


def classifiers(num_features: int) -> dict[str, tuple[Any, dict[str, list]]]:
    """Name -> (classifier, what it may choose among)."""
    return {
        'SVM': (SVC(), {'svc__C': list(C), 'svc__gamma': [gamma / num_features for gamma in GAMMA]}),
        'k-NN': (KNeighborsClassifier(weights='distance'), {'kneighborsclassifier__n_neighbors': list(NEIGHBOURS)}),
        'random forest': (RandomForestClassifier(n_estimators=500, random_state=0), {}),
    }


def fit(clips: Clips, features: str, classifier: str, train: np.ndarray) -> GridSearchCV:
    """The classifier that does best on each fold of `train` when fitted on the others, fitted on all of `train`."""
    inputs = join(clips, features)[train]
    model, choices = classifiers(inputs.shape[1])[classifier]
    inner = PredefinedSplit(np.unique(clips.folds[train], return_inverse=True)[1])
    search = GridSearchCV(make_pipeline(StandardScaler(), model), choices, cv=inner)
    return search.fit(inputs, clips.labels[train])


def join(clips: Clips, features: str) -> np.ndarray:
    return np.concatenate([clips.features[group] for group in FEATURES[features]], axis=1)


def score_folds(clips: Clips) -> list[dict[str, Any]]:
    """One dict a classifier and set of features: the accuracy on each fold, and what was chosen without it."""
    wanted = [('SVM', name) for name in FEATURES] + [('k-NN', name) for name in FEATURES] + [('random forest', 'all')]
    rows = {key: dict(classifier=key[0], features=key[1], folds={}, inner={}) for key in wanted}
    names = sorted(set(clips.folds))
    for fold in progress(names, what='testing', unit='folds'):
        test = clips.folds == fold
        for (classifier, features), row in rows.items():
            search = fit(clips, features, classifier, ~test)
            row['folds'][fold] = float(search.score(join(clips, features)[test], clips.labels[test]))
            row['inner'][fold] = float(search.best_score_)
    return [*rows.values(), *(choose_features(rows, classifier) for classifier in ('SVM', 'k-NN'))]


def choose_features(rows: Mapping[tuple[str, str], Mapping[str, Any]], classifier: str) -> dict[str, Any]:
    """For each fold the set of features that did best within the other folds."""
    own = [row for (name, _), row in rows.items() if name == classifier]
    chosen = {fold: max(own, key=lambda row: row['inner'][fold]) for fold in own[0]['folds']}
    return {
        'classifier': classifier,
        'features': 'chosen',
        'folds': {fold: row['folds'][fold] for fold, row in chosen.items()},
        'inner': {fold: row['inner'][fold] for fold, row in chosen.items()},
        'chosen': {fold: row['features'] for fold, row in chosen.items()},
    }


def table(results: list[dict[str, Any]]) -> str:
    """A line a classifier and set of features; +- is the deviation between folds."""
    folds = list(results[0]['folds'])
    lines = [['classifier', 'features', 'mean', '+-', *folds]]
    for row in results:
        values = [row['folds'][fold] for fold in folds]
        cells = [np.mean(values), np.std(values, ddof=1), *values]
        lines.append([row['classifier'], row['features'], *(f'{value:.4f}' for value in cells)])
    return tables.format_table(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
    try:
        clips = read_clips(Path(_DATA.value))
    except (ValueError, OSError) as error:
        sys.exit(f'baselines_esc10: --data={_DATA.value}: {error}')
    results = score_folds(clips)
    print(f'Accuracy on {len(clips.labels)} clips of {len(set(clips.labels))} classes\n{table(results)}\n')
    print(json.dumps(results))


if __name__ == '__main__':
    app.run(main)

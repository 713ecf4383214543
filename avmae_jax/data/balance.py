"""Drawing clips by weight: rare classes more often than they come in the data.

    weights = clip_weights(sources.read_labels(source, 'label'), num_classes=527)
    Mixture([source], clip_weights=[weights])

An epoch has as many places as there are clips, and gives each clip as many of them as its weight is worth, rounded up
or down: places are points at equal distances along the clips laid out end to end, each as long as its weight. Drawing
every place by itself would have the same mean, but would miss a clip of average weight in one epoch out of three.
Any place is found in O(log n), with nothing to remember.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from avmae_jax.data import order
from avmae_jax.data.sources import Source
from avmae_jax.structs import Clip


def clip_weights(labels: Sequence[Sequence[int]], num_classes: int, offset: int | float = 0.01) -> np.ndarray:
    """float64 [clips]: the sum over a clip's classes of 1 / (clips of that class + offset), as in AST and AudioMAE.

    Args:
      labels: the class indices of each clip. A clip without any has weight 0 and is never drawn.
      offset: the larger, the nearer come rare classes to common ones; AST and AudioMAE have 0.01.
    """
    if offset < 0:
        raise ValueError(f'offset must not be below 0; got {offset}.')
    lengths = np.fromiter((len(indices) for indices in labels), np.int64, len(labels))
    flat = np.fromiter((i for indices in labels for i in indices), np.int64, int(lengths.sum()))
    if len(flat) and not (flat.min() >= 0 and flat.max() < num_classes):
        raise ValueError(f'labels must lie in [0, num_classes={num_classes}); got {flat.min()} to {flat.max()}.')
    counts = np.bincount(flat, minlength=num_classes)
    # A class that no clip has is asked for by none.
    of_class = np.where(counts > 0, 1.0 / np.maximum(counts + offset, np.finfo(float).tiny), 0.0)
    return np.bincount(np.repeat(np.arange(len(labels)), lengths), weights=of_class[flat], minlength=len(labels))


def stratified(labels: Sequence[Sequence[int]], ratio: int | float, seed: int) -> np.ndarray:
    """int64, rising: the clips of a subset that takes the same share of each class, and one of each at least.

    Smaller subsets are part of larger ones of the same seed. A clip of several classes counts for its rarest; clips
    without a class are a class of their own.

    Args:
      labels: the class indices of each clip.
      ratio: the share, in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f'the share must lie in (0, 1]; got {ratio}.')
    counts: collections.Counter[int] = collections.Counter(i for indices in labels for i in indices)
    by_class: dict[int, list[int]] = {}
    for clip, indices in enumerate(labels):
        by_class.setdefault(min(indices, key=lambda i: (counts[i], i), default=-1), []).append(clip)
    chosen: list[int] = []
    for index, clips in by_class.items():
        count = max(1, round(ratio * len(clips)))
        chosen += [clips[order.shuffle(place, len(clips), seed, index + 1)] for place in range(count)]
    return np.sort(np.asarray(chosen, np.int64))


class Subset:
    """Some of the clips of a source, as a source: for learning from few labels."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.info = source.info
        self.split = source.split
        self.spectrogram_shape = source.spectrogram_shape

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Clip:
        return self.source[int(self.indices[index])]

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))


class WeightedOrder:
    """Which record lies at a place of an epoch, when records are drawn by weight."""

    def __init__(self, weights: Sequence[int | float] | np.ndarray):
        values = np.asarray(weights, np.float64)
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or values.min() < 0 or not values.any():
            raise ValueError(
                'clip weights must be finite, not below 0, and not all 0. Weights by class need labelled clips.'
            )
        self._ends = np.cumsum(values)
        self._last = int(np.flatnonzero(values)[-1])

    def __len__(self) -> int:
        return len(self._ends)

    def record(self, place: int, *key: int) -> int:
        """The record at a place of the order that `key` (seed, dataset, epoch) stands for."""
        size = len(self._ends)
        point = order.shuffle(place, size, *key) + order.fraction(*key)
        found = int(np.searchsorted(self._ends, point / size * self._ends[-1], side='right'))
        return min(found, self._last)  # Rounding may carry the last point to the very end.

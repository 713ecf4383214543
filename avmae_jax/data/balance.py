"""Drawing clips by weight: rare classes more often than they come in the data.

    weights = clip_weights(sources.read_labels(source, 'label'), num_classes=527)
    Mixture([source], clip_weights=[weights])

An epoch has as many places as there are clips, and gives each clip as many of them as its weight is worth, rounded up
or down: places are points at equal distances along the clips laid out end to end, each as long as its weight. Drawing
every place by itself would have the same mean, but would miss a clip of average weight in one epoch out of three.
Any place is found in O(log n), with nothing to remember.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avmae_jax.data import order


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

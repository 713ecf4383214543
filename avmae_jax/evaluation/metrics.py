"""How good scores are. Each number comes with what guessing would give, and ties never help.

Where scores are equal nothing says which comes first, so ranks are those of a random order among equals, in
expectation: a model that gives every candidate the same score gets chance, not a recall of one.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Shaped

from avmae_jax.structs import Array


def accuracy(predicted: Int[Array, 'n'], labels: Int[Array, 'n']) -> float:
    """The share of rows whose predicted class is the right one."""
    return float(np.mean(predicted == labels))


def majority_rate(labels: Int[Array, 'n']) -> float:
    """Accuracy of always naming the most frequent class of these rows."""
    return float(np.bincount(labels).max() / len(labels))


def average_precision(scores: Float[Array, 'n'], positive: Shaped[Array, 'n']) -> float:
    """Area under precision over recall, without interpolation; equal scores are one threshold, as in scikit-learn."""
    positive = np.asarray(positive) > 0
    if not positive.any():
        raise ValueError('average precision needs a row of the class; there is none.')
    order = np.argsort(-scores, kind='stable')
    last_of_equals = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum(positive[order])[last_of_equals]
    found = np.flatnonzero(last_of_equals) + 1
    gained = np.diff(hits, prepend=0) / hits[-1]
    return float(np.sum(gained * hits / found))


def mean_average_precision(scores: Float[Array, 'n c'], targets: Shaped[Array, 'n c']) -> float:
    """Mean over the classes that have a row; a class without one has no average precision."""
    present = np.flatnonzero((np.asarray(targets) > 0).any(axis=0))
    if not len(present):
        raise ValueError('mean average precision needs labelled rows; no row has a label.')
    return float(np.mean([average_precision(scores[:, c], targets[:, c]) for c in present]))


def mean_positive_rate(targets: Shaped[Array, 'n c']) -> float:
    """What scores that say nothing get for a mean average precision: the mean frequency of the classes."""
    frequency = (np.asarray(targets) > 0).mean(axis=0)
    return float(frequency[frequency > 0].mean())


def ranks(similarity: Float[Array, 'q n'], own: Int[Array, 'q']) -> tuple[Int[Array, 'q'], Int[Array, 'q']]:
    """For each query (row), how many candidates lie before its own one, and how many are equal to it.

    The second counts the right one itself.
    """
    right = similarity[np.arange(len(own)), own][:, None]
    return (similarity > right).sum(axis=1), (similarity == right).sum(axis=1)


def retrieval(before: Int[Array, 'q'], equal: Int[Array, 'q'], ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k and the median rank (1 is best) from what `ranks` counted."""
    results = {f'recall@{k}': float(np.mean(np.clip((k - before) / equal, 0, 1))) for k in ks}
    results['median_rank'] = float(np.median(before + (equal + 1) / 2))
    return results


def retrieval_chance(num_candidates: int, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """What a random order of the candidates gives."""
    chance = {f'recall@{k}': min(1.0, k / num_candidates) for k in ks}
    chance['median_rank'] = (num_candidates + 1) / 2
    return chance

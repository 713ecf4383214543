"""How good scores are. Each number comes with what guessing would give, and ties never help.

Where scores are equal nothing says which comes first, so ranks are those of a random order among equals, in
expectation: a model that gives every candidate the same score gets chance, not a recall of one. Only the order of
scores counts: logits do as well as probabilities.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from avmae_jax.structs import Array

# -- Which candidate comes first --


def ranks(similarity: Float[Array, 'q n'], own: Int[Array, 'q']) -> tuple[Int[Array, 'q'], Int[Array, 'q']]:
    """For each query (row), how many candidates lie before its own one, and how many are equal to it.

    The second counts the right one itself. Classes are candidates too: their logits are the similarity.
    """
    right = similarity[np.arange(len(own)), own][:, None]
    return (similarity > right).sum(axis=1), (similarity == right).sum(axis=1)


def hits(before: Int[Array, 'q'], equal: Int[Array, 'q'], k: int) -> Float[np.ndarray, 'q']:
    """How likely the own candidate is among the first k, from what `ranks` counted: 0 or 1 where nothing is equal."""
    return np.clip((k - before) / equal, 0, 1)


def retrieval(before: Int[Array, 'q'], equal: Int[Array, 'q'], ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k and the median rank (1 is best) from what `ranks` counted."""
    results = {f'recall@{k}': float(np.mean(hits(before, equal, k))) for k in ks}
    results['median_rank'] = float(np.median(before + (equal + 1) / 2))
    return results


def retrieval_chance(num_candidates: int, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """What a random order of the candidates gives."""
    chance = {f'recall@{k}': min(1.0, k / num_candidates) for k in ks}
    chance['median_rank'] = (num_candidates + 1) / 2
    return chance


# -- One class a row --


def top_k_accuracy(scores: Float[Array, 'n c'], labels: Int[Array, 'n'], k: int = 1) -> float:
    """The share of rows whose class is among the k with the highest scores; 1 where there are no more than k."""
    return float(np.mean(hits(*ranks(scores, labels), k)))


def majority_rate(labels: Int[Array, 'n'], k: int = 1) -> float:
    """Top-k accuracy of always naming the k most frequent classes of these rows."""
    return float(np.sort(np.bincount(labels))[::-1][:k].sum() / len(labels))


def class_accuracies(scores: Float[Array, 'n c'], labels: Int[Array, 'n']) -> dict[int, float]:
    """Class -> the share of its rows that are given to it, for the classes that occur."""
    right = hits(*ranks(scores, labels), 1)
    return {int(c): float(right[labels == c].mean()) for c in np.unique(labels)}


def mean_class_accuracy(scores: Float[Array, 'n c'], labels: Int[Array, 'n']) -> float:
    """Each class that occurs counts the same, however many rows it has; naming one class always gives 1 / classes."""
    return float(np.mean(list(class_accuracies(scores, labels).values())))


def confusion_matrix(scores: Float[Array, 'n c'], labels: Int[Array, 'n']) -> Float[np.ndarray, 'c c']:
    """[true class, class named] -> rows. A row whose highest scores are equal is shared out among their classes."""
    first = scores == scores.max(axis=1, keepdims=True)
    named = first / first.sum(axis=1, keepdims=True)
    counts = np.zeros((scores.shape[1], scores.shape[1]))
    np.add.at(counts, labels, named)
    return counts


# -- Several classes a row --


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


def average_precisions(scores: Float[Array, 'n c'], targets: Shaped[Array, 'n c']) -> dict[int, float]:
    """Class -> average precision, for the classes that have a row."""
    present = np.flatnonzero((np.asarray(targets) > 0).any(axis=0))
    return {int(c): average_precision(scores[:, c], targets[:, c]) for c in present}


def mean_average_precision(scores: Float[Array, 'n c'], targets: Shaped[Array, 'n c']) -> float:
    """Mean over the classes that have a row; a class without one has no average precision."""
    found = average_precisions(scores, targets)
    if not found:
        raise ValueError('mean average precision needs labelled rows; no row has a label.')
    return float(np.mean(list(found.values())))


def mean_positive_rate(targets: Shaped[Array, 'n c']) -> float:
    """What scores that say nothing get for a mean average precision: the mean frequency of the classes."""
    frequency = (np.asarray(targets) > 0).mean(axis=0)
    return float(frequency[frequency > 0].mean())


def roc_auc(scores: Float[Array, 'n'], positive: Shaped[Array, 'n']) -> float:
    """How likely a row of the class scores above one that is not of it; equal scores are half above."""
    positive = np.asarray(positive) > 0
    inside, outside = scores[positive], np.sort(scores[~positive])
    if not len(inside) or not len(outside):
        raise ValueError(f'ROC AUC needs rows of the class and others; {len(inside)} of {len(scores)} are of it.')
    twice_below = np.searchsorted(outside, inside, 'left') + np.searchsorted(outside, inside, 'right')
    return float(twice_below.mean() / (2 * len(outside)))


def roc_aucs(scores: Float[Array, 'n c'], targets: Shaped[Array, 'n c']) -> dict[int, float]:
    """Class -> ROC AUC, for the classes that some rows are of and others are not."""
    positive = np.asarray(targets) > 0
    defined = np.flatnonzero(positive.any(axis=0) & ~positive.all(axis=0))
    return {int(c): roc_auc(scores[:, c], targets[:, c]) for c in defined}


def d_prime(auc: float, num_pairs: int) -> float:
    """By how many standard deviations two normal curves must lie apart to have this AUC: sqrt(2) times its probit.

    At AUC 0 and 1 that is infinite, and says no more than that the rows were too few to see an error. As is usual in
    signal detection (Macmillan and Kaplan, Psychological Bulletin 1985), half an error is then assumed.

    Args:
      num_pairs: of a row of the class and one that is not, from which the AUC is counted.
    """
    nearest_end = max(min(auc, 1 - auc), 0.5 / num_pairs)
    return math.copysign(math.sqrt(2) * NormalDist().inv_cdf(nearest_end), auc - 0.5)


# -- A verb and a noun a row: EPIC-KITCHENS-100 --


def action_ranks(
    verb_scores: Float[Array, 'n v'],
    noun_scores: Float[Array, 'n o'],
    verbs: Int[Array, 'n'],
    nouns: Int[Array, 'n'],
    rows_at_once: int = 128,
) -> tuple[Int[np.ndarray, 'n'], Int[np.ndarray, 'n']]:
    """`ranks` of the right pair among all pairs of a verb and a noun; scores are logits, or log-probabilities.

    A pair's probability is the product of the two softmaxes, so pairs are ordered by the sum of their logits. The
    challenge (github.com/epic-kitchens/C1-Action-Recognition, `compute_action_scores`) keeps the 100 best nouns and
    the 100 best pairs of each row. The first k pairs are made of the first k verbs and nouns, so up to k=100 that
    changes no accuracy, and all pairs are counted here, seen in training or not.
    """
    before, equal = [], []
    for start in range(0, len(verbs), rows_at_once):
        rows = slice(start, start + rows_at_once)
        # In float64 the sum of two float32 is (all but) exact: pairs are equal only where they are.
        pairs = verb_scores[rows, :, None].astype(np.float64) + noun_scores[rows, None, :]
        pairs = pairs.reshape(len(pairs), -1)  # [rows v*o]
        counts = ranks(pairs, verbs[rows] * noun_scores.shape[1] + nouns[rows])
        before.append(counts[0])
        equal.append(counts[1])
    return np.concatenate(before), np.concatenate(equal)


def tail_classes(counts: Int[Array, 'c'], ratio: float = 0.2) -> Bool[np.ndarray, 'c']:
    """The smallest classes that together have no more than this share of the training rows.

    After the README of github.com/epic-kitchens/epic-kitchens-100-annotations, which leaves open what becomes of
    equal counts at the border; here all of them stay outside.

    Args:
      counts: training rows of each class.
    """
    if not 0 <= ratio < 1 or not counts.sum():
        raise ValueError(f'tail classes need training rows and a ratio in [0, 1); got {counts.sum()} and {ratio}.')
    ascending = np.sort(counts)
    outside = ascending[np.cumsum(ascending) > ratio * counts.sum()]
    return counts < outside[0]

"""Finding a clip's picture by its sound and its sound by its picture, from frozen features.

A masked autoencoder is never asked to bring its modalities into one space, so its features cannot be
compared as they are (`cosine` does so all the same, to show it). What they have in common is found in
closed form on the training split: canonical correlation analysis, the pair of linear maps under which the
two modalities of a clip agree most.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from avmae_jax.evaluation import metrics
from avmae_jax.evaluation.probes import heldout_rows, standardise
from avmae_jax.structs import Array

Pair = tuple[Float[Array, '_ d'], Float[Array, '_ e']]  # The two modalities of the same clips.
Joint = tuple[Float[Array, 'n c'], Float[Array, 'n c']]  # The same, in one space.


@dataclasses.dataclass(frozen=True)
class CanonicalCorrelation:
    """Linear maps of both modalities into the directions in which they correlate, weighted by how much.

    Attributes:
      shrinkage: candidates for the share of the mean variance that is added to every direction before
        whitening, from strong to weak; the one with the lowest mean log rank on held-out training clips is
        taken, then all training clips are fitted.
    """

    shrinkage: tuple[float, ...] = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
    heldout_ratio: float = 0.2

    def __call__(self, train: Pair, test: Pair) -> tuple[Joint, dict[str, float]]:
        """Both modalities of the test clips in one space, and what was chosen."""
        heldout = heldout_rows(len(train[0]), self.heldout_ratio)
        standard = [standardise(x[~heldout], x[heldout]) for x in train]
        statistics = _whitening(standard[0][0]), _whitening(standard[1][0])
        held = standard[0][1], standard[1][1]
        costs = []
        for shrinkage in self.shrinkage:
            maps = _maps(statistics, (standard[0][0], standard[1][0]), shrinkage)
            first, second = held[0] @ maps[0], held[1] @ maps[1]
            costs.append(_mean_log_rank(first, second) + _mean_log_rank(second, first))
        best = self.shrinkage[int(np.argmin(costs))]
        (first, first_test), (second, second_test) = (standardise(x, y) for x, y in zip(train, test, strict=True))
        maps = _maps((_whitening(first), _whitening(second)), (first, second), best)
        return (first_test @ maps[0], second_test @ maps[1]), {'shrinkage': best}


def _whitening(x):
    """Eigenvalues and eigenvectors of the covariance; shrinkage then costs nothing to try."""
    return np.linalg.eigh(x.T.astype(np.float64) @ x / len(x))


def _maps(statistics, pair, shrinkage):
    whiten = []
    for values, vectors in statistics:
        whiten.append(vectors / np.sqrt(np.maximum(values, 0) + shrinkage * values.mean() + 1e-12))
    common = (pair[0] @ whiten[0]).T @ (pair[1] @ whiten[1]) / len(pair[0])
    left, correlations, right = np.linalg.svd(common, full_matrices=False)
    return [
        (whiten[0] @ left * correlations).astype(np.float32),
        (whiten[1] @ right.T * correlations).astype(np.float32),
    ]


def _mean_log_rank(queries, candidates):
    before, equal = ranks(queries, candidates)
    return float(np.mean(np.log(before + (equal + 1) / 2)))


def plain(train: Pair, test: Pair) -> Joint | None:
    """Standardised features side by side as they are, where their widths allow it."""
    if train[0].shape[1] != train[1].shape[1]:
        return None
    return standardise(train[0], test[0])[1], standardise(train[1], test[1])[1]


def ranks(queries: Float[Array, 'n d'], candidates: Float[Array, 'n d'], rows_at_once: int = 1024):
    """`metrics.ranks` of cosines, where query i asks for candidate i; block by block, to bound memory."""
    queries, candidates = _unit(queries), _unit(candidates)
    blocks = []
    for start in range(0, len(queries), rows_at_once):
        similarity = queries[start : start + rows_at_once] @ candidates.T
        blocks.append(metrics.ranks(similarity, np.arange(start, start + len(similarity))))
    before, equal = zip(*blocks, strict=True)
    return np.concatenate(before), np.concatenate(equal)


def _unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

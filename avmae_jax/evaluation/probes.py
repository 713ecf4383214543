"""What frozen features know of the classes: nearest neighbours and a linear probe.

Both take features of a training and a test split and return scores for the test rows. Targets are
multi-hot; where a clip has one class only, softmax and accuracy are used, otherwise sigmoids and mean
average precision.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from avmae_jax.evaluation import metrics
from avmae_jax.structs import Array

HIGHEST = jax.lax.Precision.HIGHEST


class Score(NamedTuple):
    """One number with what guessing gives; attributes: metric: its name; settings: what was chosen to get it."""

    metric: str
    value: float
    chance: float
    settings: dict[str, float]


def judge(
    scores: Float[Array, 'n c'], targets: Float[Array, 'n c'], *, multi: bool, settings: dict[str, float]
) -> Score:
    """Accuracy, or mean average precision where a clip may have several classes."""
    if multi:
        value, chance = metrics.mean_average_precision(scores, targets), metrics.mean_positive_rate(targets)
        return Score('mAP', value, chance, settings)
    labels = targets.argmax(axis=1)
    return Score('accuracy', metrics.top_k_accuracy(scores, labels), metrics.majority_rate(labels), settings)


@dataclasses.dataclass(frozen=True)
class NearestNeighbours:
    """Votes of the most similar training clips, weighted by exp(cosine / temperature).

    k=20 and 0.07 are those of DINO and of Wu et al. 2018 (arXiv 1805.01978), whose k is 200. Cosines are
    taken of whitened features: the training mean is subtracted, as the part that all clips share drowns the
    differences, and the directions are made equally loud, as nothing in a reconstruction's error makes
    the directions that tell classes louder than those that tell where things are. No label has a say in it.

    Attributes:
      shrinkage: share of the mean variance added to each direction's before it is divided by; keeps
        directions in which nothing happens quiet.
    """

    num_neighbours: int = 20
    temperature: float = 0.07
    shrinkage: float = 0.01
    rows_at_once: int = 1024  # Bounds memory: one block of cosines is rows_at_once x training rows.

    def __call__(
        self, train: Float[Array, 'm d'], train_targets: Float[Array, 'm c'], test: Float[Array, 'n d']
    ) -> Float[np.ndarray, 'n c']:
        k = min(self.num_neighbours, len(train))
        train, test = whiten(train, test, shrinkage=self.shrinkage)
        keys, targets = _unit(jnp.asarray(train)), jnp.asarray(train_targets)

        @jax.jit
        def vote(rows):
            cosines = jnp.matmul(_unit(rows), keys.T, precision=HIGHEST)
            nearest, which = jax.lax.top_k(cosines, k)
            weights = jnp.exp((nearest - 1) / self.temperature)
            return jnp.einsum('nk,nkc->nc', weights, targets[which], precision=HIGHEST)

        blocks = [test[i : i + self.rows_at_once] for i in range(0, len(test), self.rows_at_once)]
        return np.concatenate([np.asarray(vote(jnp.asarray(block))) for block in blocks])


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on standardised features: mean loss + l2 / 2 |W|^2, by L-BFGS in float32.

    The penalty is the one with the lowest loss on a part of the training rows held out for it; then all
    training rows are fitted. The test split has no say in anything.

    Attributes:
      l2: candidates, from strong to weak: each fit starts from the one before.
      heldout_ratio: share of the training rows that choose.
      tolerance: the fit ends where the gradient's largest entry falls below it.
    """

    l2: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
    heldout_ratio: float = 0.2
    max_steps: int = 300
    tolerance: float = 1e-5

    def __call__(
        self,
        train: Float[Array, 'm d'],
        train_targets: Float[Array, 'm c'],
        test: Float[Array, 'n d'],
        *,
        multi: bool,
    ) -> tuple[Float[np.ndarray, 'n c'], dict[str, float]]:
        """Scores of the test rows, and what was chosen."""
        heldout = heldout_rows(len(train), self.heldout_ratio)
        fitted, seen = standardise(train[~heldout], train[heldout])
        weights, losses = None, []
        for l2 in self.l2:
            weights = fit_logistic(
                fitted, train_targets[~heldout], l2=l2, multi=multi, start=weights,
                max_steps=self.max_steps, tolerance=self.tolerance,
            )  # fmt: skip
            losses.append(float(_loss(weights, jnp.asarray(seen), jnp.asarray(train_targets[heldout]), multi)))
        best = self.l2[int(np.nanargmin(losses))]
        train, test = standardise(train, test)
        weights = fit_logistic(
            train, train_targets, l2=best, multi=multi, max_steps=self.max_steps, tolerance=self.tolerance
        )
        return np.asarray(_scores(weights, jnp.asarray(test))), {'l2': best}


def heldout_rows(num_rows: int, ratio: float) -> np.ndarray:
    """A fixed random choice of rows: the same for every model that is compared on them."""
    if num_rows < 2:
        raise ValueError(f'a probe needs at least 2 training rows; got {num_rows}.')
    chosen = np.zeros(num_rows, bool)
    chosen[np.random.default_rng(0).permutation(num_rows)[: max(1, int(ratio * num_rows))]] = True
    return chosen


def whiten(train: Float[Array, 'm d'], *others: Float[Array, '_ d'], shrinkage: float) -> list[np.ndarray]:
    """All turned and scaled so that the training rows have mean 0 and no direction is louder than another."""
    mean = train.mean(axis=0, dtype=np.float64)
    centred = train - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / len(train))
    scale = 1 / np.sqrt(np.maximum(variances, 0) + shrinkage * variances.mean() + 1e-12)
    return [((x - mean) @ (directions * scale)).astype(np.float32) for x in (train, *others)]


def standardise(train: Float[Array, 'm d'], *others: Float[Array, '_ d']) -> list[np.ndarray]:
    """All by mean and deviation of the training rows; a feature that never changes becomes 0, not noise."""
    mean = train.mean(axis=0, dtype=np.float64)
    deviation = train.std(axis=0, dtype=np.float64)
    scale = np.where(deviation > 1e-6 * (1 + np.abs(mean)), 1 / np.maximum(deviation, 1e-12), 0)
    return [((x - mean) * scale).astype(np.float32) for x in (train, *others)]


def fit_logistic(
    x: Float[Array, 'm d'],
    targets: Float[Array, 'm c'],
    *,
    l2: float,
    multi: bool,
    start: dict[str, Array] | None = None,
    max_steps: int = 300,
    tolerance: float = 1e-5,
) -> dict[str, Array]:
    """kernel [d c] and bias [c] of the regularised optimum; the bias is not penalised."""
    if start is None:
        start = {'kernel': jnp.zeros((x.shape[1], targets.shape[1])), 'bias': jnp.zeros(targets.shape[1])}
    return _minimise(
        start, jnp.asarray(x), jnp.asarray(targets), jnp.float32(l2), multi, max_steps, jnp.float32(tolerance)
    )


@jax.jit(static_argnames=('multi', 'max_steps'))
def _minimise(weights, x, targets, l2, multi, max_steps, tolerance):
    def objective(weights):
        return _loss(weights, x, targets, multi) + 0.5 * l2 * jnp.sum(jnp.square(weights['kernel']))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def going_on(carry):
        _, state = carry
        gradient = optax.tree.norm(optax.tree.get(state, 'grad'), ord='inf')
        count = optax.tree.get(state, 'count')
        return (count == 0) | ((count < max_steps) & (gradient > tolerance))

    def step(carry):
        weights, state = carry
        value, gradient = value_and_grad(weights, state=state)
        updates, state = solver.update(gradient, state, weights, value=value, grad=gradient, value_fn=objective)
        return optax.apply_updates(weights, updates), state

    return jax.lax.while_loop(going_on, step, (weights, solver.init(weights)))[0]


def _scores(weights, x):
    logits = jnp.matmul(x, weights['kernel'], precision=HIGHEST)
    return logits + weights['bias'][None]


def _loss(weights, x, targets, multi):
    logits = _scores(weights, x)
    if multi:
        return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1))
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))

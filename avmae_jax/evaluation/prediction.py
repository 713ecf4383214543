"""The likeliest classes of each clip, for people: names and scores in place of logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from avmae_jax.evaluation.tables import format_table
from avmae_jax.structs import Array

ACTION = ('verb', 'noun')  # Heads whose classes make an action together: EPIC-KITCHENS-100.


class Guess(NamedTuple):
    """
    Attributes:
      number: of the class; (verb, noun) of an action.
      score: probability in [0, 1].
    """

    number: int | tuple[int, int]
    name: str
    score: float


def softmax(logits: Float[Array, 'n c']) -> Float[np.ndarray, 'n c']:
    exact = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True))
    return exact / exact.sum(axis=1, keepdims=True)


def sigmoid(logits: Float[Array, 'n c']) -> Float[np.ndarray, 'n c']:
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))  # Overflows nowhere.


PROBABILITIES = {'softmax': softmax, 'sigmoid': sigmoid}  # By the kind of head, as in `objectives/classification.py`.


def top_classes(kind: str, logits: Float[Array, 'n c'], names: Sequence[str], k: int) -> list[list[Guess]]:
    """The k likeliest classes of each row, the likeliest first; equally likely ones in the order of their numbers.

    Args:
      kind: key of PROBABILITIES.
      k: where there are fewer classes, all of them are given.
    """
    if kind not in PROBABILITIES:
        raise ValueError(f'the kind of a head must be one of {tuple(PROBABILITIES)}; got {kind!r}.')
    _check(logits, names, k)
    # By logits: probabilities of 1 - 1e-20 and 1 - 1e-30 are the same number.
    chosen, scores = _first(logits, k), PROBABILITIES[kind](logits)
    return [
        [Guess(int(c), names[c], float(scores[row, c])) for c in classes] for row, classes in enumerate(chosen)
    ]  # fmt: skip


def top_actions(
    verb_logits: Float[Array, 'n v'],
    noun_logits: Float[Array, 'n o'],
    verbs: Sequence[str],
    nouns: Sequence[str],
    k: int,
) -> list[list[Guess]]:
    """The k likeliest pairs of a verb and a noun; a pair's score is the product of the two softmaxes."""
    _check(verb_logits, verbs, k)
    _check(noun_logits, nouns, k)
    # The first k pairs are made of the first k verbs and nouns. Sorted by number, so that ties come in their order.
    few_verbs, few_nouns = np.sort(_first(verb_logits, k)), np.sort(_first(noun_logits, k))
    verb_scores, noun_scores = softmax(verb_logits), softmax(noun_logits)
    found = []
    for row, (v, o) in enumerate(zip(few_verbs, few_nouns, strict=True)):
        sums = np.asarray(verb_logits[row, v], np.float64)[:, None] + noun_logits[row, o]
        (order,) = _first(sums.reshape(1, -1), k)
        pairs = [(int(v[i // len(o)]), int(o[i % len(o)])) for i in order]
        found.append(
            [
                Guess(
                    (verb, noun), f'{verbs[verb]} {nouns[noun]}', float(verb_scores[row, verb] * noun_scores[row, noun])
                )
                for verb, noun in pairs
            ]
        )
    return found


def predict(
    heads: Mapping[str, str],
    logits: Mapping[str, Float[Array, 'n _c']],
    names: Mapping[str, Sequence[str]],
    k: int = 5,
) -> list[dict[str, list[Guess]]]:
    """For each row: head -> its likeliest classes, and 'action' where there are heads for verb and noun.

    Args:
      heads: head -> 'softmax' or 'sigmoid', those of the objective.
      logits: averaged over moments, crops and parts.
      names: head -> its classes.
    """
    found = {head: top_classes(kind, logits[head], names[head], k) for head, kind in heads.items()}
    if all(heads.get(head) == 'softmax' for head in ACTION):
        verb, noun = ACTION
        found['action'] = top_actions(logits[verb], logits[noun], names[verb], names[noun], k)
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def prediction_table(paths: Sequence[str], predictions: Sequence[Mapping[str, Sequence[Guess]]]) -> str:
    """A block a file, one line a class; heads one below the other."""
    blocks = []
    for path, by_head in zip(paths, predictions, strict=True):
        rows = [['labels', 'class', 'score']]
        for head, guesses in by_head.items():
            rows += [[head if i == 0 else '', g.name, f'{g.score:.4f}'] for i, g in enumerate(guesses)]
        blocks.append(f'{path}\n{format_table(rows)}')
    return '\n\n'.join(blocks)


def _first(logits: Float[Array, 'n c'], k: int) -> np.ndarray:
    """[n k] the classes with the highest logits; of equal ones the first."""
    return np.argsort(-np.asarray(logits, np.float64), axis=1, kind='stable')[:, :k]


def _check(logits: Float[Array, 'n c'], names: Sequence[str], k: int) -> None:
    if logits.shape[1] != len(names):
        raise ValueError(f'the model scores {logits.shape[1]} classes and there are {len(names)} names.')
    if k < 1:
        raise ValueError(f'at least one class must be asked for; got k={k}.')
    if not np.isfinite(logits).all():
        raise ValueError('the model gives scores that are no finite numbers: its parameters are, or became, broken.')

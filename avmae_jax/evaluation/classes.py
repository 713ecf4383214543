"""What a classifier says of every clip of a split, and what benchmarks make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from avmae_jax.evaluation import benchmarks
from avmae_jax.evaluation.passes import RowStep
from avmae_jax.ops import augment
from avmae_jax.structs import JOINT_ORDER, Batch, Modality

EVERYTHING = 'everything'


def ways_of(modalities: Sequence[Modality]) -> list[str]:
    """How a model of several modalities can be asked: 'everything', each 'alone', and with each 'missing'.

    'audio alone' gives the model no other stream. 'video missing' gives it all streams, of clips that were stored
    without a picture: what it meets where a file has none.
    """
    found = [m for m in JOINT_ORDER if m in modalities]
    if len(found) < 2:
        return [EVERYTHING]
    return [EVERYTHING, *(f'{m} alone' for m in found), *(f'{m} missing' for m in found)]


def make_logit_step(model: Any, preprocess: Any, ways: Sequence[str] = (EVERYTHING,)) -> RowStep:
    """(params, batch) -> way -> head -> [b classes], the mean over the parts that a row has; and the labels.

    'scored' is way -> bool [b]: whether a row has anything to be scored by.
    """

    def step(params: Any, batch: Batch) -> dict[str, Any]:
        results: dict[str, Any] = {'labels': batch.labels, 'scored': {}}
        for way in ways:
            modality, _, how = way.partition(' ')
            rows = augment.without(batch, modality) if how == 'missing' else batch
            inputs = {m: x for m, x in preprocess(rows, train=False).items() if how != 'alone' or m == modality}
            results['scored'][way] = jnp.any(jnp.stack([jnp.asarray(rows.present[m]) for m in inputs]), axis=0)
            results[way] = model.apply({'params': params}, inputs, present=rows.present).averaged
        return results

    return step


def heads_of(table: Mapping[str, Any], way: str, names: Mapping[str, Sequence[str]]) -> dict[str, benchmarks.Head]:
    """What `benchmarks.score` takes, of what a pass collected.

    A clip that lacks all that a way looks at is scored by 'everything', by luck, and by no other way.

    Args:
      names: head -> names of its classes.
    """
    counted = np.ones_like(table['scored'][way]) if way == EVERYTHING else table['scored'][way]
    return {
        head: benchmarks.Head(logits, table['labels'][head] * counted[:, None], names[head])
        for head, logits in table[way].items()
    }


def benchmark_kind(heads: Mapping[str, str]) -> str:
    """The benchmark that goes with the heads of an objective and what they ask."""
    if set(heads) == {'verb', 'noun'}:
        return 'verb-noun'
    kinds = set(heads.values())
    if len(kinds) > 1:
        raise ValueError(f'config.objective.heads mixes {" and ".join(sorted(kinds))}: no benchmark scores both.')
    return 'single-label' if kinds == {'softmax'} else 'multi-label'


def modality_rows(table: Mapping[str, Any], kind: str, ways: Sequence[str], names: Mapping[str, Sequence[str]]) -> list:
    """The scores of every way, one dict a way, head, subset and metric; and what is lost against 'everything'."""
    rows = []
    whole: dict[tuple[str, str, str], float] = {}
    for way in ways:
        if way != EVERYTHING and not table['scored'][way].any():
            continue  # No clip of the split has that modality: nothing to be told.
        for score in benchmarks.score(kind, heads_of(table, way, names))['scores']:
            key = (score['head'], score['subset'], score['metric'])
            whole.setdefault(key, score['value'])
            rows.append({'given': way, **score, 'difference': score['value'] - whole[key]})
    return rows


def write_logits(path: epath.PathLike, ids: Sequence[str], heads: Mapping[str, benchmarks.Head]) -> None:
    """One npz of 'ids', and of HEAD/logits, HEAD/targets and HEAD/names for every head."""
    arrays: dict[str, np.ndarray] = {'ids': np.asarray(ids, str)}
    for name, head in heads.items():
        arrays[f'{name}/logits'] = np.asarray(head.logits, np.float32)
        arrays[f'{name}/targets'] = np.asarray(head.targets, np.float32)
        arrays[f'{name}/names'] = np.asarray(head.names, str)
    with epath.Path(path).open('wb') as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

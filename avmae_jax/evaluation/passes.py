"""One pass over a split: every clip once, whatever the number of devices and hosts.

A step computes something small for each row of a batch; a pass collects it. All hosts end up with all rows
in the order of the records, without the rows that only filled the last batch, so that whatever is fitted on
them comes out alike everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from avmae_jax.parallel.hosts import Prefetch
from avmae_jax.parallel.rules import on_mesh
from avmae_jax.progress import progress
from avmae_jax.structs import JOINT_ORDER, Array, Batch

RowStep = Callable[[Any, Batch], dict[str, Any]]  # (params, batch) -> arrays with a leading batch dimension.

MAX_IN_FLIGHT = 2  # Steps dispatched before the oldest is fetched; enough to keep the device busy.


def run_pass(
    step: RowStep,
    params: Any,
    batches: Iterable[Batch],
    *,
    sharding: NamedSharding,
    num_records: int,
    num_batches: int | None = None,
    what: str = 'evaluating',
) -> dict[str, Any]:
    """What `step` gave for every record, in the order of the records, plus 'record'; numpy, on every host.

    Args:
      batches: this host's rows of each batch; padding has weight 0.
      sharding: of a batch.
      num_records: how many there should be. Rows of one record (several moments or crops of it) are averaged:
        features, errors and logits alike. They must be equally many for all. A record that is missing, because it
        is damaged, is said.
    """
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())

    def labelled_step(params, batch):
        return {**step(params, batch), 'record': batch.record, 'weight': batch.weight}

    jitted = jax.jit(on_mesh(labelled_step, sharding.mesh), out_shardings=everywhere)
    rows: list[dict[str, Any]] = []
    in_flight: list[dict[str, Any]] = []
    prefetch = Prefetch(batches, sharding)
    bar = progress(num_batches, what=what, unit='batches')

    def fetch(keep: int) -> None:
        while len(in_flight) > keep:
            rows.append(jax.tree.map(np.asarray, in_flight.pop(0)))
            bar.update()

    try:
        for _, batch in prefetch:
            in_flight.append(jitted(params, batch))
            fetch(MAX_IN_FLIGHT - 1)
        fetch(0)
    finally:
        bar.close()
        prefetch.close()
    return _in_order(rows, num_records, what)


def _in_order(rows: list[dict[str, Any]], num_records: int, what: str) -> dict[str, Any]:
    if not rows:
        raise ValueError(f'{what}: the split has no records.')
    table = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    counted = np.flatnonzero(table.pop('weight') > 0)
    order = counted[np.argsort(table['record'][counted], kind='stable')]
    if not len(order):
        raise ValueError(f'{what}: none of the {num_records} records could be read.')
    record, first, count = np.unique(table.pop('record')[order], return_index=True, return_counts=True)
    if len(set(count)) > 1:
        raise ValueError(f'{what}: record {record[count.argmax()]} came {count.max()} times, others {count.min()}.')
    if len(record) != num_records:
        logging.warning('%s: %d of %d records could be read.', what, len(record), num_records)

    def one_per_record(x: np.ndarray) -> np.ndarray:
        x = x[order]
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x[first]
        # At least float32: the sum of many bfloat16 would lose what tells them apart.
        wide = np.promote_types(x.dtype, np.float32)
        return np.add.reduceat(x.astype(wide, copy=False), first) / wide.type(count[0])

    return {**jax.tree.map(one_per_record, table), 'record': record}


def make_feature_step(model: Any, preprocess: Any, layers: Sequence[int] = ()) -> RowStep:
    """Clip-level features: the mean of a modality's tokens after the encoder, nothing hidden.

    'alone': modality -> [b d], the encoder given nothing else: what it knows of one modality, and the only fair
    features for retrieval. 'together': the same with all modalities given, where each may have taken from the
    others (`early` and `mid` encoders); left out for a single modality. 'layers': number -> modality -> [b d], the
    modality alone after that many layers, before any norm. A class token is not averaged in.

    Args:
      layers: counted from 1.
    """

    def step(params: Any, batch: Batch) -> dict[str, Any]:
        inputs = preprocess(batch, train=False)
        inputs = {m: inputs[m] for m in JOINT_ORDER if m in inputs and m in model.tokenizers}
        grids = model.grids(inputs)
        results: dict[str, Any] = {
            'alone': {},
            'layers': {str(layer): {} for layer in layers},
            'present': {m: batch.present[m] for m in inputs},
            'labels': batch.labels,
        }
        for m, x in inputs.items():
            tokens, watched = model.apply({'params': params}, {m: x}, method='encode', mutable=['intermediates'])
            after = _outputs_of_layers(watched['intermediates'])
            results['alone'][m] = pool(tokens[m], grids[m])
            for layer in layers:
                if not 0 < layer <= len(after):
                    raise ValueError(f'layers must lie in 1..{len(after)}; got {layer}.')
                results['layers'][str(layer)][m] = pool(after[layer - 1], grids[m])
        if len(inputs) > 1:
            tokens = model.apply({'params': params}, inputs, method='encode')
            results['together'] = {m: pool(x, grids[m]) for m, x in tokens.items()}
        return results

    return step


def pool(tokens: Float[Array, 'b _ d'], grid: Sequence[int]) -> Float[Array, 'b d']:
    """The mean of a modality's tokens."""
    # A class token, where there is one, comes before the tokens of the grid.
    return jnp.mean(tokens[:, -math.prod(grid) :].astype(jnp.float32), axis=1)


def _outputs_of_layers(intermediates: Mapping[str, Any]) -> list[Float[Array, 'b n d']]:
    """What the layers of all stacks gave, in the order in which they ran; `models.blocks.Stack` tells it."""
    found = []
    for name, value in intermediates.items():
        if isinstance(value, Mapping):
            found += _outputs_of_layers(value)
        elif name.startswith('layer_'):
            found += value
    return found


def feature_sets(table: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (features [n d], rows that have the modalities [n]) of what a feature pass collected.

    'audio', 'video', 'image': alone. 'both': side by side, from the encoder given both. Where being given both
    changes a modality's features they are listed by themselves, as 'video (with audio)', and so are the
    features from alone side by side, as 'both (each alone)'. 'video, layer 2': alone after two layers; so is 'both,
    layer 2', side by side.
    """
    alone, present = table['alone'], table['present']
    modalities = [m for m in JOINT_ORDER if m in alone]
    everything = np.logical_and.reduce([present[m] for m in modalities])
    several = 'both' if len(modalities) == 2 else 'all'
    sets = {m: (alone[m], present[m]) for m in modalities}
    for layer, features in table['layers'].items():
        sets |= {f'{m}, layer {layer}': (features[m], present[m]) for m in modalities}
        if len(modalities) > 1:
            beside = np.concatenate([features[m] for m in modalities], axis=1)
            sets[f'{several}, layer {layer}'] = (beside, everything)
    if len(modalities) < 2:
        return sets
    together = table['together']
    meets = not all(np.allclose(alone[m][everything], together[m][everything], atol=1e-2) for m in modalities)
    if meets:
        for m in modalities:
            others = ' and '.join(other for other in modalities if other != m)
            sets[f'{m} (with {others})'] = (together[m], everything)
        sets[f'{several} (each alone)'] = (np.concatenate([alone[m] for m in modalities], axis=1), everything)
    sets[several] = (np.concatenate([together[m] for m in modalities], axis=1), everything)
    return sets

"""Reconstructions of a few clips under the masks that evaluation uses, ready to be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from avmae_jax.evaluation import pictures
from avmae_jax.evaluation.reconstruction import draw_fixed
from avmae_jax.structs import Array, Batch, Mask, Outputs


class Painted(NamedTuple):
    """Attributes: grids: of tokens; record: numbers of the clips, -1 for padding."""

    outputs: Outputs
    masks: dict[str, Mask]
    grids: dict[str, Any]
    record: Any


def make_painter(model: Any, objective: Any, preprocess: Any, num_clips: int) -> Callable[[Any, Batch], Painted]:
    """(params, batch) -> what the model makes of its first clips; to be jitted, with outputs on every host."""

    def paint(params: Any, batch: Batch) -> Painted:
        inputs = preprocess(batch, train=False)
        grids = model.grids(inputs)
        masks, places = draw_fixed(objective, grids, batch.record)
        outputs = model.apply({'params': params}, {m: inputs[m] for m in grids}, masks, places or None)
        if 'inpainting' not in objective.terms:  # The model answers, but nobody has taught it to.
            outputs = outputs._replace(inpainted={}, inpainted_mask={})
        outputs = _in_pixels(outputs, preprocess, first_targets(objective))
        record = jnp.where(batch.weight > 0, batch.record, -1)
        first = jax.tree.map(lambda x: x[:num_clips], (outputs, masks, record))
        return Painted(first[0], first[1], jax.tree.map(jnp.asarray, grids), first[2])

    return paint


def _in_pixels(outputs: Outputs, preprocess: Any, targets: Mapping[str, Any]) -> Outputs:
    """With picture values in [-1, 1], whatever the model saw; standardised predictions stay as they are."""

    def to_pixels(modality: str, values: Float[Array, 'b n v']) -> Float[Array, 'b n v']:
        if modality == 'audio':
            return values
        pixels = values.astype(jnp.float32).reshape(*values.shape[:2], -1, 3)
        return (2 * preprocess.undo({modality: pixels})[modality] - 1).reshape(values.shape)

    def of_predictions(by_modality: Mapping[str, Array]) -> dict[str, Array]:
        found = dict(by_modality)
        for m, values in by_modality.items():
            target = targets.get(m)
            if target is None:
                found[m] = to_pixels(m, values)
            elif target.standardise == 'none':
                found[m] = to_pixels(m, target.restore(values, outputs.patches[m], m))
        return found

    return outputs._replace(
        patches={m: to_pixels(m, values) for m, values in outputs.patches.items()},
        predicted=of_predictions(outputs.predicted),
        inpainted=of_predictions(outputs.inpainted),
    )


def patched(painted: Painted, model: Any, objective: Any) -> tuple[dict[str, pictures.PatchedMedia], np.ndarray]:
    """For `pictures.reconstruction_sheet`; and the records of the clips, without padding."""
    painted = jax.tree.map(np.asarray, painted)
    real = painted.record >= 0
    outputs, masks = jax.tree.map(lambda x: x[real], (painted.outputs, painted.masks))
    media = pictures.patched_media(
        outputs,
        masks,
        {m: tuple(int(n) for n in grid) for m, grid in painted.grids.items()},
        {m: tokenizer.patch for m, tokenizer in model.tokenizers.items()},
        standardised=standardised_targets(objective),
        num_clips=int(real.sum()),
    )
    return media, painted.record[real]


def standardised_targets(objective: Any) -> dict[str, str]:
    """By modality, how the first term of the objective that has targets standardises them."""
    return {modality: target.standardise for modality, target in first_targets(objective).items()}


def first_targets(objective: Any) -> dict[str, Any]:
    """By modality, the target of the first term of the objective that has one."""
    found: dict[str, Any] = {}
    for term in objective.terms.values():
        found = dict(term.target) | found
    return found

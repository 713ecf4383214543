"""How well hidden patches are rebuilt, beside what can be had without a model.

Masks are a function of a fixed seed and the record's number, never of training, the batch or the machine:
every checkpoint is asked the same questions. Errors are mean squares over the values of hidden patches, per
clip first, then over clips, in these units:

  input   what the model sees: pixels in [-1, 1], normalised log-mel
  raw     RGB in [0, 1]; nats of log-mel
  target  what the model was asked for, where that is not the input (patches standardised)

and beside the model's error stand those of answers that need no model:

  dataset mean   one colour for all hidden places of all clips
  clip mean      one colour, the mean of the clip's visible patches
  nearest        a copy of the visible patch nearest on the grid of tokens
  patch mean     each hidden patch's own true mean: better than anyone can know without looking
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from avmae_jax.evaluation.passes import RowStep
from avmae_jax.ops import masking
from avmae_jax.structs import Array, Batch, Mask, Modality

MASK_SEED = 20_221_209  # Of all evaluations. Change it, and figures stop being comparable.
NUM_CHANNELS = {'image': 3, 'video': 3, 'audio': 1}
BASELINES = ('dataset mean', 'clip mean', 'nearest', 'patch mean')


def draw_fixed(
    objective: Any, grids: Mapping[str, tuple[int, ...]], record: Int[Array, 'b']
) -> tuple[dict[str, Mask], dict[str, Array]]:
    """Masks, and places for inpainting, of each record."""
    key = jax.random.key(MASK_SEED, impl='threefry2x32')
    drawn = objective.draw_rows(jax.vmap(lambda i: jax.random.fold_in(key, i))(record), grids)
    return drawn.masks, drawn.places


def make_reconstruction_step(model: Any, objective: Any, preprocess: Any) -> RowStep:
    """Sums over each row's hidden values, by channel, from which `summarise` makes errors.

    The keys are '<term>/<modality>', for the terms of the objective that predict patches.
    """

    def step(params: Any, batch: Batch) -> dict[str, Any]:
        inputs = preprocess(batch, train=False)
        grids = model.grids(inputs)
        masks, places = draw_fixed(objective, grids, batch.record)
        outputs = model.apply({'params': params}, {m: inputs[m] for m in grids}, masks, places or None)
        sums: dict[str, Any] = {}
        for name, term in objective.terms.items():
            for m, patches in outputs.patches.items():
                target = _Target(term.target.get(m), m)
                if name == 'reconstruction':
                    asked = masking.take_tokens(patches, masks[m].hidden)
                    answers = jnp.ones(masks[m].hidden.shape)
                    sums[f'{name}/{m}'] = {
                        **target.sums(outputs.predicted_hidden[m], asked, answers),
                        **target.sums_of_visible(patches, masks[m], grids[m]),
                    }
                elif name == 'inpainting':
                    sums[f'{name}/{m}'] = target.sums(outputs.inpainted[m], patches, outputs.inpainted_mask[m])
        return {'sums': sums, 'present': {m: batch.present[m] for m in grids}}

    return step


class _Target:
    """What a modality was asked for, by the objective's own target (None: raw values)."""

    def __init__(self, target: Any, modality: Modality):
        self._target = target
        self._modality = modality
        self._channels = NUM_CHANNELS[modality]
        self._standardise = 'none' if target is None else target.standardise

    def plain(self, values):
        """What was asked for, in the units of the input."""
        return values if self._target is None else self._target.plain(values, self._modality)

    def sums(self, predicted, asked, answers):
        """Of the model's squared errors, and of what the asked values alone tell."""
        plain = self.plain(asked)
        values = _by_channel(plain, self._channels)
        predicted = predicted.astype(jnp.float32)
        sums = {
            'count': jnp.sum(answers, axis=1) * values.shape[2],
            'sum': jnp.einsum('bnpc,bn->bc', values, answers),
            'squares': _squares(values, answers),
            'patch mean': _squares(values - jnp.mean(values, axis=2, keepdims=True), answers),
        }
        # Of standardised patches the structure is the model's; mean and deviation, for which it was not asked, are the
        # true.
        restored = predicted if self._target is None else self._target.restore(predicted, asked, self._modality)
        sums['model'] = _squares(_by_channel(restored, self._channels) - values, answers)
        if self._standardise == 'none':
            return sums
        wanted = self._target(asked, self._modality)
        sums['target'] = _squares(_by_channel(predicted - wanted, self._channels), answers)
        sums['target patch mean'] = _squares(_by_channel(wanted, self._channels), answers)
        return sums

    def sums_of_visible(self, patches, mask: Mask, grid):
        """Of the squared errors of answers made from the visible patches."""
        patches = self.plain(patches)
        asked, visible = masking.take_tokens(patches, mask.hidden), masking.take_tokens(patches, mask.kept)
        copied = masking.take_tokens(visible, nearest_visible(mask, grid))
        answers = jnp.ones(mask.hidden.shape)
        mean = jnp.mean(_by_channel(visible, self._channels), axis=(1, 2), keepdims=True)
        return {
            'clip mean': _squares(_by_channel(asked, self._channels) - mean, answers),
            'nearest': _squares(_by_channel(copied - asked, self._channels), answers),
        }


def _by_channel(values: Float[Array, 'b n v'], channels: int) -> Float[Array, 'b n p c']:
    return values.reshape(*values.shape[:-1], -1, channels)


def _squares(x: Float[Array, 'b n p c'], answers: Float[Array, 'b n']) -> Float[Array, 'b c']:
    return jnp.einsum('bnpc,bn->bc', jnp.square(x), answers)


def nearest_visible(mask: Mask, grid: Sequence[int]) -> Int[Array, 'b m']:
    """For each hidden token, which of the kept ones is nearest on the grid; of equals, the first kept."""
    places = np.stack(np.unravel_index(np.arange(int(np.prod(grid))), tuple(grid)), axis=-1).astype(np.float32)
    hidden = jnp.asarray(places)[mask.hidden]
    kept = jnp.asarray(places)[mask.kept]
    distance = jnp.sum(jnp.square(hidden[:, :, None] - kept[:, None]), axis=-1)
    return jnp.argmin(distance, axis=-1)


class Error(NamedTuple):
    """One line of the table of reconstruction errors.

    Attributes:
      term: 'reconstruction' or 'inpainting'.
      unit: 'input', 'raw' or 'target', see above.
      mean, standard_error: of the model's error, over clips.
      baselines: name -> mean error.
      num_clips: clips that have the modality (for inpainting: both).
      true_scale: the model was given the true mean and deviation of each patch.
    """

    term: str
    modality: Modality
    unit: str
    mean: float
    standard_error: float
    baselines: dict[str, float]
    num_clips: int
    true_scale: bool


def summarise(table: Mapping[str, Any], preprocess: Any) -> list[Error]:
    """Errors of all terms, modalities and units from what a pass with `make_reconstruction_step` collected."""
    errors = []
    for name, sums in table['sums'].items():
        term, modality = name.split('/')
        needed = table['present'].values() if term == 'inpainting' else [table['present'][modality]]
        rows = np.logical_and.reduce(list(needed))
        if rows.any():
            deviation = [preprocess.audio_std] if modality == 'audio' else preprocess.rgb_std
            sums = {key: values[rows].astype(np.float64) for key, values in sums.items()}
            errors += _summarise_term(term, modality, sums, np.array(deviation))
    return errors


def _summarise_term(
    term: str, modality: Modality, sums: dict[str, np.ndarray], deviation: Float[np.ndarray, 'c']
) -> list[Error]:
    count = sums['count'][:, None]
    colour = sums['sum'].sum(axis=0, keepdims=True) / count.sum()
    sums = {**sums, 'dataset mean': sums['squares'] - 2 * colour * sums['sum'] + colour**2 * count}
    standardised = 'target' in sums

    def line(unit: str, key: str, baselines: dict[str, str], scale: np.ndarray | float, true_scale: bool) -> Error:
        by_clip = {name: (sums[k] * scale / count).mean(axis=1) for name, k in baselines.items() if k in sums}
        model = (sums[key] * scale / count).mean(axis=1)
        return Error(
            term=term,
            modality=modality,
            unit=unit,
            mean=float(model.mean()),
            standard_error=float(model.std() / np.sqrt(max(len(model) - 1, 1))),
            baselines={name: float(errors.mean()) for name, errors in by_clip.items()},
            num_clips=len(model),
            true_scale=true_scale,
        )

    same = {name: name for name in BASELINES}
    lines = [
        line('input', 'model', same, 1.0, standardised),
        line('raw', 'model', same, deviation[None] ** 2, standardised),
    ]
    if standardised:
        lines.append(line('target', 'target', {'patch mean': 'target patch mean'}, 1.0, False))
    return lines

"""Objective: draw masks -> one forward pass -> weighted terms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from avmae_jax.ops import masking
from avmae_jax.ops.rows import MASKS, row_keys
from avmae_jax.structs import JOINT_ORDER, Array, Batch, Mask, Modality, Outputs


class Drawn(NamedTuple):
    """What chance decides in a step: which tokens are hidden, and where inpainting puts the other modality's tokens."""

    masks: dict[Modality, Mask]
    places: dict[Modality, Int[Array, 'b _n']]


class Scored(NamedTuple):
    """What a step knows besides its loss.

    Attributes:
      losses: 'term/modality' -> loss before weighting, float32.
      counts: the same names -> how many rows it is the mean of, float32.
      outputs: everything the model computed. Under `jit`, what nobody returns is not computed.
      drawn: the masks and places it was computed with.
    """

    losses: dict[str, Array]
    counts: dict[str, Array]
    outputs: Outputs
    drawn: Drawn


@dataclasses.dataclass(frozen=True)
class Objective:
    """What to hide, what to ask, and how much each answer counts.

    Attributes:
      mask_ratio: by modality, the share of tokens that is hidden.
      terms: by name, from `objectives.TERMS`.
      masking: by modality, a strategy of `masking.STRATEGIES`; 'random' where nothing is given.
    """

    mask_ratio: Mapping[Modality, float]
    terms: Mapping[str, Any]
    masking: Mapping[Modality, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for modality, ratio in self.mask_ratio.items():
            if not 0 <= ratio < 1:
                raise ValueError(f'mask_ratio.{modality} must lie in [0, 1); got {ratio}.')
            masking.drawn_axes(modality, self.masking.get(modality, 'random'))
        unknown = sorted(set(self.masking) - set(self.mask_ratio))
        if unknown:
            raise ValueError(f'masking names {unknown}, for which there is no mask_ratio; it has {[*self.mask_ratio]}.')
        if not self.terms:
            raise ValueError("terms must name at least one term, such as {'reconstruction': Reconstruction()}.")

    def draw(self, rng: jax.Array, grids: Mapping[Modality, tuple[int, ...]], batch_size: int) -> Drawn:
        """Masks and places for a batch; those of a modality do not depend on which others there are."""
        masks, places = {}, {}
        shuffle = any(getattr(term, 'shuffle', False) for term in self.terms.values())
        for i, m in enumerate(JOINT_ORDER):
            if m not in grids:
                continue
            mask_rng, place_rng = jax.random.split(jax.random.fold_in(rng, i))
            axes = masking.drawn_axes(m, self.masking.get(m, 'random'))
            if m not in self.mask_ratio:
                raise ValueError(f'mask_ratio has no entry for {m}; it has {[*self.mask_ratio]}.')
            masks[m] = masking.draw_mask(
                mask_rng, batch_size=batch_size, grid=grids[m], axes=axes, mask_ratio=self.mask_ratio[m]
            )
            if shuffle:
                places[m] = masking.draw_order(place_rng, batch_size=batch_size, num_tokens=math.prod(grids[m]))
        return Drawn(masks, places)

    def draw_rows(self, keys: jax.Array, grids: Mapping[Modality, tuple[int, ...]]) -> Drawn:
        """The same with a key for each row: a row's masks do not depend on the rows that came with it."""
        drawn = jax.vmap(lambda key: self.draw(key, grids, 1))(keys)
        return jax.tree.map(lambda x: x[:, 0], drawn)

    def draw_masks(
        self, rng: jax.Array, grids: Mapping[Modality, tuple[int, ...]], batch_size: int
    ) -> dict[Modality, Mask]:
        """The masks of `draw` alone; to initialise a model, or to look at."""
        return self.draw(rng, grids, batch_size).masks

    def __call__(
        self,
        model: Any,
        params: Any,
        teacher: Any,
        inputs: Mapping[Modality, Float[Array, 'b ...']],
        batch: Batch | None,
        rng: jax.Array,
        masks: Mapping[Modality, Mask] | None = None,
        places: Mapping[Modality, Int[Array, 'b _n']] | None = None,
    ) -> tuple[Float[Array, ''], Scored]:
        """The loss and what goes into it.

        Args:
          model: a `models.autoencoder.MaskedAutoencoder`, or what calls like it.
          params: of the model.
          teacher: what `init` and `update` gave.
          inputs: by modality, what preprocessing made of `batch.media`.
          batch: says which rows count (`weight`, `present`) and has the seed of each row's masks; None: all count.
          rng: what is drawn from where there is no batch.
          masks, places: given from outside in place of drawn ones. Masks without places do not shuffle inpainting.
        """
        grids = model.grids(inputs)
        batch_size = len(next(iter(inputs.values())))
        if masks is not None:
            drawn = Drawn(dict(masks), dict(places or {}))
        elif batch is not None:
            drawn = self.draw_rows(row_keys(batch.seed, MASKS), grids)
        else:
            drawn = self.draw(rng, grids, batch_size)
        outputs: Any = model.apply({'params': params}, {m: inputs[m] for m in grids}, drawn.masks, drawn.places or None)
        rows = {m: rows_that_count(m, batch, batch_size) for m in grids}
        losses, counts = {}, {}
        for name, term in self.terms.items():
            for m, loss in term(outputs, drawn.masks, rows).items():
                losses[f'{name}/{m}'], counts[f'{name}/{m}'] = loss, jnp.sum(term.count(m, rows))
        return self.total(losses), Scored(losses, counts, outputs, drawn)

    def total(self, losses: Mapping[str, Any]) -> Any:
        """The loss that the losses by name, 'term/modality', add up to."""
        total: Any = 0.0
        for name, term in self.terms.items():
            modalities = [key.removeprefix(f'{name}/') for key in losses if key.startswith(f'{name}/')]
            for m in modalities:
                weight = 1 / len(modalities) if term.weight is None else term.weight[m]
                total = total + weight * losses[f'{name}/{m}']
        return total

    def init(self, params: Any) -> Any:
        """The teacher to start with: None, as no term here compares with a moving average of the model."""
        return None

    def update(self, teacher: Any, params: Any) -> Any:
        """The teacher after a step."""
        return teacher


def rows_that_count(modality: Modality, batch: Batch | None, batch_size: int) -> Float[Array, 'b']:
    """How much each row counts in the loss of a modality: its weight, or 0 where the modality is missing."""
    if batch is None:
        return jnp.ones((batch_size,), jnp.float32)
    weight = jnp.asarray(batch.weight, jnp.float32)
    return weight * jnp.asarray(batch.present[modality], jnp.float32) if modality in batch.present else weight

"""Predict one modality from what is left of the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.objectives.targets import Target
from avmae_jax.ops import losses
from avmae_jax.structs import Array, Mask, Modality, Outputs


@dataclasses.dataclass(frozen=True)
class Inpainting:
    """Mean squared error over the values of the places that were filled with mask tokens.

    Attributes:
      weight: by modality that is painted; None: equal shares that add up to one.
      target: by modality, what is asked for; raw values where nothing is given.
      shuffle: the places of the other modality's tokens are drawn anew for each row. Without, they are always the
        first, and what belongs there is never learned (the published recipe).
      on_all_tokens: the loss counts the places of the other modality's tokens too.
      per_value: the error of a token is divided by its number of values (else it is their sum).
    """

    weight: Mapping[Modality, float] | None = None
    target: Mapping[Modality, Target] = dataclasses.field(default_factory=dict)
    shuffle: bool = True
    on_all_tokens: bool = False
    per_value: bool = True

    def __call__(
        self, outputs: Outputs, masks: Mapping[Modality, Mask], rows: Mapping[Modality, Float[Array, 'b']]
    ) -> dict[Modality, Float[Array, '']]:
        """The loss of each modality; `rows` says how much each row of it counts."""
        if len(outputs.patches) != 2:
            raise ValueError(f'inpainting needs two modalities; the clips have {sorted(outputs.patches)}.')
        result = {}
        for m, patches in outputs.patches.items():
            (other,) = set(outputs.patches) - {m}
            if m not in outputs.inpainted:
                raise ValueError(
                    f'inpainting {m} needs fewer kept tokens of {other} ({masks[other].kept.shape[1]}) than {m} has '
                    f'tokens ({patches.shape[1]}): raise mask_ratio.{other}.'
                )
            error = losses.squared_error(outputs.inpainted[m], self.target.get(m, Target())(patches, m))
            if self.per_value:
                error = error / patches.shape[-1]
            asked = jnp.ones_like(error) if self.on_all_tokens else outputs.inpainted_mask[m]
            result[m] = losses.masked_mean(error, self.count(m, rows)[:, None] * asked)
        return result

    def count(self, modality: Modality, rows: Mapping[Modality, Float[Array, 'b']]) -> Float[Array, 'b']:
        """How much each row counts in the loss of a modality: as much as both of its modalities do."""
        del modality
        return math.prod(rows.values())

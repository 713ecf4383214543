"""Predict the hidden patches of each modality from what is left of the same clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.objectives.targets import Target
from avmae_jax.ops import losses, masking
from avmae_jax.structs import Array, Mask, Modality, Outputs


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Mean squared error over the values of hidden patches.

    Attributes:
      weight: by modality; None: equal shares that add up to one.
      target: by modality, what is asked for; raw values where nothing is given.
      on_all_tokens: the loss counts kept patches too.
      per_value: the error of a token is divided by its number of values (else it is their sum).
    """

    weight: Mapping[Modality, float] | None = None
    target: Mapping[Modality, Target] = dataclasses.field(default_factory=dict)
    on_all_tokens: bool = False
    per_value: bool = True

    def __call__(
        self, outputs: Outputs, masks: Mapping[Modality, Mask], rows: Mapping[Modality, Float[Array, 'b']]
    ) -> dict[Modality, Float[Array, '']]:
        """The loss of each modality; `rows` says how much each row of it counts."""
        result = {}
        for m, patches in outputs.patches.items():
            target = self.target.get(m, Target())
            if self.on_all_tokens:
                asked, predicted = patches, outputs.predicted[m]
            else:
                asked = masking.take_tokens(patches, masks[m].hidden)
                predicted = outputs.predicted_hidden[m]
            error = losses.squared_error(predicted, target(asked, m))
            if self.per_value:
                error = error / patches.shape[-1]
            count = self.count(m, rows)[:, None]
            result[m] = losses.masked_mean(error, jnp.broadcast_to(count, error.shape))
        return result

    def count(self, modality: Modality, rows: Mapping[Modality, Float[Array, 'b']]) -> Float[Array, 'b']:
        """How much each row counts in the loss of a modality."""
        return rows[modality]

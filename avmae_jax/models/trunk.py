"""Trunk: tokenizers and an encoder, which the autoencoder and the classifier have in common."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
from jaxtyping import Float, Int

from avmae_jax.models.encoders import Encoder, Tokens
from avmae_jax.models.tokenizers import Tokenizer
from avmae_jax.structs import JOINT_ORDER, Array, Modality


class Trunk(nn.Module):
    """From media to encoded tokens.

    Attributes:
      tokenizers: by modality; which modalities the model has.
      encoder: one of `encoders.ENCODERS`, or a `bottleneck.MBT`.
    """

    tokenizers: Mapping[Modality, Tokenizer]
    encoder: Encoder

    def __post_init__(self):
        super().__post_init__()
        unknown = sorted(set(self.tokenizers) - set(JOINT_ORDER))
        if unknown or not self.tokenizers:
            raise ValueError(f'tokenizers must be named out of {JOINT_ORDER}; got {sorted(self.tokenizers)}.')

    @nn.nowrap
    def present(self, inputs: Mapping[Modality, Array]) -> list[Modality]:
        """The modalities of the inputs that this model has, in the order in which everything loops over them."""
        return [m for m in JOINT_ORDER if m in inputs and m in self.tokenizers]

    @nn.nowrap
    def grids(self, inputs: Mapping[Modality, Array]) -> dict[Modality, tuple[int, ...]]:
        """Tokens along each axis, by modality; of the inputs only the shapes matter."""
        return {m: self.tokenizers[m].grid(inputs[m].shape) for m in self.present(inputs)}

    def encode(self, inputs: Mapping[Modality, Float[Array, 'b ...']], train: bool = False) -> Tokens:
        """Features of whole clips: nothing is hidden. Takes any subset of the modalities."""
        grids = self.grids(inputs)
        tokens = {m: self.tokens(m, self.tokenizers[m].cut(inputs[m]), grid, None) for m, grid in grids.items()}
        return self.encoder(tokens, train)

    @nn.nowrap
    def tokens(
        self,
        modality: Modality,
        patches: Float[Array, 'b n v'],
        grid: tuple[int, ...],
        kept: Int[Array, 'b k'] | None,
    ) -> Float[Array, 'b _ d']:
        encoder = self.encoder
        return self.tokenizers[modality](patches, grid, kept, encoder.size.width, encoder.compute.dtype)

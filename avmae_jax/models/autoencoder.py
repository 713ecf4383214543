"""MaskedAutoencoder: cut into patches, hide, encode what is left, decode."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
from jaxtyping import Float, Int

from avmae_jax.models.decoders import Decoder, SeparateDecoder
from avmae_jax.models.encoders import Encoder, SeparateEncoder, Tokens
from avmae_jax.models.tokenizers import Tokenizer
from avmae_jax.structs import JOINT_ORDER, Array, Mask, Modality, Outputs


class MaskedAutoencoder(nn.Module):
    """Rebuilds hidden patches of each modality from what is left of the clip.

    Attributes:
      tokenizers: by modality; which modalities the model has.
      encoder: one of `encoders.ENCODERS`.
      decoder: one of `decoders.DECODERS`.
    """

    tokenizers: Mapping[Modality, Tokenizer]
    encoder: Encoder
    decoder: Decoder

    def __post_init__(self):
        super().__post_init__()
        unknown = sorted(set(self.tokenizers) - set(JOINT_ORDER))
        if unknown or not self.tokenizers:
            raise ValueError(f'tokenizers must be named out of {JOINT_ORDER}; got {sorted(self.tokenizers)}.')
        separate = isinstance(self.encoder, SeparateEncoder) and isinstance(self.decoder, SeparateDecoder)
        if separate and len(self.tokenizers) > 1:
            raise ValueError(
                "encoder 'separate' with decoder 'separate' trains models that never meet: change one of the two, or "
                'train on one modality at a time.'
            )

    @nn.nowrap
    def present(self, inputs: Mapping[Modality, Array]) -> list[Modality]:
        """The modalities of the inputs that this model has, in the order in which everything loops over them."""
        return [m for m in JOINT_ORDER if m in inputs and m in self.tokenizers]

    @nn.nowrap
    def grids(self, inputs: Mapping[Modality, Array]) -> dict[Modality, tuple[int, ...]]:
        """Tokens along each axis, by modality; of the inputs only the shapes matter."""
        return {m: self.tokenizers[m].grid(inputs[m].shape) for m in self.present(inputs)}

    def __call__(
        self,
        inputs: Mapping[Modality, Float[Array, 'b ...']],
        masks: Mapping[Modality, Mask],
        places: Mapping[Modality, Int[Array, 'b _n']] | None = None,
    ) -> Outputs:
        """The one forward pass of pretraining; `places` shuffles inpainting, see `decoders.Decoder`."""
        grids = self.grids(inputs)
        patches = {m: self.tokenizers[m].cut(inputs[m]) for m in grids}
        encoded = self.encoder({m: self.tokens(m, patches[m], grids[m], masks[m].kept) for m in grids})
        asked = {m: self.tokenizers[m].asked(patches[m]) for m in grids}
        num_values = {m: values.shape[-1] for m, values in asked.items()}
        decoded = self.decoder(encoded, masks=masks, grids=grids, num_values=num_values, places=places)
        return Outputs(encoded=encoded, patches=asked, **decoded._asdict())

    def encode(self, inputs: Mapping[Modality, Float[Array, 'b ...']]) -> Tokens:
        """Features of whole clips: nothing is hidden. Takes any subset of the modalities."""
        grids = self.grids(inputs)
        return self.encoder(
            {m: self.tokens(m, self.tokenizers[m].cut(inputs[m]), grid, None) for m, grid in grids.items()}
        )

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

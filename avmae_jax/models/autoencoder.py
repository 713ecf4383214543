"""MaskedAutoencoder: cut into patches, hide, encode what is left, decode."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float, Int

from avmae_jax.models.decoders import Decoder, SeparateDecoder
from avmae_jax.models.encoders import SeparateEncoder
from avmae_jax.models.trunk import Trunk
from avmae_jax.structs import Array, Mask, Modality, Outputs


class MaskedAutoencoder(Trunk):
    """Rebuilds hidden patches of each modality from what is left of the clip.

    Attributes:
      decoder: one of `decoders.DECODERS`.
    """

    decoder: Decoder

    def __post_init__(self):
        super().__post_init__()
        for modality, tokenizer in self.tokenizers.items():
            if tokenizer.stride is not None:
                raise ValueError(
                    f'tokenizers.{modality}.stride={tuple(tokenizer.stride)}: hidden patches would be seen through '
                    'their neighbours, and what is put back would not be unique; an autoencoder has stride=None.'
                )
        separate = isinstance(self.encoder, SeparateEncoder) and isinstance(self.decoder, SeparateDecoder)
        if separate and len(self.tokenizers) > 1:
            raise ValueError(
                "encoder 'separate' with decoder 'separate' trains models that never meet: change one of the two, or "
                'train on one modality at a time.'
            )

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

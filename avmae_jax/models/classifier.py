"""An encoder, a pooling and a head."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.models.blocks import Dense, LayerNorm
from avmae_jax.models.encoders import Encoder
from avmae_jax.models.tokenizers import Tokenizer
from avmae_jax.structs import JOINT_ORDER, Array, Modality

POOLINGS = ('token', 'mean')


class Classifier(nn.Module):
    """Class scores for each modality; tokenizers and encoder are those of the autoencoder, name by name.

    Attributes:
      num_classes: logits of the head, which all modalities share.
      pooling: 'token' reads the class token, 'mean' the mean over tokens.
      pooled_norm: a LayerNorm between pooling and head, in place of the encoder's own (ViViT; MAE finetuning).
    """

    tokenizers: Mapping[Modality, Tokenizer]
    encoder: Encoder
    num_classes: int
    pooling: str = 'mean'
    pooled_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.pooling not in POOLINGS:
            raise ValueError(f'pooling must be one of {POOLINGS}; got {self.pooling!r}.')
        if self.pooling == 'token' and not all(t.class_token for t in self.tokenizers.values()):
            raise ValueError("pooling='token' needs tokenizers with class_token=True; pooling='mean' does without.")

    def setup(self):
        self.norm = LayerNorm('float32') if self.pooled_norm else None
        self.head = Dense(self.num_classes, 'float32')

    def __call__(self, inputs: Mapping[Modality, Float[Array, 'b ...']]) -> dict[Modality, Float[Array, 'b classes']]:
        width, dtype = self.encoder.size.width, self.encoder.compute.dtype
        tokens = {}
        for m in JOINT_ORDER:
            if m in inputs and m in self.tokenizers:
                tokenizer = self.tokenizers[m]
                grid = tokenizer.grid(inputs[m].shape)
                tokens[m] = tokenizer(tokenizer.cut(inputs[m]), grid, None, width, dtype)
        return {m: self.score(x) for m, x in self.encoder(tokens).items()}

    def score(self, encoded: Float[Array, 'b n d']) -> Float[Array, 'b classes']:
        pooled = encoded[:, 0] if self.pooling == 'token' else jnp.mean(encoded, axis=1, dtype=jnp.float32)
        if self.norm is not None:
            pooled = self.norm(pooled)
        return self.head(pooled)

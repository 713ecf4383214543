"""Classifier: tokens, an encoder (MBT, or one of the autoencoder's), a pooling, heads. What finetuning trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float

from avmae_jax.models.blocks import Dense, LayerNorm
from avmae_jax.models.encoders import Tokens
from avmae_jax.models.trunk import Trunk
from avmae_jax.structs import JOINT_ORDER, Array, Modality, Scores

JOINT = 'joint'  # The name of the one part where pooling leaves one vector for the whole clip.
Parts = dict[str, Float[Array, 'b d']]


def mean(x: Float[Array, 'b n d']) -> Float[Array, 'b d']:
    return jnp.mean(x, axis=1, dtype=jnp.float32)


def mean_pooling(patches: Tokens, classes: Parts) -> Parts:
    """The mean over each modality's patches."""
    return {m: mean(x) for m, x in patches.items()}


def max_pooling(patches: Tokens, classes: Parts) -> Parts:
    """The largest value of each channel over each modality's patches."""
    return {m: jnp.max(x, axis=1).astype(jnp.float32) for m, x in patches.items()}


def token_pooling(patches: Tokens, classes: Parts) -> Parts:
    """The class token of each modality; with a distillation token, the mean of the two."""
    return classes


def one_token_pooling(patches: Tokens, classes: Parts) -> Parts:
    """One class token for the clip, that of the first modality there is: it hears of the others where they fuse."""
    return {JOINT: next(iter(classes.values()))}


def first_pooling(patches: Tokens, classes: Parts) -> Parts:
    """The first patch of each modality (VideoMAE's classifier without mean pooling)."""
    return {m: x[:, 0].astype(jnp.float32) for m, x in patches.items()}


def joint_mean_pooling(patches: Tokens, classes: Parts) -> Parts:
    """One mean over the patches of all modalities: the modality with more of them counts more."""
    return {JOINT: mean(jnp.concatenate(list(patches.values()), axis=1))}


Pooling = Callable[[Tokens, Parts], Parts]
POOLINGS: dict[str, Pooling] = {
    'mean': mean_pooling,
    'max': max_pooling,
    'first': first_pooling,
    'token': token_pooling,
    'one_token': one_token_pooling,
    'joint_mean': joint_mean_pooling,
}
NEEDS_CLASS_TOKENS = ('token', 'one_token')
JOINT_POOLINGS = ('one_token', 'joint_mean')


def average_present(
    parts: Mapping[str, Float[Array, 'b c']], present: Mapping[Modality, Bool[Array, 'b']]
) -> Float[Array, 'b c']:
    """The mean over the parts that a row has; over all of them where it has none, since it must get something.

    A part that `present` does not tell of, as the joint one, counts always.
    """
    batch_size = next(iter(parts.values())).shape[0]
    everywhere = jnp.ones(batch_size, bool)
    there = jnp.stack([jnp.asarray(present.get(part, everywhere)) for part in parts])[:, :, None]
    there = there | ~jnp.any(there, axis=0, keepdims=True)
    # What a model makes of nothing may be anything, and 0 * inf is no zero.
    return jnp.sum(jnp.where(there, jnp.stack(list(parts.values())), 0), axis=0) / jnp.sum(there, axis=0)


class Classifier(Trunk):
    """Class scores of a clip. Tokenizers and encoder are those of the autoencoder, name by name.

    Attributes:
      num_classes: head -> classes; a head scores all modalities with the same weights.
      pooling: key of POOLINGS. Class tokens count as patches nowhere.
      pooled_norm: a LayerNorm between pooling and heads; in place of the encoder's own (ViViT; MAE finetuning), which
        encoder.final_norm=False takes away, or behind it (AST).
      pooled_norm_epsilon: of that norm; None for that of the blocks.
      representation: width of a dense layer with tanh before the heads; None for none.
    """

    num_classes: Mapping[str, int]
    pooling: str = 'mean'
    pooled_norm: bool = False
    pooled_norm_epsilon: float | int | None = None
    representation: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.pooling not in POOLINGS:
            raise ValueError(f'pooling must be one of {tuple(POOLINGS)}; got {self.pooling!r}.')
        if self.representation is not None and self.representation < 1:
            raise ValueError(
                f'representation must be at least 1 wide; got {self.representation}. None has no such layer.'
            )
        first = next(m for m in JOINT_ORDER if m in self.tokenizers)
        needing = {'token': list(self.tokenizers), 'one_token': [first]}.get(self.pooling, [])
        without = [m for m in needing if not self.tokenizers[m].class_token]
        if without:
            raise ValueError(
                f"pooling={self.pooling!r} needs tokenizers with class_token=True for {without}; pooling='mean' does "
                'without.'
            )
        if not self.num_classes or min(self.num_classes.values()) < 1:
            raise ValueError(f'num_classes must give at least one class to each head; got {dict(self.num_classes)}.')

    def setup(self):
        epsilon = self.pooled_norm_epsilon
        epsilon = self.encoder.size.architecture.norm_epsilon if epsilon is None else epsilon
        self.norm = LayerNorm('float32', epsilon) if self.pooled_norm else None
        self.dense = Dense(self.representation, 'float32', name='representation') if self.representation else None
        # Zero, so that a fresh head says nothing and the first steps do not shake what was pretrained.
        self.head = {
            name: Dense(classes, 'float32', kernel_init=nn.initializers.zeros)
            for name, classes in self.num_classes.items()
        }

    def __call__(
        self,
        inputs: Mapping[Modality, Float[Array, 'b ...']],
        train: bool = False,
        present: Mapping[Modality, Bool[Array, 'b']] | None = None,
    ) -> Scores:
        """Scores of clips. Training drops residuals, for which an encoder with drop_path needs the rng 'drop_path'.

        Args:
          present: `Batch.present`: a clip that lacks a modality is scored by its others; None: all have all.
        """
        encoded = self.encode(inputs, train)
        pooled = self.pool(encoded, self.grids(inputs))
        logits = {name: {part: head(x) for part, x in pooled.items()} for name, head in self.head.items()}
        averaged = {name: average_present(parts, present or {}) for name, parts in logits.items()}
        return Scores(encoded=encoded, pooled=pooled, logits=logits, averaged=averaged)

    def pool(self, encoded: Tokens, grids: Mapping[Modality, tuple[int, ...]]) -> dict[str, Float[Array, 'b _e']]:
        """What the heads get, by part."""
        patches = {m: x[:, x.shape[1] - math.prod(grids[m]) :] for m, x in encoded.items()}
        classes = {}
        for m, x in encoded.items():
            count = self.tokenizers[m].num_in_front
            if count:
                classes[m] = x[:, 0].astype(jnp.float32) if count == 1 else mean(x[:, :count])
        if self.pooling in NEEDS_CLASS_TOKENS and not classes:
            raise ValueError(f'pooling={self.pooling!r} has no class token to read when only {list(encoded)} is given.')
        pooled = POOLINGS[self.pooling](patches, classes)
        if self.norm is not None:
            pooled = {part: self.norm(x) for part, x in pooled.items()}
        if self.dense is not None:
            pooled = {part: jnp.tanh(self.dense(x)) for part, x in pooled.items()}
        return pooled

"""The four answers to "when do the modalities meet?"

Each takes and gives tokens by modality; any subset of the modalities may be given, and the others are then not there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.models.blocks import Compute, Stack, drop_rates
from avmae_jax.models.sizes import Size
from avmae_jax.structs import JOINT_ORDER, Array, Modality

Tokens = dict[Modality, Float[Array, 'b _ d']]


def join(tokens: Tokens) -> tuple[Float[Array, 'b n d'], tuple[int, ...]]:
    """One sequence of all modalities, in JOINT_ORDER, and the lengths of its parts."""
    parts = [tokens[m] for m in JOINT_ORDER if m in tokens]
    return jnp.concatenate(parts, axis=1), tuple(part.shape[1] for part in parts)


def split(sequence: Float[Array, 'b n d'], tokens: Tokens) -> Tokens:
    """Undoes `join`; `tokens` is what was joined."""
    parts, start = {}, 0
    for modality in JOINT_ORDER:
        if modality in tokens:
            stop = start + tokens[modality].shape[1]
            parts[modality] = sequence[:, start:stop]
            start = stop
    return parts


class Encoder(nn.Module):
    """What the encoders share.

    Attributes:
      final_norm: whether a stack ends with a LayerNorm.
      final_norm_epsilon: of that norm; None for that of the blocks.
      drop_path: in training, how often a residual of the last layer is dropped, example by example; grows linearly
        from 0 in the first layer. Draws from the rng 'drop_path'.
    """

    size: Size
    compute: Compute = Compute()
    final_norm: bool = True
    drop_path: float = 0.0
    final_norm_epsilon: float | int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.drop_path < 1:
            raise ValueError(f'drop_path must lie in [0, 1); got {self.drop_path}.')

    @nn.nowrap
    def stack(self, name: str | None, start: int = 0, stop: int | None = None, final_norm: bool | None = None) -> Stack:
        """Layers `start` to `stop` of the encoder as a stack; without a name, one that is no part of the encoder."""
        ends = self.final_norm if final_norm is None else final_norm
        place: dict[str, Any] = {'parent': None} if name is None else {'name': name}
        rates = drop_rates(self.drop_path, self.size.num_layers)[start:stop]
        size = dataclasses.replace(self.size, num_layers=len(rates))
        return Stack(size, self.compute, ends, rates, self.final_norm_epsilon, **place)


class SeparateEncoder(Encoder):
    """A stack for each modality; they never meet."""

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        return {m: self.stack(m)(x, train=train) for m, x in tokens.items()}


class SharedEncoder(Encoder):
    """One stack for all, applied to each modality by itself: they share weights and nothing else."""

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        sequence, lengths = join(tokens)
        return split(self.stack('shared')(sequence, segments=lengths, train=train), tokens)


class EarlyEncoder(Encoder):
    """One stack over the tokens of all modalities: they meet from the first layer on."""

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        sequence, _ = join(tokens)
        return split(self.stack('joint')(sequence, train=train), tokens)


class Norms(nn.Module):
    """The norms of a stack, as parameters that lie as those of Stack do, for a modality that has its own."""

    size: Size
    compute: Compute
    final_norm: bool

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        width, depth = self.size.width, self.size.num_layers

        def norm(key: jax.Array, *layers: int) -> dict[str, Array]:
            return {'scale': jnp.ones((*layers, width)), 'bias': jnp.zeros((*layers, width))}

        def norms(key: jax.Array, *layers: int) -> dict[str, dict[str, Array]]:
            return {name: norm(key, *layers) for name in ('attention_norm', 'mlp_norm')}

        if self.compute.scan:
            found = {'layers': self.param('layers', norms, depth)}
        else:
            found = {f'layer_{i}': self.param(f'layer_{i}', norms) for i in range(depth)}
        return {**found, 'norm': self.param('norm', norm)} if self.final_norm else found


class MidEncoder(Encoder):
    """A stack for each modality, each with its own norm, then joint layers.

    Attributes:
      fusion_layer: the first joint layer, counted from 0 as in MBT; layers 0 to fusion_layer - 1 are separate.
      stream_norm: whether the stack of a modality ends with a norm, if that of the joint layers does.
      modality_norms: a modality that is given alone goes through the joint layers with norms of its own, as in CAV-MAE
        (Gong et al. 2023), which contrasts such passes.
    """

    fusion_layer: int = dataclasses.field(kw_only=True)
    stream_norm: bool = dataclasses.field(default=True, kw_only=True)
    modality_norms: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.fusion_layer < self.size.num_layers:
            raise ValueError(
                f'fusion_layer must lie between 1 and num_layers - 1 = {self.size.num_layers - 1}; got '
                f'{self.fusion_layer}. Use the encoder early or separate for the two ends.'
            )

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        ends = self.final_norm and self.stream_norm
        tokens = {m: self.stack(m, stop=self.fusion_layer, final_norm=ends)(x, train=train) for m, x in tokens.items()}
        joint = self.stack('joint', start=self.fusion_layer)
        norms = {m: self.norms(m, joint) for m in tokens} if self.modality_norms else {}
        if len(norms) == 1 and not self.is_initializing():
            ((modality, x),) = tokens.items()
            return {modality: self.run_with(norms[modality], x, train)}
        sequence, _ = join(tokens)
        return split(joint(sequence, train=train), tokens)

    @nn.nowrap
    def norms(self, modality: Modality, joint: Stack) -> dict[str, Any]:
        return Norms(joint.size, joint.compute, joint.final_norm, name=f'joint_{modality}')()

    @nn.nowrap
    def run_with(self, norms: dict[str, Any], x: Float[Array, 'b n d'], train: bool) -> Float[Array, 'b n d']:
        """The joint layers with other norms than their own."""
        params = self.variables['params']['joint']
        params = {name: {**part, **norms[name]} if name in norms else part for name, part in params.items()}
        stack = self.stack(None, start=self.fusion_layer)
        rngs = {'drop_path': self.make_rng('drop_path')} if train and self.drop_path else {}
        x, seen = stack.apply({'params': params}, x, train=train, rngs=rngs, mutable=['intermediates'])
        for name, (layer,) in seen.get('intermediates', {}).items():
            self.sow('intermediates', name, layer)
        return x


ENCODERS = {'separate': SeparateEncoder, 'shared': SharedEncoder, 'early': EarlyEncoder, 'mid': MidEncoder}

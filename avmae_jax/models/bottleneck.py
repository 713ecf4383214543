"""MBT: streams of unimodal layers that exchange through a few bottleneck tokens (Nagrani et al., 2021)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.models.blocks import REMAT, Block, Compute, Layers, drop_rates, final_norm, residual_scales
from avmae_jax.models.encoders import Encoder, Tokens, join, split
from avmae_jax.models.sizes import Size
from avmae_jax.ops.dense import spread
from avmae_jax.structs import JOINT_ORDER, Array

Bottlenecks = Float[Array, 'b m d']
# Runs the layer's block of one modality over a sequence; the last argument is `Block.carried`.
RunBlock = Callable[..., Float[Array, 'b _ d']]
Exchange = Callable[[RunBlock, Tokens, Any], tuple[Tokens, Any]]


def apart(run: RunBlock, tokens: Tokens, bottlenecks: Bottlenecks | None) -> tuple[Tokens, Bottlenecks | None]:
    """Each stream by itself."""
    return {m: run(m, x) for m, x in tokens.items()}, bottlenecks


def through_bottlenecks(run: RunBlock, tokens: Tokens, bottlenecks: Bottlenecks) -> tuple[Tokens, Bottlenecks]:
    """Each stream on its tokens and the bottlenecks; what the streams make of the bottlenecks is averaged."""
    out = {m: run(m, jnp.concatenate([x, bottlenecks], axis=1)) for m, x in tokens.items()}
    made = [x[:, tokens[m].shape[1] :] for m, x in out.items()]
    return {m: x[:, : tokens[m].shape[1]] for m, x in out.items()}, sum(made) / len(made)


def looking_at_all(run: RunBlock, tokens: Tokens, bottlenecks: None) -> tuple[Tokens, None]:
    """Each stream with its own weights on its own tokens, which attend to those of all streams."""
    out = {}
    for m, x in tokens.items():
        others = [tokens[other] for other in tokens if other != m]
        out[m] = run(m, jnp.concatenate([*others, x], axis=1), x.shape[1])
    return out, bottlenecks


def in_one_stream(run: RunBlock, tokens: Tokens, bottlenecks: None) -> tuple[Tokens, None]:
    """One stream of all tokens."""
    sequence, _ = join(tokens)
    return split(run(next(iter(tokens)), sequence), tokens), bottlenecks


# How streams fuse: with weights of their own, and with shared ones.
FUSIONS: dict[str, tuple[Exchange, Exchange]] = {
    'bottleneck': (through_bottlenecks, through_bottlenecks),
    'concatenation': (looking_at_all, in_one_stream),
}


@functools.cache
def layer_function(exchange: Exchange, size: Size, compute: Compute) -> Callable[..., Any]:
    """One layer of all streams as one function, so that it is traced and differentiated once and not layer by layer.

    It takes the parameters of the layer's blocks by modality (under 'shared' if there is one for all), the tokens, the
    bottlenecks, and the scales of the residuals [streams 2 b].
    """

    def layer(params: Any, tokens: Tokens, bottlenecks: Any, scales: Any) -> tuple[Tokens, Any]:
        tokens = {m: tokens[m] for m in JOINT_ORDER if m in tokens}  # jax sorts the keys of what it is given.
        numbers = {m: i for i, m in enumerate(tokens)}

        def run(m: str, x: Float[Array, 'b n d'], carried: int | None = None) -> Float[Array, 'b _ d']:
            block = Block(size, compute, (x.shape[1],), carried=carried, parent=None)
            own = params['shared'] if 'shared' in params else params[m]
            return block.apply({'params': own}, x, None if scales is None else scales[numbers[m]])[0]

        return exchange(run, tokens, bottlenecks)

    if compute.remat != 'none':
        # Inside a scan the loop already keeps the compiler from merging the two forward passes.
        layer = jax.checkpoint(layer, policy=REMAT[compute.remat], prevent_cse=not compute.scan)
    return jax.jit(layer)


class MBT(Encoder):
    """A stream for each modality, unimodal up to `fusion_layer`, and one LayerNorm behind all streams.

    Any subset of the modalities may be given. A model that was made with one modality alone has no bottlenecks and is a
    plain transformer; one that was made with several and is given one goes through its bottlenecks all the same.
    What each layer gave is sown as `layer_0`, `layer_1`, ..., see `blocks.Stack`.

    Attributes:
      fusion_layer: the first layer that exchanges, counted from 0; num_layers for streams that never meet.
      fusion: key of FUSIONS.
      num_bottlenecks: bottleneck tokens.
      shared_weights: the streams share the weights of their blocks.
      test_with_bottlenecks: otherwise the streams do not exchange through bottlenecks except in training.
    """

    fusion_layer: int = dataclasses.field(kw_only=True)
    fusion: str = dataclasses.field(default='bottleneck', kw_only=True)
    num_bottlenecks: int = dataclasses.field(default=4, kw_only=True)
    shared_weights: bool = dataclasses.field(default=False, kw_only=True)
    test_with_bottlenecks: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.fusion_layer <= self.size.num_layers:
            raise ValueError(
                f'fusion_layer must lie between 0 and num_layers={self.size.num_layers} (streams that never meet); got '
                f'{self.fusion_layer}.'
            )
        if self.fusion not in FUSIONS:
            raise ValueError(f'fusion must be one of {tuple(FUSIONS)}; got {self.fusion!r}.')
        if self.num_bottlenecks < 1:
            raise ValueError(
                f'num_bottlenecks={self.num_bottlenecks} must be at least 1. For streams that never meet set '
                f'fusion_layer={self.size.num_layers}.'
            )

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        compute, depth = self.compute, self.size.num_layers
        tokens = {m: tokens[m].astype(compute.dtype) for m in JOINT_ORDER if m in tokens}
        owners = ['shared'] if self.shared_weights else list(tokens)
        params = {name: Layers(self.size, compute, name=name).blocks() for name in owners}
        bottlenecks = self.bottlenecks(tokens)
        scales = None
        if train and self.drop_path:
            rates = drop_rates(self.drop_path, depth)
            batch = len(next(iter(tokens.values())))
            scales = residual_scales(self.make_rng('drop_path'), rates, len(tokens), 2, batch)
        start = self.fusion_layer
        if self.fusion == 'bottleneck' and (bottlenecks is None or not (train or self.test_with_bottlenecks)):
            start = depth
        exchange = FUSIONS[self.fusion][self.shared_weights]
        tokens, bottlenecks = self.run(apart, params, tokens, bottlenecks, scales, 0, start)
        tokens, _ = self.run(exchange, params, tokens, bottlenecks, scales, start, depth)
        if not self.final_norm:
            return tokens
        norm = final_norm(self.size, compute, self.final_norm_epsilon)
        return {m: norm(x) for m, x in tokens.items()}

    def bottlenecks(self, tokens: Tokens) -> Bottlenecks | None:
        """The bottlenecks before the first exchange, or None in a model without."""
        if self.fusion != 'bottleneck' or (len(tokens) == 1 and not self.has_variable('params', 'bottlenecks')):
            return None
        # As wide as BERT's embeddings at the start; so does MBT.
        init = nn.initializers.normal(stddev=0.02)
        table = self.param('bottlenecks', init, (self.num_bottlenecks, self.size.width))
        batch = next(iter(tokens.values())).shape[0]
        return spread(table[None], (batch, *table.shape), self.compute.dtype)

    @nn.nowrap
    def run(
        self,
        exchange: Exchange,
        params: dict[str, Any],
        tokens: Tokens,
        bottlenecks: Bottlenecks | None,
        scales: Float[Array, 'layers streams 2 b'] | None,
        start: int,
        stop: int,
    ) -> tuple[Tokens, Bottlenecks | None]:
        """Layers `start` to `stop`, in a loop or scanned."""
        if start == stop:
            return tokens, bottlenecks
        layer = layer_function(exchange, self.size, self.compute)
        watched = self.is_mutable_collection('intermediates')

        def step(carry: Any, given: Any) -> tuple[Any, Tokens | None]:
            carry = layer(given[0], *carry, given[1])
            return carry, carry[0] if watched else None

        carry, seen = (tokens, bottlenecks), []
        if self.compute.scan:
            part = jax.tree.map(lambda leaf: leaf[start:stop], (params, scales))
            carry, collected = jax.lax.scan(step, carry, part)
            seen = [jax.tree.map(lambda leaf, i=i: leaf[i], collected) for i in range(stop - start)]
        else:
            for i in range(start, stop):
                given = {name: blocks[i] for name, blocks in params.items()}
                carry, after = step(carry, (given, None if scales is None else scales[i]))
                seen.append(after)
        tokens, bottlenecks = carry
        tokens = {m: tokens[m] for m in JOINT_ORDER if m in tokens}
        for i, after in enumerate(seen if watched else []):
            for m in tokens:
                self.sow('intermediates', f'layer_{start + i}', after[m])
        return tokens, bottlenecks

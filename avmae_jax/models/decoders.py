"""From encoded tokens back to the values of patches: shared, separate and joint decoders.

A transformer does not care in which order its tokens come, only which positions were added to them. So the decoder
never puts tokens "back in place": it runs on the kept tokens followed by the mask tokens, each with its position, and
what it says about the hidden places is the tail of its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Int

from avmae_jax.models.blocks import Compute, Dense, Stack
from avmae_jax.models.encoders import Tokens, join, split
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import Positions
from avmae_jax.ops import masking
from avmae_jax.ops.dense import last_axis, spread
from avmae_jax.structs import Array, Mask, Modality

INPAINTING_POSITIONS = ('place', 'before_shuffle')


class Decoded(NamedTuple):
    """Values by modality; the attributes are those of the same name in `structs.Outputs`."""

    predicted: dict[Modality, Array]
    predicted_hidden: dict[Modality, Array]
    inpainted: dict[Modality, Array]
    inpainted_mask: dict[Modality, Array]


class Filler(nn.Module):
    """Fills up what is visible with mask tokens of one modality, and adds positions.

    Attributes:
      grid: tokens along each axis of the modality that is to be decoded.
      kind: of positions, see `tokenizers.Positions`.
      modality_token: adds a learned vector that says which modality that is.
      in_front: class tokens that have the first positions.
    """

    grid: tuple[int, ...]
    width: int
    dtype: str
    kind: str
    modality_token: bool
    in_front: int = 0

    def setup(self):
        self.positions = Positions(self.kind, self.grid, self.width, self.in_front)
        self.mask = self.param('mask_token', nn.initializers.zeros, (self.width,))
        if self.modality_token:
            self.modality = self.param('modality_token', nn.initializers.zeros, (self.width,))

    def __call__(self, visible: Float[Array, 'b k e'], where: Int[Array, 'b n'] | None) -> Float[Array, 'b n e']:
        """[visible, mask tokens]; token i gets the position of place where[b, i], or of place i."""
        batch, num_visible, width = visible.shape
        num_masked = math.prod(self.grid) - num_visible
        masked = spread(last_axis(self.mask, visible), (batch, num_masked, width), self.dtype)
        table = jnp.asarray(self.positions())[self.in_front :]
        tokens = jnp.concatenate([visible, masked], axis=1)
        rows = table[None] if where is None else masking.take_rows(table, where)
        tokens = tokens + spread(rows, tokens.shape, self.dtype)
        if self.modality_token:
            tokens = tokens + spread(last_axis(self.modality, tokens), tokens.shape, self.dtype)
        return tokens

    def front(self, tokens: Float[Array, 'b m e']) -> Float[Array, 'b m e']:
        """Class tokens with their positions, where they have any."""
        if not self.in_front:
            return tokens
        table = jnp.asarray(self.positions())[: self.in_front]
        return tokens + spread(table[None], tokens.shape, self.dtype)


class Decoder(nn.Module):
    """What the decoders share: everything but which tokens see each other.

    Attributes:
      size: of the stack(s).
      final_norm: whether a stack ends with a LayerNorm.
      final_norm_epsilon: of that norm; None for that of the blocks.
      positions: kind of positions, see `tokenizers.Positions`.
      projection_bias: whether the projection from encoder to decoder width has a bias.
      modality_token: adds a learned vector that says which modality is to be decoded.
      class_position: class tokens have the first positions of the table, which is 'learned' or 'sincos_1d'; otherwise
        they have none.
      inpainting_positions: where inpainting shuffles places, 'place' gives each token the position of the place it
        answers for. 'before_shuffle' is what the public reference does: positions first, then a shuffle that separates
        them from the targets. It is there to reproduce its numbers.
    """

    size: Size
    compute: Compute = Compute()
    final_norm: bool = True
    positions: str = 'sincos_1d'
    projection_bias: bool = True
    modality_token: bool = False
    class_position: bool = False
    inpainting_positions: str = 'place'
    final_norm_epsilon: float | int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.inpainting_positions not in INPAINTING_POSITIONS:
            raise ValueError(
                f'inpainting_positions must be one of {INPAINTING_POSITIONS}; got {self.inpainting_positions!r}.'
            )

    @nn.nowrap
    def stack(self, name: str) -> Stack:
        return Stack(self.size, self.compute, self.final_norm, final_norm_epsilon=self.final_norm_epsilon, name=name)

    @nn.nowrap
    def stacks(self, modalities: list[Modality]) -> Callable[[Tokens], Tokens]:
        """Makes the stack or stacks and returns what runs them; the one thing in which decoders differ."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        encoded: Tokens,
        *,
        masks: Mapping[Modality, Mask],
        grids: Mapping[Modality, tuple[int, ...]],
        num_values: Mapping[Modality, int],
        places: Mapping[Modality, Int[Array, 'b n']] | None = None,
    ) -> Decoded:
        """Decodes each modality from its own kept tokens, and, where there are two, from those of the other.

        Inpainting X puts the tokens of Y in places[X][:, :n_Y] and asks for the others; None: in the first n_Y places.
        """
        dtype, width, modalities = self.compute.dtype, self.size.width, list(encoded)
        decode = self.stacks(modalities)
        project, fill, output = {}, {}, {}
        # A class token, where there is one, comes first, and sees and is seen like any other token.
        num_first = {m: encoded[m].shape[1] - masks[m].kept.shape[1] for m in modalities}
        for m in modalities:
            in_front = num_first[m] if self.class_position else 0
            project[m] = Dense(width, dtype, use_bias=self.projection_bias, name=f'projection_{m}')
            fill[m] = Filler(grids[m], width, dtype, self.positions, self.modality_token, in_front, name=f'filler_{m}')
            # The kernel starts at zero: what a fresh model predicts is its bias.
            output[m] = Dense(num_values[m], dtype, kernel_init=nn.initializers.zeros, name=f'output_{m}')
        projected = {m: project[m](encoded[m]) for m in modalities}
        visible = {m: projected[m][:, num_first[m] :] for m in modalities}

        order = {m: masking.token_order(masks[m]) for m in modalities}
        sequences = {
            m: jnp.concatenate([fill[m].front(projected[m][:, : num_first[m]]), fill[m](visible[m], order[m])], axis=1)
            for m in modalities
        }
        decoded = {m: tokens[:, num_first[m] :] for m, tokens in decode(sequences).items()}
        predicted, predicted_hidden = {}, {}
        for m, tokens in decoded.items():
            in_order = masking.reorder_tokens(tokens, masking.inverse_order(order[m]), order[m])
            predicted[m] = output[m](in_order)
            predicted_hidden[m] = output[m](tokens[:, visible[m].shape[1] :])

        sequences, asked = {}, {}
        for m, source in other_modality(visible).items():
            num_tokens = math.prod(grids[m])
            if source.shape[1] >= num_tokens:
                continue  # Nothing would be left to ask for. The term inpainting says so, if there is one.
            place = places.get(m) if places is not None and self.inpainting_positions == 'place' else None
            sequences[m] = fill[m](source, place)
            asked[m] = jnp.broadcast_to(jnp.arange(num_tokens)[None] >= source.shape[1], (len(source), num_tokens))
        inpainted, inpainted_mask = {}, {}
        for m, tokens in (decode(sequences) if sequences else {}).items():
            mask = asked[m].astype(jnp.float32)
            if places is not None and m in places:
                slot_of = masking.inverse_order(places[m])
                tokens = masking.reorder_tokens(tokens, slot_of, places[m])
                mask = jnp.take_along_axis(mask, slot_of, axis=1)
            inpainted[m] = output[m](tokens)
            inpainted_mask[m] = mask
        return Decoded(predicted, predicted_hidden, inpainted, inpainted_mask)


def other_modality(tokens: Tokens) -> Tokens:
    """By modality, the tokens of the other one; {} unless there are exactly two."""
    if len(tokens) != 2:
        return {}
    first, second = tokens
    return {first: tokens[second], second: tokens[first]}


class SharedDecoder(Decoder):
    """One stack for all, applied to each modality by itself."""

    @nn.nowrap
    def stacks(self, modalities: list[Modality]) -> Callable[[Tokens], Tokens]:
        stack = self.stack('shared')

        def decode(tokens: Tokens) -> Tokens:
            sequence, lengths = join(tokens)
            return split(stack(sequence, segments=lengths), tokens)

        return decode


class SeparateDecoder(Decoder):
    """A stack for each modality."""

    @nn.nowrap
    def stacks(self, modalities: list[Modality]) -> Callable[[Tokens], Tokens]:
        stack = {m: self.stack(m) for m in modalities}
        return lambda tokens: {m: stack[m](x) for m, x in tokens.items()}


class JointDecoder(Decoder):
    """One stack over the tokens of all modalities."""

    @nn.nowrap
    def stacks(self, modalities: list[Modality]) -> Callable[[Tokens], Tokens]:
        stack = self.stack('joint')

        def decode(tokens: Tokens) -> Tokens:
            sequence, _ = join(tokens)
            return split(stack(sequence), tokens)

        return decode


DECODERS = {'shared': SharedDecoder, 'separate': SeparateDecoder, 'joint': JointDecoder}

"""How many floating-point operations a model needs, counted from its shapes.

Model FLOP utilisation wants what the mathematics needs, not what a compiled program does: XLA counts the body of a loop
once and rematerialised layers twice. Only matrix products are counted, as is usual; the rest is a few per cent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.decoders import Decoder, JointDecoder
from avmae_jax.models.encoders import EarlyEncoder, Encoder, MidEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.ops import masking
from avmae_jax.structs import Modality


def dense_flops(rows: int, features_in: int, features_out: int) -> int:
    return 2 * rows * features_in * features_out


def stack_flops(size: Size, segments: Sequence[int], num_layers: int | None = None) -> int:
    """One pass through a stack over a sequence whose segments do not see each other."""
    width, tokens = size.width, sum(segments)
    dense = dense_flops(tokens, width, 4 * width) + 2 * dense_flops(tokens, width, size.mlp_width)
    attention = 4 * width * sum(length**2 for length in segments)
    return (size.num_layers if num_layers is None else num_layers) * (dense + attention)


def encoder_flops(encoder: Encoder, num_tokens: Mapping[Modality, int]) -> int:
    """One pass of an encoder over so many tokens of each modality."""
    lengths = list(num_tokens.values())
    if isinstance(encoder, EarlyEncoder):
        return stack_flops(encoder.size, [sum(lengths)])
    if isinstance(encoder, MidEncoder):
        joint = encoder.size.num_layers - encoder.fusion_layer
        separate = stack_flops(encoder.size, lengths, encoder.fusion_layer)
        return separate + stack_flops(encoder.size, [sum(lengths)], joint)
    return stack_flops(encoder.size, lengths)


def decoder_flops(decoder: Decoder, num_tokens: Mapping[Modality, int]) -> int:
    """One pass of a decoder's stack or stacks."""
    lengths = list(num_tokens.values())
    return stack_flops(decoder.size, [sum(lengths)] if isinstance(decoder, JointDecoder) else lengths)


def forward_flops(
    model: MaskedAutoencoder,
    shapes: Mapping[Modality, Sequence[int]],
    num_hidden: Mapping[Modality, int],
    terms: Iterable[str] = ('reconstruction',),
) -> dict[str, int]:
    """FLOPs of one forward pass for one clip, by part.

    Args:
      model: the autoencoder.
      shapes: by modality, of a batch of inputs; the batch size does not matter.
      num_hidden: by modality, how many tokens are hidden.
      terms: names of the objective's terms, which say how often the decoder runs.
    """
    grids = {m: model.tokenizers[m].grid(shape) for m, shape in shapes.items()}
    made = {m: model.tokenizers[m] for m in grids}
    total = {m: math.prod(grid) for m, grid in grids.items()}
    extra = {m: int(model.tokenizers[m].class_token) for m in grids}
    kept = {m: total[m] - num_hidden[m] for m in grids}
    encoded = {m: kept[m] + extra[m] for m in grids}
    values = {m: math.prod(tokenizer.patch) * getattr(tokenizer, 'channels', 3) for m, tokenizer in made.items()}
    asked = {m: values[m] // model.tokenizers[m].patch[0] if central_only(model, m) else values[m] for m in grids}
    width, decoder_width = model.encoder.size.width, model.decoder.size.width
    parts = {
        'embedding': sum(dense_flops(kept[m], values[m], width) for m in grids),
        'encoder': encoder_flops(model.encoder, encoded),
        'projection': sum(dense_flops(encoded[m], width, decoder_width) for m in grids),
        'decoder': 0,
        'output': 0,
    }
    for term in terms:
        inpainting = term == 'inpainting'
        parts['decoder'] += decoder_flops(model.decoder, {m: total[m] + (0 if inpainting else extra[m]) for m in grids})
        told = total if inpainting else num_hidden
        parts['output'] += sum(dense_flops(told[m], decoder_width, asked[m]) for m in grids)
    return parts


def central_only(model: MaskedAutoencoder, modality: Modality) -> bool:
    return modality == 'video' and model.tokenizers[modality].central_frame


def training_flops(
    model: MaskedAutoencoder,
    shapes: Mapping[Modality, Sequence[int]],
    mask_ratio: Mapping[Modality, float],
    terms: Iterable[str] = ('reconstruction',),
) -> int:
    """FLOPs of one training step for one clip: the gradient costs twice the forward pass, but inputs need none."""
    grids = {m: model.tokenizers[m].grid(shape) for m, shape in shapes.items()}
    hidden = {m: masking.num_hidden(math.prod(grid), mask_ratio[m]) for m, grid in grids.items()}
    parts = forward_flops(model, shapes, hidden, terms)
    return 3 * sum(parts.values()) - parts['embedding']

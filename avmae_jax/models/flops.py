"""How many floating-point operations a model needs, counted from its shapes.

Model FLOP utilisation wants what the mathematics needs, not what a compiled program does: XLA counts the body of a loop
once and rematerialised layers twice. Only matrix products are counted, as is usual; the rest is a few per cent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import POOLINGS, Classifier
from avmae_jax.models.decoders import Decoder, JointDecoder
from avmae_jax.models.encoders import EarlyEncoder, Encoder, MidEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import Tokenizer
from avmae_jax.ops import masking
from avmae_jax.structs import Modality


def dense_flops(rows: int, features_in: int, features_out: int) -> int:
    return 2 * rows * features_in * features_out


def layer_flops(size: Size, queries: int, seen: int) -> int:
    """One layer for so many tokens that look at `seen` tokens, themselves among them."""
    width = size.width
    dense = dense_flops(queries, width, 2 * width) + dense_flops(seen, width, 2 * width)
    attention = 4 * width * queries * seen
    return dense + attention + 2 * dense_flops(queries, width, size.mlp_width)


def stack_flops(size: Size, segments: Sequence[int], num_layers: int | None = None) -> int:
    """One pass through a stack over a sequence whose segments do not see each other."""
    layer = sum(layer_flops(size, length, length) for length in segments)
    return (size.num_layers if num_layers is None else num_layers) * layer


def bottleneck_fusion(encoder: MBT, lengths: Sequence[int]) -> int:
    """A layer in which each stream sees its tokens and the bottlenecks."""
    return stack_flops(encoder.size, [length + encoder.num_bottlenecks for length in lengths], 1)


def concatenation_fusion(encoder: MBT, lengths: Sequence[int]) -> int:
    """A layer in which the tokens of each stream see all; with own weights each stream has its own keys of all."""
    if encoder.shared_weights:
        return stack_flops(encoder.size, [sum(lengths)], 1)
    return sum(layer_flops(encoder.size, length, sum(lengths)) for length in lengths)


# One layer of streams that exchange, by MBT.fusion.
FUSION_FLOPS: dict[str, Callable[[MBT, Sequence[int]], int]] = {
    'bottleneck': bottleneck_fusion,
    'concatenation': concatenation_fusion,
}


def encoder_flops(encoder: Encoder, num_tokens: Mapping[Modality, int]) -> int:
    """One pass of an encoder, made for these modalities, over so many tokens of each."""
    lengths = list(num_tokens.values())
    if isinstance(encoder, MBT):
        apart = encoder.fusion_layer if len(lengths) > 1 else encoder.size.num_layers
        fused = (encoder.size.num_layers - apart) * FUSION_FLOPS[encoder.fusion](encoder, lengths)
        return stack_flops(encoder.size, lengths, apart) + fused
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
    total = {m: math.prod(grid) for m, grid in grids.items()}
    extra = {m: model.tokenizers[m].num_in_front for m in grids}
    kept = {m: total[m] - num_hidden[m] for m in grids}
    encoded = {m: kept[m] + extra[m] for m in grids}
    values = {m: num_values(model.tokenizers[m]) for m in grids}
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


def num_values(tokenizer: Tokenizer) -> int:
    """Values of a patch."""
    return math.prod(tokenizer.patch) * getattr(tokenizer, 'channels', 3)


def classifier_flops(model: Classifier, shapes: Mapping[Modality, Sequence[int]]) -> dict[str, int]:
    """FLOPs of one forward pass for one clip, by part; streams exchange as in training.

    Args:
      model: the classifier.
      shapes: by modality, of a batch of inputs; the batch size does not matter. A model is counted as if it was made
        for these modalities.
    """
    tokenizers = {m: model.tokenizers[m] for m in shapes}
    total = {m: math.prod(tokenizer.grid(shapes[m])) for m, tokenizer in tokenizers.items()}
    encoded = {m: total[m] + tokenizer.num_in_front for m, tokenizer in tokenizers.items()}
    token = {m: np.zeros((1, 1)) for m in shapes}
    vectors = len(POOLINGS[model.pooling]({m: x[None] for m, x in token.items()}, token))
    width = model.encoder.size.width
    pooled = model.representation or width
    return {
        'embedding': sum(dense_flops(total[m], num_values(tokenizer), width) for m, tokenizer in tokenizers.items()),
        'encoder': encoder_flops(model.encoder, encoded),
        'representation': dense_flops(vectors, width, model.representation or 0),
        'heads': sum(dense_flops(vectors, pooled, classes) for classes in model.num_classes.values()),
    }


def training_flops(
    model: MaskedAutoencoder | Classifier,
    shapes: Mapping[Modality, Sequence[int]],
    mask_ratio: Mapping[Modality, float] | None = None,
    terms: Iterable[str] = ('reconstruction',),
    repeated: bool = False,
) -> int:
    """FLOPs of one training step for one clip: the gradient costs twice the forward pass, but inputs need none.

    Args:
      model: an autoencoder or a classifier.
      shapes: by modality, of a batch of inputs.
      mask_ratio: of the objective; a classifier hides nothing.
      terms: of the objective; a classifier has none.
      repeated: count the forward pass of all layers twice, as where the backward pass computes them again.
    """
    if isinstance(model, Classifier):
        parts = classifier_flops(model, shapes)
    else:
        grids = {m: model.tokenizers[m].grid(shape) for m, shape in shapes.items()}
        hidden = {m: masking.num_hidden(math.prod(grid), (mask_ratio or {})[m]) for m, grid in grids.items()}
        parts = forward_flops(model, shapes, hidden, terms)
    again = sum(parts.get(name, 0) for name in ('encoder', 'decoder')) if repeated else 0
    return 3 * sum(parts.values()) - parts['embedding'] + again

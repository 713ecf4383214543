"""Weights of Scenic's `av_mae`: the published AV-MAE checkpoints, and its models of one modality.

    params = load(model, arrays, inputs)      # their names -> our parameters
    arrays = dump(model, params)              # and back

`arrays` are theirs by '/'-joined name, `inputs` anything with the shapes of a batch. `weights/scenic_config.py` makes
the model from their config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import stack_layers, unstack_layers
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.decoders import Decoder, JointDecoder, SharedDecoder
from avmae_jax.models.encoders import EarlyEncoder, Encoder, MidEncoder, SharedEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import Tokenizer
from avmae_jax.models.trunk import Trunk
from avmae_jax.structs import Mask, Modality
from avmae_jax.weights import bounds
from avmae_jax.weights.table import Arrays, Row, Transform, apply_rows, flatten, join_columns, keep, reshape, unflatten

SCENIC_NAMES = {'image': 'rgb', 'video': 'rgb', 'audio': 'spectrogram'}
VECTOR = ((1, 1, -1), (-1,))  # Their tokens keep axes for batch and sequence.


def load(
    model: Trunk, arrays: Mapping[str, np.ndarray], inputs: Mapping[Modality, Any], single: bool = False
) -> dict[str, Any]:
    """Parameters of `model` from Scenic's arrays; an error names what does not fit.

    Args:
      model: a MaskedAutoencoder or a Classifier.
      arrays: their parameters by name.
      inputs: by modality, something with the shape of a batch.
      single: the weights are of a model for one modality alone (`vivit`, `vit`), whose names lack the modality.
    """
    return load_rows(model, scenic_rows(model, single), arrays, inputs)


def dump(model: Trunk, params: Mapping[str, Any], single: bool = False) -> Arrays:
    """Undoes `load`. Works for anything in the shape of the parameters, such as gradients."""
    return dump_rows(scenic_rows(model, single), params)


def load_rows(
    model: Trunk, rows: Sequence[Row], arrays: Mapping[str, np.ndarray], inputs: Mapping[Modality, Any]
) -> dict[str, Any]:
    """Parameters of `model` by a table for the layout with layers one by one."""
    bounds.check(model, arrays, {m: inputs[m].shape[1:] for m in model.tokenizers})
    shapes = {name: leaf.shape for name, leaf in flatten(looped_shapes(model, inputs)).items()}
    ours = unflatten(apply_rows(rows, arrays, shapes))
    return jax.tree.map(jnp.asarray, stack_layers(ours) if model.encoder.compute.scan else ours)


def dump_rows(rows: Sequence[Row], params: Mapping[str, Any]) -> Arrays:
    """Undoes `load_rows`."""
    ours = {name: np.asarray(array) for name, array in flatten(unstack_layers(dict(params))).items()}
    return apply_rows([row.reverse() for row in rows], ours)


def looped_shapes(model: Trunk, inputs: Mapping[Modality, Any]) -> dict[str, Any]:
    """Shapes of the model's parameters, layer by layer."""

    def init() -> dict[str, Any]:
        zeros = {m: jnp.zeros(x.shape, jnp.float32) for m, x in inputs.items() if m in model.tokenizers}
        key = jax.random.key(0)
        if isinstance(model, Classifier):
            return unstack_layers(model.init(key, zeros)['params'])
        masks = {}
        for m, grid in model.grids(zeros).items():
            tokens = jnp.broadcast_to(jnp.arange(np.prod(grid)), (len(zeros[m]), int(np.prod(grid))))
            masks[m] = Mask(kept=tokens[:, :1], hidden=tokens[:, 1:])
        return unstack_layers(model.init(key, zeros, masks)['params'])

    return jax.eval_shape(init)


def row(theirs: str, ours: str, transform: Transform | None = None) -> Row:
    return Row((theirs,), (ours,), transform or keep())


def dense_rows(theirs: str, ours: str, bias: bool = True) -> list[Row]:
    return [row(f'{theirs}/{part}', f'{ours}/{part}') for part in (('kernel', 'bias') if bias else ('kernel',))]


def norm_rows(theirs: str, ours: str) -> list[Row]:
    return [row(f'{theirs}/{part}', f'{ours}/{part}') for part in ('scale', 'bias')]


def stack_rows(theirs: str, ours: str, size: Size, final_norm: bool) -> list[Row]:
    """One `Encoder` of theirs (which their decoders are, too) is one Stack of ours."""
    rows = block_rows(theirs + '/encoderblock_{layer}', ours + '/layer_{layer}', size)
    return rows + norm_rows(f'{theirs}/encoder_norm', f'{ours}/norm') if final_norm else rows


def block_rows(block: str, layer: str, size: Size) -> list[Row]:
    """One `EncoderBlock` of theirs is one Block of ours."""
    width, heads = size.width, (size.num_heads, size.width // size.num_heads)
    attention = f'{block}/MultiHeadDotProductAttention_0'
    qkv = [f'{attention}/{name}' for name in ('query', 'key', 'value')]
    return [
        *norm_rows(f'{block}/LayerNorm_0', f'{layer}/attention_norm'),
        Row(
            tuple(f'{name}/kernel' for name in qkv),
            (f'{layer}/attention/qkv/kernel',),
            join_columns((width, *heads), (width, -1)),
        ),
        Row(tuple(f'{name}/bias' for name in qkv), (f'{layer}/attention/qkv/bias',), join_columns(heads, (-1,))),
        row(f'{attention}/out/kernel', f'{layer}/attention/out/kernel', reshape((*heads, width), (width, width))),
        row(f'{attention}/out/bias', f'{layer}/attention/out/bias'),
        *norm_rows(f'{block}/LayerNorm_1', f'{layer}/mlp_norm'),
        *dense_rows(f'{block}/MlpBlock_0/Dense_0', f'{layer}/mlp/up'),
        *dense_rows(f'{block}/MlpBlock_0/Dense_1', f'{layer}/mlp/down'),
    ]


def position_rows(kind: str, theirs: str, ours: str, width: int) -> list[Row]:
    if kind == 'learned':
        return [row(f'{theirs}/pos_embedding', f'{ours}/table', reshape((1, -1, width), (-1, width)))]
    if kind == 'learned_space_time':
        return [
            row(f'{theirs}/pos_embedding_space', f'{ours}/space', reshape((1, 1, -1, width), (-1, width))),
            row(f'{theirs}/pos_embedding_time', f'{ours}/time', reshape((1, -1, 1, width), (-1, width))),
        ]
    return []


def stem_rows(theirs: str, ours: str, tokenizer: Tokenizer, width: int) -> list[Row]:
    """Their convolution is our product with a patch."""
    kernel = (*tokenizer.patch, getattr(tokenizer, 'channels', 3), width)
    return [
        row(f'{theirs}/kernel', f'{ours}/embedding/kernel', reshape(kernel, (-1, width))),
        row(f'{theirs}/bias', f'{ours}/embedding/bias'),
    ]


def tokenizer_rows(modality: Modality, tokenizer: Tokenizer, width: int, suffix: str) -> list[Row]:
    ours = f'tokenizers_{modality}'
    rows = [
        *stem_rows(f'embedding{suffix}', ours, tokenizer, width),
        *position_rows(tokenizer.positions, f'posembed_input{suffix}', f'{ours}/positions', width),
    ]
    if tokenizer.modality_token:
        theirs = f'Encoder_modality_token_{SCENIC_NAMES[modality]}'
        rows.append(row(theirs, f'{ours}/modality_token', reshape(*VECTOR)))
    if tokenizer.class_token:
        rows.append(row(f'cls{suffix}', f'{ours}/class_token', reshape(*VECTOR)))
    return rows


def encoder_rows(encoder: Encoder, modalities: list[Modality], single: bool) -> list[Row]:
    size, norm = encoder.size, encoder.final_norm
    if isinstance(encoder, EarlyEncoder):
        return stack_rows('Transformer', 'encoder/joint', size, norm)
    if isinstance(encoder, SharedEncoder):
        return stack_rows('Transformer', 'encoder/shared', size, norm)
    if single:
        return stack_rows('Transformer', f'encoder/{modalities[0]}', size, norm)
    rows = []
    for m in modalities:
        rows += stack_rows(f'Transformer_{SCENIC_NAMES[m]}', f'encoder/{m}', size, norm)
    if isinstance(encoder, MidEncoder):
        rows += stack_rows('Transformer_concat', 'encoder/joint', size, norm)
    return rows


def decoder_rows(decoder: Decoder, modalities: list[Modality], suffixes: Mapping[Modality, str]) -> list[Row]:
    rows, size = [], decoder.size
    for m in modalities:
        suffix, filler = suffixes[m], f'decoder/filler_{m}'
        rows += dense_rows(f'decoder_projection{suffix}', f'decoder/projection_{m}', decoder.projection_bias)
        rows += dense_rows(f'output_projection{suffix}', f'decoder/output_{m}')
        rows.append(row(f'mask_token{suffix}', f'{filler}/mask_token', reshape(*VECTOR)))
        rows += position_rows(decoder.positions, f'posembed_decoder{suffix}', f'{filler}/positions', size.width)
        if decoder.modality_token:
            theirs = f'Decoder_modality_token_{SCENIC_NAMES[m]}'
            rows.append(row(theirs, f'{filler}/modality_token', reshape(*VECTOR)))
    if isinstance(decoder, SharedDecoder):
        return rows + stack_rows('Decoder', 'decoder/shared', size, decoder.final_norm)
    if isinstance(decoder, JointDecoder):
        return rows + stack_rows('Decoder', 'decoder/joint', size, decoder.final_norm)
    for m in modalities:
        rows += stack_rows(f'Decoder{suffixes[m]}', f'decoder/{m}', size, decoder.final_norm)
    return rows


def scenic_rows(model: Trunk, single: bool = False) -> list[Row]:
    """The table for a model: their names -> ours, for the layout with layers one by one."""
    modalities = list(model.tokenizers)
    if single and len(modalities) != 1:
        raise ValueError(f'single=True is for models of one modality; this one has {modalities}.')
    suffixes = {m: '' if single else f'_{SCENIC_NAMES[m]}' for m in modalities}
    width = model.encoder.size.width
    rows = []
    for m in modalities:
        rows += tokenizer_rows(m, model.tokenizers[m], width, suffixes[m])
    rows += encoder_rows(model.encoder, modalities, single)
    if isinstance(model, MaskedAutoencoder):
        return rows + decoder_rows(model.decoder, modalities, suffixes)
    if model.pooled_norm:
        rows += norm_rows('encoder_norm', 'norm')
    (head,) = model.num_classes
    return rows + dense_rows('output_projection', f'head_{head}')

"""Weights of Scenic's MBT in its two variants: `av_mae`, in which AV-MAE is finetuned, and the older `mbt`.

    params = load(model, arrays, inputs, 'av_mae')      # their names -> our parameters
    arrays = dump(model, params, 'av_mae')              # and back

`weights/scenic_config.py` makes the model from their config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import Classifier
from avmae_jax.structs import Modality
from avmae_jax.weights.scenic_avmae import (
    SCENIC_NAMES,
    VECTOR,
    block_rows,
    dense_rows,
    dump_rows,
    load_rows,
    norm_rows,
    position_rows,
    row,
    stem_rows,
)
from avmae_jax.weights.table import Arrays, Row, reshape

# What a variant calls the blocks of the second modality, and what it puts before the names of the head.
BLOCKS_OF_SOUND = {'av_mae': '_spec', 'mbt': '_spectrogram'}
HEADS = {'av_mae': 'ProjectionHeadAndClassifier_0/', 'mbt': ''}


def load(
    model: Classifier, arrays: Mapping[str, np.ndarray], inputs: Mapping[Modality, Any], variant: str
) -> dict[str, Any]:
    """Parameters of `model` from Scenic's arrays; an error names what does not fit.

    Args:
      arrays: their parameters by name.
      inputs: by modality, something with the shape of a batch.
      variant: 'av_mae' or 'mbt'.
    """
    return load_rows(model, mbt_rows(model, variant), arrays, inputs)


def dump(model: Classifier, params: Mapping[str, Any], variant: str) -> Arrays:
    """Undoes `load`. Works for anything in the shape of the parameters, such as gradients."""
    return dump_rows(mbt_rows(model, variant), params)


def mbt_rows(model: Classifier, variant: str) -> list[Row]:
    """The table for a model: their names -> ours, for the layout with layers one by one."""
    if variant not in HEADS:
        raise ValueError(f'variant must be one of {tuple(HEADS)}; got {variant!r}.')
    encoder = model.encoder
    if not isinstance(encoder, MBT):
        raise ValueError(f'These are weights of an MBT; the encoder of the model is a {type(encoder).__name__}.')
    width = encoder.size.width
    alone = len(model.tokenizers) == 1
    rows = []
    for m, tokenizer in model.tokenizers.items():
        theirs, ours = SCENIC_NAMES[m], f'tokenizers_{m}'
        suffix = '' if theirs == 'rgb' else f'_{theirs}'
        rows += stem_rows(f'embedding{suffix}', ours, tokenizer, width)
        rows += position_rows(tokenizer.positions, f'Transformer/posembed_input{suffix}', f'{ours}/positions', width)
        if tokenizer.modality_token:
            rows.append(row(f'Encoder_modality_token_{theirs}', f'{ours}/modality_token', reshape(*VECTOR)))
        if tokenizer.class_token:
            name = 'cls' if theirs == 'rgb' or alone else f'cls{theirs}'
            rows.append(row(name, f'{ours}/class_token', reshape(*VECTOR)))
        if not encoder.shared_weights:
            # `av_mae` names the first modality's blocks without a suffix, `mbt` those of pictures.
            plain = theirs == 'rgb' or (alone and variant == 'av_mae')
            block = 'Transformer/encoderblock_{layer}' + ('' if plain else BLOCKS_OF_SOUND[variant])
            rows += block_rows(block, f'encoder/{m}/layer_{{layer}}', encoder.size)
    if encoder.shared_weights:
        rows += block_rows('Transformer/encoderblock_{layer}', 'encoder/shared/layer_{layer}', encoder.size)
    rows += norm_rows('Transformer/encoder_norm', 'encoder/norm')
    if encoder.fusion == 'bottleneck' and not alone:
        shape = (encoder.num_bottlenecks, width)
        rows.append(row('bottleneck', 'encoder/bottlenecks', reshape((1, *shape), shape)))
    if model.representation:
        rows += dense_rows(f'{HEADS[variant]}pre_logits', 'representation')
    (head,) = model.num_classes
    return rows + dense_rows(f'{HEADS[variant]}output_projection', f'head_{head}')

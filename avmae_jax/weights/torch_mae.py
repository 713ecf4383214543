"""State dicts of the image MAE (He et al. 2022, facebookresearch/mae) and of AudioMAE (Huang et al. 2022).

Three kinds of file are published of each: the whole autoencoder; its encoder alone, which becomes a classifier whose
head says nothing; a finetuned classifier. Their tables of positions are fixed sines and cosines until somebody trains
them: fixed ones are compared with ours and not kept, others become 'learned'.

AudioMAE's own decoder looks at windows that shift from layer to layer (Swin), of which we have no counterpart: of such
a file the encoder is read, whole, and the arrays of the decoder are listed as ignored. One of plain blocks
(`decoder_mode=0` there) is read like MAE's.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.decoders import SharedDecoder
from avmae_jax.models.encoders import SharedEncoder
from avmae_jax.models.tokenizers import AudioTokenizer, ImageTokenizer
from avmae_jax.structs import Modality
from avmae_jax.weights import torch_blocks
from avmae_jax.weights.imported import HEAD, Imported
from avmae_jax.weights.table import Arrays, Row, shape_of
from avmae_jax.weights.torch_blocks import DECODER_NUM_HEADS, NUM_HEADS, Given, Source
from avmae_jax.weights.torch_rows import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Made,
    crop,
    fixed_2d,
    is_fixed,
    linear_rows,
    norm_rows,
    position_rows,
    token_row,
)

DECODER_HEADS = {512: 16}
HEADS_GIVEN = {'num_heads': NUM_HEADS, 'decoder_num_heads': DECODER_NUM_HEADS}
GIVEN = {'image': 'height and width of pictures that are not square, as 224x192', **HEADS_GIVEN}
AUDIO_GIVEN = {'num_mel_bins': 'of the spectrograms; 128 without', **HEADS_GIVEN}
SWIN = re.compile(r'decoder_blocks\.\d+\.attn\.(?!qkv\.|proj\.)')
SWIN_REASON = 'its decoder attends within shifting windows, which ours has not; the encoder is read whole'
# Of the published models: AudioMAE's spectrograms are divided by twice the deviation.
IMAGE_SETTINGS = {'preprocess.rgb_mean': IMAGENET_MEAN, 'preprocess.rgb_std': IMAGENET_STD}
SOUND_SETTINGS = {
    'preprocess.convention': 'kaldi', 'preprocess.audio_mean': -4.2677393, 'preprocess.audio_std': 2 * 4.5689974,
}  # fmt: skip


def has_swin(arrays: Arrays) -> bool:
    return any(map(SWIN.match, arrays))


def grid_of(arrays: Arrays, modality: Modality, patch: tuple[int, int], given: Given) -> tuple[int, int]:
    """Tokens along height and width, or along time and frequency, of what positions there are."""
    places = shape_of(arrays, 'pos_embed', 3)[1] - 1
    if modality == 'audio':
        bins = torch_blocks.number({'num_mel_bins': '128', **given}, 'num_mel_bins') // patch[1]
        if bins < 1 or places % bins:
            raise ValueError(
                f'pos_embed has {places} places, not {bins} for each moment: give --given=num_mel_bins=....'
            )
        return places // bins, bins
    side = math.isqrt(places)
    height, width = torch_blocks.sizes(given, 'image', (side * patch[0], side * patch[1]))
    grid = height // patch[0], width // patch[1]
    if grid[0] * grid[1] != places:
        raise ValueError(f'pos_embed has {places} places, and {grid[0]} x {grid[1]} were due: give --given=image=HxW.')
    return grid


def build(arrays: Arrays, compute: Compute, given: Given, modality: Modality) -> Made:
    width, channels, *sides = shape_of(arrays, 'patch_embed.proj.weight', 4)
    patch, colours = (sides[0], sides[1]), 1 if modality == 'audio' else 3
    if channels != colours:
        raise ValueError(f'patch_embed.proj.weight takes {channels} channels, and {modality} has {colours}.')
    grid = grid_of(arrays, modality, patch, given)
    heads = torch_blocks.heads_of(arrays, 'blocks.0.norm1.weight', given, 'num_heads', torch_blocks.HEADS)
    fixed = is_fixed(arrays, 'pos_embed', fixed_2d(grid, width))
    fields: dict[str, Any] = dict(
        positions='sincos_2d' if fixed else 'learned', class_token=True, class_position=not fixed
    )
    tokenizer = AudioTokenizer(patch, **fields) if modality == 'audio' else ImageTokenizer(patch, **fields)
    size = torch_blocks.size_of(arrays, 'blocks', heads)
    shape = (grid[0] * patch[0], grid[1] * patch[1])
    shapes: dict[Modality, tuple[int, ...]] = {modality: shape if modality == 'audio' else (*shape, 3)}
    if modality == 'audio':
        settings = {'preprocess.num_spec_frames': shape[0], 'preprocess.num_mel_bins': shape[1], **SOUND_SETTINGS}
    else:
        settings = {**crop(modality, *shape), **IMAGE_SETTINGS}
    if 'decoder_embed.weight' in arrays and not has_swin(arrays):
        heads = torch_blocks.heads_of(arrays, 'decoder_norm.weight', given, 'decoder_num_heads', DECODER_HEADS)
        decoder = torch_blocks.size_of(arrays, 'decoder_blocks', heads)
        fixed = is_fixed(arrays, 'decoder_pos_embed', fixed_2d(grid, decoder.width))
        model = MaskedAutoencoder(
            {modality: tokenizer},
            SharedEncoder(size, compute),
            SharedDecoder(decoder, compute, positions='sincos_2d' if fixed else 'learned', class_position=not fixed),
        )
        target = f'objective.terms.reconstruction.target.{modality}.convention'
        ratio = {'image': 0.75, 'audio': 0.8}[modality]
        return Made(model, shapes, {**settings, f'objective.mask_ratio.{modality}': ratio, target: 'mae'})
    # A classifier of the mean has its norm behind the mean, one of the class token in the encoder.
    mean = 'fc_norm.weight' in arrays
    classifier = Classifier(
        {modality: tokenizer},
        SharedEncoder(size, compute, final_norm='norm.weight' in arrays),
        num_classes=torch_blocks.num_classes(arrays, 'head.bias'),
        pooling='mean' if mean else 'token',
        pooled_norm=mean,
    )
    return Made(classifier, shapes, settings, () if 'head.bias' in arrays else None)


def rows(model: MaskedAutoencoder | Classifier, shapes: Mapping[Modality, tuple[int, ...]]) -> list[Row]:
    """The table: their names -> ours, for the layout with layers one by one."""
    ((modality, tokenizer),) = model.tokenizers.items()
    size, grid = model.encoder.size, tokenizer.grid((1, *shapes[modality]))
    ours, channels = f'tokenizers_{modality}', 1 if modality == 'audio' else 3
    table = [
        *torch_blocks.stem_rows('patch_embed.proj', f'{ours}/embedding', tokenizer.patch, channels, size.width),
        token_row('cls_token', f'{ours}/class_token'),
        *position_rows('pos_embed', f'{ours}/positions/table', tokenizer.positions, grid, size.width),
        *torch_blocks.stack_rows('blocks', 'encoder/shared', size),
    ]
    if model.encoder.final_norm:
        table += norm_rows('norm', 'encoder/shared/norm')
    if isinstance(model, Classifier):
        table += norm_rows('fc_norm', 'norm') if model.pooled_norm else []
        return table + linear_rows('head', f'head_{HEAD}')
    decoder, filler = model.decoder, f'decoder/filler_{modality}'
    return [
        *table,
        *linear_rows('decoder_embed', f'decoder/projection_{modality}'),
        token_row('mask_token', f'{filler}/mask_token'),
        *position_rows('decoder_pos_embed', f'{filler}/positions/table', decoder.positions, grid, decoder.size.width),
        *torch_blocks.stack_rows('decoder_blocks', 'decoder/shared', decoder.size),
        *norm_rows('decoder_norm', 'decoder/shared/norm'),
        *linear_rows('decoder_pred', f'decoder/output_{modality}'),
    ]


def ignored(arrays: Arrays) -> dict[str, str]:
    """The decoder that is not read, if it is none of ours."""
    if not has_swin(arrays):
        return {}
    return {name: SWIN_REASON for name in arrays if name.startswith(('decoder_', 'mask_token'))}


def read_mae(path: epath.PathLike, compute: Compute, given: Given) -> Imported:
    """A model of images, for `weights/formats.py`."""
    return torch_blocks.read(path, compute, given, Source(functools.partial(build, modality='image'), rows))


def read_audiomae(path: epath.PathLike, compute: Compute, given: Given) -> Imported:
    """A model of sound, for `weights/formats.py`."""
    return torch_blocks.read(path, compute, given, Source(functools.partial(build, modality='audio'), rows, ignored))

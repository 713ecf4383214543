"""State dicts of CAV-MAE (Gong et al. 2023, YuanGongND/cav-mae): pretrained, and finetuned.

Its encoder is our `mid` without a norm behind the streams, and with norms for each modality in the joint layers
(`MidEncoder.modality_norms`); its decoder is our `joint`. What differs, and what is lost:

    spectrograms     have frequency before time there: stem, positions and the values of a patch change places
    positions        are fixed tables in the file, of which that of sound is another than ours: all become 'learned'
    decoder          one projection and one mask token serve both modalities there, ours has a copy for each
    unused norms     each block has the norms of a modality, which only joint layers use: the others are ignored
    contrast         the loss between the modalities is no objective here; the encoder that it needs is whole
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.decoders import JointDecoder
from avmae_jax.models.encoders import MidEncoder
from avmae_jax.models.tokenizers import AudioTokenizer, ImageTokenizer
from avmae_jax.structs import Modality
from avmae_jax.weights import torch_blocks
from avmae_jax.weights.imported import HEAD, Imported
from avmae_jax.weights.scenic_avmae import row
from avmae_jax.weights.table import Arrays, Row, Transform, chain, permute, reshape, shape_of, transpose
from avmae_jax.weights.torch_blocks import DECODER_NUM_HEADS, NUM_HEADS, TORCH_EPSILON, Given, Source
from avmae_jax.weights.torch_rows import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Made,
    crop,
    frequency_first,
    linear_rows,
    norm_rows,
    token_row,
)

LETTERS = {'audio': 'a', 'image': 'v'}
DECODER_HEADS = {512: 16}
GIVEN = {
    'num_mel_bins': 'of the spectrograms; 128 without',
    'image': 'height and width of pictures that are not square, as 224x192',
    'num_heads': NUM_HEADS,
    'decoder_num_heads': DECODER_NUM_HEADS,
}
UNUSED = re.compile(r'(blocks_[av]|decoder_blocks)\.\d+\.norm[12]_[av]\.')
UNUSED_REASON = 'only joint layers use the norms of a modality'
SETTINGS = {
    'preprocess.rgb_mean': IMAGENET_MEAN, 'preprocess.rgb_std': IMAGENET_STD, 'preprocess.convention': 'kaldi',
    'preprocess.audio_mean': -5.081, 'preprocess.audio_std': 4.4849,
}  # fmt: skip


def shapes_of(
    arrays: Arrays, patch: Mapping[Modality, tuple[int, int]], given: Given
) -> dict[Modality, tuple[int, ...]]:
    """What it was trained on, by the numbers of positions."""
    places = {m: shape_of(arrays, f'pos_embed_{letter}', 3)[1] for m, letter in LETTERS.items()}
    bins = torch_blocks.number({'num_mel_bins': '128', **given}, 'num_mel_bins') // patch['audio'][1]
    if bins < 1 or places['audio'] % bins:
        raise ValueError(
            f'pos_embed_a has {places["audio"]} places, not {bins} for each moment: give --given=num_mel_bins=NUMBER.'
        )
    side = math.isqrt(places['image'])
    height, width = torch_blocks.sizes(given, 'image', (side * patch['image'][0], side * patch['image'][1]))
    if (height // patch['image'][0]) * (width // patch['image'][1]) != places['image']:
        raise ValueError(f'pos_embed_v has {places["image"]} places, which {height} x {width} pixels have not.')
    return {
        'image': (height, width, 3),
        'audio': (places['audio'] // bins * patch['audio'][0], bins * patch['audio'][1]),
    }


def build(arrays: Arrays, compute: Compute, given: Given) -> Made:
    patch: dict[Modality, tuple[int, int]] = {}
    for modality, letter in LETTERS.items():
        _, channels, *sides = shape_of(arrays, f'patch_embed_{letter}.proj.weight', 4)
        if channels != (1 if modality == 'audio' else 3):
            raise ValueError(f'patch_embed_{letter}.proj.weight takes {channels} channels.')
        patch[modality] = (sides[1], sides[0]) if modality == 'audio' else (sides[0], sides[1])
    shapes = shapes_of(arrays, patch, given)
    heads = torch_blocks.heads_of(arrays, 'norm.weight', given, 'num_heads', torch_blocks.HEADS)
    streams = [torch_blocks.size_of(arrays, f'blocks_{letter}', heads, TORCH_EPSILON) for letter in LETTERS.values()]
    if streams[0] != streams[1]:
        raise ValueError(f'its streams differ: {streams[0]} and {streams[1]}.')
    joint = torch_blocks.size_of(arrays, 'blocks_u', heads, TORCH_EPSILON)
    depth = streams[0].num_layers
    fields: dict[str, Any] = dict(positions='learned', modality_token=True)
    tokenizers = {
        'image': ImageTokenizer(patch['image'], **fields),
        'audio': AudioTokenizer(patch['audio'], **fields),
    }
    encoder = MidEncoder(
        torch_blocks.with_layers(joint, depth + joint.num_layers),
        compute,
        fusion_layer=depth,
        stream_norm=False,
        modality_norms=True,
    )
    (height, width, _), (frames, bins) = shapes['image'], shapes['audio']
    settings = {
        **crop('image', height, width), 'preprocess.num_spec_frames': frames, 'preprocess.num_mel_bins': bins,
        **SETTINGS,
    }  # fmt: skip
    if 'decoder_embed.weight' not in arrays:
        classifier = Classifier(
            tokenizers,
            encoder,
            num_classes=torch_blocks.num_classes(arrays, 'mlp_head.1.bias'),
            pooling='joint_mean',
            pooled_norm='mlp_head.0.weight' in arrays,
        )
        return Made(classifier, shapes, settings, () if 'mlp_head.1.bias' in arrays else None)
    heads = torch_blocks.heads_of(arrays, 'decoder_norm.weight', given, 'decoder_num_heads', DECODER_HEADS)
    size = torch_blocks.size_of(arrays, 'decoder_blocks', heads, TORCH_EPSILON)
    for modality in tokenizers:
        settings[f'objective.mask_ratio.{modality}'] = 0.75
        settings[f'objective.terms.reconstruction.target.{modality}.convention'] = 'mae'
    return Made(MaskedAutoencoder(tokenizers, encoder, JointDecoder(size, compute, **fields)), shapes, settings)


def copies(transform: Transform) -> Transform:
    """One array of theirs serves both modalities; backwards the two must be the same."""

    def backward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        if not np.array_equal(arrays[0], arrays[1]):
            raise ValueError('both modalities have the same there, and here they have grown apart.')
        return transform.backward(arrays[:1])

    return Transform(lambda arrays: 2 * transform.forward(arrays), backward)


def both_row(theirs: str, ours: str, transform: Transform) -> Row:
    """`ours` holds {modality}."""
    return Row((theirs,), tuple(ours.replace('{modality}', modality) for modality in LETTERS), copies(transform))


def rows(model: MaskedAutoencoder | Classifier, shapes: Mapping[Modality, tuple[int, ...]]) -> list[Row]:
    """The table: their names -> ours, for the layout with layers one by one."""
    size, table = model.encoder.size, []
    grid = model.tokenizers['audio'].grid((1, *shapes['audio']))
    for modality, letter in LETTERS.items():
        tokenizer, ours, sound = model.tokenizers[modality], f'tokenizers_{modality}', modality == 'audio'
        table += [
            *torch_blocks.stem_rows(
                f'patch_embed_{letter}.proj',
                f'{ours}/embedding',
                tokenizer.patch,
                1 if sound else 3,
                size.width,
                frequency_first=sound,
            ),
            token_row(f'modality_{letter}', f'{ours}/modality_token'),
            position_row(f'pos_embed_{letter}', f'{ours}/positions/table', grid if sound else None, size.width),
            *torch_blocks.stack_rows(f'blocks_{letter}', f'encoder/{modality}', size),
            *norm_rows(
                f'blocks_u.{{layer}}.norm1_{letter}', f'encoder/joint_{modality}/layer_{{layer}}/attention_norm'
            ),
            *norm_rows(f'blocks_u.{{layer}}.norm2_{letter}', f'encoder/joint_{modality}/layer_{{layer}}/mlp_norm'),
            *norm_rows(f'norm_{letter}', f'encoder/joint_{modality}/norm'),
        ]
    table += [*torch_blocks.stack_rows('blocks_u', 'encoder/joint', size), *norm_rows('norm', 'encoder/joint/norm')]
    if isinstance(model, Classifier):
        table += norm_rows('mlp_head.0', 'norm') if model.pooled_norm else []
        return table + linear_rows('mlp_head.1', f'head_{HEAD}')
    return table + decoder_rows(model, grid)


def position_row(theirs: str, ours: str, grid: tuple[int, ...] | None, width: int) -> Row:
    """A table of places; of sound those of the grid, which theirs runs over frequency first."""
    return row(theirs, ours, reshape((1, -1, width), (-1, width)) if grid is None else frequency_first(grid, 0, width))


def decoder_rows(model: MaskedAutoencoder, grid: tuple[int, ...]) -> list[Row]:
    width = model.decoder.size.width
    time, bins = model.tokenizers['audio'].patch
    values = (bins, time)  # Of a patch of sound, as theirs has them.
    table = [
        both_row('decoder_embed.weight', 'decoder/projection_{modality}/kernel', transpose()),
        both_row('decoder_embed.bias', 'decoder/projection_{modality}/bias', reshape((-1,), (-1,))),
        both_row('mask_token', 'decoder/filler_{modality}/mask_token', reshape((1, 1, -1), (-1,))),
        *torch_blocks.stack_rows('decoder_blocks', 'decoder/joint', model.decoder.size),
        *norm_rows('decoder_norm', 'decoder/joint/norm'),
        *linear_rows('decoder_pred_v', 'decoder/output_image'),
        row(
            'decoder_pred_a.weight',
            'decoder/output_audio/kernel',
            chain(reshape((bins * time, width), (*values, width)), permute((*values, width), (2, 1, 0), (width, -1))),
        ),
        row(
            'decoder_pred_a.bias',
            'decoder/output_audio/bias',
            chain(reshape((-1,), values), permute(values, (1, 0), (-1,))),
        ),
    ]
    for modality, letter in LETTERS.items():
        filler, places = f'decoder/filler_{modality}', grid if modality == 'audio' else None
        table.append(token_row(f'decoder_modality_{letter}', f'{filler}/modality_token'))
        table.append(position_row(f'decoder_pos_embed_{letter}', f'{filler}/positions/table', places, width))
    return table


def ignored(arrays: Arrays) -> dict[str, str]:
    return {name: UNUSED_REASON for name in arrays if UNUSED.match(name)}


def read(path: epath.PathLike, compute: Compute, given: Given) -> Imported:
    """A model of images and sound, for `weights/formats.py`."""
    return torch_blocks.read(path, compute, given, Source(build, rows, ignored))

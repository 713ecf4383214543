"""State dicts of VideoMAE (Tong et al. 2022, MCG-NJU/VideoMAE) and of VideoMAE V2 (Wang et al. 2023).

Both name their parameters alike: an autoencoder has the prefixes `encoder.` and `decoder.`, a classifier none. The
tables of positions are fixed and not in the files, so what a model was trained on is not either: 16 frames of 224 x 224
pixels, unless told. Queries and values have a bias and keys have none; ours of keys is zero. V2 hides tokens of the
decoder, too, which changes how it is trained and no parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

from etils import epath

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.decoders import SharedDecoder
from avmae_jax.models.encoders import SharedEncoder
from avmae_jax.models.tokenizers import VideoTokenizer
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
    linear_rows,
    norm_rows,
    token_row,
)

DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
GIVEN = {
    'video': 'frames, height and width it was trained on; 16x224x224 without',
    'num_heads': NUM_HEADS,
    'decoder_num_heads': DECODER_NUM_HEADS,
}


def build(arrays: Arrays, compute: Compute, given: Given) -> Made:
    pretrained = 'encoder_to_decoder.weight' in arrays
    encoder = 'encoder.' if pretrained else ''
    _, channels, frames, height, width = shape_of(arrays, f'{encoder}patch_embed.proj.weight', 5)
    if channels != 3:
        raise ValueError(f'{encoder}patch_embed.proj.weight takes {channels} channels, and pictures have 3.')
    shape = torch_blocks.sizes(given, 'video', (16, 224, 224))
    tokenizer = VideoTokenizer((frames, height, width), 'sincos_1d')
    heads = torch_blocks.heads_of(arrays, f'{encoder}blocks.0.norm1.weight', given, 'num_heads', torch_blocks.HEADS)
    size = torch_blocks.size_of(arrays, f'{encoder}blocks', heads)
    shapes: dict[Modality, tuple[int, ...]] = {'video': (*shape, 3)}
    settings = {
        'video.num_frames': shape[0], **crop('video', *shape[1:]), 'preprocess.rgb_mean': IMAGENET_MEAN,
        'preprocess.rgb_std': IMAGENET_STD,
    }  # fmt: skip
    if pretrained:
        heads = torch_blocks.heads_of(arrays, 'decoder.norm.weight', given, 'decoder_num_heads', DECODER_HEADS)
        decoder = torch_blocks.size_of(arrays, 'decoder.blocks', heads)
        model = MaskedAutoencoder(
            {'video': tokenizer}, SharedEncoder(size, compute), SharedDecoder(decoder, compute, projection_bias=False)
        )
        target = 'objective.terms.reconstruction.target.video'
        settings |= {
            'objective.mask_ratio.video': 0.9, 'objective.masking.video': 'tube', f'{target}.standardise': 'channel',
            f'{target}.convention': 'videomae', f'{target}.rgb_mean': IMAGENET_MEAN,
            f'{target}.rgb_std': IMAGENET_STD,
        }  # fmt: skip
        return Made(model, shapes, settings)
    mean = 'fc_norm.weight' in arrays
    classifier = Classifier(
        {'video': tokenizer},
        SharedEncoder(size, compute, final_norm=not mean),
        num_classes=torch_blocks.num_classes(arrays, 'head.bias'),
        pooling='mean' if mean else 'first',
        pooled_norm=mean,
    )
    return Made(classifier, shapes, settings, () if 'head.bias' in arrays else None)


def rows(model: MaskedAutoencoder | Classifier, shapes: Mapping[Modality, tuple[int, ...]]) -> list[Row]:
    """The table: their names -> ours, for the layout with layers one by one."""
    patch, size = model.tokenizers['video'].patch, model.encoder.size
    theirs = 'encoder.' if isinstance(model, MaskedAutoencoder) else ''
    table = [
        *torch_blocks.stem_rows(f'{theirs}patch_embed.proj', 'tokenizers_video/embedding', patch, 3, size.width),
        *torch_blocks.stack_rows(f'{theirs}blocks', 'encoder/shared', size, key_bias=False),
    ]
    if model.encoder.final_norm:
        table += norm_rows(f'{theirs}norm', 'encoder/shared/norm')
    if isinstance(model, Classifier):
        table += norm_rows('fc_norm', 'norm') if model.pooled_norm else []
        return table + linear_rows('head', f'head_{HEAD}')
    return [
        *table,
        *linear_rows('encoder_to_decoder', 'decoder/projection_video', bias=False),
        token_row('mask_token', 'decoder/filler_video/mask_token'),
        *torch_blocks.stack_rows('decoder.blocks', 'decoder/shared', model.decoder.size, key_bias=False),
        *norm_rows('decoder.norm', 'decoder/shared/norm'),
        *linear_rows('decoder.head', 'decoder/output_video'),
    ]


def read(path: epath.PathLike, compute: Compute, given: Given) -> Imported:
    """A model of video, for `weights/formats.py`."""
    return torch_blocks.read(path, compute, given, Source(build, rows))

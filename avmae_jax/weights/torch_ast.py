"""State dicts of AST (Gong et al. 2021, YuanGongND/ast) and of SSAST (Gong et al. 2022, YuanGongND/ssast).

Both are a DeiT over a spectrogram, with a class and a distillation token (an SSAST without distillation has the first
alone), whose patches overlap, and a head behind a norm. AST's scores are of the mean of the two tokens, those of a
finetuned SSAST of the mean over the patches, unless told otherwise. Tokens and patches have frequency before time there
and time first here: the table of positions and the stem change places, and nothing that is computed does.

A pretrained SSAST fills hidden places with a mask token before the encoder, which our autoencoders do not: its encoder
is read, whole, as a classifier whose head says nothing, and what it was pretrained with is listed as ignored. The heads
of ImageNet, which DeiT brings along and no model of sound uses, are ignored in all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from etils import epath

from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.encoders import SharedEncoder
from avmae_jax.models.tokenizers import AudioTokenizer
from avmae_jax.structs import Modality
from avmae_jax.weights import torch_blocks
from avmae_jax.weights.imported import HEAD, Imported
from avmae_jax.weights.scenic_avmae import row
from avmae_jax.weights.table import Arrays, Row, shape_of
from avmae_jax.weights.torch_blocks import NUM_HEADS, Given, Source
from avmae_jax.weights.torch_mae import SOUND_SETTINGS
from avmae_jax.weights.torch_rows import Made, frequency_first, linear_rows, norm_rows, token_row

POOLINGS = ('mean', 'token')
GIVEN = {
    'audio': 'time and mel bins it was trained on; 1024x128 without',
    'stride': 'from patch to patch, as 10 or 1x128, where several would explain the number of positions',
    'num_heads': NUM_HEADS,
}
SSAST_GIVEN = {**GIVEN, 'pooling': f'what a finetuned one scores, {" or ".join(POOLINGS)}; mean without'}
IMAGENET_HEADS = 'it is of ImageNet, and no model of sound uses it'
PRETEXT = 'it is of the task of SSAST, which hides tokens within the encoder, and not of the encoder'
IGNORED = (
    (r'v\.head(_dist)?\.', IMAGENET_HEADS),
    (r'(cpredlayer|gpredlayer)\.|mask_embed$|p_input_[ft]dim$', PRETEXT),
)


def grid_of(shape: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    return tuple((size - side) // step + 1 for size, side, step in zip(shape, patch, stride, strict=True))


def stride_of(
    places: int, shape: tuple[int, int], patch: tuple[int, int], given: Given, pretrained: bool
) -> tuple[int, int]:
    """The distance from patch to patch that gives so many places; those of a pretrained SSAST lie side by side."""
    if 'stride' in given:
        texts = given['stride']
        time, mel = torch_blocks.sizes({'stride': texts if 'x' in texts else f'{texts}x{texts}'}, 'stride', (10, 10))
        tried = [(time, mel)]
    else:
        # Of strides that cut the same grid, the largest.
        same = {grid_of(shape, patch, (step, step)): (step, step) for step in range(1, min(patch) + 1)}
        tried = [patch] if pretrained else list(dict.fromkeys([*same.values(), patch]))
    found = [stride for stride in tried if math.prod(grid_of(shape, patch, stride)) == places]
    if len(found) != 1 or min(grid_of(shape, patch, found[0])) < 1:
        raise ValueError(
            f'v.pos_embed has {places} places for {"x".join(map(str, shape))} bins in patches of {patch}, which '
            f'{"several strides explain" if found else "no stride explains"}: give --given=audio=TIMExMEL_BINS of what '
            'it was trained on, or --given=stride=10 (or, along time and frequency, 1x128).'
        )
    return found[0]


def build(arrays: Arrays, compute: Compute, given: Given, pooling: str) -> Made:
    _, channels, mels, frames = shape_of(arrays, 'v.patch_embed.proj.weight', 4)
    if channels != 1:
        raise ValueError(f'v.patch_embed.proj.weight takes {channels} channels, and a spectrogram has 1.')
    patch, distilled = (frames, mels), 'v.dist_token' in arrays
    places = shape_of(arrays, 'v.pos_embed', 3)[1] - 1 - distilled
    pretrained = all(f'p_input_{axis}dim' in arrays for axis in 'tf')
    told = {'audio': 'x'.join(str(arrays[f'p_input_{axis}dim']) for axis in 'tf')} if pretrained else given
    time, bins = torch_blocks.sizes(told, 'audio', (1024, 128))
    stride = stride_of(places, (time, bins), patch, given, pretrained)
    heads = torch_blocks.heads_of(arrays, 'v.blocks.0.norm1.weight', given, 'num_heads', torch_blocks.HEADS)
    tokenizer = AudioTokenizer(
        patch,
        'learned',
        class_token=True,
        class_position=True,
        distillation_token=distilled,
        stride=None if stride == patch else stride,
    )
    has_head = 'mlp_head.1.bias' in arrays
    model = Classifier(
        {'audio': tokenizer},
        SharedEncoder(torch_blocks.size_of(arrays, 'v.blocks', heads), compute),
        num_classes=torch_blocks.num_classes(arrays, 'mlp_head.1.bias'),
        pooling=pooling,
        pooled_norm=has_head,
        pooled_norm_epsilon=torch_blocks.TORCH_EPSILON if has_head else None,
    )
    settings = {'preprocess.num_spec_frames': time, 'preprocess.num_mel_bins': bins, **SOUND_SETTINGS}
    return Made(model, {'audio': (time, bins)}, settings, () if has_head else None)


def rows(model: Classifier, shapes: Mapping[Modality, tuple[int, ...]]) -> list[Row]:
    """The table: their names -> ours, for the layout with layers one by one."""
    tokenizer, size, ours = model.tokenizers['audio'], model.encoder.size, 'tokenizers_audio'
    positions = frequency_first(tokenizer.grid((1, *shapes['audio'])), tokenizer.num_in_front, size.width)
    table = [
        *torch_blocks.stem_rows(
            'v.patch_embed.proj', f'{ours}/embedding', tokenizer.patch, 1, size.width, frequency_first=True
        ),
        token_row('v.cls_token', f'{ours}/class_token'),
        row('v.pos_embed', f'{ours}/positions/table', positions),
        *torch_blocks.stack_rows('v.blocks', 'encoder/shared', size),
        *norm_rows('v.norm', 'encoder/shared/norm'),
        *linear_rows('mlp_head.1', f'head_{HEAD}'),
    ]
    if tokenizer.distillation_token:
        table.append(token_row('v.dist_token', f'{ours}/distillation_token'))
    return table + norm_rows('mlp_head.0', 'norm') if model.pooled_norm else table


def ignored(arrays: Arrays) -> dict[str, str]:
    return {name: reason for name in arrays for pattern, reason in IGNORED if re.match(pattern, name)}


def read_ast(path: epath.PathLike, compute: Compute, given: Given) -> Imported:
    """AST, for `weights/formats.py`."""
    return _read(path, compute, given, 'token')


def read_ssast(path: epath.PathLike, compute: Compute, given: Given) -> Imported:
    """SSAST, for `weights/formats.py`."""
    pooling = given.get('pooling', POOLINGS[0])
    if pooling not in POOLINGS:
        raise ValueError(f'--given=pooling={pooling} is none of {", ".join(POOLINGS)}.')
    return _read(path, compute, given, pooling)


def _read(path: epath.PathLike, compute: Compute, given: Given, pooling: str) -> Imported:
    def built(arrays: Arrays, compute: Compute, given: Given) -> Made:
        return build(arrays, compute, given, pooling)

    return torch_blocks.read(path, compute, given, Source(built, rows, ignored))

"""Weights of ViTs that were trained on images, in the .npz files of Google's `vision_transformer` and `big_vision`.

    vit = read('B_16.npz', Compute())
    scores = vit.model.apply({'params': vit.params}, {'image': images})      # images [b h w 3] in [-1, 1]

Such a ViT is our Classifier of images, name by name, so that another model can start from it. The dialects differ in
the numbers of their modules, in where the table of positions lies, and in whether the class token has a place in it;
each is first brought to Scenic's names, for which `weights/scenic_avmae.py` has the tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.encoders import SharedEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import ImageTokenizer
from avmae_jax.weights.files import checked, read_npz
from avmae_jax.weights.imported import HEAD, Imported, silent_head
from avmae_jax.weights.scenic_avmae import (
    VECTOR,
    dense_rows,
    load_rows,
    position_rows,
    row,
    stack_rows,
    stem_rows,
)
from avmae_jax.weights.table import Arrays, Row, as_float32, few, reshape, shape_of

# What stands before the names: in files of a model, of a training state, of an old one.
PREFIXES = ('', 'params/', 'opt/target/')
STEM = 'embedding/kernel'
POSITIONS = 'Transformer/posembed_input'
OTHER_POSITIONS = ('pos_embedding', 'Transformer/pos_embedding')
# Modules were once counted across kinds; and Scenic calls the head otherwise.
OTHER_NAMES = (
    (r'(Transformer/encoderblock_\d+)/MultiHeadDotProductAttention_1/', r'\1/MultiHeadDotProductAttention_0/'),
    (r'(Transformer/encoderblock_\d+)/LayerNorm_2/', r'\1/LayerNorm_1/'),
    (r'(Transformer/encoderblock_\d+)/MlpBlock_3/', r'\1/MlpBlock_0/'),
    (r'output_projection/', 'head/'),
)


class ViT(NamedTuple):
    """A ViT in our terms.

    Attributes:
      model: a Classifier of images with one head, 'label'.
      params: of the model.
      grid: tokens along height and width, of the images it was trained on.
    """

    model: Classifier
    params: dict[str, Any]
    grid: tuple[int, int]


def read(path: epath.PathLike, compute: Compute) -> ViT:
    """The ViT in an .npz file."""
    arrays = checked(path, read_npz(path))
    try:
        return load(arrays, compute)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def read_model(path: epath.PathLike, compute: Compute) -> Classifier:
    """The model alone, without a device."""
    arrays = checked(path, read_npz(path))
    try:
        return build_model(scenic_names(arrays), compute)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def read_imported(path: epath.PathLike, compute: Compute, given: Mapping[str, str]) -> Imported:
    """The same for `weights/formats.py`."""
    stored = checked(path, read_npz(path))
    try:
        arrays = scenic_names(stored)
        model, params, grid = load(stored, compute)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    patch, rows = model.tokenizers['image'].patch, vit_rows(model)
    classes: tuple[str, ...] | None = ()
    if not _has_head(stored):
        classes, arrays = None, {name: array for name, array in arrays.items() if not name.startswith('head/')}
        rows = [*(row for row in rows if not row.source[0].startswith('head/')), *silent_head(model)]
    shape = (grid[0] * patch[0], grid[1] * patch[1], 3)
    return Imported(model, params, {'image': shape}, rows, arrays, classes=classes)


def load(arrays: Mapping[str, np.ndarray], compute: Compute) -> ViT:
    """The ViT of such names and arrays; an error names what does not fit."""
    arrays = scenic_names(arrays)
    grid = grid_of(arrays)
    model = build_model(arrays, compute)
    patch = model.tokenizers['image'].patch
    image = jax.ShapeDtypeStruct((1, grid[0] * patch[0], grid[1] * patch[1], 3), jnp.float32)
    return ViT(model, load_rows(model, vit_rows(model), arrays, {'image': image}), grid)


def _has_head(arrays: Mapping[str, np.ndarray]) -> bool:
    return any(name.endswith(('head/kernel', 'output_projection/kernel')) for name in arrays)


def scenic_names(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The arrays of any dialect under Scenic's names, float32; with a place for the class token and with a head."""
    prefix = next((prefix for prefix in PREFIXES if prefix + STEM in arrays), None)
    if prefix is None:
        raise ValueError(f'a ViT has {STEM!r}, and here are {few(sorted(arrays))}.')
    named: Arrays = {}
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for name, array in as_float32(own).items():
        scanned = re.fullmatch(r'Transformer/encoderblock/(.+)', name)
        if scanned and array.ndim == 0:
            raise ValueError(f'{name} is one number, where those of all layers were due.')
        layers = [f'Transformer/encoderblock_{i}/{scanned[1]}' for i in range(len(array))] if scanned else [name]
        for layer, part in zip(layers, array if scanned else [array], strict=True):
            for theirs, ours in OTHER_NAMES:
                layer = re.sub(f'^{theirs}', ours, layer)
            named[layer] = part
    table = next((named.pop(name) for name in OTHER_POSITIONS if name in named), None)
    if table is not None:
        named[f'{POSITIONS}/pos_embedding'] = table
    table = named.get(f'{POSITIONS}/pos_embedding')
    if table is None:
        raise ValueError('its positions are not learned: there is no pos_embedding. Such ViTs are not read.')
    if 'cls' in named and _is_square(shape_of(named, f'{POSITIONS}/pos_embedding', 3)[1]):
        # The class token came in front after positions were added: the same as a position of zero.
        named[f'{POSITIONS}/pos_embedding'] = np.pad(table, ((0, 0), (1, 0), (0, 0)))
    if 'head/kernel' not in named:
        (features,) = shape_of(named, 'pre_logits/bias' if 'pre_logits/bias' in named else 'embedding/bias', 1)
        # Stored without a head: one that says nothing.
        named['head/kernel'], named['head/bias'] = np.zeros((features, 1), np.float32), np.zeros(1, np.float32)
    return named


def grid_of(arrays: Arrays) -> tuple[int, int]:
    """Tokens along height and width; ViTs are published for squares."""
    places = shape_of(arrays, f'{POSITIONS}/pos_embedding', 3)[1] - ('cls' in arrays)
    if not _is_square(places):
        raise ValueError(f'{POSITIONS}/pos_embedding has {places} places for patches, which is no square.')
    return (math.isqrt(places),) * 2


def build_model(arrays: Arrays, compute: Compute) -> Classifier:
    """The model that arrays under Scenic's names are of."""
    block = 'Transformer/encoderblock_0'
    needed = [STEM, f'{block}/MultiHeadDotProductAttention_0/query/kernel', f'{block}/MlpBlock_0/Dense_0/bias']
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(f'a ViT has {few(missing)}, and here are {few(sorted(arrays))}.')
    stem, query, hidden = (shape_of(arrays, name, axes) for name, axes in zip(needed, (4, 3, 1), strict=True))
    if stem[2] != 3:
        raise ValueError(f'{STEM} is {stem} and not of (height, width, 3, width): ViTs behind a ResNet are not read.')
    layers = {match[1] for match in map(re.compile(r'Transformer/encoderblock_(\d+)/').match, arrays) if match}
    has_token = 'cls' in arrays
    return Classifier(
        {'image': ImageTokenizer(stem[:2], 'learned', class_token=has_token, class_position=has_token)},
        SharedEncoder(Size(stem[3], query[1], hidden[0], len(layers)), compute),
        num_classes={HEAD: shape_of(arrays, 'head/kernel', 2)[1]},
        pooling='token' if has_token else 'mean',
        representation=shape_of(arrays, 'pre_logits/bias', 1)[0] if 'pre_logits/bias' in arrays else None,
    )


def vit_rows(model: Classifier) -> list[Row]:
    """The table for a model: Scenic's names -> ours, for the layout with layers one by one."""
    size, tokenizer = model.encoder.size, model.tokenizers['image']
    rows = [
        *stem_rows('embedding', 'tokenizers_image', tokenizer, size.width),
        *position_rows(tokenizer.positions, POSITIONS, 'tokenizers_image/positions', size.width),
        *stack_rows('Transformer', 'encoder/shared', size, final_norm=True),
        *dense_rows('head', f'head_{HEAD}'),
    ]
    if tokenizer.class_token:
        rows.append(row('cls', 'tokenizers_image/class_token', reshape(*VECTOR)))
    return rows + dense_rows('pre_logits', 'representation') if model.representation else rows


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number

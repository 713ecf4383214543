"""What projects in PyTorch have in common: the blocks of timm under its names, and how a state dict becomes a model.

Nothing in a state dict tells how many heads attention has: HEADS knows those of the published sizes by width, `given`
tells of others. LayerNorms of timm add 1e-6 to the variance, those of plain torch 1e-5; its GELU is the exact one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.sizes import Architecture, Size
from avmae_jax.structs import Modality
from avmae_jax.weights import files
from avmae_jax.weights.imported import HEAD, Imported, silent_head
from avmae_jax.weights.scenic_avmae import load_rows, row
from avmae_jax.weights.table import Arrays, Row, chain, few, join_columns, permute, reshape, shape_of
from avmae_jax.weights.torch_rows import Made, keyless, linear_rows, norm_rows

# Width -> heads of encoders: DeiT's and ViT's tiny to huge, and the giant of VideoMAE V2.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
TIMM_EPSILON, TORCH_EPSILON = 1e-6, 1e-5

# What may be told of a state dict, for `weights/formats.py`.
NUM_HEADS = 'attention heads of the encoder, where its width is not that of a published size'
DECODER_NUM_HEADS = 'the same of the decoder'
Given = Mapping[str, str]


class Source(NamedTuple):
    """A project whose state dicts are read.

    Attributes:
      build: (arrays, how to compute, what is given) -> our model.
      rows: (model, shapes) -> the table, their names -> ours.
      ignored: arrays -> name of each that no model of ours needs -> why.
    """

    build: Callable[[Arrays, Compute, Given], Made]
    rows: Callable[[Any, Mapping[Modality, tuple[int, ...]]], list[Row]]
    ignored: Callable[[Arrays], dict[str, str]] = lambda arrays: {}


def read(path: epath.PathLike, compute: Compute, given: Given, source: Source) -> Imported:
    """The model in a state dict, of torch or as safetensors; ValueError names the file and what is wrong."""
    arrays = files.read_arrays(path)
    try:
        made = source.build(arrays, compute, given)
        ignored = source.ignored(arrays)
        kept = {name: array for name, array in arrays.items() if name not in ignored}
        others = sorted(name for name, array in kept.items() if array.dtype != np.float32)
        if others:
            raise ValueError(f'{few(others)} are no arrays of float32, as parameters are.')
        rows = source.rows(made.model, made.shapes)
        if isinstance(made.model, Classifier) and made.classes is None:
            # That of a table for models that have one takes nothing here, and backwards would give a head.
            rows = [one for one in rows if not ''.join(one.target).startswith(f'head_{HEAD}/')] + silent_head(
                made.model
            )
        inputs = {m: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for m, shape in made.shapes.items()}
        params = load_rows(made.model, rows, kept, inputs)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return Imported(
        made.model, params, made.shapes, rows, kept, classes=made.classes, settings=made.settings, ignored=ignored
    )


# -- What the arrays say of the model --


def size_of(arrays: Arrays, blocks: str, num_heads: int, epsilon: float = TIMM_EPSILON) -> Size:
    """The size of a stack of blocks."""
    (width,) = shape_of(arrays, f'{blocks}.0.norm1.weight', 1)
    (mlp_width,) = shape_of(arrays, f'{blocks}.0.mlp.fc1.bias', 1)
    has_bias = any(f'{blocks}.0.attn.{name}' in arrays for name in ('qkv.bias', 'q_bias'))
    return Size(width, num_heads, mlp_width, num_layers(arrays, blocks), Architecture('exact', epsilon, has_bias))


def with_layers(size: Size, count: int) -> Size:
    """The same with another number of layers."""
    return dataclasses.replace(size, num_layers=count)


def num_layers(arrays: Arrays, blocks: str) -> int:
    numbers = {int(match[1]) for match in map(re.compile(rf'{re.escape(blocks)}\.(\d+)\.').match, arrays) if match}
    return len(numbers)


def heads_of(arrays: Arrays, norm: str, given: Given, name: str, table: Mapping[int, int]) -> int:
    """The heads that go with the width of a norm, or as many as are given."""
    (width,) = shape_of(arrays, norm, 1)
    if name in given:
        return number(given, name)
    if width not in table:
        raise ValueError(f'how many heads a width of {width} has is not known: give --given={name}=NUMBER.')
    return table[width]


def number(given: Given, name: str) -> int:
    if not given[name].isdecimal() or not 0 < int(given[name]) < 2**20:
        raise ValueError(f'--given={name}={given[name]} is no number above 0.')
    return int(given[name])


def sizes(given: Given, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """A shape like 16x224x224."""
    if name not in given:
        return default
    texts = given[name].split('x')
    if len(texts) != len(default) or not all(text.isdecimal() and 0 < int(text) < 2**20 for text in texts):
        raise ValueError(f'--given={name}={given[name]} is no shape like {"x".join(map(str, default))}.')
    return tuple(map(int, texts))


def num_classes(arrays: Arrays, bias: str) -> dict[str, int]:
    """Of the head; 1, of one that says nothing, where there is none."""
    return {HEAD: shape_of(arrays, bias, 1)[0] if bias in arrays else 1}


# -- Tables --


def block_rows(theirs: str, ours: str, size: Size, key_bias: bool = True) -> list[Row]:
    """One block of timm is one Block of ours; its columns come as (query | key | value, head, channel)."""
    width, heads, channels = size.width, size.num_heads, size.width // size.num_heads
    attention, qkv = f'{theirs}.attn', f'{ours}/attention/qkv'
    split = (3, heads, channels, width)
    rows = [
        *norm_rows(f'{theirs}.norm1', f'{ours}/attention_norm'),
        row(
            f'{attention}.qkv.weight',
            f'{qkv}/kernel',
            chain(reshape((3 * width, width), split), permute(split, (3, 1, 0, 2), (width, -1))),
        ),
        *linear_rows(f'{attention}.proj', f'{ours}/attention/out'),
        *norm_rows(f'{theirs}.norm2', f'{ours}/mlp_norm'),
        *linear_rows(f'{theirs}.mlp.fc1', f'{ours}/mlp/up'),
        *linear_rows(f'{theirs}.mlp.fc2', f'{ours}/mlp/down'),
    ]
    if not size.architecture.qkv_bias:
        return rows
    if key_bias:
        whole = chain(reshape((3 * width,), split[:3]), permute(split[:3], (1, 0, 2), (-1,)))
        return [*rows, row(f'{attention}.qkv.bias', f'{qkv}/bias', whole)]
    joined = chain(keyless(), reshape((width,), split[1:3]), join_columns(split[1:3], (-1,)))
    return [*rows, Row((f'{attention}.q_bias', f'{attention}.v_bias'), (f'{qkv}/bias',), joined)]


def stack_rows(theirs: str, ours: str, size: Size, key_bias: bool = True) -> list[Row]:
    return block_rows(theirs + '.{layer}', ours + '/layer_{layer}', size, key_bias)


def stem_rows(
    theirs: str, ours: str, patch: Sequence[int], channels: int, width: int, frequency_first: bool = False
) -> list[Row]:
    """Their convolution [width, colours, *patch] is our product with a patch, colours last.

    Args:
      frequency_first: theirs is of spectrograms that have frequency before time.
    """
    axes = list(range(2, 2 + len(patch)))
    if frequency_first:
        patch, axes = patch[::-1], axes[::-1]
    kernel = permute((width, channels, *patch), (*axes, 1, 0), (-1, width))
    return [row(f'{theirs}.weight', f'{ours}/kernel', kernel), row(f'{theirs}.bias', f'{ours}/bias')]

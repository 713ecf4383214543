"""How large a model may be that is made of given arrays: asked before memory or time is spent on one of that size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from avmae_jax.structs import Modality

MAX_TOKENS = 2**17  # Of a row; a video of 16 x 224 x 224 has 1,568.
MAX_AXIS = 2**20  # Of a row.


def check(model: Any, arrays: Mapping[str, np.ndarray], shapes: Mapping[Modality, tuple[int, ...]]) -> None:
    """Refuses a model that cannot be of these arrays, and rows of more tokens than a table of positions is made for.

    Every layer has kernels [width, width] and [width, mlp_width] that lie whole in some array, and every layer has an
    array of its own: what is larger than that a config says and no file holds.

    Args:
      model: an autoencoder or a classifier.
      arrays: by name, in anybody's layout.
      shapes: modality -> shape of one row.
    """
    largest = max((array.size for array in arrays.values()), default=0)
    for part in ('encoder', 'decoder'):
        if not hasattr(model, part):
            continue
        size = getattr(model, part).size
        limits = {
            'width': math.isqrt(largest),
            'num_heads': size.width,
            'mlp_width': largest // max(1, size.width),
            'num_layers': len(arrays),
        }
        for name, limit in limits.items():
            if not 0 < getattr(size, name) <= limit:
                raise ValueError(
                    f'{part}.size.{name} would be {getattr(size, name)}, and of these arrays it is at most {limit}.'
                )
    for modality, shape in shapes.items():
        tokenizer = model.tokenizers[modality]
        if not all(side > 0 for side in (*tokenizer.patch, *(tokenizer.stride or ()))):
            raise ValueError(f'patches of {modality} would be {tokenizer.patch}, {tokenizer.stride} apart.')
        if not all(0 < size < MAX_AXIS for size in shape):
            raise ValueError(f'{modality} would be of shape {shape}, and sizes are from 1 to {MAX_AXIS - 1}.')
        tokens = math.prod(tokenizer.grid((1, *shape)))
        if not 0 < tokens <= MAX_TOKENS:
            raise ValueError(
                f'{modality} of shape {shape} has {tokens} tokens in patches of {tokenizer.patch}, and from 1 to '
                f'{MAX_TOKENS} are read.'
            )

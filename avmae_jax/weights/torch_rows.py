"""What models of PyTorch have in common, whoever publishes them: rows of tables, positions, what a reader makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.classifier import Classifier
from avmae_jax.ops import positions
from avmae_jax.structs import Modality
from avmae_jax.weights.scenic_avmae import VECTOR, row
from avmae_jax.weights.table import Arrays, Row, Transform, constant, of_shape, reshape, shape_of, transpose

# Their own defaults, of `torch.nn.LayerNorm` and of VideoMAE's loss.
TORCH_EPSILON = 1e-5
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Made(NamedTuple):
    """What config.json and the names of arrays make; the attributes are those of `Imported`."""

    model: MaskedAutoencoder | Classifier
    shapes: dict[Modality, tuple[int, ...]]
    settings: dict[str, Any]
    classes: tuple[str, ...] | None = None


def crop(modality: Modality, height: int, width: int) -> dict[str, Any]:
    """The size of pictures, if a config can tell it: ours are square."""
    return {f'{modality}.crop_size': height} if height == width else {}


def is_fixed(arrays: Arrays, name: str, table: np.ndarray) -> bool:
    """Whether a stored table of positions, class token in front, is the fixed one, with nothing for the token."""
    wanted = np.concatenate([np.zeros_like(table[:1]), table])[None]
    return shape_of(arrays, name, 3) == wanted.shape and np.allclose(arrays[name], wanted, rtol=0, atol=1e-5)


def fixed_2d(grid: Sequence[int], width: int) -> np.ndarray:
    """The fixed table of the image MAE; nothing like it where the width has no such table."""
    return np.full((1, 1), np.nan, np.float32) if width % 4 else positions.sincos_grid(grid, width)


def norm_rows(theirs: str, ours: str) -> list[Row]:
    return [row(f'{theirs}.weight', f'{ours}/scale'), row(f'{theirs}.bias', f'{ours}/bias')]


def linear_rows(theirs: str, ours: str, bias: bool = True) -> list[Row]:
    rows = [row(f'{theirs}.weight', f'{ours}/kernel', transpose())]
    return [*rows, row(f'{theirs}.bias', f'{ours}/bias')] if bias else rows


def keyless() -> Transform:
    """Biases of queries and values, between which one of zero comes for keys; backwards that of keys is dropped."""
    return Transform(lambda arrays: [arrays[0], 0 * arrays[0], arrays[1]], lambda arrays: [arrays[0], arrays[2]])


def position_rows(theirs: str, ours: str, kind: str, grid: Sequence[int], width: int) -> list[Row]:
    """A table with the class token in front; the fixed ones of the image MAE have zeros for it."""
    if kind == 'learned':
        return [row(theirs, ours, reshape((1, -1, width), (-1, width)))]
    table = fixed_2d(grid, width)
    return [Row((theirs,), (), constant(np.concatenate([np.zeros_like(table[:1]), table])[None]))]


def frequency_first(grid: Sequence[int], in_front: int, width: int) -> Transform:
    """AST's table, whose places run over frequency first, as ours, which run over time first."""
    time, frequency = grid

    def forward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        table = of_shape(arrays[0], (1, in_front + time * frequency, width))[0]
        places = table[in_front:].reshape(frequency, time, width).swapaxes(0, 1)
        return [np.concatenate([table[:in_front], places.reshape(-1, width)])]

    def backward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        places = of_shape(arrays[0], (-1, width))[in_front:].reshape(time, frequency, width).swapaxes(0, 1)
        return [np.concatenate([arrays[0][:in_front], places.reshape(-1, width)])[None]]

    return Transform(forward, backward)


def token_row(theirs: str, ours: str) -> Row:
    return row(theirs, ours, reshape(*VECTOR))

"""Start a model from the parameters of another: an autoencoder with any of the four encoders, or an MBT.

Everything is a question of names, so one table of rules serves all: for a name of the new model, the names in the
other one that it may come from. The first that is there is taken.

    separate   stream by stream; its norms, one for each stream, fit nowhere in an MBT
    mid        as separate up to its joint layers; these go into every stream, and the joint norm is the MBT's
    early      the same layers into every stream, and the norm
    shared     the same
    MBT        name by name, bottlenecks included; heads only when asked for

Streams that share their weights start from the first modality's (video before audio) where the other model has one for
each. Decoders fit nowhere. The numbers of layers may differ: what has nothing to come from keeps its initialisation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from avmae_jax.models.blocks import stack_layers, unstack_layers
from avmae_jax.ops import positions
from avmae_jax.structs import JOINT_ORDER, Array, Modality

TAKEN, RESIZED, KEPT, LEFT_OVER = 'taken', 'resized', 'kept at initialisation', 'left over'

Shape = tuple[int, ...]
Grids = Mapping[Modality, Sequence[int]]


class Row(NamedTuple):
    """What became of one parameter.

    Attributes:
      fate: TAKEN, RESIZED, KEPT or LEFT_OVER.
      name: of the parameter in the new model; '' for one of the other model that was left over.
      source: where it came from in the other model; '' for one that kept its initialisation.
    """

    fate: str
    name: str
    shape: Shape | None
    source: str
    source_shape: Shape | None


class Report(NamedTuple):
    """What became of every parameter of both models; prints as a table."""

    rows: list[Row]

    def names(self, fate: str) -> list[str]:
        return [row.name or row.source for row in self.rows if row.fate == fate]

    def __str__(self) -> str:
        """Layers that shared a fate are one line."""
        merged: dict[tuple[str, str, str, str, str], list[int]] = {}
        for row in self.rows:
            key = (
                row.fate,
                re.sub(r'layer_\d+', 'layer_*', row.name) or '-',
                str(row.shape or ''),
                re.sub(r'layer_\d+', 'layer_*', row.source) or '-',
                str(row.source_shape or '') if row.source_shape != row.shape else '',
            )
            number = re.search(r'layer_(\d+)', row.name or row.source)
            merged.setdefault(key, []).append(int(number[1]) if number else -1)
        lines = [('fate', 'layers', 'parameter', 'shape', 'from', 'of shape')]
        for (fate, name, shape, source, source_shape), layers in merged.items():
            lines.append((fate, _ranges(layers), name, shape, source, source_shape))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        table = ['  '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        counts = ', '.join(f'{len(self.names(fate))} {fate}' for fate in (TAKEN, RESIZED, KEPT, LEFT_OVER))
        return '\n'.join([*table, f'Parameters: {counts}.'])


def _ranges(numbers: Sequence[int]) -> str:
    """'0-11' for layers 0 to 11; '' where there are none."""
    numbers = sorted({number for number in numbers if number >= 0})
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ', '.join(f'{part[0]}-{part[-1]}' if len(part) > 1 else str(part[0]) for part in parts)


def transfer(
    params: Mapping[str, Any],
    source: Mapping[str, Any],
    *,
    grids: Grids | None = None,
    source_grids: Grids | None = None,
    heads: bool = False,
    divide_stem: bool = True,
) -> tuple[dict[str, Any], Report]:
    """Parameters of a fresh model with all that another model has for it; layers may be scanned in either.

    Args:
      params: of the new model, as it was initialised.
      source: of the other model.
      grids: tokens along each axis, by modality, of the new model; needed where learned positions change in number.
      source_grids: those of the other model.
      heads: take the heads too, from another classifier of the same classes.
      divide_stem: a stem of one channel that becomes one of several is divided by their number, so that a spectrogram
        that is repeated gives the tokens it gave. False repeats it as it is, as the public reference does.
    """
    scanned = _is_scanned(params)
    ours = _flatten(unstack_layers(_plain(params)))
    theirs = _flatten(unstack_layers(_plain(source)))
    used, rows, result = set(), [], {}
    for name, array in ours.items():
        found = next((other for other in origins(name, theirs, heads) if other in theirs), None)
        if found is None:
            result[name] = array
            rows.append(Row(KEPT, name, array.shape, '', None))
            continue
        given = np.asarray(theirs[found])
        fitted = _fit(name, given, array, grids or {}, source_grids or {}, divide_stem)
        result[name] = jnp.asarray(fitted, array.dtype)
        used.add(found)
        rows.append(Row(TAKEN if fitted is given else RESIZED, name, array.shape, found, given.shape))
    rows += [Row(LEFT_OVER, '', None, name, theirs[name].shape) for name in theirs if name not in used]
    if not used:
        raise ValueError(
            'Nothing of the start fits the model: '
            f'it has {_few(theirs)}, and the model {_few(ours)}. Is it the checkpoint that was meant?'
        )
    tree = traverse_util.unflatten_dict(result, sep='/')
    return stack_layers(tree) if scanned else tree, Report(rows)


def origins(name: str, theirs: Mapping[str, Any], heads: bool = False) -> list[str]:
    """The names in the other model that a parameter may come from, best first; the rules of this file."""
    if name.startswith('head_') and not heads:
        return []
    found = [name]
    streams = [m for m in JOINT_ORDER if any(other.startswith(f'encoder/{m}/layer_') for other in theirs)]
    match = re.fullmatch(rf'encoder/({"|".join([*JOINT_ORDER, "shared"])})/layer_(\d+)/(.+)', name)
    if match:
        stream, layer, rest = match[1], int(match[2]), match[3]
        if stream == 'shared':
            found += [f'encoder/{m}/layer_{layer}/{rest}' for m in streams[:1]]
        found.append(f'encoder/shared/layer_{layer}/{rest}')
        # The joint layers of `mid` count after those of its streams; `early` has no streams.
        found.append(f'encoder/joint/layer_{layer - _depth(theirs, streams)}/{rest}')
    match = re.fullmatch(r'encoder/norm/(.+)', name)
    if match:
        found += [f'encoder/{part}/norm/{match[1]}' for part in ('joint', 'shared')]
    return found


def _depth(theirs: Mapping[str, Any], streams: Sequence[Modality]) -> int:
    """How many layers the streams of a model have."""
    pattern = re.compile(rf'encoder/(?:{"|".join(streams)})/layer_(\d+)/' if streams else r'(?!)')
    return 1 + max((int(match[1]) for match in map(pattern.match, theirs) if match), default=-1)


def _fit(
    name: str, given: np.ndarray, wanted: Array, grids: Grids, source_grids: Grids, divide_stem: bool
) -> np.ndarray:
    """An array of the other model in the shape of the new one; the array itself where nothing is to be changed."""
    match = re.fullmatch(r'tokenizers_([a-z]+)/positions/(table|time|space)', name)
    if match and given.shape[1:] == wanted.shape[1:]:
        grid, source_grid = grids.get(match[1]), source_grids.get(match[1])
        # Grids may differ although they have as many places.
        if given.shape != wanted.shape or (grid and source_grid and tuple(grid) != tuple(source_grid)):
            return _resize(name, match[2], given, wanted, grid, source_grid)
    if given.shape == wanted.shape:
        return given
    if name == 'tokenizers_audio/embedding/kernel' and wanted.shape == (3 * given.shape[0], *given.shape[1:]):
        return np.repeat(given / 3 if divide_stem else given, 3, axis=0)
    raise ValueError(
        f'{name} is {given.shape} in the start and {wanted.shape} in the model: config.model must have the sizes '
        '(width, mlp_width, patch) of what it starts from.'
    )


def _resize(
    name: str,
    part: str,
    given: np.ndarray,
    wanted: Array,
    grid: Sequence[int] | None,
    source_grid: Sequence[int] | None,
) -> np.ndarray:
    """A learned table on the grid of the new model. A class token in front of the grid stays as it is."""
    if grid is None or source_grid is None:
        raise ValueError(f'{name} is {given.shape} in the start and {wanted.shape} in the model: resizing needs grids.')
    axes = {'table': slice(None), 'time': slice(1), 'space': slice(1, None)}[part]
    old, new = tuple(source_grid)[axes], tuple(grid)[axes]
    in_front, wanted_in_front = len(given) - math.prod(old), len(wanted) - math.prod(new)
    if in_front not in (0, 1) or wanted_in_front not in (0, 1):
        raise ValueError(f'{name} is {given.shape} in the start, which does not fit its grid {old}.')
    # A class token that had no position before keeps the one it was initialised with.
    first = given[:1] if in_front else wanted[:1]
    resized = positions.resize_table(given[in_front:], old, new)
    return np.concatenate([first, resized]) if wanted_in_front else resized


def _plain(tree: Any) -> Any:
    return {name: _plain(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep='/')


def _is_scanned(tree: Any) -> bool:
    return isinstance(tree, Mapping) and ('layers' in tree or any(_is_scanned(value) for value in tree.values()))


def _few(names: Mapping[str, Any]) -> str:
    parts = sorted({'/'.join(name.split('/')[:2]) for name in names})
    return ', '.join(parts[:8]) + (', ...' if len(parts) > 8 else '')

"""Start a model from another's parameters: an autoencoder with any of the four encoders, an MBT, a model of images.

Everything is a question of names, so one table of rules serves all: for a name of the new model, the names in the
other one that it may come from. The first that is there is taken.

    separate   stream by stream; its norms, one for each stream, fit nowhere in an MBT
    mid        as separate up to its joint layers; these go into every stream, and the joint norm is the MBT's
    early      the same layers into every stream, and the norm
    shared     the same
    MBT        name by name, bottlenecks included; heads only when asked for
    images     a ViT (`weights/vit.py`) or an image MAE: its layers into every stream, and the norm behind the last
               one; its tokenizer into those of video and sound, which it lacks

From patches of a picture to tubelets and to patches of a spectrogram:

    stem       video: the frame in the middle of a tubelet, or the mean over its frames (INFLATIONS); sound: the mean
               over the colours, or as it is where the spectrogram is repeated as three
    positions  resized on the grid, time in place of height for sound; for video the same at every moment
    class      into each modality's, together with its position where that of the new model has none

Streams that share their weights start from the first modality's (video before audio) where the other model has one for
each. Decoders fit nowhere. The numbers of layers may differ: what has nothing to come from keeps its initialisation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from avmae_jax.models.blocks import stack_layers, unstack_layers
from avmae_jax.models.tokenizers import Tokenizer
from avmae_jax.ops import positions
from avmae_jax.structs import JOINT_ORDER, Array, Modality

TAKEN, RESIZED, INFLATED, MERGED = 'taken', 'resized', 'inflated', 'merged with its position'
KEPT, LEFT_OVER = 'kept at initialisation', 'left over'
FATES = (TAKEN, RESIZED, INFLATED, MERGED, KEPT, LEFT_OVER)

Shape = tuple[int, ...]
Grids = Mapping[Modality, Sequence[int]]
Tokenizers = Mapping[Modality, Tokenizer]


def central(kernel: Float[np.ndarray, 'v d'], frames: int) -> Float[np.ndarray, '_w d']:
    """Only the frame in the middle of a tubelet counts; as Scenic counts, the later one of two."""
    inflated = np.zeros((frames, *kernel.shape), kernel.dtype)
    inflated[frames // 2] = kernel
    return inflated.reshape(-1, kernel.shape[-1])


def average(kernel: Float[np.ndarray, 'v d'], frames: int) -> Float[np.ndarray, '_w d']:
    """All frames of a tubelet count alike (I3D's inflation, Carreira and Zisserman 2017)."""
    return np.tile(kernel / frames, (frames, 1))


IN_FRONT = ('/class_token', '/distillation_token')  # In the order of their positions.

# How the stem of an image model becomes one of tubelets: (kernel, frames of a tubelet) -> kernel.
INFLATIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {'central': central, 'average': average}


class Row(NamedTuple):
    """What became of one parameter.

    Attributes:
      fate: one of FATES.
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
        counts = ', '.join(f'{len(self.names(fate))} {fate}' for fate in FATES)
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


class Setting(NamedTuple):
    """What parameters do not tell of the two models, and how they are to be fitted; see `transfer`."""

    tokenizers: Tokenizers
    source_tokenizers: Tokenizers
    grids: Grids
    source_grids: Grids
    divide_stem: bool
    inflation: str


def transfer(
    params: Mapping[str, Any],
    source: Mapping[str, Any],
    *,
    grids: Grids | None = None,
    source_grids: Grids | None = None,
    tokenizers: Tokenizers | None = None,
    source_tokenizers: Tokenizers | None = None,
    heads: bool = False,
    divide_stem: bool = True,
    inflation: str = 'central',
) -> tuple[dict[str, Any], Report]:
    """Parameters of a fresh model with all that another model has for it; layers may be scanned in either.

    Args:
      params: of the new model, as it was initialised.
      source: of the other model.
      grids: tokens along each axis, by modality, of the new model; needed where learned positions change in number.
      source_grids: those of the other model.
      tokenizers: of the new model; needed where the other one is of images. Where those of both are known, stems of
        other patches are refused even if they have as many values.
      source_tokenizers: those of the other model.
      heads: take the heads too, from another classifier of the same classes.
      divide_stem: a stem of one channel that becomes one of several is divided by their number, so that a spectrogram
        that is repeated gives the tokens it gave. False repeats it as it is, as the public reference does.
      inflation: key of INFLATIONS, for a video that starts from images.
    """
    if inflation not in INFLATIONS:
        raise ValueError(f'inflation must be one of {tuple(INFLATIONS)}; got {inflation!r}.')
    setting = Setting(
        tokenizers or {}, source_tokenizers or {}, grids or {}, source_grids or {}, divide_stem, inflation
    )
    scanned = _is_scanned(params)
    ours = _flatten(unstack_layers(_plain(params)))
    theirs = _flatten(unstack_layers(_plain(source)))
    used, rows, result = set(), [], {}
    for name, array in ours.items():
        found = next((other for other in origins(name, ours, theirs, heads) if other in theirs), None)
        if found is None:
            result[name] = array
            rows.append(Row(KEPT, name, array.shape, '', None))
            continue
        given = np.asarray(theirs[found])
        fitted, fate = _fit(name, found, given, array, setting)
        position = _lost_position(name, found, setting)
        if position in theirs:
            place = [found.endswith(token) for token in IN_FRONT].index(True)
            fitted, fate = fitted + np.asarray(theirs[position])[place], MERGED
            used.add(position)
        result[name] = jnp.asarray(fitted, array.dtype)
        used.add(found)
        rows.append(Row(fate, name, array.shape, found, given.shape))
    rows += [Row(LEFT_OVER, '', None, name, theirs[name].shape) for name in theirs if name not in used]
    if not used:
        raise ValueError(
            'Nothing of the start fits the model: '
            f'it has {_few(theirs)}, and the model {_few(ours)}. Is it the checkpoint that was meant?'
        )
    tree = traverse_util.unflatten_dict(result, sep='/')
    return stack_layers(tree) if scanned else tree, Report(rows)


def origins(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], heads: bool = False) -> list[str]:
    """The names in the other model that a parameter may come from, best first; the rules of this file."""
    if name.startswith('head_') and not heads:
        return []
    if match := re.fullmatch(r'tokenizers_([a-z]+)/(.+)', name):
        return [name, *_image_origins(match[1], match[2], theirs)]
    if match := re.fullmatch(r'encoder/([a-z]+)/layer_(\d+)/(.+)', name):
        return [f'{layer}/{match[3]}' for layer in _layer_origins(match[1], int(match[2]), ours, theirs)]
    if match := re.fullmatch(r'(encoder(?:/[a-z]+)?/norm)/(.+)', name):
        return [f'{norm}/{match[2]}' for norm in _norm_origins(match[1], ours, theirs)]
    return [name]


def _image_origins(modality: Modality, part: str, theirs: Mapping[str, Any]) -> list[str]:
    """The part of an image model's tokenizer that one of another modality starts from, unless it has that modality."""
    if any(other.startswith(f'tokenizers_{modality}/') for other in theirs):
        return []
    parts = {name: name for name in ('embedding/kernel', 'embedding/bias', 'class_token', 'positions/table')}
    if modality == 'video':
        parts.update(dict.fromkeys(('positions/space', 'positions/time'), 'positions/table'))
    return [f'tokenizers_image/{parts[part]}'] if part in parts else []


def _layer_origins(part: str, layer: int, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The layers that one of ours may come from, by their number among all that a token goes through."""
    streams, depth = _streams(theirs), _depth(theirs)
    if part == 'joint':
        # The joint layers of `mid` count after those of its streams; `early` has no streams.
        layer += _depth(ours)
        found = []
    else:
        found = [f'encoder/{part}/layer_{layer}']
    if part == 'shared':
        found += [f'encoder/{m}/layer_{layer}' for m in streams[:1]]
    found += [f'encoder/shared/layer_{layer}', f'encoder/joint/layer_{layer - depth}']
    return found + [f'encoder/{m}/layer_{layer}' for m in streams if streams == ['image']]


def _norm_origins(norm: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The norms that one of ours may come from: those behind the last layer are each other's."""
    of_stream = norm.removeprefix('encoder/').removesuffix('/norm') in JOINT_ORDER
    if of_stream and _has_joint(ours):
        return [norm]
    last = ['encoder/norm', 'encoder/joint/norm', 'encoder/shared/norm']
    if _streams(theirs) == ['image'] and not _has_joint(theirs):
        last.append('encoder/image/norm')
    return last if of_stream and _has_joint(theirs) else [norm, *last]


def _streams(names: Mapping[str, Any]) -> list[Modality]:
    """The modalities that have layers of their own."""
    return [m for m in JOINT_ORDER if any(name.startswith(f'encoder/{m}/layer_') for name in names)]


def _depth(names: Mapping[str, Any]) -> int:
    """How many layers the streams of a model have."""
    pattern = re.compile(rf'encoder/(?:{"|".join(JOINT_ORDER)})/layer_(\d+)/')
    return 1 + max((int(match[1]) for match in map(pattern.match, names) if match), default=-1)


def _has_joint(names: Mapping[str, Any]) -> bool:
    return any(name.startswith('encoder/joint/') for name in names)


def _fit(name: str, found: str, given: np.ndarray, wanted: Array, setting: Setting) -> tuple[np.ndarray, str]:
    """An array of the other model in the shape of the new one, and its fate."""
    modality, source = (text.split('/')[0].removeprefix('tokenizers_') for text in (name, found))
    if name.endswith('/embedding/kernel'):
        _check_patches(modality, source, setting)
    match = re.fullmatch(r'tokenizers_[a-z]+/positions/(table|time|space)', name)
    if match and given.shape[1:] == wanted.shape[1:]:
        return _fit_positions(name, match[1], modality, source, given, wanted, setting)
    if given.shape == wanted.shape:
        return given, TAKEN
    if name == 'tokenizers_audio/embedding/kernel' and wanted.shape == (3 * given.shape[0], *given.shape[1:]):
        return np.repeat(given / 3 if setting.divide_stem else given, 3, axis=0), RESIZED
    if (modality, source) == ('audio', 'image') and given.shape == (3 * wanted.shape[0], *wanted.shape[1:]):
        return given.reshape(-1, 3, given.shape[-1]).mean(axis=1), INFLATED
    if (modality, source) == ('video', 'image') and given.shape[1:] == wanted.shape[1:]:
        return INFLATIONS[setting.inflation](given, setting.tokenizers['video'].patch[0]), INFLATED
    raise ValueError(
        f'{name} is {given.shape} in the start and {wanted.shape} in the model: config.model must have the sizes '
        '(width, mlp_width, patch) of what it starts from.'
    )


def _check_patches(modality: Modality, source: Modality, setting: Setting) -> None:
    """Stems fit where their patches do; that they have as many values is not enough."""
    ours, theirs = setting.tokenizers.get(modality), setting.source_tokenizers.get(source)
    if ours is None or theirs is None:
        if modality != source:
            raise ValueError(
                f'The start is of images: for a stem of {modality} it needs the tokenizers of both models.'
            )
        return
    # Frames are no part of a picture's patch.
    axes = slice(None) if modality == source else slice(-2, None)
    if tuple(ours.patch[axes]) != tuple(theirs.patch):
        wanted = (*ours.patch[: len(ours.patch) - len(theirs.patch)], *theirs.patch)
        raise ValueError(
            f'config.model.tokenizers.{modality}.patch={tuple(ours.patch)} and the start was trained with patches of '
            f'{tuple(theirs.patch)}: it fits patch={wanted}.'
        )


def _lost_position(name: str, found: str, setting: Setting) -> str:
    """The table whose first place is to be added to a class token that has a position in the other model alone."""
    modality, source = (text.split('/')[0].removeprefix('tokenizers_') for text in (name, found))
    ours, theirs = setting.tokenizers.get(modality), setting.source_tokenizers.get(source)
    if not name.endswith(IN_FRONT) or ours is None or theirs is None:
        return ''
    return f'tokenizers_{source}/positions/table' if theirs.class_position and not ours.class_position else ''


def _fit_positions(
    name: str, part: str, modality: Modality, source: Modality, given: np.ndarray, wanted: Array, setting: Setting
) -> tuple[np.ndarray, str]:
    """A learned table on the grid of the new model. A class token in front of the grid stays as it is."""
    grid, source_grid = setting.grids.get(modality), setting.source_grids.get(source)
    fate = RESIZED
    if modality == 'video' and source == 'image':
        if part == 'time':  # A picture looks the same at every moment.
            return np.zeros(wanted.shape, given.dtype), INFLATED
        source_grid = None if source_grid is None else (1, *source_grid)
        fate = INFLATED
    if grid is None or source_grid is None:
        if given.shape == wanted.shape:
            return given, TAKEN
        raise ValueError(f'{name} is {given.shape} in the start and {wanted.shape} in the model: resizing needs grids.')
    axes = {'table': slice(None), 'time': slice(1), 'space': slice(1, None)}[part]
    old, new = tuple(source_grid)[axes], tuple(grid)[axes]
    # Grids may differ although they have as many places.
    if given.shape == wanted.shape and old == new:
        return given, TAKEN
    in_front, wanted_in_front = len(given) - math.prod(old), len(wanted) - math.prod(new)
    if not 0 <= min(in_front, wanted_in_front) <= max(in_front, wanted_in_front) <= len(IN_FRONT):
        raise ValueError(f'{name} is {given.shape} in the start, which does not fit its grid {old}.')
    # A class token that had no position before keeps the one it was initialised with.
    first = np.concatenate([given[:in_front], wanted[in_front:wanted_in_front]])[:wanted_in_front]
    resized = positions.resize_table(given[in_front:], old, new)
    return np.concatenate([first, resized]), fate


def _plain(tree: Any) -> Any:
    return {name: _plain(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep='/')


def _is_scanned(tree: Any) -> bool:
    return isinstance(tree, Mapping) and ('layers' in tree or any(_is_scanned(value) for value in tree.values()))


def _few(names: Mapping[str, Any]) -> str:
    parts = sorted({'/'.join(name.split('/')[:2]) for name in names})
    return ', '.join(parts[:8]) + (', ...' if len(parts) > 8 else '')

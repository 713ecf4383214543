"""What a reader of somebody else's weights hands over: a model of ours, its parameters, and where they came from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.structs import Modality
from avmae_jax.weights.table import Arrays, Row, Transform, flatten, layers_of

HEAD = 'label'  # Of every classifier that is read.

# What becomes of an array of theirs.
TAKEN, RESHAPED, FIXED, IGNORED, MADE = 'taken', 'reshaped', 'fixed', 'ignored', 'made'
FATES = (TAKEN, RESHAPED, FIXED, IGNORED, MADE)


class Imported(NamedTuple):
    """A model of somebody else in our terms.

    Attributes:
      model: an autoencoder or a classifier, with one head 'label'.
      params: of the model.
      shapes: modality -> shape of one row as the model was trained on it, without the batch dimension.
      rows: the table that made `params`: their names -> ours, for the layout with layers one by one.
      arrays: theirs, as the table took them.
      classes: names of the head's classes in their order; () where only their number is known, None for a model that
        came without a head and has got one that says nothing.
      settings: 'section.name' of a config -> what the source says of it besides the model: how pixels and sound were
        normalised, the size of pictures, what was hidden in pretraining.
      ignored: arrays of theirs that no model of ours needs -> why.
    """

    model: MaskedAutoencoder | Classifier
    params: dict[str, Any]
    shapes: dict[Modality, tuple[int, ...]]
    rows: Sequence[Row]
    arrays: Arrays
    classes: Sequence[str] | None = None
    settings: Mapping[str, Any] = {}
    ignored: Mapping[str, str] = {}


class Format(NamedTuple):
    """A way in which weights are published.

    Attributes:
      about: one line for people who choose.
      read: (file or folder, how the model is to be computed, what the file does not say by name) -> the model. Raises
        ValueError that names the file and what is wrong.
      given: name -> what it means, of what the file may need told.
    """

    about: str
    read: Callable[[epath.Path, Compute, Mapping[str, str]], Imported]
    given: Mapping[str, str] = {}


class Fate(NamedTuple):
    """What became of one array, or of several that are one of ours."""

    fate: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...] | None
    ours: tuple[str, ...]
    our_shape: tuple[int, ...] | None


def fates(imported: Imported) -> list[Fate]:
    """What became of every array of theirs, and what of ours came from none."""
    shapes = {name: leaf.shape for name, leaf in flatten(one_by_one(imported.params)).items()}
    found, filled = [], set()
    for row in imported.rows:
        for layer in layers_of(row.source[0], imported.arrays) if row.source else ['']:
            theirs = tuple(name.format(layer=layer) for name in row.source)
            ours = tuple(name.format(layer=layer) for name in row.target)
            filled |= set(ours)
            shape = imported.arrays[theirs[0]].shape if theirs else None
            our_shape = tuple(shapes[ours[0]]) if ours else None
            same = shape == our_shape and len(theirs) == 1
            fate = FIXED if not ours else MADE if not theirs else TAKEN if same else RESHAPED
            found.append(Fate(fate, theirs, shape, ours, our_shape))
    found += [Fate(IGNORED, (name,), None, (), None) for name in imported.ignored]
    return found + [Fate(MADE, (), None, (name,), tuple(shapes[name])) for name in shapes if name not in filled]


def silent_head(model: Classifier) -> list[Row]:
    """The head of a model that came without: zeros, which backwards are nobody's."""
    features, count = model.representation or model.encoder.size.width, model.num_classes[HEAD]
    zeros = Transform(
        lambda arrays: [np.zeros((features, count), np.float32), np.zeros(count, np.float32)], lambda arrays: []
    )
    return [Row((), (f'head_{HEAD}/kernel', f'head_{HEAD}/bias'), zeros)]


def one_by_one(params: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of parameters in the layout with layers one by one."""

    def expand(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return jax.ShapeDtypeStruct(np.shape(tree), np.float32)
        rest = {name: expand(value) for name, value in tree.items() if name != 'layers'}
        if 'layers' in tree:
            depth = len(jax.tree.leaves(tree['layers'])[0])
            layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], np.float32), dict(tree['layers']))
            rest |= {f'layer_{i}': layer for i in range(depth)}
        return rest

    return expand(params)


def table(imported: Imported) -> str:
    """`fates` as text; layers that shared a fate are one line."""
    merged: dict[tuple[str, ...], int] = {}
    for fate in (found := fates(imported)):
        key = (
            fate.fate,
            _together([_without_numbers(name) for name in fate.theirs]),
            str(fate.shape or ''),
            _together([re.sub(r'layer_\d+', 'layer_*', name) for name in fate.ours]),
            str(fate.our_shape or '') if fate.our_shape != fate.shape else '',
        )
        merged[key] = merged.get(key, 0) + 1
    lines = [('fate', 'times', 'theirs', 'shape', 'ours', 'of shape')]
    for (name, theirs, shape, ours, our_shape), times in merged.items():
        lines.append((name, str(times), theirs, shape, ours, our_shape))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ['  '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    counts = ', '.join(f'{sum(one.fate == fate for one in found)} {fate}' for fate in FATES)
    reasons = dict.fromkeys(f'{_without_numbers(name)} is ignored: {why}' for name, why in imported.ignored.items())
    return '\n'.join([*text, *reasons, f'Arrays: {counts}; none is left over on either side.'])


def _without_numbers(name: str) -> str:
    return re.sub(r'(?<=[._/])\d+(?=[._/])|layer_\d+', '*', name)


def _together(names: Sequence[str]) -> str:
    """Several names as one: block.(query + key + value).weight."""
    if len(names) < 2:
        return names[0] if names else '-'
    start = os.path.commonprefix(list(names))
    start = start[: max(start.rfind('.'), start.rfind('/')) + 1]
    end = os.path.commonprefix([name[len(start) :][::-1] for name in names])[::-1]
    end = end[min((i for i in (end.find('.'), end.find('/')) if i >= 0), default=len(end)) :]
    return f'{start}({" + ".join(name[len(start) : len(name) - len(end)] for name in names)}){end}'

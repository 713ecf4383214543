"""One function that applies tables of name rules, in either direction.

A row says: these arrays of theirs are that array of ours, changed so. Names may hold `{layer}`, which stands for a
number and is the same on both sides. A table is complete or an error: nothing may be left over on either side.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How arrays change on their way; each function takes and gives a list, one array for each name of its side."""

    forward: Callable[[list[np.ndarray]], list[np.ndarray]]
    backward: Callable[[list[np.ndarray]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One rule of a conversion.

    Attributes:
      source: names that are taken; all of them are needed at once. Without any, the row makes what it gives.
      target: names that are given. Without any, the row takes what the other side has no parameters for.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    transform: Transform

    def reverse(self) -> Row:
        back = Transform(forward=self.transform.backward, backward=self.transform.forward)
        return Row(self.target, self.source, back)


def keep() -> Transform:
    """The array as it is."""
    return Transform(lambda arrays: arrays, lambda arrays: arrays)


def shape_of(arrays: Mapping[str, np.ndarray], name: str, num_axes: int) -> tuple[int, ...]:
    """The shape of an array that must be there, and hold something."""
    if name not in arrays:
        raise ValueError(f'{name} is missing; there are {few(sorted(arrays))}.')
    if arrays[name].ndim != num_axes or 0 in arrays[name].shape:
        raise ValueError(f'{name} is {arrays[name].shape}, where {num_axes} axes were due.')
    return arrays[name].shape


def of_shape(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The array, when that is its shape, in which one entry may be -1: as many numbers in another order are others."""
    if array.ndim != len(shape) or any(n not in (size, -1) for size, n in zip(array.shape, shape, strict=True)):
        raise ValueError(f'it is of shape {array.shape}, where {tuple(shape)} was due.')
    return array


def reshape(theirs: Sequence[int], ours: Sequence[int]) -> Transform:
    """The same numbers in another shape; one entry of a shape may be -1. Of several arrays, each."""
    return Transform(
        lambda arrays: [of_shape(array, theirs).reshape(ours) for array in arrays],
        lambda arrays: [of_shape(array, ours).reshape(theirs) for array in arrays],
    )


def transpose() -> Transform:
    """A matrix [out, in] as PyTorch keeps it becomes a kernel [in, out]; of several, each."""
    return Transform(lambda arrays: [array.T for array in arrays], lambda arrays: [array.T for array in arrays])


def permute(theirs: Sequence[int], axes: Sequence[int], ours: Sequence[int]) -> Transform:
    """Their axes in another order, and then in another shape.

    Args:
      theirs: their shape.
      axes: of theirs, in our order.
      ours: our shape; one entry may be -1.
    """
    middle, back = [theirs[axis] for axis in axes], np.argsort(axes)
    return Transform(
        lambda arrays: [of_shape(arrays[0], theirs).transpose(axes).reshape(ours)],
        lambda arrays: [of_shape(arrays[0], ours).reshape(middle).transpose(back)],
    )


def chain(*transforms: Transform) -> Transform:
    """One after the other, from theirs to ours."""

    def forward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        for transform in transforms:
            arrays = transform.forward(arrays)
        return arrays

    def backward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        for transform in reversed(transforms):
            arrays = transform.backward(arrays)
        return arrays

    return Transform(forward, backward)


def constant(*values: np.ndarray, tolerance: float = 1e-5) -> Transform:
    """Theirs is what our model computes by itself, to the tolerance, such as a fixed table of positions."""

    def forward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        for array, value in zip(arrays, values, strict=True):
            if array.shape != value.shape or not np.allclose(array, value, rtol=0, atol=tolerance):
                raise ValueError(f'it is not the fixed table of shape {value.shape} that the model computes.')
        return []

    return Transform(forward, lambda arrays: list(values))


def join_columns(theirs: Sequence[int], ours: Sequence[int]) -> Transform:
    """Several arrays [..., head, channel] become one whose columns are ordered (head, which array, channel)."""

    def forward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [np.stack([of_shape(array, theirs) for array in arrays], axis=-2).reshape(ours)]

    def backward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        count = arrays[0].size // int(np.prod(theirs))
        together = arrays[0].reshape(*theirs[:-1], count, theirs[-1])
        return [together[..., i, :] for i in range(count)]

    return Transform(forward, backward)


def apply_rows(
    rows: Iterable[Row], source: Mapping[str, np.ndarray], wanted: Mapping[str, Sequence[int]] | None = None
) -> Arrays:
    """Applies a table to arrays by name.

    Args:
      rows: the table.
      source: what there is. Every array must be taken by exactly one row.
      wanted: name -> shape of what must come out, no more and no less; None where that is not known.
    """
    result: Arrays = {}
    taken: dict[str, Row] = {}
    for row in rows:
        for layer in layers_of(row.source[0], source) if row.source else ['']:
            names = [name.format(layer=layer) for name in row.source]
            missing = [name for name in names if name not in source]
            if missing:
                raise ValueError(f'{names[0]} comes without {missing}: the weights are incomplete.')
            again = [name for name in names if name in taken]
            if again:
                raise ValueError(f'{again} would be used twice: by {taken[again[0]].source} and by {row.source}.')
            taken.update(dict.fromkeys(names, row))
            targets = [name.format(layer=layer) for name in row.target]
            try:
                arrays = row.transform.forward([np.asarray(source[name]) for name in names])
            except ValueError as error:
                shapes = {name: np.shape(source[name]) for name in names}
                raise ValueError(f'{shapes} cannot become {targets}: {error}') from error
            result.update(zip(targets, arrays, strict=True))
    complain_about_leftovers(sorted(set(source) - set(taken)), sorted(set(wanted or ()) - set(result)))
    if wanted is None:
        return result
    extra = sorted(set(result) - set(wanted))
    if extra:
        raise ValueError(f'The model has no place for {few(extra)}: is it smaller than the one these weights are of?')
    wrong = [
        f'{n} {result[n].shape} for {tuple(wanted[n])}' for n in sorted(wanted) if result[n].shape != (*wanted[n],)
    ]
    if wrong:
        raise ValueError(f'Shapes do not fit (given for wanted): {few(wrong)}.')
    return result


def layers_of(name: str, source: Mapping[str, Any]) -> list[str]:
    """The values of `{layer}` for which a name exists; [''] for a name without it that does."""
    if '{layer}' not in name:
        return [''] if name in source else []
    pattern = re.compile(re.escape(name).replace(re.escape('{layer}'), r'(\d+)'))
    return sorted((match[1] for match in map(pattern.fullmatch, source) if match), key=int)


def complain_about_leftovers(unused: list[str], unfilled: list[str]) -> None:
    problems = []
    if unused:
        problems.append(f'these were given and no rule takes them: {few(unused)}')
    if unfilled:
        problems.append(f'these are needed and nothing was given for them: {few(unfilled)}')
    if problems:
        raise ValueError(f'The weights do not fit the model; {"; ".join(problems)}.')


def few(names: Sequence[str], count: int = 6) -> str:
    """The first of many names."""
    rest = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + rest


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Nested dicts -> 'path/to/leaf' -> leaf."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        found = flatten(value, f'{prefix}{name}/') if isinstance(value, Mapping) else {prefix + name: value}
        if not flat.keys().isdisjoint(found):
            raise ValueError(f'{few(sorted(flat.keys() & found))} is there twice.')
        flat.update(found)
    return flat


def as_float32(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Parameters; what is of whole numbers is refused, as it is none, or is one of a quantised model."""
    others = sorted(name for name, array in arrays.items() if array.dtype.kind != 'f')
    if others:
        raise ValueError(f'{few(others)} are no arrays of floats, as parameters are.')
    return {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree

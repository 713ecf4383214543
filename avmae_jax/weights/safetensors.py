"""Files of arrays by name in the safetensors format: a header in JSON, then the bytes. Needs numpy alone.

    write('model.safetensors', {'head/kernel': kernel}, {'format': 'avmae_jax'})
    arrays = read('model.safetensors')

The format is that of https://github.com/huggingface/safetensors: 8 bytes with the length of the header, the header
(name -> dtype, shape, first byte and the byte after the last), the data without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from avmae_jax.weights.table import Arrays

DTYPES: dict[str, np.dtype] = {
    'F64': np.dtype('<f8'),
    'F32': np.dtype('<f4'),
    'F16': np.dtype('<f2'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'I64': np.dtype('<i8'),
    'I32': np.dtype('<i4'),
    'I16': np.dtype('<i2'),
    'I8': np.dtype('i1'),
    'U64': np.dtype('<u8'),
    'U32': np.dtype('<u4'),
    'U16': np.dtype('<u2'),
    'U8': np.dtype('u1'),
    'BOOL': np.dtype('?'),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = '__metadata__'
MAX_HEADER_BYTES = 100_000_000  # As in the library of the format.
MAX_DIMS = 32


class Entry(NamedTuple):
    """Where an array lies: its bytes are `start` to `stop` of the data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """
    Attributes:
      entries: by name, in the order of their bytes.
      metadata: what was written beside the arrays.
      data_start: bytes of the file before the data.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def write(path: epath.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays in the order of their names: the same arrays give the same bytes."""
    entries: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in sorted(arrays):
        array = arrays[name]
        if array.dtype not in NAMES or name == METADATA:
            raise ValueError(f'{name!r} of {array.dtype} cannot be stored; known are {", ".join(DTYPES)}.')
        stop = start + array.nbytes
        entries[name] = {'dtype': NAMES[array.dtype], 'shape': list(array.shape), 'data_offsets': [start, stop]}
        start = stop
    header = json.dumps(entries, separators=(',', ':')).encode()
    header += b' ' * (-len(header) % 8)  # Readers map the file into memory and want numbers at multiples of 8.
    with epath.Path(path).open('wb') as file:
        file.write(len(header).to_bytes(8, 'little') + header)
        for name in sorted(arrays):
            file.write(np.ascontiguousarray(arrays[name]).tobytes())


def read(path: epath.PathLike) -> Arrays:
    """All arrays of a file; what is no whole file of the format is a ValueError that names the file and the fault."""
    path = epath.Path(path)
    try:
        with path.open('rb') as file:
            header = _read_header(file, path.stat().length)
            # In the order of the bytes, which have no gaps: the file is read from end to end.
            return {name: _read_array(file, name, entry) for name, entry in header.entries.items()}
    except ValueError as error:
        raise ValueError(f'{path} cannot be read as safetensors: {error}') from error


def read_header(path: epath.PathLike) -> Header:
    """What is in a file, without the arrays."""
    path = epath.Path(path)
    try:
        with path.open('rb') as file:
            return _read_header(file, path.stat().length)
    except ValueError as error:
        raise ValueError(f'{path} cannot be read as safetensors: {error}') from error


def _read_header(file: BinaryIO, num_bytes: int) -> Header:
    """Checks everything that the header says against the size of the file, before memory is taken for any of it."""
    length = int.from_bytes(file.read(8), 'little')
    if num_bytes < 8 or length > min(num_bytes - 8, MAX_HEADER_BYTES):
        raise ValueError(f'the header should have {length} bytes, the file has {num_bytes}.')
    try:
        content = json.loads(file.read(length).decode(), object_pairs_hook=without_duplicates)
    except RecursionError as error:
        raise ValueError('the header is nested too deeply.') from error
    if not isinstance(content, dict):
        raise ValueError('the header is no table of names.')
    metadata = content.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f'{METADATA} is no table of texts.')
    entries = {name: _entry(name, value) for name, value in content.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    at = 0
    for name, entry in entries.items():
        if entry.start != at:
            raise ValueError(f'{name!r} starts at byte {entry.start} of the data, where {at} was due.')
        at = entry.stop
    if 8 + length + at != num_bytes:
        raise ValueError(f'the header speaks of {8 + length + at} bytes, the file has {num_bytes}.')
    return Header(entries, metadata, 8 + length)


def without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of such pairs, where no name comes twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f'{name!r} is there twice.')
        found[name] = value
    return found


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {'dtype', 'shape', 'data_offsets'}:
        raise ValueError(f'{name!r} is not told by dtype, shape and data_offsets.')
    if not isinstance(value['dtype'], str) or value['dtype'] not in DTYPES:
        raise ValueError(f'{name!r} is of dtype {value["dtype"]!r}; known are {", ".join(DTYPES)}.')
    shape, offsets = _sizes(name, value['shape'], MAX_DIMS), _sizes(name, value['data_offsets'], 2)
    dtype = DTYPES[value['dtype']]
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'{name!r} of shape {shape} and {value["dtype"]} does not fill bytes {offsets}.')
    return Entry(dtype, shape, *offsets)


def _sizes(name: str, values: Any, most: int) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > most or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        raise ValueError(f'{name!r} has sizes that are none: {str(values)[:80]}.')
    return tuple(values)


def _read_array(file: BinaryIO, name: str, entry: Entry) -> np.ndarray:
    data = file.read(entry.stop - entry.start)
    if len(data) != entry.stop - entry.start:
        raise ValueError(f'{name!r} is cut off.')
    array = np.frombuffer(bytearray(data), entry.dtype).reshape(entry.shape)
    if entry.dtype == bool and (array.view(np.uint8) > 1).any():
        raise ValueError(f'{name!r} holds truth values that are neither 0 nor 1.')
    return array


def check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuses arrays that hold what is no finite number."""
    for name, array in arrays.items():
        if array.dtype.kind in 'fV' and not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise ValueError(f'{name!r} holds values that are no finite numbers.')

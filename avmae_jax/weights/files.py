"""Arrays by name out of a file of weights, whoever wrote it; and a file of flax's, written.

    arrays = read_arrays('pytorch_model.bin')          # 'blocks.0.attn.qkv.weight' -> array
    tree = read_msgpack('checkpoint_1000')             # {'params': {...}, 'global_step': 1000}
    write_msgpack('checkpoint_1000', tree)

What a file is, its first bytes say and not its name. Nothing is unpickled, sizes that a file declares are compared with
its length before memory is taken, and a file that is cut, damaged or of another kind ends in a ValueError of one
sentence that names it and what is wrong. What damage a reader notices depends on the format:

    npz, torch     every number is under a CRC, which is checked: a flipped bit is refused
    safetensors    the header must fit the file byte by byte, but nothing guards the numbers
    msgpack        the same

so a publisher's digest is worth giving (`sha256`): then the whole file is what it was, or is refused. Numbers that are
not finite are refused in all four, and bfloat16 and float16, in which some are published, become float32.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import hashlib
import importlib
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import msgpack
import numpy as np
from etils import epath

from avmae_jax import whole
from avmae_jax.weights import safetensors
from avmae_jax.weights.table import Arrays, few, flatten

# What an array may be of; objects, strings and records are none of them.
DTYPES = {
    **{name: np.dtype(name) for name in ('bool', 'float16', 'float32', 'float64', 'complex64', 'complex128')},
    **{f'{kind}{bits}': np.dtype(f'{kind}{bits}') for kind in ('int', 'uint') for bits in (8, 16, 32, 64)},
    'bfloat16': np.dtype(jnp.bfloat16),
}
HALVES = (DTYPES['float16'], DTYPES['bfloat16'])
MAX_AXES = 32


class Format(NamedTuple):
    """A kind of file.

    Attributes:
      starts: whether a file that begins with such bytes (512 of them, or all) is of this kind.
      read: from its path to arrays by name.
    """

    starts: Callable[[bytes], bool]
    read: Callable[[epath.PathLike], Arrays]


def read_arrays(path: epath.PathLike, sha256: str = '') -> Arrays:
    """The arrays of a file by name, of safetensors, torch, npz or msgpack; names of nested trees are joined by '/'.

    Args:
      sha256: of the whole file in hexadecimal, where its publisher gives one; '' for none.
    """
    check_digest(path, sha256)
    with _open(path) as file:
        head = file.read(512)
    for kind in FORMATS.values():
        if kind.starts(head):
            return checked(path, kind.read(path))
    raise ValueError(f'{path} begins like no file of weights that is read here: {", ".join(FORMATS)}.')


def check_digest(path: epath.PathLike, sha256: str) -> None:
    """Refuses a file whose content has another digest; '' lets every file pass."""
    if not sha256:
        return
    digest = hashlib.sha256()
    with _open(path) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != sha256.lower():
        raise ValueError(f'{path} has the sha256 {digest.hexdigest()} and not {sha256}: it is damaged or another file.')


def checked(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The arrays with halves made float32; one that holds NaN or infinity is refused by name."""
    result: Arrays = {}
    for name, array in arrays.items():
        if array.dtype in HALVES:
            array = array.astype(np.float32)
        # Parameters of float64 are to be float32, where what is too large for it would be infinite.
        with np.errstate(over='ignore'):
            numbers = array.astype(np.float32, copy=False) if array.dtype.kind == 'f' else array
        if array.dtype.kind in 'fc' and not np.all(np.isfinite(numbers)):
            raise ValueError(f'{path}: {name} holds numbers that are not finite: it is damaged, or its training was.')
        result[name] = array
    return result


def is_file(path: epath.PathLike) -> bool:
    """Whether it is there and a file; a pipe or a device, of which a reader would see no end, is none."""
    if not epath.Path(path).is_file():
        return False
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # It is in a store.
        return True


def _open(path: epath.PathLike) -> BinaryIO:
    if not is_file(path):
        raise ValueError(f'{path} is no file: give the file that holds the weights.')
    return epath.Path(path).open('rb')


# What the parsers below raise at bytes that make no sense.
PARSER_ERRORS = (
    EOFError, KeyError, MemoryError, NotImplementedError, OSError, OverflowError, RuntimeError, SyntaxError, TypeError,
    ValueError, msgpack.exceptions.UnpackException, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@contextlib.contextmanager
def _reading(path: epath.PathLike, kind: str) -> Iterator[None]:
    """Tells of whatever goes wrong with the name of the file."""
    try:
        yield
    except PARSER_ERRORS as error:
        raise ValueError(f'{path} is no {kind} that can be read: {error or type(error).__name__}') from error


def _length(file: BinaryIO) -> int:
    here = file.tell()
    length = file.seek(0, io.SEEK_END)
    file.seek(here)
    return length


def _dtype(where: str, name: str) -> np.dtype:
    if name not in DTYPES:
        raise ValueError(f'{where} is of dtype {name[:40]!r}; read are {", ".join(DTYPES)}.')
    return DTYPES[name]


def _shaped(where: str, buffer: bytes | memoryview, dtype: np.dtype, shape: Any) -> np.ndarray:
    """An array over bytes that must be exactly as many as its shape says."""
    if not isinstance(shape, tuple | list) or len(shape) > MAX_AXES or not all(_is_size(size) for size in shape):
        raise ValueError(f'{where} has no shape but {str(shape)[:80]}.')
    needed = dtype.itemsize
    for size in shape:  # In Python's integers, which do not overflow.
        needed *= size
    if needed != len(buffer):
        raise ValueError(f'{where} says it is {dtype.name}{list(shape)}, {needed} bytes, and holds {len(buffer)}.')
    try:
        return np.frombuffer(buffer, dtype).reshape(shape) if needed else np.zeros(shape, dtype)
    except ValueError as error:  # Nothing along one axis, and more along another than there can be.
        raise ValueError(f'{where} says it is {dtype.name}{list(shape)}: {error}') from error


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0


# -- zip archives: npz and torch --

# Weights are noise to a compressor. A file of more than this many bytes that unpacks to so many times its length is
# refused: it is made to fill the memory.
MAX_UNPACKED, SMALL = 32, 1 << 26


def _zip_members(file: BinaryIO, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files of an archive, when they are all there, once each, and not larger than the archive can hold."""
    members, length = archive.infolist(), _length(file)
    if not members:
        raise ValueError('it holds nothing.')
    if _count_at_end(file, length) != len(members):  # The directory is read by lengths in it, and has no CRC.
        raise ValueError(f'it ends by counting other files than the {len(members)} that are found.')
    times = collections.Counter(member.filename for member in members)
    if len(times) < len(members):
        raise ValueError(f'it holds {few(sorted(name for name, count in times.items() if count > 1))} twice.')
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(SMALL, MAX_UNPACKED * length):
        raise ValueError(f'{length} bytes long, it says that it unpacks to {unpacked}: no weights do.')
    for member in members:
        if member.compress_type == zipfile.ZIP_STORED and member.file_size > length:
            raise ValueError(f'{length} bytes long, it says that its {member.filename} has {member.file_size}.')
    return members


def _count_at_end(file: BinaryIO, length: int) -> int:
    """How many files an archive says it has, at its very end."""
    file.seek(length - 42)
    end = file.read()
    if end[20:24] != b'PK\x05\x06':
        raise ValueError('it does not end as a zip archive that a library writes.')
    count = int.from_bytes(end[30:32], 'little')
    if end[:4] != b'PK\x06\x07':
        return count
    # A large archive: the place of the number is told just before.
    file.seek(int.from_bytes(end[8:16], 'little') + 32)
    large = int.from_bytes(file.read(8), 'little')
    return large if count in (large, 0xFFFF) else -1


def read_npz(path: epath.PathLike) -> Arrays:
    """The arrays of an .npz file, as numpy writes it."""
    arrays: Arrays = {}
    with _open(path) as file, _reading(path, '.npz file'), zipfile.ZipFile(file) as archive:
        for member in _zip_members(file, archive):
            name = member.filename.removesuffix('.npy')
            arrays[name] = _parse_npy(name, archive.read(member))
    return arrays


def _parse_npy(where: str, content: bytes) -> np.ndarray:
    """An array in numpy's own format, whose header is a Python dict in letters."""
    lengths = {b'\x01\x00': '<H', b'\x02\x00': '<I', b'\x03\x00': '<I'}
    form = lengths.get(content[6:8])
    if content[:6] != b'\x93NUMPY' or form is None or len(content) < 12:
        raise ValueError(f'{where} is no array in the format of numpy.')
    start = 8 + struct.calcsize(form)
    end = start + struct.unpack(form, content[8:start])[0]
    if end > min(len(content), 10_000):
        raise ValueError(f'{where} has a header of {end - start} bytes, which is none.')
    try:
        header = ast.literal_eval(content[start:end].decode('latin-1').strip())
        name, fortran, shape = header['descr'], header['fortran_order'], header['shape']
        dtype = np.dtype(name) if isinstance(name, str) else None
    except (KeyError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f'{where} has a header that cannot be read: {error}') from error
    if dtype is None or dtype.name not in DTYPES:
        raise ValueError(f'{where} is of dtype {str(name)[:40]!r}; read are {", ".join(DTYPES)}.')
    order = shape[::-1] if fortran and isinstance(shape, tuple) else shape
    array = _shaped(where, memoryview(content)[end:], dtype, order)
    return np.asarray(array.T if fortran else array, dtype.newbyteorder('='))


# -- torch --

MIN_TORCH = (2, 6)  # Before it, `weights_only` could be got around (CVE-2025-32434).
# Where published checkpoints keep the parameters of the model, beside a state of the optimiser and settings.
WRAPPERS = ('model', 'module', 'state_dict', 'model_state_dict')


def read_torch(path: epath.PathLike) -> Arrays:
    """The parameters in a file that `torch.save` wrote: of a state dict, or of the one within a training checkpoint.

    The pickle in it is read by torch with `weights_only=True`, which knows tensors and containers alone. Beside the
    model (under one of WRAPPERS) nothing is looked at. A 'module.' before every name, of DataParallel, is taken off.
    """
    _check_torch_zip(path)
    torch = _import_torch(path)
    local = os.path.isfile(path)
    try:
        # What is not asked for, as a state of the optimiser, is never read from disk.
        source: Any = os.fspath(path) if local else io.BytesIO(epath.Path(path).read_bytes())
        loaded = torch.load(source, map_location='cpu', weights_only=True, mmap=local)
    except Exception as error:  # At bytes that make no sense, torch raises whatever its parser stumbled over.
        raise ValueError(_torch_complaint(path, error)) from error
    arrays = {}
    with _reading(path, 'state dict of torch'):
        state = _state_dict(loaded, torch)
        length, total = epath.Path(path).stat().length, sum(_num_bytes(tensor) for tensor in state.values())
        if total > length:
            raise ValueError(f'{length} bytes long, it says that its tensors have {total}.')
        for name, tensor in state.items():
            half = tensor.dtype in (torch.bfloat16, torch.float16)
            array = (tensor.detach().float() if half else tensor.detach()).numpy()
            _dtype(name, array.dtype.name)
            arrays[name] = np.array(array)  # A copy: what torch gave lies in the file.
    return arrays


def _num_bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def _check_torch_zip(path: epath.PathLike) -> None:
    """Every byte that torch will read, against its CRC, which torch itself does not look at."""
    with _open(path) as file, _reading(path, 'file of torch.save'):
        if file.read(4) != b'PK\x03\x04':
            raise ValueError('since 2020 it writes zip archives; save it anew with a current torch.')
        with zipfile.ZipFile(file) as archive:
            members = _zip_members(file, archive)
            roots = {member.filename.split('/')[0] for member in members}
            names = {member.filename.partition('/')[2] for member in members}
            if 'data.pkl' not in names or len(roots) != 1:
                raise ValueError(f'as a zip archive it has {few(sorted(names))}.')
            if 'constants.pkl' in names:
                raise ValueError('it is a program of torch.jit; save model.state_dict() instead.')
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f'its {member.filename} is compressed.')
                with archive.open(member) as stored:
                    while stored.read(1 << 20):
                        pass


def _import_torch(path: epath.PathLike) -> Any:
    try:
        torch = importlib.import_module('torch')  # Half a gigabyte, for those who have such files.
    except ImportError as error:
        raise ValueError(f"{path} is of torch, which is not installed: pip install 'avmae_jax[interop]'.") from error
    version = tuple(int(part) for part in torch.__version__.split('.')[:2])
    if version < MIN_TORCH:
        raise ValueError(
            f'{path} is of torch, and torch {torch.__version__} does not read it safely: install 2.6 or later.'
        )
    return torch


def _torch_complaint(path: epath.PathLike, error: Exception) -> str:
    wanted = [word for word in str(error).split() if 'Unsupported' in word or 'GLOBAL' in word]
    if not wanted:
        return f'{path} is no file of torch that can be read: {type(error).__name__}: {str(error)[:200]}'
    named = str(error).partition('GLOBAL ')[2].split(' ')[0]
    return (
        f'{path} asks to run {named[:80] or "code"}, more than tensors need, and is not opened: who trusts it '
        "saves its state dict, torch.save(torch.load(old, weights_only=False)['model'], new), and converts that."
    )


def _state_dict(loaded: Any, torch: Any) -> dict[str, Any]:
    """Name -> dense tensor in memory, out of what a file held."""
    for _ in range(3):
        inner = [loaded[name] for name in WRAPPERS if isinstance(loaded, Mapping) and name in loaded]
        inner = [value for value in inner if isinstance(value, Mapping)]
        if not inner:
            break
        loaded = inner[0]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f'it holds {type(loaded).__name__}.')
    parallel = all(isinstance(name, str) and name.startswith('module.') for name in loaded)
    state = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f'{str(name)[:80]!r} is {type(tensor).__name__} and no tensor; a file has tensors, itself or under one '
                f'of {", ".join(WRAPPERS)}.'
            )
        # A view may repeat its numbers, so that a few bytes look like a terabyte.
        odd = tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != 'cpu'
        if odd or _num_bytes(tensor) > tensor.untyped_storage().nbytes():
            raise ValueError(f'{name} is no plain tensor.')
        state[name.removeprefix('module.') if parallel else name] = tensor
    return state


# -- flax's msgpack --

NDARRAY, COMPLEX, SCALAR = 1, 2, 3  # Types that flax.serialization adds to those of msgpack.
CHUNKED = '__msgpack_chunked_array__'
MAX_CHUNK = 1 << 30  # Bytes; flax cuts what is longer, as msgpack's own limit is 2 ** 32 - 1.
# Lists in a checkpoint are dicts by number: the only arrays of msgpack are those three things that make an ndarray.
LIMITS: dict[str, Any] = dict(
    raw=False, strict_map_key=True, max_array_len=64, use_list=False, object_pairs_hook=safetensors.without_duplicates
)


def read_msgpack(path: epath.PathLike) -> dict[str, Any]:
    """The tree in a file of `flax.serialization`: dicts of arrays, numbers, strings and None."""
    with _open(path) as file, _reading(path, 'msgpack of flax'):
        tree = msgpack.unpackb(file.read(), ext_hook=_decode, **LIMITS)
        if not isinstance(tree, dict):
            raise ValueError(f'it holds {type(tree).__name__} and no dict.')
        tree = _join_chunks(tree)
        flatten(tree)  # Where 'a/b' stands for two.
        return tree


def _decode(code: int, data: bytes) -> Any:
    """What flax's types stand for."""
    if code == COMPLEX:
        parts = msgpack.unpackb(data, **LIMITS)
        if not isinstance(parts, tuple) or [type(part) for part in parts] != [float, float]:
            raise ValueError('a complex number is not two floats.')
        return complex(*parts)
    if code not in (NDARRAY, SCALAR):
        raise ValueError(f'it has a type {code}, which flax does not write.')
    parts = msgpack.unpackb(data, **{**LIMITS, 'raw': True})
    if not isinstance(parts, tuple) or len(parts) != 3 or not all(isinstance(part, bytes) for part in parts[1:]):
        raise ValueError('an array is not (shape, dtype, bytes).')
    array = _shaped('an array', parts[2], _dtype('an array', parts[1].decode('latin-1')), parts[0])
    if code == SCALAR and array.ndim:
        raise ValueError(f'a number has the shape {array.shape}.')
    return array[()] if code == SCALAR else array


def _join_chunks(tree: Any) -> Any:
    """The tree with arrays in one piece that flax cut in several."""
    if not isinstance(tree, Mapping):
        return tree
    if CHUNKED not in tree:
        return {name: _join_chunks(value) for name, value in tree.items()}
    sizes, parts = _numbered(tree.get('shape')), _numbered(tree.get('chunks'))
    flat = all(isinstance(part, np.ndarray) and part.ndim == 1 and part.dtype == parts[0].dtype for part in parts)
    if not parts or not flat:
        raise ValueError('a chunked array is not made of flat arrays of one dtype.')
    return _shaped('a chunked array', np.concatenate(parts).view(np.uint8).data, parts[0].dtype, sizes)


def _numbered(tree: Any) -> list[Any]:
    """The values of {'0': ..., '1': ...} in order."""
    if not isinstance(tree, Mapping) or set(tree) != {str(i) for i in range(len(tree))}:
        raise ValueError('a chunked array does not number its parts.')
    return [tree[str(i)] for i in range(len(tree))]


def write_msgpack(path: epath.PathLike, tree: Mapping[str, Any]) -> None:
    """A tree of dicts, arrays, numbers, strings and None as `flax.serialization.msgpack_restore` reads it.

    Under the name there is the whole file, or what was there before.
    """
    content = msgpack.packb(_cut_chunks(tree), default=_encode, strict_types=True)
    with whole.new_file(path) as file:
        file.write_bytes(content)


def _cut_chunks(tree: Any) -> Any:
    """The tree with arrays that are too long for msgpack in pieces, as flax cuts them."""
    if isinstance(tree, Mapping):
        return {name: _cut_chunks(tree[name]) for name in sorted(tree)}  # As flax sorts them.
    if hasattr(tree, 'dtype') and not isinstance(tree, np.generic):
        tree = np.asarray(tree)
    if not isinstance(tree, np.ndarray) or tree.nbytes <= MAX_CHUNK:
        return tree
    flat, count = tree.reshape(-1), max(1, MAX_CHUNK // tree.itemsize)
    chunks = [flat[i : i + count] for i in range(0, flat.size, count)]
    return {
        CHUNKED: True,
        'shape': {str(i): size for i, size in enumerate(tree.shape)},
        'chunks': {str(i): chunk for i, chunk in enumerate(chunks)},
    }


def _encode(value: Any) -> msgpack.ExtType:
    """An array, a numpy or a complex number as flax writes it."""
    if isinstance(value, complex) and not isinstance(value, np.generic):
        return msgpack.ExtType(COMPLEX, msgpack.packb((value.real, value.imag)))
    if not isinstance(value, np.ndarray | np.generic):
        raise ValueError(f'{type(value).__name__} has no place in a file of msgpack; arrays, numbers and strings have.')
    array = np.asarray(value)
    parts = (array.shape, _dtype('an array', array.dtype.name).name, array.tobytes())
    return msgpack.ExtType(SCALAR if isinstance(value, np.generic) else NDARRAY, msgpack.packb(parts))


def _msgpack_arrays(path: epath.PathLike) -> Arrays:
    return {
        name: np.asarray(value)
        for name, value in flatten(read_msgpack(path)).items()
        if isinstance(value, np.ndarray | np.generic | int | float | complex)
    }


def _is_zip(of_torch: bool) -> Callable[[bytes], bool]:
    # The first file of an archive of torch lies in a folder: archive/data.pkl.
    def starts(head: bytes) -> bool:
        name = head[30 : 30 + int.from_bytes(head[26:28], 'little')]
        return head.startswith(b'PK\x03\x04') and (b'/' in name and not name.endswith(b'.npy')) == of_torch

    return starts


FORMATS = {
    'safetensors': Format(lambda head: head[8:9] == b'{', safetensors.read),
    'npz': Format(_is_zip(of_torch=False), read_npz),
    'torch': Format(
        lambda head: _is_zip(of_torch=True)(head) or head.startswith((b'\x80\x02', b'\x80\x04')), read_torch
    ),
    # A dict: of up to 15 entries, or more.
    'msgpack': Format(lambda head: head[:1] in (b'\xde', b'\xdf') or b'\x80' < head[:1] <= b'\x8f', _msgpack_arrays),
}

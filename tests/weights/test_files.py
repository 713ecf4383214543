"""Readers of files of weights: what other libraries write, and what nobody should have written."""

import argparse
import contextlib
import hashlib
import io
import os
import struct
import sys
import tracemalloc
import zipfile

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization
from safetensors import numpy as safetensors_numpy

from avmae_jax.weights import files

torch_reason = "torch is not installed: pip install 'avmae_jax[interop]'"


def some_arrays(seed=0):
    random = np.random.default_rng(seed)
    return {
        'encoder.0.weight': random.normal(size=(3, 5)).astype(np.float32),
        'encoder.0.bias': random.normal(size=5).astype(np.float32),
        'steps': np.asarray(random.integers(1000), np.int64),
        'none': np.zeros((0, 4), np.float32),
    }


def write_torch(path, arrays):
    torch = pytest.importorskip('torch', reason=torch_reason)
    torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, path)


def write_npz_packed(path, arrays):
    with open(path, 'wb') as file:
        np.savez_compressed(file, **arrays)


def write_npz(path, arrays):
    with open(path, 'wb') as file:
        np.savez(file, **arrays)


WRITERS = {
    'safetensors': lambda path, arrays: safetensors_numpy.save_file(arrays, path),
    'torch': write_torch,
    'npz': write_npz,
    'npz, compressed': write_npz_packed,
    'msgpack': lambda path, arrays: path.write_bytes(serialization.msgpack_serialize(arrays)),
}
WITH_CRC = ('torch', 'npz', 'npz, compressed')


def same(one, other):
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and np.array_equal(one[name], other[name])
        for name in one
    )


@pytest.mark.parametrize('name', WRITERS)
def test_what_a_library_wrote_is_read_bit_for_bit_whatever_the_file_is_called(tmp_path, name):
    path = tmp_path / 'weights'
    WRITERS[name](path, some_arrays())
    assert same(files.read_arrays(path), some_arrays())
    assert all(array.flags.aligned for array in files.read_arrays(path).values())


@pytest.mark.parametrize('name', ['npz', 'npz, compressed'])
def test_numpy_arrays_of_any_order_of_axes_and_bytes(tmp_path, name):
    array = np.random.default_rng(0).normal(size=(2, 3, 4))
    arrays = {'fortran': np.asfortranarray(array), 'big': array.astype('>f4'), 'a/number': np.float32(2.5)}
    WRITERS[name](tmp_path / 'w.npz', arrays)
    read = files.read_arrays(tmp_path / 'w.npz')
    assert set(read) == set(arrays) and all(np.array_equal(read[key], arrays[key]) for key in arrays)
    assert read['big'].dtype == np.float32 and read['big'].dtype.isnative


# -- halves, and numbers that are none --


def test_halves_become_float32_and_nothing_else_does(tmp_path):
    values = np.random.default_rng(0).normal(size=7)
    half, brain = values.astype(np.float16), np.asarray(jnp.asarray(values, jnp.bfloat16))
    (tmp_path / 'w.msgpack').write_bytes(serialization.msgpack_serialize({'f16': half, 'bf16': brain, 'f64': values}))
    read = files.read_arrays(tmp_path / 'w.msgpack')
    assert same(read, {'f16': half.astype(np.float32), 'bf16': brain.astype(np.float32), 'f64': values})


def test_halves_of_torch_become_float32(tmp_path):
    torch = pytest.importorskip('torch', reason=torch_reason)
    from safetensors import torch as safetensors_torch

    halves = {'f16': torch.randn(5).half(), 'bf16': torch.randn(5).bfloat16()}
    wanted = {name: tensor.float().numpy() for name, tensor in halves.items()}
    torch.save(halves, tmp_path / 'w.pt')
    safetensors_torch.save_file(halves, tmp_path / 'w.safetensors')
    assert same(files.read_arrays(tmp_path / 'w.pt'), wanted)
    assert same(files.read_arrays(tmp_path / 'w.safetensors'), wanted)


def test_what_float32_cannot_hold_is_refused_and_not_made_infinite(tmp_path):
    write_npz(tmp_path / 'w', {'a': np.float64([1.0, 1e39])})
    with pytest.raises(ValueError, match='w: a holds numbers that are not finite'):
        files.read_arrays(tmp_path / 'w')


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('name', WRITERS)
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, name, value):
    arrays = some_arrays()
    arrays['encoder.0.bias'][3] = value
    WRITERS[name](tmp_path / 'weights', arrays)
    with pytest.raises(ValueError, match=r'weights: encoder\.0\.bias holds numbers that are not finite'):
        files.read_arrays(tmp_path / 'weights')


def test_a_digest_decides_on_the_whole_file(tmp_path):
    write_npz(tmp_path / 'w.npz', some_arrays())
    digest = hashlib.sha256((tmp_path / 'w.npz').read_bytes()).hexdigest()
    assert same(files.read_arrays(tmp_path / 'w.npz', digest.upper()), some_arrays())
    with pytest.raises(ValueError, match=f'w.npz has the sha256 {digest} and not 00ff'):
        files.read_arrays(tmp_path / 'w.npz', '00ff')


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    os.mkfifo(tmp_path / 'pipe')  # Whoever reads it waits.
    for path in (tmp_path, tmp_path / 'nowhere', tmp_path / 'pipe', '/dev/zero'):
        with pytest.raises(ValueError, match='is no file: give the file'):
            files.read_arrays(path)
    (tmp_path / 'w.txt').write_text('no weights')
    with pytest.raises(ValueError, match='begins like no file of weights that is read here: safetensors, npz'):
        files.read_arrays(tmp_path / 'w.txt')


# -- torch --


def test_the_model_is_found_in_a_training_checkpoint(tmp_path):
    torch = pytest.importorskip('torch', reason=torch_reason)
    layer = torch.nn.Linear(3, 2)
    state = layer.state_dict()
    wanted = {name: tensor.numpy() for name, tensor in state.items()}
    parallel = {f'module.{name}': tensor for name, tensor in state.items()}
    optimizer = {'state': {0: {'exp_avg': torch.full((3,), torch.nan)}}, 'betas': (0.9, 0.95)}
    for saved in (
        layer.state_dict(),
        dict(layer.named_parameters()),
        parallel,
        {'model': state, 'optimizer': optimizer, 'epoch': 3},
        {'module': state},
        {'state_dict': parallel, 'epoch': 3},
        {'model': {'state_dict': state}},
    ):
        torch.save(saved, tmp_path / 'w.pth')
        assert same(files.read_arrays(tmp_path / 'w.pth'), wanted)


def test_a_file_that_is_not_on_this_disk_is_read_through_memory(tmp_path, monkeypatch):
    write_torch(tmp_path / 'w.pth', some_arrays())
    monkeypatch.setattr(files.os.path, 'isfile', lambda path: False)
    assert same(files.read_torch(tmp_path / 'w.pth'), some_arrays())


class Opener:
    def __reduce__(self):
        return open, (self.path, 'w')


def test_a_pickle_that_asks_for_code_is_refused_unopened(tmp_path):
    torch = pytest.importorskip('torch', reason=torch_reason)
    opener = Opener()
    opener.path = str(tmp_path / 'touched')
    for saved, wanted in [({'model': {}, 'x': opener}, 'open'), ({'args': argparse.Namespace(a=1)}, 'Namespace')]:
        torch.save(saved, tmp_path / 'w.pth')
        with pytest.raises(ValueError, match=f'w.pth asks to run .*{wanted}, more than tensors need'):
            files.read_arrays(tmp_path / 'w.pth')
    assert not (tmp_path / 'touched').exists()


def test_what_torch_saves_besides_state_dicts_is_refused(tmp_path):
    torch = pytest.importorskip('torch', reason=torch_reason)
    weight = torch.randn(3, 3)
    for saved, complaint in [
        ([weight], 'it holds list'),
        ({}, 'it holds dict'),
        ({'w': weight, 'epoch': 3}, "'epoch' is int and no tensor"),
        ({'w': weight.to_sparse()}, 'w is no plain tensor'),
        ({'w': torch.randn(1).expand(1 << 40)}, 'w is no plain tensor'),
        ({str(i): weight for i in range(99)}, 'it says that its tensors have'),
        ({'w': torch.randn(2).to(torch.float8_e4m3fn)}, 'is no state dict of torch that can be read'),
    ]:
        torch.save(saved, tmp_path / 'w.pth')
        with pytest.raises(ValueError, match=f'w.pth .*{complaint}'):
            files.read_arrays(tmp_path / 'w.pth')
    torch.save({'w': weight}, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match='old.pth is no file of torch.save .*save it anew with a current torch'):
        files.read_arrays(tmp_path / 'old.pth')
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / 'jit.pth')
    with pytest.raises(ValueError, match='jit.pth .*it is a program of torch.jit; save model.state_dict'):
        files.read_arrays(tmp_path / 'jit.pth')


def test_without_torch_its_files_say_what_to_install(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / 'w.pth', 'w') as archive:
        archive.writestr('archive/data.pkl', b'')
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(ValueError, match=r"w.pth is of torch, which is not installed: pip install 'avmae_jax\[interop"):
        files.read_arrays(tmp_path / 'w.pth')


# -- msgpack --

TREE = {
    'params': {'block': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}, 'scale': np.float32(2)},
    'model_state': {},
    'global_step': 7,
    'rate': 0.5,
    'phase': 1 + 2j,
    'metadata': {'name': 'run', 'nothing': None, 'done': True},
}


def test_a_tree_is_written_as_flax_writes_it(tmp_path):
    files.write_msgpack(tmp_path / 'checkpoint', TREE)
    assert (tmp_path / 'checkpoint').read_bytes() == serialization.msgpack_serialize(TREE)
    read = files.read_msgpack(tmp_path / 'checkpoint')
    assert read['params']['scale'] == 2 and type(read['params']['scale']) is np.float32
    np.testing.assert_array_equal(read['params']['block'].pop('kernel'), TREE['params']['block']['kernel'])
    assert read == {**TREE, 'params': {'block': {}, 'scale': np.float32(2)}}


def test_arrays_in_pieces_go_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 10)
    monkeypatch.setattr(files, 'MAX_CHUNK', 10)
    tree = {'deep': {'long': np.arange(15, dtype=np.float32).reshape(3, 5)}, 'short': np.arange(2, dtype=np.float32)}
    files.write_msgpack(tmp_path / 'checkpoint', tree)
    assert (tmp_path / 'checkpoint').read_bytes() == serialization.msgpack_serialize(tree)
    assert same(files.read_arrays(tmp_path / 'checkpoint'), {'deep/long': tree['deep']['long'], 'short': tree['short']})


def test_jax_arrays_and_bfloat16_are_written_as_flax_writes_them(tmp_path):
    tree = {'a': jnp.arange(3.0), 'b': jnp.arange(3, dtype=jnp.bfloat16)}
    files.write_msgpack(tmp_path / 'checkpoint', tree)
    assert (tmp_path / 'checkpoint').read_bytes() == serialization.msgpack_serialize(tree)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    (tmp_path / 'checkpoint').write_text('old')
    with pytest.raises(ValueError, match='object has no place in a file of msgpack'):
        files.write_msgpack(tmp_path / 'checkpoint', {'a': object()})
    with pytest.raises(ValueError, match="of dtype 'object'"):
        files.write_msgpack(tmp_path / 'checkpoint', {'a': np.array([None])})
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoint']
    assert (tmp_path / 'checkpoint').read_text() == 'old'


def packed(shape=(2,), dtype='float32', buffer=bytes(8), code=files.NDARRAY):
    return msgpack.packb({'w': msgpack.ExtType(code, msgpack.packb((shape, dtype, buffer)))})


@pytest.mark.parametrize(
    'content, complaint',
    [
        (packed(shape=(3,)), r'float32\[3\], 12 bytes, and holds 8'),
        (packed(shape=(1 << 40, 1 << 40)), 'and holds 8'),
        (packed(shape=(-1, -2)), 'has no shape'),
        (packed(shape=(0, 1 << 62, 1 << 62), buffer=b''), 'says it is float32'),
        (packed(shape=(1,) * 33 + (2,)), 'has no shape'),
        (packed(shape=2), 'has no shape'),
        (packed(dtype='object'), "of dtype 'object'"),
        (packed(code=files.SCALAR), 'a number has the shape'),
        (packed(code=9), 'a type 9'),
        (msgpack.packb({'w': msgpack.ExtType(files.COMPLEX, msgpack.packb((1.0, 'i')))}), 'not two floats'),
        (msgpack.packb({'w': msgpack.ExtType(files.NDARRAY, b'')}), 'no msgpack of flax'),
        (msgpack.packb({'w': {files.CHUNKED: True, 'shape': {'0': 3}, 'chunks': {'1': 2}}}), 'does not number'),
        (msgpack.packb({'w': {files.CHUNKED: True, 'shape': {'0': 3}, 'chunks': {'0': 2}}}), 'not made of flat arrays'),
        (msgpack.packb({'w': 1}) + b'\x00', 'no msgpack of flax'),
        (b'\x81' * 4000, 'no msgpack of flax'),
        (b'\x81\xa1w' + b'\xdd\x00\x00\x10\x00' * 500, 'no msgpack of flax'),
        (b'\xdf\xff\xff\xff\xff', 'no msgpack of flax'),
        (msgpack.packb({1: 2}), 'no msgpack of flax'),
        (b'\x82\xa1w\x01\xa1w\x02', "'w' is there twice"),
        (msgpack.packb({'a/b': 1, 'a': {'b': 2}}), 'a/b is there twice'),
    ],
)
def test_msgpack_that_flax_would_not_write_is_refused(tmp_path, content, complaint):
    (tmp_path / 'w').write_bytes(content)
    with pytest.raises(ValueError, match=f'w is no msgpack of flax that can be read: .*{complaint}|w is {complaint}'):
        files.read_arrays(tmp_path / 'w')


# -- memory --


def npy(header):
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header.encode()


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_an_archive_of_nothing_or_of_one_name_many_times_is_refused(tmp_path):
    for names, complaint in (([], 'it holds nothing'), (['w.npy', 'v.npy'] * 10_000, 'it holds v.npy, w.npy twice')):
        with zipfile.ZipFile(tmp_path / 'w', 'w') as archive:
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), b'')
        with pytest.raises(ValueError, match=f'w is no .npz file that can be read: {complaint}'):
            files.read_npz(tmp_path / 'w')


def huge(name):
    """Small files that say they hold a terabyte."""
    out = io.BytesIO()
    if name == 'safetensors':
        header = b'{"w":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}'
        return len(header).to_bytes(8, 'little') + header
    if name == 'safetensors header':
        return (1 << 40).to_bytes(8, 'little') + b'{}'
    if name == 'msgpack':
        return packed(shape=(1 << 38,))
    if name == 'npz header':
        with zipfile.ZipFile(out, 'w') as archive:
            archive.writestr('w.npy', npy("{'descr': '<f4', 'fortran_order': False, 'shape': (274877906944,)}"))
        return out.getvalue()
    if name == 'npz bomb':
        with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive, archive.open('w.npy', 'w') as file:
            for _ in range(100):
                file.write(bytes(1 << 20))
        return out.getvalue()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr('w.npy', bytes(100))
    content = out.getvalue()
    # Both headers of the entry say 4 GB less one byte.
    return content.replace(struct.pack('<II', 100, 100), struct.pack('<II', (1 << 32) - 2, (1 << 32) - 2))


@pytest.mark.parametrize(
    'name', ['safetensors', 'safetensors header', 'msgpack', 'npz header', 'npz bomb', 'npz sizes']
)
def test_sizes_are_not_believed(tmp_path, name):
    (tmp_path / 'w').write_bytes(huge(name))
    tracemalloc.start()
    with pytest.raises(ValueError, match='w is no|w cannot be read|begins like no'):
        files.read_arrays(tmp_path / 'w')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


# -- damage --


def damaged(content, random, how):
    """The bytes of one case."""
    if how == 'random':
        return random.bytes(int(random.integers(1, 400)))
    if how == 'random behind the beginning':
        return content[: int(random.integers(1, 60))] + random.bytes(int(random.integers(0, 400)))
    if how == 'cut':
        return content[: int(random.integers(len(content)))]
    if how == 'flip':
        place, bit = int(random.integers(len(content))), int(random.integers(8))
        return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
    start, length = sorted(random.integers(len(content), size=2))
    return content[:start] + random.bytes(int(length - start)) + content[length:]


DAMAGE = {'random': 100, 'random behind the beginning': 100, 'cut': 150, 'flip': 700, 'overwritten': 100}


@pytest.mark.parametrize('name', WRITERS)
def test_damage_is_noticed_or_changes_nothing_but_numbers(tmp_path, name, fuzz):
    path, arrays, random = tmp_path / 'weights', some_arrays(), np.random.default_rng(3)
    WRITERS[name](path, arrays)
    content, loaded = path.read_bytes(), 0
    for how, count in DAMAGE.items():
        for _ in range(count * fuzz):
            case = damaged(content, random, how)
            path.write_bytes(case)
            try:
                read = files.read_arrays(path)
            except ValueError as error:
                assert str(error).startswith(str(path)), error
                continue
            loaded += 1
            if name in WITH_CRC:
                assert same(read, arrays), f'{how}: other numbers than were written'
            elif how == 'flip' and set(read) == set(arrays):
                # A table refuses other names, and other shapes of arrays without numbers: all that is left to change.
                assert all(read[key].shape == array.shape for key, array in arrays.items() if array.size)
                assert sum(np.sum(read[key] != array) for key, array in arrays.items() if array.size) <= 1
            assert sum(array.nbytes for array in read.values()) <= 2 * len(case)
    assert loaded  # Some flips fall on what nobody reads, or on a number.


@pytest.mark.parametrize('name', WRITERS)
def test_with_a_digest_every_flip_is_refused(tmp_path, name):
    path, random = tmp_path / 'weights', np.random.default_rng(4)
    WRITERS[name](path, some_arrays())
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    for _ in range(200):
        path.write_bytes(damaged(content, random, 'flip'))
        with pytest.raises(ValueError, match='has the sha256'):
            files.read_arrays(path, digest)


def rezipped(content, random):
    """The archive with damage within its first file and CRCs that are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, 'w') as new:
        for i, member in enumerate(old.infolist()):
            stored = old.read(member)
            if i == 0:
                for _ in range(int(random.integers(1, 4))):
                    stored = damaged(stored, random, ['flip', 'flip', 'cut', 'overwritten'][int(random.integers(4))])
                    stored = stored or b'\x80'
            new.writestr(member.filename, stored)
    return out.getvalue()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('name', ['torch', 'npz'])
def test_damage_under_a_right_crc_is_a_clean_error_or_a_load(tmp_path, name, fuzz):
    path, random = tmp_path / 'weights', np.random.default_rng(5)
    WRITERS[name](path, some_arrays())
    content = path.read_bytes()
    for _ in range(400 * fuzz):
        case = rezipped(content, random)
        path.write_bytes(case)
        with contextlib.suppress(ValueError):
            try:
                read = files.read_arrays(path)
            except ValueError as error:
                assert str(error).startswith(str(path)), error
                raise
            assert sum(array.nbytes for array in read.values()) <= 2 * len(case)

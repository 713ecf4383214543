import json

import ml_dtypes
import numpy as np
import pytest

from avmae_jax.weights import safetensors


def make_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        'b/kernel': rng.normal(size=(3, 5)).astype(np.float32),
        'a': rng.normal(size=7).astype(ml_dtypes.bfloat16),
        'half': rng.normal(size=(2, 1, 3)).astype(np.float16),
        'wide': rng.normal(size=2),
        'scalar': np.asarray(3.5, np.float32),
        'empty': np.zeros((0, 4), np.float32),
        'count': rng.integers(-9, 9, 4),
        'flags': np.asarray([True, False, True]),
        'bytes': rng.integers(0, 256, 3).astype(np.uint8),
    }


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def test_reading_undoes_writing_bit_for_bit(tmp_path):
    path, arrays = tmp_path / 'x.safetensors', make_arrays()
    safetensors.write(path, arrays, {'format': 'ours'})
    assert_equal(safetensors.read(path), arrays)
    header = safetensors.read_header(path)
    assert header.metadata == {'format': 'ours'} and header.data_start % 8 == 0
    before = path.read_bytes()
    safetensors.write(path, dict(reversed(arrays.items())), {'format': 'ours'})
    assert path.read_bytes() == before


def test_arrays_that_do_not_lie_row_by_row_are_written_row_by_row(tmp_path):
    turned = np.arange(6.0).reshape(2, 3).T
    safetensors.write(tmp_path / 'x', {'turned': turned})
    np.testing.assert_array_equal(safetensors.read(tmp_path / 'x')['turned'], turned)


def test_the_library_of_the_format_reads_ours_and_we_read_its(tmp_path):
    library = pytest.importorskip('safetensors.numpy', reason="needs pip install 'avmae_jax[interop]'")
    arrays = make_arrays(1)
    del arrays['a']  # Not every version of the library gives bfloat16 to numpy.
    safetensors.write(tmp_path / 'ours', arrays)
    assert_equal(library.load_file(tmp_path / 'ours'), arrays)
    library.save_file(arrays, tmp_path / 'theirs')
    assert_equal(safetensors.read(tmp_path / 'theirs'), arrays)


def with_header(change, tmp_path):
    """A file with one array whose header was changed."""
    path = tmp_path / 'changed'
    safetensors.write(path, {'x': np.arange(4, dtype=np.float32)})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = (json.dumps(header) if text is None else text).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + length :])
    return path


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda h: h['x'].update(shape=[5]), 'does not fill'),
        (lambda h: h['x'].update(shape=[-4]), 'sizes that are none'),
        (lambda h: h['x'].update(shape=[2**62, 4]), 'does not fill'),
        (lambda h: h['x'].update(shape=[4.0]), 'sizes that are none'),
        (lambda h: h['x'].update(shape=[True] * 2 + [4]), 'sizes that are none'),
        (lambda h: h['x'].update(dtype='F31'), "dtype 'F31'"),
        (lambda h: h['x'].update(dtype=['F32']), 'dtype'),
        (lambda h: h['x'].update(data_offsets=[4, 20]), 'where 0 was due'),
        (lambda h: h['x'].update(data_offsets=[0, 16, 16]), 'sizes that are none'),
        (lambda h: h['x'].update(more=1), 'not told by'),
        (lambda h: h.update(y={'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}), 'where 16 was due'),
        (lambda h: h.update(y={'dtype': 'F32', 'shape': [4], 'data_offsets': [16, 32]}), 'the file has'),
        (lambda h: h.update(__metadata__={'a': 1}), 'no table of texts'),
        (lambda h: h.clear(), 'the file has'),
        (lambda h: '[]', 'no table of names'),
        (lambda h: '{"x": 1', 'cannot be read as safetensors'),
        (lambda h: '[' * 5000, 'cannot be read as safetensors'),
        (lambda h: '{"x": {}, "x": {}}', 'twice'),
    ],
)
def test_a_header_that_does_not_fit_the_file_is_refused(change, message, tmp_path):
    path = with_header(change, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        safetensors.read(path)
    assert str(path) in str(caught.value)


def test_a_cut_or_lengthened_file_is_refused_wherever_it_is_cut(tmp_path):
    path = tmp_path / 'x'
    safetensors.write(path, make_arrays())
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match='cannot be read as safetensors'):
            safetensors.read(path)
    path.write_bytes(data + b'\0')
    with pytest.raises(ValueError, match='the file has'):
        safetensors.read(path)


def test_a_header_that_claims_to_be_huge_takes_no_memory(tmp_path):
    path = tmp_path / 'x'
    path.write_bytes((2**62).to_bytes(8, 'little') + b'{}')
    with pytest.raises(ValueError, match='the header should have'):
        safetensors.read(path)


def test_random_bytes_end_in_a_sentence_or_in_arrays(tmp_path, fuzz):
    path, rng = tmp_path / 'x', np.random.default_rng(0)
    safetensors.write(path, make_arrays())
    whole = path.read_bytes()
    for _ in range(1500 * fuzz):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)
        try:
            found = safetensors.read(path)
        except ValueError as error:
            assert 'cannot be read as safetensors' in str(error)
        else:
            assert sum(array.nbytes for array in found.values()) <= len(whole)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_no_finite_number_is_named(dtype, value):
    arrays = {'good': np.ones(2, dtype), 'bad': np.asarray([1, value], dtype), 'count': np.arange(3)}
    with pytest.raises(ValueError, match="'bad'"):
        safetensors.check_finite(arrays)
    safetensors.check_finite({'good': arrays['good'], 'count': arrays['count']})


def test_what_the_format_has_no_name_for_is_not_written(tmp_path):
    with pytest.raises(ValueError, match='cannot be stored'):
        safetensors.write(tmp_path / 'x', {'x': np.ones(2, np.complex64)})

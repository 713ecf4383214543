import os
import pickle
import threading

import numpy as np
import pytest

from avmae_jax.data import tfrecord


@pytest.fixture
def payloads():
    rng = np.random.default_rng(0)
    return [rng.bytes(n) for n in (0, 1, 100, 5000, 17)]


@pytest.fixture
def path(tmp_path, payloads):
    path = tmp_path / 'x.tfrecord'
    path.write_bytes(b''.join(tfrecord.frame_record(payload) for payload in payloads))
    return path


def open_file(path):
    return tfrecord.TFRecordFile(path, tfrecord.scan_index(path))


def test_record_i_is_what_was_written(path, payloads):
    file = open_file(path)
    assert [file[i] for i in range(len(file))] == payloads
    assert [payload for _, _, payload in tfrecord.scan_records(path)] == payloads


def test_framing_is_that_of_tensorflow(reference):
    theirs = reference / 'data' / 'tiny_dmvr.tfrecord'  # Written by TensorFlow.
    framed = [tfrecord.frame_record(payload) for _, _, payload in tfrecord.scan_records(theirs)]
    assert b''.join(framed) == theirs.read_bytes()


def test_no_flipped_bit_gets_through(path, payloads):
    data = path.read_bytes()
    index = tfrecord.scan_index(path)
    rng = np.random.default_rng(1)
    for at in [*range(40), *rng.integers(0, len(data), 60).tolist()]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        file = tfrecord.TFRecordFile(path, index)
        wrong = int(np.searchsorted(index[:, 0], at, side='right')) - 1
        for i, payload in enumerate(payloads):
            if i == wrong:
                with pytest.raises(tfrecord.DamagedRecordError, match=f'at byte {index[i, 0]}'):
                    file[i]
            else:
                assert file[i] == payload


def test_a_cut_file_is_damaged_from_the_cut_on(path, payloads):
    index = tfrecord.scan_index(path)
    os.truncate(path, int(index[3, 0]) + 200)
    file = tfrecord.TFRecordFile(path, index)
    assert [file[i] for i in range(3)] == payloads[:3]
    for i in (3, 4):
        with pytest.raises(tfrecord.DamagedRecordError, match=r'cut short|damaged'):
            file[i]
    with pytest.raises(tfrecord.DamagedRecordError, match='ends behind the file'):
        tfrecord.scan_index(path)


def test_the_index_is_the_text_that_tfrecord2idx_writes(path, payloads, tmp_path):
    sizes = [len(payload) + 16 for payload in payloads]
    text = tfrecord.format_index(sizes)
    assert text.splitlines()[:3] == ['0 16', '16 17', '33 116']
    (tmp_path / 'x.index').write_text(text)
    np.testing.assert_array_equal(tfrecord.read_index(tmp_path / 'x.index'), tfrecord.scan_index(path))


@pytest.mark.parametrize('text', ['0 16\n17 5\n', '4 16\n', '0 16 3\n', 'a b\n'])
def test_an_index_with_holes_or_words_is_refused(tmp_path, text):
    (tmp_path / 'x.index').write_text(text)
    with pytest.raises(ValueError, match=r'x\.index'):
        tfrecord.read_index(tmp_path / 'x.index')


def test_the_framing_digest_sees_an_exchanged_record(path, payloads):
    before = open_file(path).framing_digest()
    assert before == open_file(path).framing_digest()
    changed = [*payloads[:2], payloads[2][::-1], *payloads[3:]]
    path.write_bytes(b''.join(tfrecord.frame_record(payload) for payload in changed))
    assert open_file(path).framing_digest() != before


def test_an_empty_file_has_no_records(tmp_path):
    (tmp_path / 'empty').write_bytes(b'')
    file = open_file(tmp_path / 'empty')
    assert len(file) == 0 and len(file.framing_digest()) == 64


def test_a_file_is_shared_by_threads_and_pickles(path, payloads):
    file = open_file(path)
    copy = pickle.loads(pickle.dumps(file))
    wrong = []

    def read():
        for _ in range(50):
            wrong.extend(i for i in range(5) if copy[i] != payloads[i])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_descriptors_are_closed_with_the_file(path):
    file = open_file(path)
    file[0]
    count = len(os.listdir('/proc/self/fd'))
    del file
    assert len(os.listdir('/proc/self/fd')) == count - 1


def test_object_stores_are_read_through_epath(path, payloads, monkeypatch):
    local = open_file(path)
    remote = tfrecord.TFRecordFile(f'file://{path}', local.index)
    monkeypatch.setattr(os, 'pread', None)
    monkeypatch.setattr(tfrecord.epath, 'Path', lambda name: path if str(name) == f'file://{path}' else None)
    assert [remote[i] for i in range(len(remote))] == payloads

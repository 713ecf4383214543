"""Writing into an object store; its stand-in is fsspec's store in memory, behind epath's own code for gs://."""

import shutil

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from avmae_jax.data import schema, sources
from avmae_jax.data.prepare import clips, job, manifest, place

SETTINGS = clips.Settings(fps=5.0, short_side=32)
OUTPUT = 'gs://bucket/plain'


class Store(MemoryFileSystem):
    """Keeps the order of writing; `broken` names a file that cannot be written. It has no rename."""

    store: dict = {}
    pseudo_dirs = ['']
    cachable = False
    written: list[str] = []
    broken = ''

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix('gs://'))

    def _open(self, path, mode='rb', **more):
        name = path.rpartition('/')[2]
        if mode == 'wb':
            if self.broken and name.endswith(self.broken):
                raise RuntimeError('503 Service Unavailable')
            self.written.append(name)
        return super()._open(path, mode=mode, **more)

    def mv(self, *paths, **more):
        raise AssertionError('an object store has no rename')


@pytest.fixture
def store(monkeypatch, tmp_path):
    store = Store()
    for kind in (Store.store, Store.written):
        kind.clear()
    Store.pseudo_dirs[:] = ['']
    monkeypatch.setattr(Store, 'broken', '')
    monkeypatch.setattr(type(backend.fsspec_backend), '_get_filesystem', lambda self, name: _filesystem(store, name))
    monkeypatch.setattr(place.tempfile, 'gettempdir', lambda: str(tmp_path))
    return store


def _filesystem(store, name):
    return store if name == 'gcs' else fsspec.filesystem(name)


@pytest.fixture(scope='module')
def rows(plain_folder):
    return manifest.read_manifest([str(plain_folder / 'clips.csv')])


def run(rows, output):
    return job.run(rows, SETTINGS, str(output), 'plain', num_workers=1, num_shards=2)


def contents(store):
    return {
        path.removeprefix('/bucket/plain/'): file.getvalue()
        for path, file in store.store.items()
        if path.count('/') == 3
    }


def test_a_store_gets_the_files_that_a_disk_gets_and_the_dataset_last(rows, store, tmp_path):
    run(rows, tmp_path / 'disk')
    run(rows, OUTPUT)
    assert contents(store) == {f.name: f.read_bytes() for f in (tmp_path / 'disk').iterdir() if f.is_file()}
    assert store.written[-1] == schema.INFO_FILE
    for i in range(2):
        shard = f'plain-train.tfrecord-0000{i}-of-00002'
        at = [store.written.index(name) for name in (shard, f'{shard}.index', f'{shard}.json')]
        assert at == sorted(at)
    assert not list(tmp_path.glob('avmae_prepare*'))  # Nothing stays on this machine.
    assert len(sources.open_source(OUTPUT, 'train')) == 8


def test_a_store_that_fails_is_told_and_a_second_run_does_only_what_is_missing(rows, store, monkeypatch, tmp_path):
    monkeypatch.setattr(Store, 'broken', 'test.tfrecord-00001-of-00002.index')
    with pytest.raises(OSError, match='gs://bucket/plain cannot be written to .503'):
        run(rows, OUTPUT)
    assert schema.INFO_FILE not in contents(store)
    monkeypatch.setattr(Store, 'broken', '')
    assert run(rows, OUTPUT).clips_written == 0  # It was written, and had only not been copied.
    shard = 'plain-train.tfrecord-00001-of-00002'
    whole = contents(store)
    store.pipe_file(f'/bucket/plain/{shard}', whole[shard][:-1])
    assert run(rows, OUTPUT).clips_written == 4
    assert contents(store) == whole
    for leftover in tmp_path.glob('avmae_prepare*'):
        shutil.rmtree(leftover)


def test_other_things_in_the_store_are_left_alone(rows, store):
    store.pipe_file('/bucket/plain/thesis.txt', b'years of work')
    with pytest.raises(ValueError, match=r"gs://bucket/plain holds \['thesis.txt'\]"):
        run(rows, OUTPUT)


def test_other_settings_in_a_store_are_refused(rows, store):
    run(rows, OUTPUT)
    with pytest.raises(ValueError, match='gs://bucket/plain was begun with other settings: name'):
        job.run(rows, SETTINGS, OUTPUT, 'other', num_workers=1, num_shards=2)

"""What a workdir in an object store keeps of earlier sessions; the stand-in is fsspec's store in memory for gs://."""

import fsspec
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from avmae_jax import settings
from avmae_jax.training import goodput, writer

WORKDIR = epath.Path('gs://bucket/run')


class Store(MemoryFileSystem):
    """As gcsfs: a file that is opened to grow begins anew, and is there once it is closed."""

    store: dict = {}
    pseudo_dirs = ['']
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix('gs://'))

    def _open(self, path, mode='rb', **more):
        return super()._open(path, mode=mode.replace('a', 'w'), **more)


class NoEvents:
    """tensorboardX writes into stores by a library of its own."""

    def __init__(self, *_):
        self.write_event = self.flush = self.close = lambda *_: None


@pytest.fixture(autouse=True)
def store(monkeypatch):
    store = Store()
    Store.store.clear()
    Store.pseudo_dirs[:] = ['']
    monkeypatch.setattr(
        type(backend.fsspec_backend),
        '_get_filesystem',
        lambda self, name: store if name == 'gcs' else fsspec.filesystem(name),
    )
    monkeypatch.setattr(writer, 'EventsWriter', NoEvents)


def test_figures_of_a_killed_session_stay_up_to_where_the_next_one_begins():
    killed = writer.MetricWriter(WORKDIR)
    for step in range(1, 6):
        killed.write_scalars(step, {'loss': step})
        killed.flush()  # And no close.
    again = writer.MetricWriter(WORKDIR, start_step=3)
    again.write_scalars(4, {'loss': 4.5})
    again.close()
    lines = [(line['step'], line['loss']) for line in writer.read_scalars(WORKDIR)]
    assert lines == [(1, 1), (2, 2), (3, 3), (4, 4.5)]


def test_goodput_of_all_sessions_is_kept():
    for first, last in ((0, 5), (3, 9)):
        account = goodput.Account(WORKDIR)
        account.begin_steps(first)
        for step in (last - 1, last):
            account.write(step, 0.0)
    assert [(one['first_step'], one['step']) for one in goodput.read(WORKDIR)] == [(0, 5), (3, 9)]


def test_settings_take_the_place_of_the_old_ones():
    for seed in (1, 2):
        settings.save_config({'seed': seed}, WORKDIR)
    assert settings.load_config(WORKDIR) == {'seed': 2}
    assert [path.name for path in WORKDIR.iterdir()] == ['config.json']

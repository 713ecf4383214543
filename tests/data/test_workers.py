import gc
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import grain
import numpy as np
import pytest

from avmae_jax.data import batches, slots, sources, views, workers
from avmae_jax.data import stream as stream_lib

VIEW = views.View(
    video=views.VideoView(num_frames=3, frame_seconds=0.2, short_side=40, crop_size=24),
    audio=views.AudioView(seconds=0.8),
)


ROOT = pathlib.Path(workers.__file__).parents[2]


@pytest.fixture(scope='module')
def source(toy_folder):
    return sources.open_source(toy_folder)


def open_stream(source, **options):
    return batches.train_stream(source, VIEW, **{'batch_size': 4, 'seed': 0, 'num_steps': 7, **options})


def same(left, right):
    media = all(np.array_equal(left.media[m], right.media[m]) for m in left.media)
    return media and np.array_equal(left.record, right.record) and np.array_equal(left.seed, right.seed)


def running(pid):
    try:
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=30.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(('num_workers', 'num_threads'), [(1, 2), (2, 1), (3, 2)])
def test_batches_are_the_same_for_any_number_of_workers_and_threads(source, num_workers, num_threads):
    with open_stream(source) as stream:
        expected = list(stream)
    for start in (0, 3):
        with open_stream(source, start_step=start, num_workers=num_workers, num_threads=num_threads) as stream:
            found = list(stream)  # Holds all batches, more than there are slots.
        assert len(found) == 7 - start
        assert all(same(ours, theirs) for ours, theirs in zip(found, expected[start:], strict=True))


def test_evaluation_too(source):
    found = []
    for num_workers in (0, 2):
        with batches.eval_stream(source, VIEW, 4, num_workers=num_workers) as stream:
            found.append(list(stream))
    assert len(found[0]) == 3 and all(same(a, b) for a, b in zip(*found, strict=True))


def test_workers_import_neither_jax_nor_tensorflow(source):
    with open_stream(source, num_workers=1, num_steps=1000) as stream:
        next(stream)
        (pid,) = stream.worker_pids
        maps = pathlib.Path(f'/proc/{pid}/maps').read_text()
    assert 'libav' in maps and 'numpy' in maps  # These it needs, so the test would see the others.
    assert not [name for name in ('jaxlib', 'tensorflow', 'torch') if name in maps]


def test_of_the_input_path_only_grain_imports_jax():
    code = textwrap.dedent("""
        import sys
        from avmae_jax.data import mixing, sources, views, workers
        assert not {'jax', 'grain'} & set(sys.modules)
        sys.modules['jax'] = None
        from avmae_jax.data import batches
        print(*sys.modules)
    """)
    found = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert 'grain' in found.split()
    assert not set(found.split()) & {'jaxlib', 'tensorflow', 'tensorflow_datasets', 'flax'}


def test_a_worker_starts_without_a_word(source, capfd):
    with open_stream(source, num_workers=1) as stream:
        next(stream)
    assert capfd.readouterr().err == ''


def test_a_batch_reaches_the_consumer_without_a_copy(source):
    with open_stream(source, num_workers=1) as stream:
        batch = next(stream)
        shared = np.frombuffer(stream._loader._memory, np.uint8)
        arrays = [*batch.media.values(), *batch.present.values(), *batch.labels.values(), batch.record, batch.damaged]
        assert all(np.shares_memory(array, shared) and array.ctypes.data % 64 == 0 for array in arrays)
        del shared


class Addressed(grain.transforms.Map):
    """Stands for a transformation that somebody puts behind ours: arrays of its own, and one of ours."""

    def __init__(self, make_batch):
        self.make_batch, self.source = make_batch, make_batch.source

    def map(self, places):
        batch = self.make_batch.map(places)
        return batch._replace(weight=batch.media['video'] / 255, labels={'addressed': batch.media['audio'][:2]})

    def empty(self, num_clips, make):
        return self.make_batch.empty(num_clips, make)


def test_what_lies_outside_the_slot_reaches_the_consumer_too(source):
    places, make_batch = batches._train(source, VIEW, 4, 0, 5, 0, 1, 1)
    with open_stream(source, num_steps=5) as stream:
        expected = list(stream)
    for num_workers in (0, 1):
        with stream_lib.Stream(places, Addressed(make_batch), range(5), num_workers, 1, 0.0, 60.0) as stream:
            for ours, theirs in zip(stream, expected, strict=True):
                assert same(ours, theirs)
                np.testing.assert_array_equal(ours.weight, theirs.media['video'] / 255)
                np.testing.assert_array_equal(ours.labels['addressed'], theirs.media['audio'][:2])


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_batch_stays_as_it_is_for_as_long_as_somebody_holds_it(source, num_workers):
    with open_stream(source, num_workers=num_workers, num_steps=40) as stream:
        kept, copies = [], []
        for batch in stream:
            part = batch.media['video'][1:, :, ::2]  # A view of a view.
            kept.append(part)
            copies.append(part.copy())
            if len(kept) > 3:
                np.testing.assert_array_equal(kept.pop(0), copies.pop(0))
            del batch
    for part, copy in zip(kept, copies, strict=True):  # After the end too.
        np.testing.assert_array_equal(part, copy)


def test_jax_may_alias_a_batch(source):
    jax = pytest.importorskip('jax')
    with open_stream(source, num_workers=1, num_steps=30) as stream:
        arrays, copies = [], []
        for batch in stream:
            arrays.append(jax.device_put(batch.media['video'][0]))
            copies.append(batch.media['video'][0].copy())
            del batch
            if len(arrays) > 2:
                np.testing.assert_array_equal(arrays.pop(0), copies.pop(0))


def test_closing_ends_the_workers_and_leaves_nothing(source):
    descriptors = len(os.listdir('/proc/self/fd'))
    shared = set(os.listdir('/dev/shm'))
    stream = open_stream(source, num_workers=2, num_steps=1000)
    batch = next(stream)
    pids = stream.worker_pids
    assert len(pids) == 2 and all(map(running, pids))
    stream.close()
    assert not any(map(running, pids))
    stream.close()  # Once more does no harm.
    with pytest.raises(workers.LoaderError, match='closed'):
        next(stream)
    del batch, stream
    gc.collect()
    assert wait_until(lambda: len(os.listdir('/proc/self/fd')) <= descriptors)
    assert set(os.listdir('/dev/shm')) <= shared


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_stream_that_is_forgotten_or_read_to_its_end_closes_itself(source, num_workers):
    stream = open_stream(source, num_workers=num_workers, num_steps=3)
    pids = stream.worker_pids
    assert len(list(stream)) == 3 and not any(map(running, pids))
    stream = open_stream(source, num_workers=num_workers, num_steps=1000)
    next(stream)
    pids = stream.worker_pids
    del stream
    gc.collect()
    assert wait_until(lambda: not any(map(running, pids)))


def test_an_error_in_the_loop_closes_the_stream(source):
    with pytest.raises(ZeroDivisionError), open_stream(source, num_workers=1, num_steps=1000) as stream:
        pids = stream.worker_pids
        next(stream)
        raise ZeroDivisionError
    assert not any(map(running, pids))


@pytest.mark.parametrize(('number', 'hint'), [(signal.SIGKILL, 'memory'), (signal.SIGBUS, 'shorter')])
def test_a_worker_that_dies_is_named_within_seconds(source, number, hint):
    with open_stream(source, num_workers=2, num_steps=10**6) as stream:
        next(stream)
        pids = stream.worker_pids
        os.kill(pids[1], number)
        began = time.monotonic()
        with pytest.raises(workers.LoaderError, match=rf'worker 1 \(pid {pids[1]}\) was killed.*{number.name}.*{hint}'):
            for _ in range(100):
                next(stream)
        assert time.monotonic() - began < 30
    assert not any(map(running, pids))


def test_a_worker_that_hangs_is_named_with_what_it_reads(source):
    with open_stream(source, num_workers=2, num_steps=10**6) as stream:
        for _ in range(4):  # Until both have started.
            next(stream)
        stream.stall_seconds = 2.0
        pids = stream.worker_pids
        os.kill(pids[0], signal.SIGSTOP)
        message = rf'no batch for 2 s \(stall_seconds\): waiting for step \d+ from loader worker 0 \(pid {pids[0]}, '
        with pytest.raises(workers.StalledError, match=message + 'stopped by a signal.*toy-train.tfrecord-0000'):
            for _ in range(100):
                next(stream)
    assert not any(map(running, pids))


class Hanging:
    """A source on a disk that does not answer."""

    def __init__(self, source):
        self.info, self.split, self.spectrogram_shape = source.info, source.split, None
        self._length = len(source)

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        time.sleep(30)

    def where(self, index):
        return f'/slow/disk at byte {index}'


def test_a_hanging_disk_is_an_error_in_threads_too(source):
    with pytest.raises(workers.StalledError, match=r'no batch for 0 s.*the threads of this process.*/slow/disk'):
        with open_stream(Hanging(source), stall_seconds=0.4) as stream:
            next(stream)


def test_a_source_from_a_notebook_works_in_workers(source):
    class Local(sources.ShardedSource):  # Cannot be found by the worker under its name.
        pass

    local = Local(source.files, source.parse, source.info, source.split)
    with open_stream(source) as stream, open_stream(local, num_workers=1) as other:
        assert all(same(ours, theirs) for ours, theirs in zip(other, stream, strict=True))


def test_a_file_that_is_gone_is_named(source):
    gone = pickle.loads(pickle.dumps(source))
    for file in gone.files:
        file.path = '/nowhere/' + pathlib.Path(file.path).name
    for num_workers in (0, 1):
        with (
            pytest.raises(workers.LoaderError, match=r'(?s)/nowhere/toy-train'),
            open_stream(gone, num_workers=num_workers) as stream,
        ):
            next(stream)


def test_interrupts_are_left_to_the_parent(source):
    with open_stream(source, num_workers=1, num_steps=50) as stream:
        next(stream)
        (pid,) = stream.worker_pids
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        for _ in range(10):
            next(stream)
        assert running(pid)


def test_workers_end_with_a_parent_that_is_killed(toy_folder):
    code = textwrap.dedent(f"""
        import time
        from avmae_jax.data import batches, sources, views
        view = views.View(video=views.VideoView(3, 0.2, 40, 24))
        stream = batches.train_stream(sources.open_source({str(toy_folder)!r}), view, 4, 0, num_workers=2)
        next(stream)
        print(*stream.worker_pids, flush=True)
        time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.stdout.close()
    assert len(pids) == 2 and all(map(running, pids))
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(map(running, pids)))


def test_too_little_memory_is_an_error_before_anything_starts(source, monkeypatch):
    monkeypatch.setattr(slots, 'available_memory', lambda: 10_000)
    with pytest.raises(ValueError, match=r'needs [\d,]+ bytes of memory.*has 10,000.*num_workers.*batch_size'):
        open_stream(source, num_workers=2)


def test_where_there_is_no_anonymous_memory_dev_shm_serves_and_is_checked(source, monkeypatch):
    monkeypatch.delattr(os, 'memfd_create')
    shared = set(os.listdir('/dev/shm'))
    with open_stream(source, num_workers=1) as stream:
        assert len(list(stream)) == 7
    assert set(os.listdir('/dev/shm')) <= shared
    real = os.statvfs

    def small(path):
        found = real(path)
        return type('Status', (), {'f_bavail': 16, 'f_frsize': found.f_frsize})

    monkeypatch.setattr(os, 'statvfs', small)
    with pytest.raises(ValueError, match=r'needs [\d,]+ bytes of shared memory and /dev/shm has 65,536.*--shm-size'):
        open_stream(source, num_workers=1)


def test_time_spent_waiting_is_counted(source):
    with open_stream(source, num_workers=1) as stream:
        waited = 0.0
        for _ in range(7):
            began = time.monotonic()
            next(stream)
            waited += time.monotonic() - began
            time.sleep(0.02)  # The consumer's own work does not count.
    assert 0.02 < stream.wait_seconds <= waited


def test_a_stream_says_at_which_step_it_is(source):
    with open_stream(source, start_step=3) as stream:
        assert stream.step == 3 and len(stream) == 4
        next(stream)
        assert stream.step == 4


# -- How many there are where nobody says --


@pytest.mark.parametrize(
    ('cores', 'num_threads', 'expected'),
    [(1, 2, 0), (2, 2, 0), (3, 2, 1), (4, 2, 1), (8, 2, 3), (8, 1, 6), (26, 2, 12), (34, 2, 16), (224, 2, 16)],
)
def test_workers_times_threads_are_the_cores_that_the_step_leaves(monkeypatch, cores, num_threads, expected):
    monkeypatch.setattr(workers, 'usable_cores', lambda: cores)
    assert workers.default_num_workers(num_threads) == expected


@pytest.mark.parametrize(
    ('limit', 'expected'),
    [('max 100000', 6), ('400000 100000', 4), ('50000 100000', 1), ('800000 100000', 6), (None, 6)],
)
def test_cores_are_those_of_the_affinity_and_of_the_container(monkeypatch, limit, expected):
    def read_text(path):
        assert str(path) == '/sys/fs/cgroup/cpu.max'
        if limit is None:
            raise FileNotFoundError
        return limit

    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(6)))
    monkeypatch.setattr(os, 'cpu_count', lambda: 224)
    monkeypatch.setattr(pathlib.Path, 'read_text', read_text)
    assert workers.usable_cores() == expected

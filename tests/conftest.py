"""Eight CPU devices for every test, and silent broadcasting over missing dimensions as an error."""

import contextlib
import csv
import functools
import json
import os
import pathlib
import runpy
import subprocess
import sys
import types
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from absl import flags

# Tests compile much and compute little, and on two cores two at a time. Processes that tests start inherit this.
COMPILE_FAST = ['--xla_backend_optimization_level=0', '--xla_llvm_disable_expensive_passes=true']
if jax.__version_info__ < (0, 11):
    # Half the time of a kernel, where LLVM does not optimise it. XLA ends a process that names a flag it does not know,
    # and a later one may not know these.
    COMPILE_FAST += ['--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1']
os.environ.setdefault('XLA_FLAGS', ' '.join(COMPILE_FAST))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
jax.config.update('jax_platforms', os.environ['JAX_PLATFORMS'])
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# All processes, and the next run of the tests, share what was compiled. `make clean` throws it away.
CACHE = {
    'jax_compilation_cache_dir': str(REPOSITORY / '.pytest_cache' / 'compiled'),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
}
for name, value in CACHE.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
sys.path.append(str(REPOSITORY))  # `configs` are not installed; they are read from the checkout.


def _let_flags_of_verbs_share_names() -> None:
    """Each verb is a process of its own; only tests import several into one, where absl refuses equal names."""
    define = flags.FlagValues.__setitem__

    def define_again(self, name, flag):
        flag.allow_override = True
        define(self, name, flag)

    flags.FlagValues.__setitem__ = define_again


_let_flags_of_verbs_share_names()


def pytest_addoption(parser):
    parser.addoption(
        '--update-golden', action='store_true', help='Write the parameter tables in tests/golden instead of comparing.'
    )
    parser.addoption('--fuzz', type=int, default=1, help='How many times as many damaged files readers are tried with.')


# They start processes and wait for them; begun last, they would leave the other worker idle at the end.
LONG = tuple(f'test_{name}.py' for name in ('drills', 'local', 'finetune', 'processes', 'evaluate', 'convert'))


def pytest_collection_modifyitems(items):
    """Long files first: with --no-loadscope-reorder workers take files in this order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope='module', autouse=True)
def _forget_what_was_compiled():
    """A worker would hold the programs of all its files, gigabytes; what is needed again is in CACHE."""
    yield
    jax.clear_caches()


@pytest.fixture(scope='session')
def repository() -> pathlib.Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope='session')
def reference() -> pathlib.Path:
    """The folder with numbers of the public reference models."""
    folder = pathlib.Path(os.environ.get('AVMAE_REFERENCE', REPOSITORY.parent / 'shared' / 'reference'))
    if not folder.is_dir():
        pytest.skip(f'{folder} is not there; set AVMAE_REFERENCE to the folder with the reference numbers.')
    return folder


@pytest.fixture(scope='session')
def tiny_clips(tmp_path_factory) -> pathlib.Path:
    """clips.csv of 12 made-up mp4 clips of 2 s, 64 px: 9 classes, 9 clips to train on and 3 to test."""
    from avmae_jax.data.generate import write_clips

    table = write_clips(tmp_path_factory.mktemp('clips'), 12, seed=7, size=64, fps=12.5, num_processes=0)
    rows = list(csv.DictReader(table.open()))
    with table.open('w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, 'split': 'train' if i < 9 else 'test'} for i, row in enumerate(rows))
    return table


@pytest.fixture(scope='session')
def tiny_dataset(tiny_clips, tmp_path_factory) -> pathlib.Path:
    """The same as a prepared dataset of two shards a split. Do not change it: copy it first."""
    folder = tmp_path_factory.mktemp('prepared') / 'tiny'
    command = ['-m', 'avmae_jax.prepare', f'--input={tiny_clips}', f'--output={folder}', '--num_shards=2']
    subprocess.run(
        [sys.executable, *command, '--num_workers=1', '--short_side=64'], check=True, timeout=120, cwd=REPOSITORY
    )
    return folder


# configs/tiny.py made small enough to compile in seconds; values as flags and in Python alike.
SMALLEST = {
    'batch_size': 8,
    'num_steps': 300,
    'video.num_frames': 2,
    'video.short_side': 32,
    'video.crop_size': 32,
    'audio.seconds': 0.32,
    'preprocess.num_spec_frames': 32,
    'preprocess.num_mel_bins': 32,
    'model.encoder.size.width': 16,
    'model.encoder.size.num_heads': 2,
    'model.encoder.size.mlp_width': 32,
    'model.encoder.size.num_layers': 2,
    'model.encoder.fusion_layer': 1,
    'model.decoder.size.width': 16,
    'model.decoder.size.num_layers': 1,
    'model.decoder.size.mlp_width': 32,
    'objective.mask_ratio.video': 0.5,
    'objective.mask_ratio.audio': 0.5,
    'optimizer.warmup_steps': 4.0,
    'checkpoint.every_steps': 25,
    'report.pictures_every_steps': 0,
    'evaluation.every_steps': 0,
    'data.num_workers': 0,
}


# configs/finetune/tiny.py likewise; its streams meet in the second of two layers.
SMALLEST_FINETUNING = {
    **{name: value for name, value in SMALLEST.items() if not name.startswith(('model.decoder', 'objective'))},
    'preprocess.spec_augment.frequency_width': 8,
    'preprocess.spec_augment.time_width': 8,
}


@pytest.fixture(scope='session')
def smallest() -> dict[str, object]:
    """Settings that turn configs/tiny.py into the smallest thing that trains."""
    return dict(SMALLEST)


@pytest.fixture(scope='session')
def smallest_finetuning() -> dict[str, object]:
    """The same for configs/finetune/tiny.py."""
    return dict(SMALLEST_FINETUNING)


@pytest.fixture(scope='session')
def small_config(tiny_dataset):
    """(argument of the config, **changes) -> the smallest config as plain dicts, on `tiny_dataset`."""

    from configs import tiny

    return functools.partial(_make_small, tiny, SMALLEST, tiny_dataset)


@pytest.fixture(scope='session')
def small_finetuning(tiny_dataset):
    """The same of configs/finetune/tiny.py."""
    from configs.finetune import tiny

    return functools.partial(_make_small, tiny, SMALLEST_FINETUNING, tiny_dataset)


def _make_small(module, smallest: dict, dataset: pathlib.Path, arguments: str | None = None, **changes: object) -> dict:
    from avmae_jax import settings

    config = module.get_config(arguments)
    there = settings.flatten(config.to_dict())
    for name, value in {**smallest, 'data.path': str(dataset), **changes}.items():
        if name in there:  # Not so: sections of a modality that is left out, the fusion layer of most encoders.
            config.update_from_flattened_dict({name: value})
    return settings.to_plain(config)


@pytest.fixture(scope='session')
def save_run():
    """(folder, config, steps=(3,), seed=0) -> a run in `folder` with a checkpoint a step, each of other random numbers.

    No parameter is left at what it is initialised with: zeros and ones would hide mistakes.
    """

    return _save_run


def _save_run(folder: pathlib.Path, config: dict, steps: tuple[int, ...] = (3,), seed: int = 0) -> pathlib.Path:
    import numpy as np

    from avmae_jax import experiment, settings
    from avmae_jax.checkpoints.manager import Checkpoints
    from avmae_jax.training.state import to_items

    source = experiment.open_train_sources(config)
    parts = experiment.build(config, source)
    state = jax.jit(experiment.make_init(parts))(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def random_params():
        noise = lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
        return jax.tree.map(noise, jax.tree.map(np.asarray, state.params))

    checkpoints = Checkpoints(folder / 'checkpoints', keep_last=len(steps))
    for step in steps:
        # Where the optimiser keeps an average of the parameters, it is of others than these.
        state = state._replace(
            step=state.step * 0 + step, params=random_params(), opt_state=parts.optimizer.init(random_params())
        )
        state = jax.tree.map(jax.numpy.asarray, state)
        checkpoints.save(step, to_items(state), experiment.make_meta(config, source, parts.shapes, state))
    checkpoints.close()
    settings.save_config(config, folder)
    return folder


@pytest.fixture(scope='session')
def run_script(repository):
    """(path in the repository) -> a context with what the script defines; its flags are gone after it."""

    @contextlib.contextmanager
    def run(path: str) -> Iterator[types.SimpleNamespace]:
        before = {name: flags.FLAGS[name] for name in flags.FLAGS}
        try:
            yield types.SimpleNamespace(**runpy.run_path(str(repository / path), run_name=pathlib.Path(path).stem))
        finally:
            for name in [name for name in flags.FLAGS if flags.FLAGS[name] is not before.get(name)]:
                delattr(flags.FLAGS, name)
                if name in before:  # A flag of a command, which the script has too.
                    flags.FLAGS[name] = before[name]

    return run


ANYTHING = (None, True, 'x', [], {}, -1, 0, 10**9, 10**400, 1e-300, 1e308, float('nan'))


@pytest.fixture(scope='session')
def fuzz(request) -> int:
    """How many times as many damaged files readers are tried with, for once in a while: --fuzz=20 --timeout=0."""
    return request.config.getoption('--fuzz')


@pytest.fixture(scope='session')
def broken_json(fuzz):
    """(JSON, seed) -> (what was done, text): other values in its leaves, names left out, and damage to its bytes."""

    def broken(
        content: object, num_leaves: int = 250 * fuzz, num_flips: int = 100 * fuzz, seed: int = 0
    ) -> Iterator[tuple[str, str]]:
        leaves = list(_broken_leaves(content))
        for where, changed in leaves[:: 1 + len(leaves) // num_leaves]:  # Of many, such as names of arrays, some.
            yield where, json.dumps(changed)
        text, random = json.dumps(content).encode(), np.random.default_rng(seed)
        for place, bit in random.integers((len(text), 8), size=(num_flips, 2)):
            flipped = text[:place] + bytes([text[place] ^ (1 << bit)]) + text[place + 1 :]
            yield f'bit {bit} of byte {place} flipped', flipped.decode('latin-1')
        for length in random.integers(len(text), size=20 * fuzz):
            yield f'cut to {length} bytes', text[:length].decode()

    return broken


def _broken_leaves(content: object, where: str = '') -> Iterator[tuple[str, object]]:
    if isinstance(content, dict | list) and content:
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            for place, changed in _broken_leaves(value, f'{where}.{key}'):
                copy = content.copy()
                copy[key] = changed
                yield place, copy
            rest = content.copy()
            rest.pop(key)
            yield f'{where}.{key} left out', rest
    else:
        yield from ((f'{where} = {value!r}', value) for value in ANYTHING)


def _once(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    """Has a function called once for each of its arguments."""
    found, call = {}, getattr(module, name)

    def remembered(*arguments):
        key = repr(arguments)
        if key not in found:
            found[key] = call(*arguments)
        return found[key]

    monkeypatch.setattr(module, name, remembered)


@pytest.fixture
def traced_once(monkeypatch):
    """Has the shapes of parameters traced once for each model: what is broken are arrays, and settings."""
    from avmae_jax.weights import scenic_avmae

    _once(monkeypatch, scenic_avmae, 'looped_shapes')


@pytest.fixture
def read_once(monkeypatch, traced_once):
    """Has files of weights read once: what is broken is the JSON beside them."""
    from avmae_jax.weights import files, scenic_files

    _once(monkeypatch, files, 'read_arrays')
    _once(monkeypatch, scenic_files, 'read_checkpoint')


@pytest.fixture(scope='session')
def assert_read_or_refused():
    """Reads what was broken: a ValueError that names the folder, or the very numbers of the file."""

    from avmae_jax import settings
    from avmae_jax.weights import scenic_avmae

    def check(read: Callable[[], object], folder: pathlib.Path, where: str) -> bool:
        try:
            imported = read()
        except ValueError as error:
            assert str(folder) in str(error) and '\n' not in str(error)[:300], where
            return False
        except Exception as error:
            raise AssertionError(where) from error
        back = scenic_avmae.dump_rows(imported.rows, imported.params)
        assert set(back) == set(imported.arrays), where
        assert all(np.array_equal(back[name], imported.arrays[name]) for name in back), where
        assert all(settings.fits(value, float | bool | str | tuple[float, ...]) for value in imported.settings.values())
        return True

    return check


@pytest.fixture(scope='session')
def start_verb(repository):
    """Starts `python -m avmae_jax.VERB`; what still runs at the end of the session is killed."""
    started = []

    def start(verb: str, *arguments: str, num_devices: int = 1, **more) -> subprocess.Popen:
        environment = {
            **os.environ,
            'JAX_PLATFORMS': 'cpu',
            'JAX_NUM_CPU_DEVICES': str(num_devices),
        }
        process = subprocess.Popen(
            [sys.executable, '-m', f'avmae_jax.{verb}', *arguments],
            cwd=repository,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **more,
        )
        started.append(process)
        return process

    yield start
    _kill(started)


@pytest.fixture
def start_training(start_verb, tiny_dataset, smallest):
    """Starts `python -m avmae_jax.train` on the smallest config; what still runs at the end of the test is killed."""
    started = []

    def start(workdir: pathlib.Path, *arguments: str, **more) -> subprocess.Popen:
        values = {'data.path': tiny_dataset, **smallest}
        del values['model.encoder.fusion_layer']
        # The encoder with the fewest stacks, as it compiles fastest.
        command = ['--config=configs/tiny.py:encoder=early', f'--workdir={workdir}']
        command += [f'--config.{name}={value}' for name, value in values.items()]
        started.append(start_verb('train', *command, *arguments, **more))
        return started[-1]

    yield start
    _kill(started)


def _kill(started: list[subprocess.Popen]) -> None:
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()

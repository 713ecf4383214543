"""The examples of docs/downstream.md run as they stand, lower the loss, and what they make answers."""

import numpy as np
import pytest

from avmae_jax import pretrained

# Example -> what it needs installed.
EXAMPLES = {'flax': None, 'torch': 'torch', 'transformers': 'transformers'}


@pytest.fixture(scope='module')
def benchmark(run_script):
    with run_script('benchmarks/downstream.py') as names:
        yield names


@pytest.fixture(scope='module')
def folder(save_run, small_config, tmp_path_factory):
    """The three exports, of an encoder whose streams can stand by themselves."""
    from avmae_jax import export

    made = tmp_path_factory.mktemp('downstream')
    trained = pretrained.read_run(save_run(made / 'run', small_config('encoder=early')))
    export.export(made / 'model', trained, 'safetensors', 'float32')
    export.export(made / 'model_torch', trained, 'torch', 'float32')
    export.export(made / 'model_hf', trained.alone('video'), 'huggingface', 'float32')
    return made, trained


@pytest.fixture
def needed(name, folder, monkeypatch):
    """What the example imports."""
    if EXAMPLES[name]:
        pytest.importorskip(EXAMPLES[name], reason="needs pip install 'avmae_jax[interop]'")
    monkeypatch.syspath_prepend(str(folder[0] / 'model_torch'))


@pytest.mark.usefixtures('needed')
@pytest.mark.parametrize('name', EXAMPLES)
def test_an_example_finetunes_what_was_exported(name, folder, benchmark, monkeypatch):
    made, trained = folder
    shapes = trained.row_shapes
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, *shapes['video']), dtype=np.uint8)
    waveforms = rng.uniform(-1, 1, (6, *shapes['audio'])).astype(np.float32)
    batches = [(frames, waveforms, np.asarray([0, 1, 2, 0, 1, 2]))] * 30
    monkeypatch.chdir(made)
    found = benchmark.run_example(name, batches=batches, NUM_CLASSES=3, NUM_STEPS=30)
    assert found['losses'][-1] < 0.9 * found['losses'][0]
    right = np.asarray(found['predict'](frames, waveforms)) == batches[0][2]
    assert right.mean() > 1 / 3


@pytest.mark.usefixtures('needed')
@pytest.mark.parametrize('name', ['torch', 'transformers'])  # Compiling flax's once is enough.
def test_the_benchmark_finetunes_and_scores_on_prepared_clips(name, folder, benchmark, tiny_dataset):
    made, trained = folder
    found = benchmark.finetune(name, trained, str(tiny_dataset), made, head='label', num_steps=2, batch_size=4, seed=0)
    assert found['steps'] == 2 and found['clips'] == 3 and 0 <= found['top-1'] <= 1
    assert found['given'] == ('video' if name == 'transformers' else 'video and audio')
    line = benchmark.table([found]).splitlines()[-1]
    assert line == f'| {name} | {found["given"]} | 2 | {found["top-1"]:.3f} |'


def test_a_document_without_the_block_is_told(benchmark, tmp_path):
    (tmp_path / 'other.md').write_text('<!-- flax -->\n```python\na = 1\n```\n')
    assert benchmark.read_example('flax', tmp_path / 'other.md') == 'a = 1\n'
    with pytest.raises(ValueError, match='0 blocks of Python marked torch'):
        benchmark.read_example('torch', tmp_path / 'other.md')

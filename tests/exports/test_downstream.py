"""The examples of docs/downstream.md run as they stand, and lower the loss."""

import numpy as np
import pytest

from avmae_jax import export, pretrained

EXAMPLES = {'flax': None, 'torch': 'torch', 'transformers': 'transformers'}


@pytest.fixture(scope='module')
def folder(save_run, small_config, tmp_path_factory):
    """The three exports, of an encoder whose streams can stand by themselves."""
    made = tmp_path_factory.mktemp('downstream')
    trained = pretrained.read_run(save_run(made / 'run', small_config('encoder=early')))
    export.export(made / 'model', trained, 'safetensors', 'float32')
    export.export(made / 'model_torch', trained, 'torch', 'float32')
    export.export(made / 'model_hf', trained.alone('video'), 'huggingface', 'float32')
    return made, trained.row_shapes


@pytest.mark.parametrize('name', EXAMPLES)
def test_an_example_finetunes_what_was_exported(name, folder, repository, monkeypatch):
    if EXAMPLES[name]:
        pytest.importorskip(EXAMPLES[name], reason="needs pip install 'avmae_jax[interop]'")
    made, shapes = folder
    code = (repository / 'docs/downstream.md').read_text().split(f'<!-- {name} -->')[1]
    code = code.split('```python\n')[1].split('```')[0]
    rng = np.random.default_rng(0)
    given = {
        'frames': rng.integers(0, 256, (6, *shapes['video']), dtype=np.uint8),
        'waveforms': rng.uniform(-1, 1, (6, *shapes['audio'])).astype(np.float32),
        'labels': np.asarray([0, 1, 2, 0, 1, 2]),
        'NUM_CLASSES': 3,
        'NUM_STEPS': 30,
    }
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(str(made / 'model_torch'))
    exec(compile(code, f'docs/downstream.md ({name})', 'exec'), given)
    assert given['losses'][-1] < 0.9 * given['losses'][0]

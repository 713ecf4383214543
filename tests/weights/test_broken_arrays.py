"""Whatever shape and kind the arrays of a model have that somebody publishes: it is refused, or it is that model."""

import numpy as np
import pytest

from avmae_jax.models.blocks import Compute
from avmae_jax.weights import files, scenic_files, vit
from avmae_jax.weights.formats import FORMATS
from avmae_jax.weights.table import flatten, unflatten
from tests.weights import test_scenic_files, test_vit

LOOP = Compute('float32', scan=False)


def vit_npz(folder):
    with open(folder / 'weights', 'wb') as file:
        np.savez(file, **test_vit.published())
    return 'vit_npz', folder / 'weights', {}


def scenic(name):
    def write(folder):
        config, arrays, kind, given = test_scenic_files.made(name)
        test_scenic_files.write_config(folder, config)
        scenic_files.write_checkpoint(folder / 'weights', arrays)
        return kind, folder / 'weights', given

    return write


def torch_of(kind):
    def write(folder):
        torch = pytest.importorskip('torch', reason="torch is of the extra `interop`: pip install 'avmae_jax[interop]'")
        from tests.weights import test_torch

        model, given = test_torch.PROJECTS[kind]()
        torch.save(test_torch.theirs.randomised(model).state_dict(), folder / 'weights')
        return kind, folder / 'weights', given

    return write


def huggingface_of(name):
    def write(folder):
        pytest.importorskip('transformers', reason="is of the extra `interop`: pip install 'avmae_jax[interop]'")
        from tests.weights import test_huggingface

        return 'huggingface', test_huggingface.saved(test_huggingface.made(name), folder), {}

    return write


PUBLISHED = {
    'vit_npz': vit_npz,
    **{f'scenic {name}': scenic(name) for name in ('autoencoder', 'classifier', 'mbt')},
    **{kind: torch_of(kind) for kind in ('mae', 'audiomae', 'videomae', 'cavmae', 'ast', 'ssast')},
    **{
        name: huggingface_of(name)
        for name in ('ViTMAEForPreTraining', 'ViTForImageClassification', 'VideoMAEForVideoClassification',
                     'ASTForAudioClassification')
    },
}  # fmt: skip

# Format -> what reads its arrays, where that is not files.read_arrays.
READERS = {
    'vit_npz': (vit, 'read_npz'),
    **dict.fromkeys(('scenic_avmae', 'scenic_mbt'), (scenic_files, 'read_msgpack')),
}

NUM_CASES = 60
CHANGES = {
    'a number': lambda x: x.reshape(-1)[0],
    'empty': lambda x: x[:0],
    'flat': lambda x: x.reshape(-1),
    'one axis more': lambda x: x[None],
    'one axis more at the end': lambda x: x[..., None],
    'axes in another order': lambda x: np.ascontiguousarray(x.T),
    'longer': lambda x: np.concatenate([x, x]),
    'wider': lambda x: np.concatenate([x, x], axis=-1),
    'shorter': lambda x: x[:-1],
    'whole numbers': lambda x: x.astype(np.int64),
    'truth values': lambda x: x > 0,
    'too large for float32': lambda x: np.where(x == x, 1e300, 0.0),
    'missing': lambda x: None,
}


def broken(arrays):
    """(what was done, arrays by name) for every change to one of the arrays in turn; layers are alike."""
    chosen = [name for name in arrays if not any(f'{mark}{i}' in name for mark in '._' for i in range(1, 4))]
    for name in chosen:
        for how, change in CHANGES.items() if arrays[name].ndim else ():
            changed = None if how == 'missing' else np.asarray(change(arrays[name]))
            if changed is None or changed.shape != arrays[name].shape or changed.dtype != arrays[name].dtype:
                yield f'{name}: {how}', {n: x for n, x in {**arrays, name: changed}.items() if x is not None}
        yield f'{name} under another name', {f'{n}x' if n == name else n: x for n, x in arrays.items()}


@pytest.mark.parametrize('name', PUBLISHED)
def test_broken_arrays_are_refused_or_the_same_model(
    tmp_path, monkeypatch, traced_once, assert_read_or_refused, name, fuzz
):
    kind, path, given = PUBLISHED[name](tmp_path)
    module, reader = READERS.get(kind, (files, 'read_arrays'))
    whole = getattr(module, reader)(path if path.is_file() else path / 'model.safetensors')
    nested = reader == 'read_msgpack'
    cases = list(broken(flatten(whole['params']) if nested else whole))
    # --fuzz=100 tries all of them: they are some thousand.
    for number in np.random.default_rng(len(cases)).permutation(len(cases))[: NUM_CASES * fuzz]:
        where, arrays = cases[number]

        def read(*_, arrays=arrays):
            # What is checked of any file before it is understood is checked of these too.
            return {'params': unflatten(arrays)} if nested else files.checked(tmp_path, arrays)

        monkeypatch.setattr(module, reader, read)
        assert_read_or_refused(lambda: FORMATS[kind].read(path, LOOP, given), tmp_path, where)

"""Exported programs run without this package, on any number of clips, and say what the model says."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import avmae_jax
from avmae_jax import export, pretrained
from avmae_jax.exports import program

pytest.importorskip('flatbuffers', reason="needs pip install 'avmae_jax[export]'")

# What somebody runs who has nothing but jax and the file.
ALONE = """
import pathlib, sys
import numpy as np

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('avmae_jax', 'flax'):
            raise ImportError(f'{name} is forbidden here')

sys.meta_path.insert(0, Forbid())
import jax
program = jax.export.deserialize(pathlib.Path(sys.argv[1]).read_bytes())
rows = dict(np.load(sys.argv[2]))
found = jax.jit(program.call)(rows)
np.savez(sys.argv[3], **found)
few = program.call({name: x[:1] for name, x in rows.items()})
assert all(np.allclose(few[name], x[:1], atol=1e-5) for name, x in found.items())
print(program.platforms)
"""


def make_rows(shapes, batch=3):
    rng = np.random.default_rng(0)
    make = {
        'audio': lambda shape: rng.uniform(-1, 1, shape).astype(np.float32),
        'video': lambda shape: rng.integers(0, 256, shape, dtype=np.uint8),
    }
    return {m: make[m]((batch, *shape)) for m, shape in shapes.items()}


@pytest.mark.parametrize('name, function', [
    pytest.param('pretrained', 'embed', marks=pytest.mark.slow), ('finetuned', 'classify'),
])  # fmt: skip
def test_a_program_runs_without_this_package(name, function, pretrained_run, finetuned_run, tmp_path):
    run = {'pretrained': pretrained_run, 'finetuned': finetuned_run}[name]
    trained = pretrained.read_run(run)
    export.export(tmp_path / 'out', trained, 'jax_export', 'float32')
    rows = make_rows(trained.row_shapes)
    np.savez(tmp_path / 'rows.npz', **rows)
    files = [tmp_path / 'out' / f'{function}.stablehlo', tmp_path / 'rows.npz', tmp_path / 'found.npz']
    told = subprocess.run(
        [sys.executable, '-c', ALONE, *map(str, files)], check=True, timeout=200, capture_output=True, text=True
    )
    assert told.stdout.strip() == "('cpu', 'cuda', 'tpu')"
    wanted = getattr(avmae_jax.load_pretrained(run), function)(**rows)
    found = np.load(tmp_path / 'found.npz')
    assert set(found) == set(wanted)
    for key in wanted:
        np.testing.assert_allclose(found[key], wanted[key], rtol=1e-5, atol=1e-5)
    assert {path.name for path in (tmp_path / 'out').glob('*.stablehlo')} == {
        'pretrained': {'embed.stablehlo'}, 'finetuned': {'embed.stablehlo', 'classify.stablehlo'},
    }[name]  # fmt: skip


@pytest.mark.slow
def test_parameters_in_bfloat16_halve_the_program(pretrained_run):
    trained = pretrained.read_run(pretrained_run)
    whole, half = (len(program.export_function(trained, 'embed', dtype)) for dtype in ('float32', 'bfloat16'))
    used = {name: x for name, x in trained.params.items() if name != 'decoder'}
    assert whole - half > 1.8 * sum(x.size for x in jax.tree.leaves(used))

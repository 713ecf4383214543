"""Imports point down, and never sideways between the folders of a layer (docs/design.md)."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / 'avmae_jax'
VERBS = {'train', 'evaluate', 'crossvalidate', 'prepare', 'inspect', 'make_clips', 'demo', 'plan', 'convert', 'export'}
# Neighbours of a layer are strangers to each other.
LAYERS = (
    {'structs', 'progress', 'whole'},
    {'ops', 'jobs', 'settings'},
    {'models', 'objectives', 'data', 'parallel'},
    {'checkpoints', 'weights'},
    {'training', 'evaluation'},
    {'planning', 'exports'},
    {'experiment'},
    {'starts', 'subjects'},
    {'checks', 'pretrained'},
    VERBS,
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imported_parts(path: pathlib.Path) -> set[str]:
    """The parts of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: imports are absolute'
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        else:
            continue
        found |= {name.split('.')[1] for name in names if name.startswith('avmae_jax.')}
    return found


FILES = sorted(PACKAGE.rglob('*.py'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part_of(path)
    if own == '__init__':
        return
    assert own in LAYER_OF, f'{own} is in no layer: give it one here and in docs/design.md'
    for other in imported_parts(path) - {own, '__version__'}:
        assert other in LAYER_OF, f'{path} imports {other}, which is in no layer'
        assert LAYER_OF[other] < LAYER_OF[own], f'{path} must not import {other}: it lies no lower'


OUTSIDE = [path for folder in ('configs', 'launch') for path in sorted((PACKAGE.parent / folder).rglob('*.py'))]


@pytest.mark.parametrize('path', OUTSIDE, ids=lambda path: f'{path.parent.name}/{path.name}')
def test_configs_and_launchers_import_nothing_of_the_package(path):
    assert not imported_parts(path)


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_imports_tensorflow(path):
    if path.name == 'avmae_torch.py':
        return  # Exports bring it along; the package reads it as text.
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or '').split('.')[0])
    assert not names & {'tensorflow', 'torch'}


def test_importing_the_training_verb_loads_neither_tensorflow_nor_torch():
    # One of the packages it needs imports torch where it is installed, for nothing that is used here.
    script = "import sys, avmae_jax.train; sys.exit(str({'tensorflow', 'torch'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=PACKAGE.parent, timeout=120, stderr=subprocess.PIPE, text=True
    )
    assert done.stderr.endswith('set()\n'), done.stderr

"""docs/quickstart.ipynb runs from top to bottom in a fresh kernel, and what it showed is kept with it.

Made anew, with a kernel that has the package, by

    QUICKSTART_DIR=quickstart jupyter execute --inplace docs/quickstart.ipynb
"""

import ast
import copy
import pprint
import re

import nbclient
import nbformat
import numpy as np
import pytest

from avmae_jax import settings

MAX_BYTES = 600_000
WITH_PICTURES = ('shards-code', 'loss-code', 'evaluate-code', 'neighbours-code')

# In place of configs/tiny.py, so that it compiles in seconds; `make test` runs the notebook with it.
SMALL_CONFIG = """
import sys

sys.path.append({repository!r})

from configs import tiny


def get_config():
    config = tiny.get_config('encoder=early')
    config.update_from_flattened_dict({values})
    return config
"""


@pytest.fixture(scope='module')
def notebook(repository):
    """As it is kept. Its cells are not to be changed: copy it first."""
    return nbformat.read(repository / 'docs/quickstart.ipynb', as_version=4)


@pytest.fixture
def jupyter(tmp_path, monkeypatch):
    """Jupyter keeps its files away from those of whoever runs the tests."""
    (tmp_path / 'jupyter').mkdir()
    for name in ('IPYTHONDIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR'):
        monkeypatch.setenv(name, str(tmp_path / 'jupyter' / name.lower()))
    monkeypatch.setenv('PYDEVD_DISABLE_FILE_VALIDATION', '1')
    monkeypatch.setenv('QUICKSTART_DIR', str(tmp_path / 'made'))


def code_of(notebook) -> dict[str, str]:
    """Name -> source of the cells with code."""
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == 'code'}


def prose_of(notebook) -> str:
    return '\n'.join(cell.source for cell in notebook.cells if cell.cell_type == 'markdown')


def outputs_of(notebook) -> dict[str, list]:
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == 'code'}


def text_of(outputs) -> str:
    return ''.join(output.text for output in outputs if output.output_type == 'stream')


def execute(notebook, folder):
    """A copy with the outputs of a fresh kernel that was started in an empty folder, and left it so."""
    folder.mkdir()
    made = copy.deepcopy(notebook)
    for cell in made.cells:
        if cell.cell_type == 'code':
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(
        made, timeout=600, kernel_name='python3', resources={'metadata': {'path': folder}}
    ).execute()
    assert not list(folder.iterdir())
    return made


def check_outputs(notebook):
    """Every cell with code ran, in order, without a complaint, and showed what it is there for."""
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code' and cell.id != 'of-the-test']
    counts = [cell.execution_count for cell in cells]
    assert None not in counts and counts == sorted(counts)
    outputs = outputs_of(notebook)
    for name, shown in outputs.items():
        assert {output.output_type for output in shown} <= {'stream', 'display_data'}, name
        assert all(output.name == 'stdout' for output in shown if output.output_type == 'stream'), name
    for name in WITH_PICTURES:
        assert any('image/jpeg' in output.get('data', {}) for output in outputs[name]), name
    assert sum('<audio' in output.get('data', {}).get('text/html', '') for output in outputs['listen-code']) == 2
    figures = {name: [float(x) for x in re.findall(r'\d+\.\d+', text_of(outputs[name]))] for name in outputs}
    assert len(figures['loss-code']) == 8 and len(figures['probe-code']) == 2 * 3 + 3 * 2 + 2 * 2
    assert np.isfinite(figures['loss-code'] + figures['probe-code']).all()
    assert re.search(r'\d+% of \d+ clips .* by chance: \d+%', text_of(outputs['neighbours-code']))
    assert 'model.safetensors' in text_of(outputs['export-code'])
    for modality in ('audio', 'video'):
        assert re.search(rf'encode: {modality} \(1, \d+, \d+\)', text_of(outputs['load-code']))
        assert re.search(rf'embed:  {modality} \(1, \d+\)', text_of(outputs['load-code']))


@pytest.mark.timeout(900)  # Seven processes, one after another.
def test_every_cell_runs_with_a_small_model(notebook, smallest, jupyter, repository, tmp_path, monkeypatch):
    monkeypatch.setenv('QUICKSTART_STEPS', '4')
    monkeypatch.setenv('QUICKSTART_CLIPS', '45')  # The fewest of which some are for testing.
    of_others = ('num_steps', 'model.encoder.fusion_layer', 'optimizer.warmup_steps')
    values = pprint.pformat({name: value for name, value in smallest.items() if name not in of_others})
    config = tmp_path / 'small.py'
    config.write_text(SMALL_CONFIG.format(repository=str(repository), values=values))
    small = copy.deepcopy(notebook)
    place = [cell.id for cell in small.cells].index('setup-code') + 1
    small.cells.insert(place, nbformat.v4.new_code_cell(f'config = {str(config)!r}', id='of-the-test'))
    check_outputs(execute(small, tmp_path / 'empty'))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_as_it_stands_the_model_beats_answers_that_need_none(notebook, jupyter, tmp_path, monkeypatch):
    monkeypatch.delenv('XLA_FLAGS', raising=False)  # Here it computes more than it compiles.
    made = execute(notebook, tmp_path / 'empty')
    check_outputs(made)
    rows = re.findall(r'(audio|video) +(\d\.\d+) +(\d\.\d+) +(\d\.\d+)', text_of(outputs_of(made)['probe-code']))
    assert len(rows) == 2
    for modality, error, nearest, mean in rows:
        assert float(error) < 0.9 * min(float(nearest), float(mean)), modality


def test_it_is_kept_with_its_outputs_and_nothing_of_the_machine(notebook, repository):
    check_outputs(notebook)
    file = repository / 'docs/quickstart.ipynb'
    assert file.stat().st_size < MAX_BYTES
    said = ''.join(text_of(outputs) for outputs in outputs_of(notebook).values())
    assert '$ python -m avmae_jax.train --config=' in said
    assert not re.findall(r'(?<![\w.])[/\\]\w[^\s,]*|\w:\\\S*', said)  # No path begins at a root.


def test_its_code_uses_only_files_that_it_makes(notebook):
    tree = ast.parse('\n'.join(code_of(notebook).values()))
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            assert not re.match(r'[/~]\w|\.\.|\w+://', node.value), node.value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            if ast.unparse(node.left) in ('place', 'root'):
                assert node.right.value == 'configs/tiny.py'
            elif isinstance(node.right.value, str):
                assert ast.unparse(node.left) == 'folder', ast.unparse(node)
    for call in calls_of_run(tree):
        for argument in call.args[1:]:
            if isinstance(argument, ast.JoinedStr):
                (first, *_) = [part for part in argument.values if isinstance(part, ast.FormattedValue)]
                assert ast.unparse(first.value) in ('folder', 'config', 'num_clips')
            elif isinstance(argument, ast.Constant):
                assert '/' not in argument.value


def test_its_verbs_flags_settings_and_links_exist(notebook, repository):
    prose = prose_of(notebook)
    named = re.findall(r'`(?:python -m avmae_jax\.)?(\w+) (--[^`]*)`', prose)
    assert {verb for verb, _ in named} == {'prepare', 'plan', 'evaluate'}
    code = [
        (call.args[0].value, ' '.join(ast.unparse(argument) for argument in call.args[1:]))
        for call in calls_of_run(ast.parse('\n'.join(code_of(notebook).values())))
    ]
    assert [verb for verb, _ in code] == ['make_clips', 'prepare', 'inspect', 'train', 'evaluate', 'export']
    for verb, arguments in named + code:
        defined = (repository / f'avmae_jax/{verb}.py').read_text()
        for flag in set(re.findall(r'--(\w+)', arguments)) - {'help'}:
            assert f"'{flag}'" in defined, (verb, flag)
    config = settings.flatten(settings.read_config(str(repository / 'configs/tiny.py')))
    changed = re.findall(r"^    '([\w.]+)': ", code_of(notebook)['train-code'], re.MULTILINE)
    assert len(changed) == 5 and set(changed) <= set(config)
    links = re.findall(r'\]\(([^)]+)\)', prose)
    assert len(links) > 4
    for link in links:
        assert (repository / 'docs' / link).exists(), link


def calls_of_run(tree) -> list[ast.Call]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == 'run']
    return sorted((call for call in calls if call.args), key=lambda call: call.lineno)

"""What the step of two configs may take on 16 chips of a TPU v5e, by the TPU's own compiler: more is a failure.

`pytest --update-golden tests/planning/test_budgets.py` writes budgets.json anew; a change of it wants a reason.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

BUDGETS = pathlib.Path(__file__).parent / 'budgets.json'
# Small, as each is compiled whenever the tests run; layers are scanned, so that more of them would say no more.
ALL = ('--num_clips=1000', '--config.batch_size=32', '--config.model.compute.dtype=bfloat16')
CONFIGS = {
    'pretrain': ('configs/tiny.py:encoder=early', '--config.parallel.rules=replicated'),
    'finetune': (
        'configs/finetune/tiny.py:modalities=audio',
        '--num_classes=label=9',
        '--config.parallel.rules=fsdp',
        '--config.parallel.replica=4',
    ),
}
TOLERANCE = 1.02  # constraints.txt pins the compiler; this is for what it lays out a little differently.

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="libtpu is not installed: pip install 'avmae_jax[plan]'"
)


def compile_plan(config: str, *arguments: str, folder: pathlib.Path, repository: pathlib.Path) -> dict:
    """plan.json of a config on 16 chips; a process of its own, as libtpu reads its settings from the environment."""
    command = [sys.executable, '-m', 'avmae_jax.plan', f'--config={config}', '--topology=v5e:4x4', f'--output={folder}']
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(repository), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run(
        [*command, *arguments], cwd=repository, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / 'plan.json').read_text())


def measure(plan: dict) -> dict:
    """What a budget says."""
    sent: dict[str, int] = {}
    for row in plan['collectives']:
        name = f'{row["kind"]} {row["dtype"]}'
        sent[name] = sent.get(name, 0) + row['array_bytes']
    return {
        'peak_bytes': int(plan['memory']['peak']),
        'collective_bytes': dict(sorted(sent.items())),
        'gradient_dtypes': sorted(plan['gradient_bytes']),
        'donated': plan['memory']['donated'],
    }


def excesses(measured: dict, budget: dict) -> list[str]:
    """What is worse than it was."""
    found = []
    if measured['peak_bytes'] > TOLERANCE * budget['peak_bytes']:
        found.append(f'peak memory {measured["peak_bytes"]:,} bytes, of {budget["peak_bytes"]:,}')
    for name, size in measured['collective_bytes'].items():
        if size > TOLERANCE * budget['collective_bytes'].get(name, 0):
            found.append(f'{name}: {size:,} bytes, of {budget["collective_bytes"].get(name, 0):,}')
    if measured['gradient_dtypes'] != budget['gradient_dtypes']:
        found.append(f'gradients are added up in {measured["gradient_dtypes"]}, not {budget["gradient_dtypes"]}')
    if budget['donated'] and not measured['donated']:
        found.append('the state is not donated')
    return found


@needs_compiler
@pytest.mark.parametrize('name', CONFIGS)
def test_a_step_takes_no_more_than_its_budget(name, repository, tmp_path, request):
    measured = measure(compile_plan(*CONFIGS[name], *ALL, folder=tmp_path, repository=repository))
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    if request.config.getoption('--update-golden'):
        budgets[name] = measured
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + '\n')
    assert not excesses(measured, budgets[name]), '; '.join(excesses(measured, budgets[name]))
    assert budgets[name]['gradient_dtypes'] == ['f32'] and budgets[name]['donated']


def test_what_is_worse_than_the_budget_is_named():
    budget = {
        'peak_bytes': 1000, 'collective_bytes': {'all-reduce f32': 100}, 'gradient_dtypes': ['f32'], 'donated': True
    }  # fmt: skip
    assert not excesses(budget, budget)
    assert not excesses({**budget, 'peak_bytes': 1019, 'collective_bytes': {}}, budget)
    worse = {
        'peak_bytes': (1100, 'peak memory 1,100 bytes, of 1,000'),
        'collective_bytes': ({'all-reduce f32': 100, 'all-gather bf16': 8}, 'all-gather bf16: 8 bytes, of 0'),
        'gradient_dtypes': (['bf16', 'f32'], "gradients are added up in ['bf16', 'f32']"),
        'donated': (False, 'not donated'),
    }
    for name, (value, words) in worse.items():
        (found,) = excesses({**budget, name: value}, budget)
        assert words in found

import json
import runpy

import pytest


@pytest.fixture(scope='module')
def benchmark(run_script):
    with run_script('benchmarks/results_avmnist.py') as names:
        yield names


def make_results(value):
    return {
        'results': {
            'classification': [
                {'features': 'video', 'method': 'knn', 'value': value, 'chance': 0.1},
                {'features': 'both (each alone)', 'method': 'knn', 'value': 0.77, 'chance': 0.1},
            ],
            'retrieval': [
                {
                    'query': 'audio',
                    'candidates': 'video',
                    'method': 'canonical correlation',
                    'scores': {'recall@10': 0.5},
                    'chance': {'recall@10': 0.033},
                }
            ],
            'reconstruction': [
                {
                    'term': 'reconstruction',
                    'modality': 'video',
                    'unit': 'input',
                    'mean': 0.25,
                    'baselines': {'dataset mean': 1.0},
                }
            ],
        }
    }


def test_seeds_of_a_row_are_averaged_and_chance_stands_first(benchmark):
    text = benchmark.table(
        [
            ('mid', 'pretrained', make_results(0.8)),
            ('mid', 'random init', make_results(0.3)),
            ('mid', 'pretrained', make_results(0.6)),
        ]
    )
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines()]
    assert lines[0] == ['encoder', 'parameters', 'seeds', 'video knn', 'audio -> video R@10', 'video error']
    assert lines[2] == ['', 'chance', '', '0.100', '0.033', '1.000']
    assert lines[3] == ['mid', 'random init', '1', '0.300', '0.500', '0.250']
    assert lines[4] == ['mid', 'pretrained', '2', '0.700 ± 0.141', '0.500 ± 0.000', '0.250 ± 0.000']


def test_every_row_is_a_config_that_exists(benchmark, repository, tmp_path):
    get_config = runpy.run_path(str(repository / benchmark.CONFIG))['get_config']
    for row, arguments in benchmark.ROWS.items():
        get_config(arguments)
        train = benchmark.commands(row, 3, 'DATA', tmp_path, None)['train']
        assert f'--config={benchmark.CONFIG}:{arguments}' in train and '--config.seed=3' in train


def test_what_is_finished_is_read_back(benchmark, tmp_path):
    folder = tmp_path / 'evaluation'
    folder.mkdir()
    for name, value in (('test-step-0000010', 0.1), ('test-step-0000200', 0.2), ('test-random-init-seed-0', 0.3)):
        (folder / f'{name}.json').write_text(json.dumps(make_results(value)))
    found = benchmark.read(tmp_path)
    assert {kind: benchmark.figures(content)['video knn'] for kind, content in found.items()} == {
        'pretrained': 0.2,
        'random init': 0.3,
    }

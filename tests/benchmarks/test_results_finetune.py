import json

import pytest


@pytest.fixture(scope='module')
def benchmark(run_script):
    with run_script('benchmarks/results_finetune.py') as names:
        yield names


def write_run(folder, value, *, gflop=0.25):
    (folder / 'evaluation').mkdir(parents=True)
    scores = [{'metric': 'top-5', 'value': 1.0}, {'metric': 'top-1', 'value': value}]
    (folder / 'evaluation/test-step-0000001.json').write_text(
        json.dumps({'results': {'benchmark': {'scores': scores}}})
    )
    (folder / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "clips_per_second": 50.0}\n')
    (folder / 'train.log').write_text(f'100 clips, 3 steps of 32, 1.0 epochs, {gflop} GFLOP a clip, on 1 x cpu.\n')


def test_every_figure_of_the_tables_has_one_run_and_few_labels_come_first(benchmark):
    runs = list(dict.fromkeys(benchmark.runs_of(benchmark.TABLES, [0])))
    # 5 starts x 3 modalities x 3 shares, the sound of 2 shares augmented, and 3 more ways to fuse from two starts.
    assert len(runs) == len({run.name for run in runs}) == 45 + 10 + 6
    for augment in ('none', 'sound'):
        shares = [run.labels for run in runs if run.fusion == 'bottleneck' and run.augment == augment]
        assert shares == sorted(shares)
    assert len(list(benchmark.runs_of(['labels', 'augment'], [0, 1], [0.1], ['mid']))) == 2 * (3 + 2)


def test_commands_of_a_run_say_all_that_its_name_does(benchmark, tmp_path):
    run = benchmark.Run('mid', 3, 'picture', 0.1)
    train = ' '.join(benchmark.commands(run, 'DATA', tmp_path, tmp_path / 'run')['train'])
    for part in ('modalities=video,', 'subset_ratio=0.1', 'seed=3', f'start.path={tmp_path}/mid-seed-3'):
        assert part in train
    augmented = benchmark.commands(run._replace(given='sound', augment='sound'), 'DATA', tmp_path, tmp_path)['train']
    assert 'modalities=audio,' in ' '.join(augmented) and 'augment=sound' in ' '.join(augmented)
    assert '--config.num_epochs=90.0' in augmented and '--config.num_epochs=30.0' in train
    scratch = ' '.join(benchmark.commands(run._replace(start='scratch'), 'DATA', tmp_path, tmp_path)['train'])
    assert 'start.path' not in scratch and 'layer_decay=1.0' in scratch


def test_tables_hold_means_over_seeds_and_what_fusion_computes(benchmark, tmp_path):
    runs = [benchmark.Run('mid', seed, 'sound', 0.01) for seed in (0, 1)]
    runs += [benchmark.Run('scratch', 0, fusion='late'), benchmark.Run('mid', 0, 'sound', 0.01, augment='sound')]
    runs += [benchmark.Run('shared', 0)]
    for run, value in zip(runs[:4], (0.2, 0.4, 0.7, 0.6), strict=True):  # The last one has not ended yet.
        write_run(tmp_path / run.name, value)
    benchmark.write_tables(runs, tmp_path)
    text = (tmp_path / 'results.md').read_text()
    mid = next(line for line in text.splitlines() if line.startswith('| mid |'))
    assert '0.300 ± 0.141' in mid and mid.endswith('| 0.600 |')
    assert '| late | 0.700 | - | 0.250 | 50 |' in text
    assert [row['top-1'] for row in json.loads((tmp_path / 'results.json').read_text())] == [0.2, 0.4, 0.7, 0.6]

"""Weights of others become runs: ordinary ones, that train, evaluate, plan and config.start take."""

import json

import numpy as np
import pytest

from avmae_jax import convert, experiment, settings
from configs.finetune import imagenet as finetune_imagenet
from tests.weights.test_vit import published

IMAGE = {
    'data.num_workers': 0, 'batch_size': 8, 'image.short_side': 14, 'image.crop_size': 12, 'num_epochs': 4.0,
    'optimizer.warmup_epochs': 1.0, 'evaluation.every_steps': 0, 'checkpoint.every_steps': 25,
    'model.compute.dtype': 'float32',
}  # fmt: skip


def finetuning(**changes):
    config = finetune_imagenet.get_config('mixup=none')
    config.update_from_flattened_dict({**IMAGE, **changes})
    return settings.to_plain(config)


def save(tmp_path, weights):
    np.savez(tmp_path / 'vit.npz', **weights)
    return tmp_path / 'vit.npz'


def test_a_vit_becomes_a_run_that_is_rebuilt_from_its_folder(tmp_path):
    weights = published()
    told = convert.convert('vit_npz', save(tmp_path, weights), tmp_path / 'run', finetuning())
    restored = experiment.restore_model(tmp_path / 'run')
    assert restored.folder.name == '0' and restored.model.num_classes == {'label': 7}
    assert np.array_equal(restored.params['head_label']['kernel'], weights['head/kernel'])
    changed = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line.startswith('model.')}
    assert changed['model.representation'] == ['None', '6', 'file'] and 'model.pooling' not in changed
    assert '(4, 4, 3, 12)' in told and 'none is left over' in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ['run', 'vit.npz']
    assert settings.load_config(tmp_path / 'run') == settings.read_config(str(tmp_path / 'run/config.py'))
    model = json.loads((tmp_path / 'run/config.json').read_text())['model']
    assert model == experiment.describe_model(restored.model) and model['encoder']['drop_path'] == 0.2


@pytest.mark.parametrize(
    'changes, overrides, complaint',
    [
        ({'image.crop_size': 8}, {}, r'trained on image of shape \(12, 12, 3\), and the config gives \(8, 8, 3\)'),
        ({}, {'model.pooling': 'mean'}, "--config.model.pooling='mean', and the weights are of a model with 'token'"),
    ],
)
def test_what_does_not_fit_is_told_and_nothing_is_written(tmp_path, changes, overrides, complaint):
    file = save(tmp_path, published())
    with pytest.raises(ValueError, match=complaint):
        convert.convert('vit_npz', file, tmp_path / 'run', finetuning(**changes), overrides=overrides)
    assert [path.name for path in tmp_path.iterdir()] == ['vit.npz']


def test_values_that_are_not_finite_are_refused(tmp_path):
    weights = published()
    weights['head/kernel'][1, 2] = np.nan
    with pytest.raises(ValueError, match='head/kernel holds numbers that are not finite'):
        convert.convert('vit_npz', save(tmp_path, weights), tmp_path / 'run', finetuning())

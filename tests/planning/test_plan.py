"""What `python -m avmae_jax.plan` takes for data, and what it counts twice; of FLOPs see tests/models/test_flops.py."""

import pytest

from avmae_jax import experiment, plan, settings

PRETRAIN, FINETUNE = 'configs/pretrain/audioset.py', 'configs/finetune/vggsound.py'


@pytest.fixture
def read(repository, monkeypatch):
    monkeypatch.chdir(repository)
    return settings.read_config


def describe(config, file, dataset=None, num_clips=None, num_classes=None):
    return plan.describe_data(config, file, dataset, num_clips, num_classes or {})


def test_the_dataset_is_the_one_that_the_config_is_named_after(read):
    source = describe(read(PRETRAIN), f'{PRETRAIN}:size=B')
    assert len(source) == 2_063_949 and source.sources[0].info.name == 'audioset'
    source = describe(read(FINETUNE), FINETUNE)
    assert len(source.labels['label'].names) == 309 and not source.labels['label'].multi
    assert len(describe(read(PRETRAIN), PRETRAIN, dataset='vggsound')) == 183_730


def test_clips_and_classes_that_no_catalogue_knows_are_asked_for(read):
    imagenet = 'configs/pretrain/imagenet.py'
    with pytest.raises(ValueError, match='--num_clips=N'):
        describe(read(imagenet), imagenet)
    source = describe(read(imagenet), imagenet, num_clips=1_281_167)
    assert len(source) == 1_281_167 and source.sources[0].info.modalities == ('image',)
    sounds = 'configs/finetune/kinetics_sounds.py'
    with pytest.raises(ValueError, match='--num_classes=label=N'):
        describe(read(sounds), sounds, num_clips=22_000)
    assert len(describe(read(sounds), sounds, num_clips=22_000, num_classes={'label': 32}).labels['label'].names) == 32
    with pytest.raises(ValueError, match='--num_classes=label: give HEAD=COUNT'):
        plan.parse_classes(['label'])


def test_clips_that_are_only_described_cannot_be_read(read):
    with pytest.raises(IndexError, match='only described'):
        describe(read(PRETRAIN), PRETRAIN)[0]


def test_what_is_repeated_is_one_more_forward_pass_of_the_layers(read):
    config = read(f'{PRETRAIN}:size=Ti')
    parts = experiment.build(config, describe(config, PRETRAIN))
    once, again = (experiment.step_flops(config, parts, repeated=repeated) for repeated in (False, True))
    assert 1.25 * once < again < 4 / 3 * once

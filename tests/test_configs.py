"""Every config builds, holds the recipe's numbers, and makes the parameters of its golden table."""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Mapping

import jax
import numpy as np
import pytest

from avmae_jax import checks, experiment, settings, subjects, train
from avmae_jax.data.described import Described
from avmae_jax.data.mixing import Mixture
from avmae_jax.models import sizes
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.parallel import rules
from avmae_jax.training import optimizer as optimizer_lib
from avmae_jax.training import state as state_lib
from avmae_jax.weights import scenic_mbt
from avmae_jax.weights.table import layers_of
from configs import sections, tiny
from configs.pretrain import audioset, imagenet, vggsound

GOLDEN = pathlib.Path(__file__).parent / 'golden'
FINETUNE = (
    'tiny', 'avmnist', 'audioset', 'audioset_mbt', 'vggsound', 'epic_kitchens', 'esc50', 'kinetics_sounds', 'imagenet',
)  # fmt: skip
CONFIGS = {
    'tiny': tiny,
    'audioset': audioset,
    'vggsound': vggsound,
    'imagenet': imagenet,
    **{f'finetune-{name.replace("_", "-")}': importlib.import_module(f'configs.finetune.{name}') for name in FINETUNE},
}
# Clips in the training split as the papers count them.
NUM_CLIPS = {
    'tiny': 360,
    'audioset': 1_857_210,
    'vggsound': 172_427,
    'imagenet': 1_281_167,
    'finetune-tiny': 360,
    'finetune-avmnist': 2_700,
    'finetune-audioset': 508_994,
    'finetune-audioset-mbt': 20_361,
    'finetune-vggsound': 172_427,
    'finetune-epic-kitchens': 67_217,
    'finetune-esc50': 1_600,
    'finetune-kinetics-sounds': 22_000,
    'finetune-imagenet': 1_281_167,
}
CLASSES = {
    'finetune-audioset': {'label': 527},
    'finetune-audioset-mbt': {'label': 527},
    'finetune-vggsound': {'label': 309},
    'finetune-epic-kitchens': {'verb': 97, 'noun': 300},
    'finetune-esc50': {'label': 50},
    'finetune-kinetics-sounds': {'label': 32},
    'finetune-imagenet': {'label': 1000},
}


def source_for(name: str) -> Mixture:
    classes = CLASSES.get(name, {'label': 10})
    described = Described(
        'no_clips', NUM_CLIPS[name], image='imagenet' in name, classes=classes, multi_label=classes.get('label') == 527
    )
    return Mixture([described])


def build(name: str, arguments: str | None = None, **changes):
    config = CONFIGS[name].get_config(arguments)
    config.data.path = 'somewhere'
    config.update_from_flattened_dict(changes)
    config = settings.to_plain(config)
    source = source_for(name)
    checks.check(config, source)
    return config, experiment.build(config, source)


# -- Golden tables --

TABLES = {
    'tiny': ('tiny', None),
    'tiny-separate': ('tiny', 'encoder=separate'),
    'tiny-audio': ('tiny', 'modalities=audio'),
    'audioset-S': ('audioset', 'size=S'),
    'audioset-B': ('audioset', 'size=B'),
    'audioset-L': ('audioset', 'size=L'),
    'audioset-H': ('audioset', 'size=H'),
    'audioset-B-early-joint': ('audioset', 'size=B,encoder=early,decoder=joint'),
    'audioset-g': ('audioset', 'size=g'),
    'audioset-L-audio': ('audioset', 'size=L,modalities=audio'),
    'audioset-L-video': ('audioset', 'size=L,modalities=video'),
    'vggsound-L': ('vggsound', None),
    'vggsound-B-shared': ('vggsound', 'size=B,encoder=shared,decoder=separate'),
    'imagenet-L': ('imagenet', None),
    'imagenet-B': ('imagenet', 'size=B'),
    'finetune-tiny': ('finetune-tiny', None),
    'finetune-audioset-L': ('finetune-audioset', None),
    'finetune-audioset-B-concatenation': ('finetune-audioset', 'size=B,fusion=concatenation'),
    'finetune-audioset-L-audio': ('finetune-audioset', 'modalities=audio'),
    'finetune-audioset-mbt-B': ('finetune-audioset-mbt', None),
    'finetune-vggsound-L': ('finetune-vggsound', None),
    'finetune-epic-kitchens-L': ('finetune-epic-kitchens', None),
    'finetune-esc50-B': ('finetune-esc50', None),
    'finetune-kinetics-sounds-B': ('finetune-kinetics-sounds', None),
    'finetune-imagenet-L': ('finetune-imagenet', None),
}


@pytest.mark.parametrize('table', TABLES)
def test_the_parameter_table_equals_the_golden_one(table, request):
    config, parts = build(*TABLES[table])
    params = state_lib.abstract_state(experiment.make_init(parts)).params  # Shapes alone: no memory is taken.
    mesh = mesh_lib.make_mesh()
    shardings = rules.state_shardings(params, mesh, 'fsdp')
    lines = []
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    ):
        name = rules.path_name(path)
        assert rules.dimension_names(name, len(leaf.shape)) is not None, f'no row of DIMENSIONS fits {name}'
        where = ','.join(axis or '-' for axis in sharding.spec) or 'everywhere'
        lines.append(f'{name} {"x".join(map(str, leaf.shape))} {leaf.dtype} {where}')
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    text = '\n'.join([f'{total:,} parameters; fsdp over data=8', *sorted(lines)]) + '\n'
    file = GOLDEN / f'{table}.txt'
    if request.config.getoption('--update-golden'):
        file.write_text(text)
    assert file.exists() and text == file.read_text(), f'{file} differs; pytest --update-golden writes it anew'


# -- The recipe --


@pytest.mark.parametrize('name', ['audioset', 'vggsound', 'imagenet'])
@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
def test_length_and_rates_are_those_of_the_released_config(name, stage, reference):
    released = json.loads((reference / 'optim' / 'lr_schedules.json').read_text())[f'{name}_{stage}']
    _, parts = build(name if stage == 'pretrain' else f'finetune-{name}')
    assert parts.length.num_steps == released['total_steps']
    assert parts.length.steps_per_epoch == released['steps_per_epoch']
    assert parts.schedule.warmup_steps == released['warmup_steps']
    assert parts.schedule.peak == pytest.approx(released['lr_configs']['base_learning_rate'])
    assert parts.schedule.end_ratio == released['lr_configs'].get('alpha', 0.0)


@pytest.mark.parametrize(
    ('name', 'kept', 'tokens'),
    [
        ('audioset', {'video': 157, 'audio': 149}, {'video': 1568, 'audio': 496}),
        ('vggsound', {'video': 157, 'audio': 200}, {'video': 1568, 'audio': 400}),
        ('imagenet', {'image': 49}, {'image': 196}),
    ],
)
def test_tokens_are_counted_as_in_the_papers(name, kept, tokens):
    _, parts = build(name)
    inputs = {m: jax.ShapeDtypeStruct((2, *shape), 'float32') for m, shape in parts.shapes.items()}
    masks = jax.eval_shape(lambda: parts.objective.draw_masks(jax.random.key(0), parts.model.grids(inputs), 2))
    assert {m: mask.kept.shape[1] for m, mask in masks.items()} == kept
    assert {m: mask.kept.shape[1] + mask.hidden.shape[1] for m, mask in masks.items()} == tokens


def test_layers_of_the_configs_are_those_of_the_model_sizes():
    assert sections.LAYERS == {name: size.num_layers for name, size in sizes.SIZES.items()}
    assert set(sections.ENCODERS) == set(experiment.encoders.ENCODERS)
    assert set(sections.DECODERS) == set(experiment.decoders.DECODERS)


# -- Nothing is written in a config that nobody reads --


class Watched(Mapping):
    """A config that notes which of its leaves are read."""

    def __init__(self, config, read, prefix=''):
        self.config, self.read, self.prefix = config, read, prefix

    def __getitem__(self, name):
        value, path = self.config[name], f'{self.prefix}{name}'
        if isinstance(value, dict):
            return Watched(value, self.read, f'{path}.')
        self.read.add(path)
        return value

    def __iter__(self):
        return iter(self.config)

    def __len__(self):
        return len(self.config)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_leaf_of_a_config_is_read(name, monkeypatch):
    config, _ = build(name)
    read: set[str] = set()
    watched, source = Watched(config, read), source_for(name)
    checks.check(watched, source)
    checks.check_devices(watched, mesh_lib.make_mesh())
    monkeypatch.setattr(experiment.batches, 'train_stream', lambda source, view, **settings: settings)
    monkeypatch.setattr(experiment.sources, 'open_source', lambda *args, **settings: source.sources[0])
    monkeypatch.setattr(experiment.sources, 'read_labels', lambda source, head: [[0]] * len(source))
    experiment.build_train_stream(watched, experiment.open_train_sources(watched))
    # What is left is for the loop and what is done beside it, before it and after it.
    verb = ''.join(pathlib.Path(module.__file__).read_text() for module in (train, subjects, experiment))
    for path in sorted(set(settings.flatten(config)) - read):
        section, _, leaf = path.partition('.')
        beside = ('seed', 'parallel', 'checkpoint', 'report', 'evaluation', 'start')
        assert section in beside, f'nobody reads config.{path}'
        if section == 'parallel' and leaf in mesh_lib.AXES:
            continue
        name = leaf or section
        assert f"['{name}']" in verb or f".get('{name}'" in verb, f'nobody reads config.{path}'


@pytest.mark.parametrize('name', CONFIGS)
def test_a_model_is_described_by_the_section_that_makes_it_again(name):
    config, parts = build(name)
    section = experiment.describe_model(parts.model)
    assert section == settings.to_plain(section)
    again = experiment.build_model({**config, 'model': section}, source_for(name).sources[0].info)
    assert again == parts.model and again != experiment.build_model(
        {**config, 'model': {**section, 'architecture': {**section['architecture'], 'gelu': 'exact'}}},
        source_for(name).sources[0].info,
    )


# -- What is wrong is told before a device is touched --

WRONG = {
    'objective.mask_ratio.video': (1.0, 'mask_ratio.video'),
    'objective.mask_ratio.audio': (-0.1, 'mask_ratio'),
    'model.encoder.fusion_layer': (4, 'fusion_layer'),
    'video.crop_size': (100, 'crop_size'),
    'batch_size': (0, 'batch_size'),
    'optimizer.accumulate_steps': (3, 'accumulate_steps'),
    'optimizer.warmup_steps': (400.0, 'warm-up'),
    'optimizer.name': ('adm', 'did you mean adam'),
    'model.encoder.name': ('midd', 'did you mean mid'),
    'model.compute.dtype': ('float16', 'bfloat16'),
    'parallel.rules': ('fdsp', 'did you mean fsdp'),
    'evaluation.split': ('valid', 'evaluation.split'),
    'preprocess.convention': ('kalid', 'kaldi'),
    'num_steps': (0, 'steps'),
}


@pytest.mark.parametrize('setting', WRONG)
def test_a_wrong_setting_is_named_with_its_remedy(setting, monkeypatch):
    monkeypatch.setattr(jax, 'devices', None)  # Asking for devices would fail otherwise than by ValueError.
    value, words = WRONG[setting]
    with pytest.raises(ValueError, match=words) as caught:
        build('tiny', **{setting: value})
    assert str(value) in str(caught.value)


WRONG_FINETUNING = {
    'model.encoder.fusion_layer': (5, 'fusion_layer must lie between 0 and num_layers=4'),
    'model.encoder.fusion': ('late', "fusion must be one of .*'bottleneck'"),
    'model.pooling': ('joint_mean', 'mixup.per_modality=True labels each modality in its own way.* pool by mean'),
    'model.tokenizers.video.patch': ((3, 16, 16), 'does not divide the video of 8 x 112 x 112.*num_frames'),
    'model.tokenizers.audio.patch': (
        (16, 20),
        'does not divide the 128 mel bins: choose config.preprocess.num_mel_bins',
    ),
    'preprocess.num_mel_bins': (100, 'does not divide the 100 mel bins'),  # Of patches of 16.
    'video.num_frames': (100, 'last 10.00 s at most: 63 frames or fewer, or a smaller frame_seconds'),
    'preprocess.lose_modality_ratio': (1.5, r'lose_modality_ratio must lie in \[0, 1\]'),
    'objective.label_smoothing': (1.0, 'label_smoothing'),
    'objective.mixup.alpha': (0.0, 'alpha'),
    'optimizer.layer_decay': (1.5, 'layer_decay must lie in'),
    'optimizer.average_decay': (1.0, 'average_decay must lie between 0 and 1'),
    'optimizer.base_learning_rate': (-1.0, 'config.optimizer.base_learning_rate=-1.0 must be above 0'),
    'optimizer.beta2': (1.5, r'beta1 and beta2 must lie in \[0, 1\)'),
    'optimizer.weight_decay': (-1.0, 'weight_decay must not be below 0'),
    'optimizer.end_ratio': (2.0, r'config.optimizer.end_ratio=2.0 must lie in \[0, 1\]'),
    'model.representation': (0, 'representation must be at least 1 wide'),
    'model.encoder.size.width': (0, 'width must be at least 1'),
    'video.frame_seconds': (0.0, 'frame_seconds must be above 0'),
    'video.crop.scale': ((1.3, 0.9), 'two rising factors'),
    'audio.seconds': (-1.0, 'seconds must be above 0'),
    'data.views_per_clip': (0, 'data.views_per_clip=0 must be at least 1'),
    'data.num_threads': (0, 'data.num_threads=0 must be at least 1'),
    'optimizer.clip_norm': (-1.0, 'clip_norm must be above 0'),
    'objective.weight.label': (-0.5, 'weight must not be below 0'),
    'evaluation.num_clips': (0, 'evaluation.num_clips=0 must be at least 1'),
    'evaluation.max_batches': (0, 'max_batches=0 must be at least 1; config.evaluation.every_steps=0'),
    'start.path': ('not/there', 'config.start.path: .* neither a workdir'),
    'start.inflation': ('centre', 'did you mean central'),
}


@pytest.mark.parametrize('setting', WRONG_FINETUNING)
def test_a_wrong_setting_of_finetuning_is_named_with_its_remedy(setting, monkeypatch):
    monkeypatch.setattr(jax, 'devices', None)
    value, words = WRONG_FINETUNING[setting]
    with pytest.raises(ValueError, match=words) as caught:
        build('finetune-tiny', **{setting: value})
    assert str(value) in str(caught.value)


def test_more_frames_than_the_longest_clip_holds_are_told_of_files_that_were_not_cut_too():
    config, _ = build('finetune-tiny')
    source = Described('films', 400, classes={'label': 10}, clip_seconds=None)
    checks.check(config, Mixture([source]))  # Nobody knows how long they are.
    source.info = dataclasses.replace(source.info, longest_seconds=1.0)
    with pytest.raises(ValueError, match=r'config.video.num_frames=8, .* of films hold, which last 1.00 s at most: 7 '):
        checks.check(config, Mixture([source]))


def test_the_sound_of_digits_is_augmented_where_there_is_sound():
    _, parts = build('finetune-avmnist', 'modalities=audio,augment=sound')
    assert parts.preprocess.time_shift and parts.preprocess.spec_augment.time_ratio == 1.0
    _, plain = build('finetune-avmnist', 'modalities=audio')
    assert not plain.preprocess.time_shift and plain.preprocess.spec_augment is None
    with pytest.raises(ValueError, match='augment=sound: it is one of none'):
        build('finetune-avmnist', 'modalities=video,augment=sound')


def test_weights_of_images_that_are_not_there_are_told():
    with pytest.raises(ValueError, match=r"config.start.path='B_16.npz': there is no such file"):
        build('finetune-tiny', **{'start.path': 'B_16.npz'})


def test_heads_are_those_of_the_data_and_ask_what_it_can_tell():
    config, _ = build('finetune-tiny')
    several = source_for('finetune-audioset')
    with pytest.raises(ValueError, match=r"heads.label='softmax' takes one class.*set it to 'sigmoid'"):
        checks.check(config, several)
    with pytest.raises(ValueError, match="heads names 'label', and the data has labels for noun, verb only"):
        checks.check(config, source_for('finetune-epic-kitchens'))
    two = Mixture([Described('no_clips', 360, classes={'label': count}) for count in (10, 11)])
    with pytest.raises(ValueError, match="heads names 'label', whose classes are not the same in all the folders"):
        checks.check(config, two)


def test_models_and_objectives_of_two_kinds_do_not_go_together():
    finetuning, pretraining = build('finetune-tiny')[0], build('tiny')[0]
    source = source_for('tiny')
    with pytest.raises(ValueError, match='config.model.decoder makes an autoencoder'):
        checks.check({**finetuning, 'model': pretraining['model']}, source)
    with pytest.raises(ValueError, match='config.objective.terms asks for reconstructions'):
        checks.check({**pretraining, 'model': finetuning['model']}, source)
    config = {**finetuning, 'model': {**finetuning['model'], 'poling': 'max'}}
    with pytest.raises(ValueError, match='did you mean pooling'):
        checks.check(config, source)


def test_what_a_model_leaves_out_is_the_default_of_the_classifier():
    config, parts = build('finetune-tiny')
    short = {name: config['model'][name] for name in ('tokenizers', 'encoder', 'compute')}
    source = source_for('tiny')
    assert experiment.build_model({**config, 'model': short}, source.sources[0].info) == parts.model


def test_classes_that_sequence_examples_do_not_have_are_told(reference):
    config = CONFIGS['finetune-vggsound'].get_config('size=Ti,records=legacy')
    config.data.path = str(reference / 'data' / 'tiny_dmvr.tfrecord')
    config.update_from_flattened_dict(
        {'data.legacy.spectrogram_shape': (10, 16), 'preprocess.num_spec_frames': 80, 'preprocess.num_mel_bins': 16}
    )
    config.update_from_flattened_dict({'batch_size': 3, 'data.legacy.num_classes': 5})
    config = settings.to_plain(config)
    del config['optimizer']['warmup_epochs']
    config['optimizer']['warmup_steps'] = 2.0
    del config['num_epochs']
    config['num_steps'] = 10
    checks.check(config, experiment.open_train_sources(config))  # Its clips are of the classes 0, 1, 3 and 4.
    config['data']['legacy']['num_classes'] = 4
    with pytest.raises(ValueError, match='config.data.legacy.num_classes to 5 or more'):
        checks.check(config, experiment.open_train_sources(config))
    config['data']['balanced_by'] = 'label'
    with pytest.raises(ValueError, match=r'config.data.balanced_by: labels must lie in \[0, num_classes='):
        experiment.open_train_sources(config)


def test_finetuning_on_audioset_hears_what_pretraining_heard():
    def statistics(name, records):
        preprocess = CONFIGS[name].get_config(f'records={records}').preprocess
        return preprocess.audio_mean, preprocess.audio_std

    for name in ('audioset', 'finetune-audioset', 'finetune-audioset-mbt'):
        assert statistics(name, 'prepared') == (None, None)  # Those of the dataset.
    # The log-mels of the reference are not ours, and it normalises them in finetuning alone.
    assert statistics('audioset', 'legacy') == (0.0, 1.0)
    for name in ('finetune-audioset', 'finetune-audioset-mbt'):
        assert statistics(name, 'legacy') == (1.102, 2.762)


@pytest.mark.parametrize('name', FINETUNE)
def test_a_linear_probe_freezes_all_but_the_head(name):
    config, parts = build(f'finetune-{name.replace("_", "-")}', 'probe=linear')
    assert 'mixup' not in config['objective'] and 'cutmix' not in config['objective']
    params = state_lib.abstract_state(experiment.make_init(parts)).params
    frozen = optimizer_lib.frozen_layers(params, config['optimizer']['frozen'])
    moving = {rules.path_name(path) for path, still in jax.tree_util.tree_leaves_with_path(frozen) if not np.all(still)}
    assert moving and all(path.startswith('head_') for path in moving)


def test_an_encoder_is_given_no_fusion_that_it_does_not_have():
    with pytest.raises(ValueError, match='Config argument fusion=late: it is of the encoder mbt; got encoder=mid'):
        CONFIGS['finetune-tiny'].get_config('encoder=mid,fusion=late')
    with pytest.raises(ValueError, match='fusion_layer=two: it is a number'):
        CONFIGS['finetune-vggsound'].get_config('fusion_layer=two')
    model = CONFIGS['finetune-audioset'].get_config('encoder=mid,fusion_layer=20').model
    assert model.encoder.fusion_layer == 20
    assert CONFIGS['finetune-tiny'].get_config('encoder=mid').model.encoder.fusion_layer == (
        tiny.get_config().model.encoder.fusion_layer
    )


def test_the_large_model_and_its_layers_are_those_of_the_reference(reference):
    wanted = json.loads((reference / 'optim' / 'layerwise_lr_and_wd.json').read_text())['audioset_finetune_L']
    config, parts = build('finetune-audioset')
    params = state_lib.abstract_state(experiment.make_init(parts)).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == wanted['n_params']
    assert config['optimizer']['layer_decay'] == wanted['layerwise_decay']
    ours = {}
    for path, ids in jax.tree_util.tree_leaves_with_path(optimizer_lib.layer_ids(params)):
        name = rules.path_name(path)
        layers = enumerate(ids) if '/layers/' in name else [(None, ids)]
        ours |= {name.replace('/layers/', f'/layer_{i}/'): int(layer) for i, layer in layers}
    theirs = {}
    for row in scenic_mbt.mbt_rows(parts.model, 'av_mae'):
        (target,) = row.target
        for layer in layers_of(target, ours):
            theirs |= dict.fromkeys((name.format(layer=layer) for name in row.source), ours[target.format(layer=layer)])
    assert theirs == wanted['param_to_layer_id']


def test_the_flops_of_a_step_are_counted_for_a_classifier_too():
    config, parts = build('finetune-tiny')
    flops = experiment.step_flops(config, parts)
    assert flops > 0 and experiment.step_flops({**config, 'batch_size': 32}, parts) == 2 * flops


def test_the_split_to_evaluate_on_may_be_several_joined_by_plus():
    build('tiny', **{'evaluation.split': 'test+validation'})
    with pytest.raises(ValueError, match=r"evaluation.split='test\+valid' is no split of no_clips"):
        build('tiny', **{'evaluation.split': 'test+valid'})


def test_a_dataset_without_the_wanted_modality_is_refused():
    config, _ = build('tiny')
    with pytest.raises(ValueError, match='has no audio, video'):
        checks.check(config, source_for('imagenet'))


def test_sequence_examples_of_the_reference_are_trained_on_as_they_are(reference):
    config = vggsound.get_config('size=Ti,records=legacy')
    config.data.path = str(reference / 'data' / 'tiny_dmvr.tfrecord')
    config.data.legacy.spectrogram_shape = (10, 16)
    config.update_from_flattened_dict(
        {'preprocess.num_spec_frames': 80, 'preprocess.num_mel_bins': 16, 'batch_size': 3, 'num_epochs': 10}
    )
    config = settings.to_plain(config)
    source = experiment.open_train_sources(config)
    checks.check(config, source)
    assert experiment.build(config, source).shapes['audio'] == (80, 16)
    with experiment.build_train_stream(config, source) as stream:
        assert next(stream).media['audio'].shape == (3, 80, 16)


def test_a_setting_that_does_not_exist_is_refused_with_the_one_that_was_meant():
    config, _ = build('tiny')
    config['model']['encoder']['fusion_layr'] = 3
    with pytest.raises(ValueError, match=r'model.encoder.fusion_layr.*did you mean fusion_layer'):
        checks.check(config, source_for('tiny'))


def test_what_takes_the_place_of_null_is_looked_at_before_anything_is_read():
    config, _ = build('tiny')
    config['data']['num_workers'] = 'many'
    with pytest.raises(ValueError, match="config.data.num_workers is 'many', where a whole number or null was due"):
        experiment.build_eval_stream(config, source_for('tiny'))


@pytest.mark.parametrize('arguments', ['encodr=mid', 'encoder=middle', 'modalities=sound', 'size'])
def test_a_wrong_argument_of_a_config_lists_the_right_ones(arguments):
    with pytest.raises(ValueError, match='Config argument'):
        audioset.get_config(arguments)


CONFIG_FOLDER = pathlib.Path(__file__).parent.parent / 'configs'
CONFIG_FILES = [path for path in sorted(CONFIG_FOLDER.rglob('*.py')) if 'def get_config' in path.read_text()]


@pytest.mark.parametrize('file', CONFIG_FILES, ids=lambda file: str(file.relative_to(CONFIG_FOLDER)))
def test_an_argument_that_a_config_does_not_have_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match=f"^--config={file}:colour=red: Config argument 'colour=red': "):
        settings.read_config(f'{file}:colour=red')


@pytest.mark.parametrize(
    'text, told',
    [
        ('def get_config():\n    return {}\n', 'get_config of OWN takes no arguments: leave out :colour=red.'),
        ('def get_config(a, b):\n    return {}\n', 'OWN fails with TypeError: get_config() missing 1 required'),
        ('def get_config(a):\n    return a.b\n', "OWN fails in line 2 with AttributeError: 'str' object has no attr"),
        ('def get_config(a):\n    return\n', 'get_config of OWN gives None, where a ConfigDict was due.'),
        ('x = 1\n', 'OWN has no function get_config.'),
        ('def get_config(a:\n', "OWN fails with SyntaxError: '(' was never closed (own.py, line 1)."),
    ],
)
def test_a_config_of_ones_own_that_fails_is_told_in_one_line(text, told, tmp_path, capsys):
    file = tmp_path / 'own.py'
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        train.parse_flags(['train', f'--config={file}:colour=red'])
    assert end.value.code == train.ExitCode.SETTINGS
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'train: --config={file}:colour=red: ' + told.replace('OWN', str(file)))


def test_a_batch_that_the_devices_cannot_share_is_refused():
    config, _ = build('tiny', batch_size=12)
    with pytest.raises(ValueError, match='multiple of the 8 devices'):
        checks.check_devices(config, mesh_lib.make_mesh())


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'parallel.rules': 'fsdp'}, "parallel.model=2, and parallel.rules='fsdp' .*tensor or fsdp_tensor"),
        ({'parallel.rules': 'tensor', 'model.decoder.size.num_heads': 1}, 'num_heads=1 of config.model.decoder.size'),
        ({'parallel.rules': 'tensor', 'model.encoder.size.mlp_width': 511}, 'mlp_width=511 of config.model.encoder'),
    ],
)
def test_an_axis_for_tensor_parallelism_that_nothing_can_be_split_over_is_refused(changes, words):
    config, _ = build('tiny', **changes)
    grid = mesh_lib.make_mesh(model=2)
    with pytest.raises(ValueError, match=words):
        checks.check_devices(config, grid)
    checks.check_devices(build('tiny', **{'parallel.rules': 'tensor'})[0], grid)


@pytest.mark.parametrize('kernel, platform', [('cudnn', 'gpu'), ('splash', 'tpu')])
def test_a_kernel_for_attention_that_the_devices_do_not_have_is_refused(kernel, platform):
    config, _ = build('tiny', **{'model.compute.attention': kernel})
    with pytest.raises(ValueError, match=f"attention='{kernel}' is a kernel of {platform}, .* devices of cpu"):
        checks.check_devices(config, mesh_lib.make_mesh())


def test_cudnn_is_refused_for_heads_that_it_does_not_take():
    asked = {'model.compute.attention': 'cudnn', 'model.compute.dtype': 'bfloat16'}
    checks.check_attention(build('tiny', **asked)[0], 'gpu')
    for changes in ({'model.compute.dtype': 'float32'}, {'model.encoder.size.num_heads': 64}):
        with pytest.raises(ValueError, match="attention='cudnn' takes bfloat16 and heads of a multiple of 8"):
            checks.check_attention(build('tiny', **{**asked, **changes})[0], 'gpu')


def test_a_layer_that_would_be_split_over_several_processes_is_refused(monkeypatch):
    devices = np.array([types.SimpleNamespace(process_index=i // 2) for i in range(8)])
    assert mesh_lib.layers_within_processes(devices.reshape(2, 2, 2))
    assert not mesh_lib.layers_within_processes(devices.reshape(1, 2, 4))
    monkeypatch.setattr(mesh_lib, 'layers_within_processes', lambda devices: False)
    config, _ = build('tiny', **{'parallel.rules': 'tensor'})
    with pytest.raises(ValueError, match='parallel.model=4 must divide the 8 devices of a process'):
        checks.check_devices(config, mesh_lib.make_mesh(model=4))
    checks.check_devices(config, mesh_lib.make_mesh())


def test_a_run_is_gone_on_with_under_its_own_settings_alone(tmp_path):
    config, _ = build('tiny')
    settings.save_config(config, tmp_path)
    assert settings.load_config(tmp_path) == config
    other = {**config, 'data': {**config['data'], 'num_workers': 3}, 'report': {'log_every_steps': 7}}
    settings.check_resumable(config, other, tmp_path)  # What changes nothing that is computed may change.
    with pytest.raises(ValueError, match='seed: 0 -> 1'):
        settings.check_resumable(config, {**config, 'seed': 1}, tmp_path)


def test_a_run_of_before_a_setting_is_gone_on_with():
    config, _ = build('finetune-tiny')
    info, old = source_for('finetune-tiny').sources[0].info, json.loads(json.dumps(config))
    del old['model']['encoder']['final_norm'], old['model']['architecture'], old['start']['trunk']
    settings.check_resumable(experiment.brought_up(old, config, info), config, 'run')
    for name, value in {'model.encoder.final_norm': False, 'start.trunk': True, 'model.encoder.drop_path': 0.2}.items():
        with pytest.raises(ValueError, match=f'holds a run with other settings: .*{name}: '):
            other = settings.override(config, {name: value})
            settings.check_resumable(experiment.brought_up(old, other, info), other, 'run')


def test_a_folder_whose_name_has_a_comma_is_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'cats, dogs').mkdir()
    assert experiment.split_paths('cats, dogs') == ['cats, dogs']
    assert experiment.split_paths(f'{tmp_path}/cats, dogs') == [f'{tmp_path}/cats, dogs']
    assert experiment.split_paths('cats,dogs') == ['cats', 'dogs']
    assert experiment.split_paths('gs://a,tfds:b') == ['gs://a', 'tfds:b']


@pytest.mark.parametrize('where', ['in the checkout', 'elsewhere'])
def test_a_config_is_read_from_any_folder_and_finds_its_neighbours(where, repository, tmp_path):
    (tmp_path / 'configs').mkdir()  # Of another project, in which the command is given.
    (tmp_path / 'configs/sections.py').write_text('')
    config = repository / 'configs/tiny.py'
    if where == 'elsewhere':
        config = tmp_path / 'mine.py'
        config.write_text('from configs import tiny\n\n\ndef get_config():\n    return tiny.get_config()\n')
    command = [sys.executable, '-m', 'avmae_jax.train', f'--config={config}', f'--workdir={tmp_path / "run"}']
    environment = {**os.environ, 'PYTHONPATH': str(repository)}
    run = functools.partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    done = run(command)
    assert done.returncode == 2 and 'config.data.path is empty' in done.stderr, done.stderr
    if where == 'in the checkout':  # What is wrong with an argument is told without the way through the file.
        done = run([*command[:3], f'--config={config}:modalities=smell', command[-1]])
        assert done.returncode == 2 and 'modalities=smell: it is one of video, audio.' in done.stderr
        assert 'Traceback' not in done.stderr

"""Finds settings that do not fit each other, the data or the devices, and says which one to change to what.

What one constructor can see for itself it refuses itself; here is what takes several sections or the dataset.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from avmae_jax import experiment, objectives, settings, starts
from avmae_jax.checkpoints import transfer
from avmae_jax.data import sources, views
from avmae_jax.data.mixing import Mixture
from avmae_jax.models import tokenizers
from avmae_jax.models.classifier import JOINT_POOLINGS, Classifier
from avmae_jax.ops import attention, masking
from avmae_jax.ops.preprocess import STORED, Preprocess
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.parallel import rules
from avmae_jax.settings import Config, choose
from avmae_jax.structs import Modality

SECTIONS = (
    'seed', 'batch_size', 'num_epochs', 'num_steps', 'data', 'video', 'audio', 'image', 'preprocess', 'model',
    'objective', 'optimizer', 'parallel', 'checkpoint', 'report', 'evaluation', 'start',
)  # fmt: skip


def check(config: Config, source: Mixture) -> None:
    """Finds settings that do not fit each other or the data, without touching a device; raises ValueError."""
    for name in config:
        choose(dict.fromkeys(SECTIONS), name, name)
    _check_numbers(config)
    _check_kind(config)
    info = source.sources[0].info
    parts = experiment.build(config, source)
    model, objective, view, preprocess = parts.model, parts.objective, parts.view, parts.preprocess
    wanted = {'model.tokenizers': set(model.tokenizers)}
    if isinstance(objective, objectives.Objective):
        wanted['objective.mask_ratio'] = set(objective.mask_ratio)
    for where, modalities in wanted.items():
        if modalities != set(view.parts):
            raise ValueError(
                f'config.{where} is for {_names(modalities)}, the sections of the data are for {_names(view.parts)}: '
                'choose modalities by the argument modalities=... of the config.'
            )
    for one in source.sources:
        held = set(one.info.modalities) | ({'image'} if 'video' in one.info.modalities else set())
        if missing := set(view.parts) - held:
            raise ValueError(
                f'config wants {_names(view.parts)} and the dataset {one.info.name} has no {_names(missing)}, only '
                f'{_names(one.info.modalities)}: take another dataset, or other modalities (an argument of the config).'
            )
    _check_preprocess(preprocess, source, view)
    for modality, shape in parts.shapes.items():
        _check_patches(model.tokenizers[modality], modality, shape)
        if isinstance(objective, objectives.Objective):
            _check_masking(objective, model.tokenizers[modality], modality, shape)
    if isinstance(objective, objectives.Classification):
        _check_classification(objective, model, source)
    if 'start' in config:
        _check_start(config['start'])
    micro, views_per_clip = config['optimizer']['accumulate_steps'], config['data']['views_per_clip']
    if min(micro, views_per_clip) < 1 or config['batch_size'] % (micro * views_per_clip):
        raise ValueError(
            f'config.batch_size={config["batch_size"]} must be a multiple of optimizer.accumulate_steps={micro} times '
            f'data.views_per_clip={views_per_clip}.'
        )
    choose(rules.RULES, 'parallel.rules', config['parallel']['rules'])
    known = 'legacy' not in config['data']  # Of SequenceExamples only the files are known, by their names.
    split = config['evaluation']['split']
    if known and config['evaluation']['every_steps'] and not set(sources.split_parts(split)) <= set(info.splits):
        raise ValueError(
            f'config.evaluation.split={split!r} is no split of {info.name} '
            f'(it has {_names(info.splits)}); config.evaluation.every_steps=0 trains without.'
        )


# Of settings that no constructor looks at: the least that each may be; and those that are shares.
LEAST = {
    'seed': 0, 'batch_size': 1, 'data.views_per_clip': 1, 'data.num_workers': 0, 'data.num_threads': 1,
    'data.stall_seconds': 1e-3, 'optimizer.accumulate_steps': 1, 'checkpoint.keep_last': 1, 'checkpoint.keep_best': 0,
    'report.log_every_steps': 1, 'report.num_pictures': 1, 'report.profile_num_steps': 1, 'evaluation.max_batches': 1,
    'evaluation.num_clips': 1, 'parallel.watchdog_seconds': 0,
}  # fmt: skip
SHARES = ('data.max_damaged_ratio', 'report.wait_share_warning', 'optimizer.end_ratio')


def _check_numbers(config: Config) -> None:
    values = settings.flatten(config)
    for name, least in LEAST.items():
        # A setting may be open, and runs of before it was there have none.
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise ValueError(f'config.{name} is {value!r:.80}, where a number was due.')
        if not value >= least:
            remedy = '; config.evaluation.every_steps=0 trains without.' if name == 'evaluation.max_batches' else '.'
            raise ValueError(f'config.{name}={value} must be at least {least}{remedy}')
    for name in SHARES:
        if name in values and not 0 <= values[name] <= 1:
            raise ValueError(f'config.{name}={values[name]} must lie in [0, 1].')


def _names(names: Any) -> str:
    return ', '.join(sorted(names)) or 'nothing'


def _check_preprocess(preprocess: Preprocess, source: Mixture, view: views.View) -> None:
    if view.audio is not None:
        stored = source.spectrogram_shape is not None
        if stored != (preprocess.convention == STORED):
            raise ValueError(
                f'config.preprocess.convention={preprocess.convention!r} and the dataset stores '
                + (f'log-mels: set it to {STORED!r}.' if stored else 'waveforms: set it to avmae or kaldi.')
            )
        if not stored and source.sample_rate != preprocess.sample_rate:
            raise ValueError(
                f'The dataset stores sound at {source.sample_rate} Hz, not {preprocess.sample_rate}: prepare it again.'
            )
    for one in source.sources:
        media = one.info.media
        for part in (view.video, view.image):
            if part is not None and media.short_side and media.short_side < part.short_side:
                logging.warning(
                    '%s stores pictures with a short side of %d; short_side=%d enlarges them.',
                    one.info.name,
                    media.short_side,
                    part.short_side,
                )
        seconds, part = one.info.clip_seconds, view.video
        if not seconds:  # Images last no time.
            continue
        if part is not None and (part.num_frames - 1) * part.frame_seconds >= seconds:
            fitting = math.ceil(seconds / part.frame_seconds)
            raise ValueError(
                f'config.video.num_frames={part.num_frames}, {part.frame_seconds} s apart, are more than the clips '
                f'of {one.info.name} hold, which last {seconds:.2f} s at most: {fitting} frames or fewer, or a smaller '
                'frame_seconds.'
            )
        longest = max(part.seconds for part in view.parts.values())
        if longest > seconds + 1e-6:
            logging.warning(
                '%s stores clips of up to %.2f s; the config looks at %.2f s: pictures begin anew and sound is silent '
                'behind the end.',
                one.info.name,
                seconds,
                longest,
            )


def _check_kind(config: Config) -> None:
    decoding = 'decoder' in config['model']
    if decoding != ('terms' in config['objective']):
        raise ValueError(
            'config.objective.heads asks for classes and config.model.decoder makes an autoencoder: the configs in '
            'configs/finetune have models with a pooling in its place.'
            if decoding
            else 'config.objective.terms asks for reconstructions, and config.model has no decoder.'
        )


def _check_start(section: Config) -> None:
    choose(transfer.INFLATIONS, 'start.inflation', section['inflation'])
    if not isinstance(section.get('trunk', False), bool):
        raise ValueError(f'config.start.trunk={section["trunk"]!r} must be True or False.')
    if starts.is_vit(section['path']):
        if not epath.Path(section['path']).exists():
            raise ValueError(f'config.start.path={section["path"]!r}: there is no such file.')
    elif section['path']:
        try:
            experiment.find_checkpoints(section['path'])
        except ValueError as error:
            raise ValueError(f'config.start.path: {error}') from error


def _check_classification(objective: objectives.Classification, model: experiment.Model, source: Mixture) -> None:
    for head, kind in objective.heads.items():
        if head not in source.labels:
            raise ValueError(
                f'config.objective.heads names {head!r}, whose classes are not the same in all the folders of '
                'config.data.path: prepare them with the same label map.'
            )
        if kind == 'softmax' and source.labels[head].multi and source.spectrogram_shape is None:
            raise ValueError(
                f"config.objective.heads.{head}='softmax' takes one class a clip, and the clips of "
                f"{source.sources[0].info.name} may have several: set it to 'sigmoid'."
            )
    if objective.mixup is not None and objective.mixup.per_modality and len(model.tokenizers) > 1:
        if isinstance(model, Classifier) and model.pooling in JOINT_POOLINGS:
            raise ValueError(
                f'config.objective.mixup.per_modality=True labels each modality in its own way, and '
                f'config.model.pooling={model.pooling!r} has one vector for all: set it to False, or pool by mean.'
            )
    for one in source.sources:
        # Prepared shards were checked when they were written; of SequenceExamples nobody has seen the labels.
        if one.spectrogram_shape is not None:
            for head in objective.heads:
                largest = max((max(found, default=-1) for found in sources.read_labels(one, head)), default=-1)
                if largest >= len(one.info.labels[head].names):
                    raise ValueError(
                        f'{one.info.name} has a clip of class {largest} of {head!r}, and there are '
                        f'{len(one.info.labels[head].names)} classes, counted from 0: set '
                        f'config.data.legacy.num_classes to {largest + 1} or more.'
                    )


def _check_patches(tokenizer: tokenizers.Tokenizer, modality: Modality, shape: tuple[int, ...]) -> None:
    axes = tokenizer.axes_of((1, *shape))
    if modality == 'audio' and tokenizer.stride is None and axes[-1] % tokenizer.patch[-1]:
        raise ValueError(
            f'config.model.tokenizers.audio.patch={tokenizer.patch} does not divide the {axes[-1]} mel bins: choose '
            f'config.preprocess.num_mel_bins as a multiple of {tokenizer.patch[-1]}.'
        )
    # Of sound, moments at the end that fill no patch are left out, and AST's patches overlap as they may.
    for size, patch, step in zip(axes, tokenizer.patch, tokenizer.stride or tokenizer.patch, strict=False):
        if modality != 'audio' and (size - patch) % step:
            raise ValueError(
                f'config.model.tokenizers.{modality}.patch={tokenizer.patch} does not divide the {modality} of '
                f'{" x ".join(map(str, axes))}: choose config.{modality}.crop_size and num_frames as multiples of it.'
            )
    try:
        tokenizer.grid((1, *shape))
    except ValueError as error:
        raise ValueError(f'config.model.tokenizers.{modality}: {error}') from error


def _check_masking(
    objective: objectives.Objective, tokenizer: tokenizers.Tokenizer, modality: Modality, shape: tuple[int, ...]
) -> None:
    try:
        grid = tokenizer.grid((1, *shape))
        drawn = masking.drawn_axes(modality, objective.masking.get(modality, 'random'))
        masking.num_hidden(int(np.prod([grid[axis] for axis in drawn])), objective.mask_ratio[modality])
    except ValueError as error:
        raise ValueError(f'config.objective, {modality}: {error}') from error


def check_devices(config: Config, mesh: jax.sharding.Mesh) -> None:
    """What has to know the devices."""
    rows = int(np.prod([mesh.shape[axis] for axis in mesh_lib.BATCH_AXES]))
    micro = config['batch_size'] // config['optimizer']['accumulate_steps']
    if micro % rows:
        raise ValueError(
            f'config.batch_size={config["batch_size"]} / optimizer.accumulate_steps='
            f'{config["optimizer"]["accumulate_steps"]} must be a multiple of the {rows} devices that share the batch.'
        )
    check_attention(config, mesh.devices.flat[0].platform)
    _check_split_layers(config, mesh)


KERNELS = {'cudnn': 'gpu', 'splash': 'tpu'}  # Attention -> the only platform that has it.


def check_attention(config: Config, platform: str) -> None:
    """Whether the devices have the kernel that is asked for, and it takes what it would get."""
    kernel = config['model']['compute']['attention']
    wanted = KERNELS.get(kernel, platform)
    if platform != wanted:
        raise ValueError(
            f'config.model.compute.attention={kernel!r} is a kernel of {wanted}, and these are devices of {platform}: '
            "set it to 'auto'."
        )
    if kernel == 'cudnn':
        for part, size in experiment.build_sizes(config).items():
            dtype, head_width = config['model']['compute']['dtype'], size.width // size.num_heads
            if not attention.suits_cudnn(dtype, head_width):
                raise ValueError(
                    f"config.model.compute.attention='cudnn' takes bfloat16 and heads of a multiple of 8 up to 128; "
                    f"config.model.{part} has {dtype} and heads of {head_width}: set it to 'auto'."
                )


def _check_split_layers(config: Config, mesh: jax.sharding.Mesh) -> None:
    parts, rule_set = mesh.shape['model'], config['parallel']['rules']
    if parts == 1:
        return
    if 'model' not in rules.RULES[rule_set].values():
        splitting = [name for name, table in rules.RULES.items() if 'model' in table.values()]
        raise ValueError(
            f'config.parallel.model={parts}, and parallel.rules={rule_set!r} splits nothing over it, so that always '
            f'{parts} devices would do the same: set it to 1, or parallel.rules to {" or ".join(splitting)}.'
        )
    if not mesh_lib.layers_within_processes(mesh.devices):
        # Devices that share a layer work on the same rows, and each process reads rows of its own.
        first = mesh.devices.flat[0].process_index
        own = sum(device.process_index == first for device in mesh.devices.flat)
        raise ValueError(
            f'config.parallel.model={parts} must divide the {own} devices of a process: '
            'a layer is split within a process only.'
        )
    for part, size in experiment.build_sizes(config).items():
        for dim in ('num_heads', 'mlp_width'):
            if getattr(size, dim) % parts:
                raise ValueError(
                    f'config.parallel.model={parts} does not divide {dim}={getattr(size, dim)} of '
                    f'config.model.{part}.size: set it to a divisor of the heads and MLP widths of encoder and decoder.'
                )

"""From a config to the things it names: the one file that knows both names and classes.

A section of a config is the arguments of a constructor. A key that the constructor does not have, or a value it
refuses, ends here, before a device is touched. Nothing behind this file sees a config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from avmae_jax import __version__, objectives
from avmae_jax.checkpoints.manager import META, Checkpoints
from avmae_jax.data import balance, batches, sources, views, workers
from avmae_jax.data.mixing import Mixture
from avmae_jax.data.schema import DatasetInfo
from avmae_jax.models import decoders, encoders, flops, sizes, tokenizers
from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import Classifier
from avmae_jax.ops import augment
from avmae_jax.ops.mixup import CutMix, Mixup
from avmae_jax.ops.preprocess import Preprocess
from avmae_jax.ops.rand_augment import RandAugment
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.parallel import rules
from avmae_jax.settings import Config, check_kinds, choose, construct, to_plain, with_setting
from avmae_jax.structs import JOINT_ORDER, Batch, Modality
from avmae_jax.training import optimizer as optimizer_lib
from avmae_jax.training import state as state_lib
from avmae_jax.training import step as step_lib

# -- Sections to objects --

Model = MaskedAutoencoder | Classifier


def _without(section: Config, *names: str) -> dict[str, Any]:
    return {name: section[name] for name in section if name not in names}


def build_model(config: Config, info: DatasetInfo | None = None) -> Model:
    """A masked autoencoder where the section has a decoder, and a classifier where it has a pooling.

    Args:
      info: what a classifier takes its classes from; a masked autoencoder needs none of it.
    """
    section = config['model']
    common = ('tokenizers', 'encoder', 'architecture', 'compute')
    own = ('decoder',) if 'decoder' in section else CLASSIFIER_SETTINGS
    for name in section:
        choose(dict.fromkeys(common + own), 'model', name)
    compute = construct(Compute, 'model.compute', section['compute'])
    # Runs of before this setting have none.
    architecture = construct(sizes.Architecture, 'model.architecture', section.get('architecture', {}))
    made = {
        modality: construct(
            choose(tokenizers.TOKENIZERS, 'model.tokenizers', modality),
            f'model.tokenizers.{modality}',
            section['tokenizers'][modality],
        )
        for modality in section['tokenizers']
    }
    if 'decoder' in section:
        encoder = _build_stack(section, 'encoder', encoders.ENCODERS, architecture, compute)
        decoder = _build_stack(section, 'decoder', decoders.DECODERS, architecture, compute)
        return MaskedAutoencoder(tokenizers=made, encoder=encoder, decoder=decoder)
    return construct(
        Classifier,
        'model',
        {name: section[name] for name in CLASSIFIER_SETTINGS if name in section},
        tokenizers=made,
        encoder=_build_stack(section, 'encoder', {**encoders.ENCODERS, 'mbt': MBT}, architecture, compute),
        num_classes=_num_classes(config, info),
    )


SIZES = {'encoder': sizes.SIZES, 'decoder': sizes.DECODER_SIZES}


def build_sizes(config: Config) -> dict[str, sizes.Size]:
    """'encoder' and, where there is one, 'decoder' -> how large they are."""
    section = config['model']
    return {
        part: _build_size(section[part]['size'], f'model.{part}.size', table)
        for part, table in SIZES.items()
        if part in section
    }


def describe_model(model: Model) -> dict[str, Any]:
    """The section config.model that `build_model` makes this model of, as plain values."""
    encoder = _describe_stack(model.encoder, {**encoders.ENCODERS, 'mbt': MBT})
    section: dict[str, Any] = {
        'tokenizers': {modality: _fields(tokenizer) for modality, tokenizer in model.tokenizers.items()},
        'encoder': encoder,
        'architecture': dataclasses.asdict(model.encoder.size.architecture),
        'compute': dataclasses.asdict(model.encoder.compute),
    }
    if isinstance(model, MaskedAutoencoder):
        assert model.decoder.size.architecture == model.encoder.size.architecture
        section['decoder'] = _describe_stack(model.decoder, decoders.DECODERS)
    else:
        section |= {name: getattr(model, name) for name in CLASSIFIER_SETTINGS}
    return to_plain(section)


def _describe_stack(stack: Any, classes: Mapping[str, Any]) -> dict[str, Any]:
    (name,) = (name for name, kind in classes.items() if kind is type(stack))
    size = {number: value for number, value in vars(stack.size).items() if number != 'architecture'}
    return {'name': name, **_fields(stack, 'size', 'compute'), 'size': size}


def _fields(module: Any, *without: str) -> dict[str, Any]:
    """The arguments that a module was made with, but for flax's own."""
    names = [field.name for field in dataclasses.fields(module) if field.init]
    return {name: getattr(module, name) for name in names if name not in ('parent', 'name', *without)}


CLASSIFIER_SETTINGS = ('pooling', 'pooled_norm', 'pooled_norm_epsilon', 'representation')


def _build_stack(
    section: Config, part: str, classes: Mapping[str, Any], architecture: sizes.Architecture, compute: Compute
) -> Any:
    return construct(
        choose(classes, f'model.{part}.name', section[part]['name']),
        f'model.{part}',
        _without(section[part], 'name', 'size'),
        size=_build_size(section[part]['size'], f'model.{part}.size', SIZES[part], architecture),
        compute=compute,
    )


def _num_classes(config: Config, info: DatasetInfo | None) -> dict[str, int]:
    """Head -> classes, of the heads that the objective asks about."""
    heads = config['objective']['heads']
    labels = {} if info is None else info.labels
    for head in heads:
        if head not in labels:
            raise ValueError(
                f'config.objective.heads names {head!r}, and the data has '
                + (
                    f'labels for {", ".join(sorted(labels))} only.'
                    if labels
                    else 'no labels: prepare it with a list that has some.'
                )
            )
    return {head: len(labels[head].names) for head in heads}


def _build_size(
    size: Any, where: str, table: Mapping[str, sizes.Size], architecture: sizes.Architecture = sizes.USUAL
) -> sizes.Size:
    """A size by its name in the table, or by its numbers."""
    if isinstance(size, Mapping):
        return construct(sizes.Size, where, size, architecture=architecture)
    return dataclasses.replace(choose(table, where, size), architecture=architecture)


def build_objective(config: Config) -> objectives.Objective | objectives.Classification:
    """What is asked of a masked autoencoder where the section has terms, of a classifier where it has heads."""
    section = config['objective']
    if 'heads' in section:
        mixing = {'mixup': Mixup, 'cutmix': CutMix}
        made = {name: construct(mixing[name], f'objective.{name}', section[name]) for name in mixing if name in section}
        return construct(objectives.Classification, 'objective', _without(section, *mixing), **made)
    terms = {}
    for name in section['terms']:
        where = f'objective.terms.{name}'
        term = section['terms'][name]
        target = {m: construct(objectives.Target, f'{where}.target.{m}', term['target'][m]) for m in term['target']}
        terms[name] = construct(
            choose(objectives.TERMS, 'objective.terms', name), where, _without(term, 'target'), target=target
        )
    return construct(objectives.Objective, 'objective', _without(section, 'terms'), terms=terms)


VIEWS = {'video': views.VideoView, 'audio': views.AudioView, 'image': views.ImageView}


def build_view(config: Config) -> views.View:
    """What is cut out of a clip: one part for each of the sections video, audio, image."""
    parts = {m: construct(VIEWS[m], m, config[m]) for m in JOINT_ORDER if m in config}
    return views.View(**parts, share_window=config['data']['share_window'])


AUGMENTATIONS = {
    'rand_augment': RandAugment,
    'color_jitter': augment.ColorJitter,
    'random_erasing': augment.RandomErasing,
    'spec_augment': augment.SpecAugment,
}


def build_preprocess(config: Config, info: DatasetInfo) -> Preprocess:
    """Sound is normalised by the statistics of the dataset unless the config gives others."""
    section = dict(config['preprocess'].items())
    changes = {
        name: construct(kind, f'preprocess.{name}', section.pop(name))
        for name, kind in AUGMENTATIONS.items()
        if name in section
    }
    construct(Preprocess, 'preprocess', _without(section, 'audio_mean', 'audio_std'), **changes)
    if 'audio' in config and 'audio_mean' in section:
        convention = section['convention']
        missing = [name for name in ('audio_mean', 'audio_std') if section[name] is None]
        measured = info.statistics.get('audio', {}).get(convention)
        if missing and measured is None:
            raise ValueError(
                f'{info.name} holds no audio statistics of the convention {convention!r} '
                f'(it has {sorted(info.statistics.get("audio", {}))}): set config.preprocess.audio_mean and '
                'config.preprocess.audio_std.'
            )
        section |= {name: float(measured[name.removeprefix('audio_')]) for name in missing}
    return construct(Preprocess, 'preprocess', section, **changes)


def build_schedule(config: Config, num_steps: int, steps_per_epoch: int) -> optimizer_lib.WarmupCosine:
    section = config['optimizer']
    warmup = _steps_or_epochs(section, 'optimizer.warmup', 'warmup_steps', 'warmup_epochs', steps_per_epoch)
    if not section['base_learning_rate'] > 0:
        raise ValueError(f'config.optimizer.base_learning_rate={section["base_learning_rate"]} must be above 0.')
    if warmup < 0:
        raise ValueError(f'config.optimizer: the warm-up must not be shorter than 0; got {warmup} steps.')
    if warmup >= num_steps:
        raise ValueError(f'config.optimizer: the warm-up of {warmup} steps must end before step {num_steps}.')
    return optimizer_lib.WarmupCosine(
        peak=optimizer_lib.peak_learning_rate(section['base_learning_rate'], config['batch_size']),
        num_steps=num_steps,
        warmup_steps=warmup,
        end_ratio=section['end_ratio'],
    )


SCHEDULE_SETTINGS = ('name', 'base_learning_rate', 'warmup_steps', 'warmup_epochs', 'end_ratio', 'accumulate_steps')
TAILORING_SETTINGS = ('layer_decay', 'frozen', 'average_decay')


def build_optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    section = config['optimizer']
    constructor = choose(optimizer_lib.OPTIMIZERS, 'optimizer.name', section['name'])
    plain = construct(
        constructor, 'optimizer', _without(section, *SCHEDULE_SETTINGS, *TAILORING_SETTINGS), schedule=schedule
    )
    tailoring = {name: section[name] for name in TAILORING_SETTINGS if name in section}
    return construct(optimizer_lib.tailored, 'optimizer', tailoring, optimizer=plain)


def _steps_or_epochs(section: Config, where: str, steps: str, epochs: str, steps_per_epoch: int) -> float | int:
    if (steps in section) == (epochs in section):
        raise ValueError(f'config: give one of {where}: {steps} or {epochs}.')
    return section[steps] if steps in section else section[epochs] * steps_per_epoch


class Length(NamedTuple):
    """Attributes: steps_per_epoch: whole batches in one pass over the data; num_steps: of the run."""

    steps_per_epoch: int
    num_steps: int


def training_length(config: Config, num_clips: int) -> Length:
    clips_per_step = config['batch_size'] // config['data']['views_per_clip']
    steps_per_epoch = max(1, num_clips // clips_per_step)
    num_steps = _steps_or_epochs(config, 'the length of the run', 'num_steps', 'num_epochs', steps_per_epoch)
    if num_steps < 1:
        raise ValueError(f'config: a run of {num_steps} steps is none.')
    return Length(steps_per_epoch=steps_per_epoch, num_steps=int(num_steps))


# -- Data --


def open_train_sources(config: Config) -> Mixture:
    """The clips to train on: as many of them, and drawn as often, as config.data says."""
    section = config['data']
    head, ratio = section['balanced_by'], section['subset_ratio']
    plain = open_sources(config, section['split'])
    if not head and ratio == 1:
        return plain
    if head and head not in plain.labels:
        raise ValueError(f'config.data.balanced_by={head!r} is none of the labels of the data: {sorted(plain.labels)}.')
    chosen, weights = [], []
    for source in plain.sources:
        # A subset is of all classes alike too, if there are any.
        by = head or next(iter(source.info.labels), '')
        labels = sources.read_labels(source, by) if by else [[0]] * len(source)
        indices = with_setting('data.subset_ratio', balance.stratified, labels, ratio, config['seed'])
        chosen.append(balance.Subset(source, indices) if ratio < 1 else source)
        if head:
            num_classes = len(source.info.labels[head].names)
            by_class = [labels[i] for i in indices]
            weights.append(with_setting('data.balanced_by', balance.clip_weights, by_class, num_classes))
    setting = 'data.balanced_by' if head else 'data.subset_ratio'
    return with_setting(setting, Mixture, chosen, list(section['weights']) or None, weights or None)


def open_sources(config: Config, split: str) -> Mixture:
    """The clips of a split, checked against what their preparation wrote down."""
    section = config['data']
    if not section['path']:
        raise ValueError(
            'config.data.path is empty: give --config.data.path=DIR, a folder that `python -m avmae_jax.prepare` wrote.'
        )
    legacy = construct(sources.Legacy, 'data.legacy', section['legacy']) if 'legacy' in section else None
    opened = [
        sources.open_source(path, split, verify=section['verify'], legacy=legacy, data_dir=section['data_dir'])
        for path in split_paths(section['path'])
    ]
    return Mixture(opened, list(section['weights']) or None)


def split_paths(text: str) -> list[str]:
    """Several paths with commas between; what exists as it stands is one path, commas or not."""
    exists = '://' not in text and os.path.exists(text)
    return [text] if exists else text.split(',')


def dataset_digest(source: Mixture) -> str:
    """One value for the content of all the datasets of a mixture."""
    return '+'.join(one.info.digest() for one in source.sources)


def build_train_stream(config: Config, source: Mixture, start_step: int = 0, num_steps: int | None = None) -> Any:
    """This host's batches from `start_step` on; a context manager."""
    section = config['data']
    return batches.train_stream(
        source,
        build_view(config),
        batch_size=config['batch_size'],
        seed=config['seed'],
        start_step=start_step,
        num_steps=num_steps,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
        views_per_clip=section['views_per_clip'],
        max_damaged_ratio=section['max_damaged_ratio'],
        **_loader_settings(section),
    )


def build_eval_stream(
    config: Config,
    split: str | Mixture,
    *,
    batch_size: int | None = None,
    num_clips: int = 1,
    path: str | None = None,
) -> Any:
    """Every record of a split once, the last batch filled with rows of weight 0; a context manager.

    Args:
      split: its name, or clips that are open already.
      batch_size: rows over all hosts; None for that of training.
      num_clips: moments taken of each record.
      path: of another dataset than the one that was trained on.
    """
    section = config['data']
    if path is not None:
        config = {**config, 'data': {**section, 'path': path, 'weights': []}}
    return batches.eval_stream(
        open_sources(config, split) if isinstance(split, str) else split,
        build_view(config),
        batch_size=batch_size or config['batch_size'],
        num_clips=num_clips,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
        max_damaged_ratio=section['max_damaged_ratio'],
        **_loader_settings(section),
    )


def _loader_settings(section: Config) -> dict[str, Any]:
    # It may be open, so that only here is seen what takes its place.
    check_kinds('config.data', section, {'num_workers': int | None})
    num_workers = section['num_workers']
    if num_workers is None:
        num_workers = workers.default_num_workers(section['num_threads'])
    return dict(num_workers=num_workers, num_threads=section['num_threads'], stall_seconds=section['stall_seconds'])


def input_shapes(view: views.View, preprocess: Preprocess, source: Mixture) -> dict[Modality, tuple[int, ...]]:
    """What preprocessing will make of one row of each modality, without the batch dimension."""
    shapes = {}
    sound = views.SoundFormat(source.sample_rate, source.spectrogram_shape)
    for modality, spec in view.layout(sound).items():
        if modality != 'audio':
            shapes[modality] = spec.shape
        elif len(spec.shape) == 2:
            shapes[modality] = spec.shape
        else:
            frames = preprocess.num_spec_frames or preprocess.log_mel_convention.num_frames(spec.shape[0])
            shapes[modality] = (frames, preprocess.num_mel_bins)
    return shapes


# -- All of it --


class Parts(NamedTuple):
    """What a config and its data amount to.

    Attributes:
      shapes: modality -> shape of one row as the model gets it.
    """

    model: Model
    objective: objectives.Objective | objectives.Classification
    view: views.View
    preprocess: Preprocess
    schedule: optimizer_lib.WarmupCosine
    optimizer: optax.GradientTransformation
    shapes: dict[Modality, tuple[int, ...]]
    length: Length


def build(config: Config, source: Mixture) -> Parts:
    """Everything a training run is made of, but its data stream."""
    info = source.sources[0].info
    view, preprocess = build_view(config), build_preprocess(config, info)
    length = training_length(config, len(source))
    schedule = build_schedule(config, length.num_steps, length.steps_per_epoch)
    return Parts(
        model=build_model(config, info),
        objective=build_objective(config),
        view=view,
        preprocess=preprocess,
        schedule=schedule,
        optimizer=build_optimizer(config, schedule),
        shapes=input_shapes(view, preprocess, source),
        length=length,
    )


def step_flops(config: Config, parts: Parts, *, repeated: bool = False) -> float:
    """What a step takes over all devices, by the mathematics and not by how it is computed.

    Args:
      repeated: with what is computed a second time where the backward pass finds the inputs of layers alone
        (model.compute.remat='full').
    """
    shapes = {modality: (1, *shape) for modality, shape in parts.shapes.items()}
    asked: dict[str, Any] = {}
    if not isinstance(parts.objective, objectives.Classification):
        asked = dict(mask_ratio=parts.objective.mask_ratio, terms=parts.objective.terms)
    return float(config['batch_size'] * flops.training_flops(parts.model, shapes, **asked, repeated=repeated))


def make_init(parts: Parts) -> Callable[[jax.Array], state_lib.TrainState]:
    """key -> the state before the first step."""
    init_params = make_init_params(parts.model, parts.objective, parts.shapes)
    return state_lib.make_init(init_params, parts.objective.init, parts.optimizer)


def abstract_batch(config: Config, view: views.View, source: Mixture, sharding: Any = None) -> Batch:
    """Shapes and types of the global batch."""
    sound = views.SoundFormat(source.sample_rate, source.spectrogram_shape)
    rows = config['batch_size']

    def array(*shape, dtype):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    layout = view.layout(sound)
    return Batch(
        media={modality: array(*spec.shape, dtype=spec.dtype) for modality, spec in layout.items()},
        present={modality: array(dtype=jnp.bool_) for modality in layout},
        labels={head: array(len(labels.names), dtype=jnp.float32) for head, labels in source.labels.items()},
        record=array(dtype=jnp.int32),
        seed=array(2, dtype=jnp.uint32),
        weight=array(dtype=jnp.float32),
        damaged=array(dtype=jnp.int32),
    )


class Placed(NamedTuple):
    """Where a run lies on a mesh.

    Attributes:
      state: its state as shapes, types and places.
      shardings: of the state, in the same tree.
      rows: of a batch.
    """

    state: state_lib.TrainState
    shardings: state_lib.TrainState
    rows: jax.NamedSharding


def place(config: Config, init: Callable[[jax.Array], state_lib.TrainState], mesh: jax.sharding.Mesh) -> Placed:
    """What a run will have where, without computing or allocating any of it; the devices need not be here.

    Args:
      init: what `make_init` gave. It is traced once, however often it is placed or run.
    """
    shardings = rules.state_shardings(state_lib.abstract_state(init), mesh, config['parallel']['rules'])
    return Placed(state_lib.abstract_state(init, shardings), shardings, rules.batch_sharding(mesh))


def compile_step(config: Config, parts: Parts, source: Mixture, placed: Placed) -> Any:
    """The training step, compiled for the mesh on which everything is placed."""
    lose_modality_ratio = parts.preprocess.lose_modality_ratio
    train_step = step_lib.make_train_step(
        step_lib.make_loss(parts.model, parts.objective, parts.preprocess, lose_modality_ratio=lose_modality_ratio),
        objective=parts.objective,
        optimizer=parts.optimizer,
        schedule=parts.schedule,
        accumulate_steps=config['optimizer']['accumulate_steps'],
    )
    return step_lib.jit_train_step(
        train_step,
        state=placed.state,
        shardings=placed.shardings,
        batch=abstract_batch(config, parts.view, source, placed.rows),
        batch_sharding=placed.rows,
    )


def make_init_params(
    model: Model,
    objective: objectives.Objective | objectives.Classification,
    shapes: Mapping[Modality, tuple[int, ...]],
) -> Callable[[jax.Array], Any]:
    """key -> fresh parameters, for inputs of these shapes (without the batch dimension)."""

    def init_params(rng: jax.Array) -> Any:
        inputs = {modality: jnp.zeros((1, *shape), jnp.float32) for modality, shape in shapes.items()}
        if isinstance(objective, objectives.Classification):
            return model.init(rng, inputs)['params']
        drawn = objective.draw(jax.random.key(0), model.grids(inputs), 1)
        return model.init(rng, inputs, drawn.masks, drawn.places or None)['params']

    return init_params


def brought_up(old: Config, new: Config, info: DatasetInfo) -> Config:
    """The settings of a run, with those that came in since where leaving them out makes what the new ones make."""
    brought = dict(old)
    with contextlib.suppress(ValueError, KeyError, TypeError):  # Of what nobody builds any more, the settings tell.
        if build_model(old, info) == build_model(new, info):
            brought['model'] = new['model']
    if 'start' in old and 'start' in new:
        brought['start'] = {'trunk': False, **old['start']}
    return brought


# -- A finished run --


class RestoredModel(NamedTuple):
    """What a checkpoint holds of its model; alike on every process of a job.

    Attributes:
      folder: of the checkpoint, .../STEP.
      meta: what `make_meta` wrote.
      info: the dataset it was trained on, without shards.
      params: numpy arrays, to be put onto whatever devices there are.
      averaged: whether they are the moving average that the run kept.
    """

    folder: epath.Path
    meta: dict[str, Any]
    info: DatasetInfo
    model: Model
    params: Any
    averaged: bool = False


def restore_model(checkpoint: epath.PathLike, *, averaged: bool = True) -> RestoredModel:
    """The model of a checkpoint, in any number of processes; reads the optimiser only where it keeps an average.

    Args:
      checkpoint: a workdir or its folder `checkpoints`, for the newest that is whole; or the folder of one step.
      averaged: the moving average of the parameters in their place, if the run keeps one.
    """
    folder, asked = find_checkpoints(checkpoint)
    checkpoints = Checkpoints(folder, read_only=True)
    step = checkpoints.last_good_step(['params', META], asked)
    found = None if step is None else checkpoints.read_meta(step)
    if found is None:
        raise ValueError(f'{folder} holds no checkpoint that is whole.')
    averaged = averaged and found[1]['config']['optimizer'].get('average_decay') is not None
    if averaged:
        # Of this checkpoint the average may be damaged, and that of an earlier one whole.
        step = checkpoints.last_good_step(['params', 'opt_state', META], asked)
        found = None if step is None else checkpoints.read_meta(step)
        if found is None:
            raise ValueError(f'{folder} holds no checkpoint whose average of the parameters is whole.')
    step, meta = found
    info = DatasetInfo.from_json(json.dumps(meta['dataset']['info']))
    model, objective = build_model(meta['config'], info), build_objective(meta['config'])
    shapes = {modality: tuple(shape) for modality, shape in meta['input_shapes'].items()}
    params = jax.eval_shape(make_init_params(model, objective, shapes), jax.random.key(0))
    # Whole on every device: the one placement that each process of any job can fetch from its own.
    everywhere = jax.NamedSharding(mesh_lib.make_mesh(), jax.P())
    items = {'params': params}
    if averaged:
        optimizer = build_optimizer(meta['config'], optax.constant_schedule(0.0))
        items['opt_state'] = jax.eval_shape(optimizer.init, params)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), items)
    restored = checkpoints.restore(target, step)
    assert restored is not None  # With a step it raises instead.
    checkpoints.close()
    chosen = optimizer_lib.averaged(restored.items['opt_state']) if averaged else restored.items['params']
    params = jax.tree.map(np.asarray, chosen)
    return RestoredModel(folder / str(step), meta, info, model, params, averaged)


def find_checkpoints(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """(folder of checkpoints, step or None for the newest) of a workdir, its checkpoints, or one of them."""
    folder = epath.Path(path)
    if folder.name.isdigit() and folder.is_dir():
        return folder.parent, int(folder.name)
    if (folder / 'checkpoints').is_dir():
        return folder / 'checkpoints', None
    if folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir()):
        return folder, None
    raise ValueError(f'{path} is neither a workdir, nor its folder checkpoints, nor a checkpoint in it.')


def make_meta(
    config: Config, source: Mixture, shapes: Mapping[Modality, tuple[int, ...]], state: state_lib.TrainState
) -> dict[str, Any]:
    """What is saved beside the arrays of a state."""
    info = dataclasses.replace(source.sources[0].info, splits={})
    return {
        **state_lib.to_meta(state),
        'data_position': int(state.step),
        'config': dict(config),
        'dataset': {'digest': dataset_digest(source), 'info': json.loads(info.to_json())},
        'input_shapes': {modality: list(shape) for modality, shape in shapes.items()},
        'versions': {'jax': jax.__version__, 'numpy': np.__version__, 'optax': optax.__version__},
    }


def versions() -> dict[str, str]:
    """Of this package and of what decides its numbers."""
    libraries = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    return {
        'avmae_jax': __version__,
        'python': platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }

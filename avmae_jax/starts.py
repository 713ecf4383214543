"""What training begins with where config.start names another model: a run, or a ViT of images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from avmae_jax import experiment, settings
from avmae_jax.checkpoints import transfer
from avmae_jax.data.mixing import Mixture
from avmae_jax.models import sizes
from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.ops.preprocess import Preprocess
from avmae_jax.settings import Config, to_plain, with_setting
from avmae_jax.structs import Modality
from avmae_jax.weights import vit


class Start(NamedTuple):
    """A model that training may begin with: its parameters, tokenizers and tokens along each axis."""

    model: experiment.Model
    params: Any
    tokenizers: Mapping[Modality, Any]
    grids: Mapping[Modality, tuple[int, ...]]


def with_trunk(config: Config) -> Config:
    """The config, with the tokenizers and the encoder of the start where config.start.trunk asks for them.

    How the encoder is trained (drop_path) and computed stays the config's; of several tokenizers those are taken whose
    modalities the config has.
    """
    section = config.get('start') or {}
    if not section.get('trunk'):
        return config
    path, model = section['path'], settings.to_plain(config)['model']
    if not path:
        raise ValueError('config.start.trunk=True takes the trunk of config.start.path, which is empty: set it too.')
    theirs = _read_section(path)
    missing = sorted(set(model['tokenizers']) - set(theirs['tokenizers']))
    if missing:
        raise ValueError(
            f'config.start.trunk=True, and {path} has no tokenizer of {", ".join(missing)}: leave it out, or choose '
            'modalities by the argument modalities=... of the config.'
        )
    taken = {
        'tokenizers': {modality: theirs['tokenizers'][modality] for modality in model['tokenizers']},
        'encoder': {**theirs['encoder'], 'drop_path': model['encoder'].get('drop_path', 0.0)},
        # Runs of before this setting have none.
        'architecture': theirs.get('architecture', dataclasses.asdict(sizes.USUAL)),
    }
    before, now = (settings.flatten({name: each[name] for name in taken if name in each}) for each in (model, taken))
    changed = [
        f'{name}: {before.get(name, "-")!r} -> {now.get(name, "-")!r}'
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    logging.info('config.start.trunk changes config.model: %s.', '; '.join(changed) or 'nothing')
    return {**config, 'model': {**model, **taken}}


def _read_section(path: str) -> Config:
    """config.model of a start. Its checkpoint is not opened, as that would start the devices of this process."""
    if is_vit(path):
        return experiment.describe_model(with_setting('start.path', vit.read_model, path, Compute()))
    folder, _ = with_setting('start.path', experiment.find_checkpoints, path)
    return with_setting('start.path', settings.load_config, folder.parent)['model']


def start_params(config: Config, parts: experiment.Parts, source: Mixture) -> tuple[Any, transfer.Report]:
    """What training begins with when config.start names another model, and what became of its parameters.

    The rest is what it would be without: initialised from config.seed.

    Returns: numpy arrays, and the report.
    """
    section = config['start']
    other = _read_vit(section, parts) if is_vit(section['path']) else _read_run(config, source)
    _compare_trunks(parts.model, other.model)
    key, _ = jax.random.split(jax.random.key(config['seed']))  # As training/state.py initialises.
    init = experiment.make_init_params(parts.model, parts.objective, parts.shapes)
    fresh = jax.tree.map(np.asarray, jax.jit(init)(key))
    params, report = with_setting(
        'start',
        functools.partial(
            transfer.transfer,
            grids=parts.model.grids(_blank(parts.shapes)),
            source_grids=other.grids,
            tokenizers=parts.model.tokenizers,
            source_tokenizers=other.tokenizers,
            heads=section['heads'],
            divide_stem=section['divide_stem'],
            inflation=section['inflation'],
        ),
        fresh,
        other.params,
    )
    return jax.tree.map(np.asarray, params), report


# Of tokenizers, what a start may differ in without an error, and of its patches transfer.py sees that they fit.
TOLD = ('stride', 'positions', 'modality_token', 'class_token', 'class_position', 'distillation_token', 'channels')
TAKEN_OVER = 'config.start.trunk=True takes tokenizers and encoder as they are there'


def _compare_trunks(ours: experiment.Model, theirs: experiment.Model) -> None:
    """Refuses blocks that are made otherwise than those of the start, and warns of what else differs."""
    one, other = (vars(model.encoder.size.architecture) for model in (ours, theirs))
    wrong = {name: value for name, value in other.items() if value != one[name]}
    if wrong:
        told = ', '.join(f'{name}={one[name]!r} and not {value!r}' for name, value in wrong.items())
        flags = ' '.join(f'--config.model.architecture.{name}={value}' for name, value in wrong.items())
        raise ValueError(
            f'config.start.path is of a model that is made otherwise than config.model, which has {told}: give '
            f'{flags}, or {TAKEN_OVER}.'
        )
    differing = [
        f'tokenizers.{modality}.{name}={here!r} and not {there!r}'
        for modality in ours.tokenizers
        if modality in theirs.tokenizers
        for name in TOLD
        for here, there in [[getattr(model.tokenizers[modality], name, None) for model in (ours, theirs)]]
        if here != there
    ]
    differing += [
        f'encoder.{name}={here!r} and not {there!r}'
        for (name, here), there in zip(_norm_of(ours).items(), _norm_of(theirs).values(), strict=True)
        if here != there
    ]
    if differing:
        logging.warning('Other than config.start.path, config.model has %s; %s.', ', '.join(differing), TAKEN_OVER)
    if not ours.encoder.final_norm and isinstance(ours, Classifier) and not ours.pooled_norm:
        logging.warning(
            'config.model.encoder.final_norm=False: no norm stands before the heads; config.model.pooled_norm=True '
            'puts one there, as VideoMAE and MAE do when they finetune.'
        )


def _norm_of(model: experiment.Model) -> dict[str, Any]:
    """The norm behind the encoder."""
    encoder = model.encoder
    if not encoder.final_norm:
        return {'final_norm': False, 'final_norm_epsilon': None}
    epsilon = encoder.final_norm_epsilon
    return {
        'final_norm': True,
        'final_norm_epsilon': encoder.size.architecture.norm_epsilon if epsilon is None else epsilon,
    }


def _compare_preprocess(config: Config, theirs: Config) -> None:
    """Warns where the start saw its pictures, or heard its sound, otherwise: it learns that anew."""
    defaults = {field.name: field.default for field in dataclasses.fields(Preprocess)}
    shared = set(config['model']['tokenizers']) & set(theirs['model']['tokenizers'])
    names = ['convention'] * ('audio' in shared) + ['rgb_mean', 'rgb_std'] * bool(shared - {'audio'})
    for name in names:
        here, there = (to_plain({name: c['preprocess'].get(name, defaults[name])})[name] for c in (config, theirs))
        if here != there:
            logging.warning('config.preprocess.%s is %s, and that of config.start.path was %s.', name, here, there)


def is_vit(path: str) -> bool:
    """Whether a start is a file with the weights of an image ViT, and no run."""
    return path.endswith('.npz')


def _read_vit(section: Config, parts: experiment.Parts) -> Start:
    if section['heads']:
        raise ValueError(f'config.start.heads=True: the classes of {section["path"]} are of images; set it to False.')
    made = with_setting('start.path', vit.read, section['path'], parts.model.encoder.compute)
    return Start(made.model, made.params, made.model.tokenizers, {'image': made.grid})


def _read_run(config: Config, source: Mixture) -> Start:
    section = config['start']
    other = experiment.restore_model(section['path'])
    if section['heads']:
        for head in config['objective']['heads']:
            # An autoencoder was trained on labelled clips perhaps, and has no heads.
            there = isinstance(other.model, Classifier) and head in other.model.num_classes
            held, wanted = other.info.labels[head] if there else None, source.labels[head]
            if held is None or held.digest != wanted.digest:
                raise ValueError(
                    f'config.start.heads=True, and the classes of {head!r} in {section["path"]} are '
                    f'{"not there" if held is None else f"{len(held.names)} others"}, the data has '
                    f'{len(wanted.names)}: set it to False.'
                )
    shapes = {modality: tuple(shape) for modality, shape in other.meta['input_shapes'].items()}
    _compare_preprocess(config, other.meta['config'])
    return Start(other.model, other.params, other.model.tokenizers, other.model.grids(_blank(shapes)))


def _blank(shapes: Mapping[Modality, tuple[int, ...]]) -> dict[Modality, np.ndarray]:
    """One row of each modality that takes no memory; of it only the shape matters."""
    return {modality: np.broadcast_to(np.float32(0), (1, *shape)) for modality, shape in shapes.items()}

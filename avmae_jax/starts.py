"""What training begins with where config.start names another model: a run, or a ViT of images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from avmae_jax import experiment
from avmae_jax.checkpoints import transfer
from avmae_jax.data.mixing import Mixture
from avmae_jax.models import sizes
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


def start_params(config: Config, parts: experiment.Parts, source: Mixture) -> tuple[Any, transfer.Report]:
    """What training begins with when config.start names another model, and what became of its parameters.

    The rest is what it would be without: initialised from config.seed.

    Returns: numpy arrays, and the report.
    """
    section = config['start']
    other = _read_vit(section, parts) if is_vit(section['path']) else _read_run(config, source)
    _check_architecture(parts.model.encoder.size.architecture, other.model.encoder.size.architecture)
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


def _check_architecture(ours: sizes.Architecture, theirs: sizes.Architecture) -> None:
    wrong = {name: value for name, value in vars(theirs).items() if value != getattr(ours, name)}
    if wrong:
        flags = ' '.join(f'--config.model.architecture.{name}={value}' for name, value in wrong.items())
        raise ValueError(f'config.start.path is of a model that is made otherwise than config.model: give {flags}.')


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

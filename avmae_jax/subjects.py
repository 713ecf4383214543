"""What is evaluated: the model of a checkpoint, and the data that it is shown, as it is to be shown them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from avmae_jax import experiment, objectives, settings
from avmae_jax.checkpoints.manager import DIGESTS_FILE
from avmae_jax.data.mixing import Mixture
from avmae_jax.data.schema import DatasetInfo, unnamed_classes
from avmae_jax.ops.preprocess import Preprocess


class Subject(NamedTuple):
    """A model, what it is asked and what it is shown.

    Attributes:
      info: the dataset it was trained on.
      config: of its training, with the overrides of the command line.
      own: config of its training, as it was.
      trained_on: digest of the data it was trained on; '' for an imported model.
      name: of its results: 'step-0001000', 'random-init-seed-0'.
      about: where it comes from; goes into the results.
      params: numpy arrays, the same on every process.
    """

    info: DatasetInfo
    config: dict[str, Any]
    own: dict[str, Any]
    trained_on: str
    name: str
    about: dict[str, Any]
    params: Any
    model: experiment.Model
    objective: objectives.Objective | objectives.Classification
    preprocess: Preprocess

    @property
    def num_crops(self) -> int:
        """Of each moment of a clip."""
        return experiment.build_view(self.config).eval_crops

    @property
    def has_silent_head(self) -> bool:
        """Whether it came without a head and has one of zeros: its features say something, its scores do not."""
        heads = {name: head for name, head in self.params.items() if name.startswith('head_')}
        return bool(heads) and 'random_init' not in self.about and not any(map(np.any, jax.tree.leaves(heads)))

    def open(self, split: str) -> Mixture:
        """The clips of a split."""
        return experiment.open_sources(self.config, split)

    def stream(self, split: str | Mixture, *, batch_size: int, num_clips: int = 1, in_workers: bool = True) -> Any:
        """Every record of a split once, or of clips that are open already; a context manager.

        Args:
          in_workers: False reads in this process, where few batches are not worth starting others.
        """
        config = self.config if in_workers else settings.override(self.config, {'data.num_workers': 0})
        return experiment.build_eval_stream(config, split, batch_size=batch_size, num_clips=num_clips)


# Of a config given besides the checkpoint; the rest describes the training that the checkpoint is of.
TAKEN_SECTIONS = ('data', 'video', 'audio', 'image', 'preprocess', 'evaluation', 'batch_size')
# What a checkpoint is of, or how it was trained: other values would change nothing of what is found.
FIXED_SECTIONS = ('model', 'optimizer', 'start', 'num_steps', 'checkpoint', 'report')


def load_subject(
    checkpoint: epath.PathLike,
    *,
    overrides: Mapping[str, Any],
    random_init: bool = False,
    seed: int | None = None,
    config: settings.Config | None = None,
    averaged: bool = True,
) -> Subject:
    """The last good checkpoint of a run (or the one named), or what its training began with.

    Args:
      config: whose data, views and preprocessing take the place of those of the run.
    """
    restored = experiment.restore_model(checkpoint, averaged=averaged)
    meta, step = restored.meta, int(restored.folder.name)
    own = meta['config']
    if config is not None:
        if sorted(config['model']['tokenizers']) != sorted(own['model']['tokenizers']):
            raise ValueError(
                f'--config has {", ".join(sorted(config["model"]["tokenizers"]))} and the checkpoint '
                f'{", ".join(sorted(own["model"]["tokenizers"]))}: give the arguments it was trained with.'
            )
        kept = {name: value for name, value in own.items() if name not in TAKEN_SECTIONS}
        path = config['data']['path'] or own['data']['path']  # A file names no dataset.
        taken = {name: config[name] for name in TAKEN_SECTIONS if name in config}
        own = {**kept, **taken, 'data': {**config['data'], 'path': path}}
    config = settings.override(own, overrides)
    for name in overrides:
        if settings.is_within(name, FIXED_SECTIONS):
            raise ValueError(f'config.{name} is of the training, and {checkpoint} is trained: leave it out.')
    params, name = restored.params, f'step-{step:07d}'
    about = {
        'checkpoint': str(restored.folder),
        'step': step,
        'digest': hashlib.sha256((restored.folder / DIGESTS_FILE).read_bytes()).hexdigest(),
        'trained_on': meta['dataset']['digest'],
        'labels': {head: classes.digest for head, classes in restored.info.labels.items()},
        'averaged': restored.averaged,
    }
    objective = experiment.build_objective(config)
    if random_init:
        seed = config['seed'] if seed is None else seed
        shapes = {modality: tuple(shape) for modality, shape in meta['input_shapes'].items()}
        init = experiment.make_init_params(restored.model, objective, shapes)
        # The key that training/state.py initialises with, so that this is what the run began with.
        params = jax.tree.map(np.asarray, jax.jit(init)(jax.random.split(jax.random.key(seed))[0]))
        name, about = f'random-init-seed-{seed}', {'random_init': True, 'seed': seed}
    return Subject(
        info=restored.info,
        config=config,
        own=meta['config'],
        trained_on=meta['dataset']['digest'],
        name=name,
        about=about,
        params=params,
        model=restored.model,
        objective=objective,
        # By the statistics of what it was trained on, whatever it is shown now.
        preprocess=experiment.build_preprocess(config, restored.info),
    )


def moments(config: settings.Config) -> int:
    """Of each clip that are averaged, as many as the config says."""
    # Runs of before this setting have none.
    wanted = config['evaluation'].get('num_clips', 1)
    if wanted < 1:
        raise ValueError(f'config.evaluation.num_clips={wanted} must be at least 1.')
    return wanted


def check_classes(subject: Subject, source: Mixture) -> None:
    """Refuses to score a classifier by other classes than those it was trained on."""
    assert isinstance(subject.objective, objectives.Classification)
    for head in subject.objective.heads:
        trained, given = subject.about.get('labels', {}).get(head), source.labels.get(head)
        if given is None:
            raise ValueError(f'{source.sources[0].info.name} has no labels for {head!r}, which the model scores.')
        # Of an imported model perhaps nobody knows more than how many they are.
        named = subject.trained_on or subject.info.labels[head].names != unnamed_classes(len(given.names))
        if trained is not None and named and trained != given.digest:
            raise ValueError(
                f'The classes of {head!r} in {source.sources[0].info.name}, or their order, are others than the model '
                f'was trained on (label map {given.digest[:12]}, trained on {trained[:12]}): its scores would '
                'mean nothing. Prepare the data with the same label map.'
            )

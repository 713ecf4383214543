"""A run of one checkpoint with nothing but parameters: what `config.start.path` and plain orbax read.

    checkpoints/STEP/params      of orbax: nested dicts, as the model lays its layers out
    checkpoints/STEP/meta        the config, the dataset, the shapes of the inputs
    config.json                  of the run

It starts another run and is evaluated like any run, with --config.data.path=DIR, as its config names no folders; it is
not gone on with, as the optimiser's state is not there.
"""

from __future__ import annotations

import json
from typing import Any

import jax
from etils import epath

from avmae_jax import settings
from avmae_jax.checkpoints.manager import Checkpoints
from avmae_jax.exports.trained import DTYPES, Trained, published

PATHS = {('data', 'path'): '', ('data', 'data_dir'): None, ('start', 'path'): ''}  # Left empty in the config.


def write(folder: epath.Path, trained: Trained, dtype: str) -> None:
    """The checkpoint and the config."""
    config = settings.to_plain(trained.config)
    # The average is what is stored, and no average of it.
    config.setdefault('optimizer', {})['average_decay'] = None
    # Where things lay on the machine of the training is nobody else's.
    for (section, name), empty in PATHS.items():
        if name in config.get(section, {}):
            config[section][name] = empty
    meta: dict[str, Any] = {
        'config': config,
        'dataset': {'digest': trained.about['trained_on'], 'info': json.loads(trained.info.to_json())},
        'input_shapes': {modality: list(shape) for modality, shape in trained.shapes.items()},
        'step': trained.about['step'],
        'versions': trained.about['trained_with'],
        'about': published(trained.about),
    }
    params = jax.tree.map(lambda x: x.astype(DTYPES[dtype]), trained.params)
    checkpoints = Checkpoints(folder / 'checkpoints')
    checkpoints.save(trained.about['step'], {'params': params}, meta)
    checkpoints.close()
    settings.save_config(config, folder)

"""The format that `avmae_jax.load_pretrained` reads: model.safetensors and what rebuilds the model, in JSON.

model.safetensors      parameters by the names of our models, layer by layer, float32 or bfloat16
config.json            the model, what it was trained for, the shapes of its inputs, the dataset
preprocessing.json     frames, sample rate, log-mel, normalisation
labels.json            head -> names of its classes; of classifiers
README.md              the model card
digests.json           size and sha256 of all of these
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from etils import epath

from avmae_jax.data.schema import DatasetInfo
from avmae_jax.exports import folder as folders
from avmae_jax.exports.trained import Trained, cast, describe_preprocessing, named_arrays, published
from avmae_jax.weights import safetensors
from avmae_jax.weights.table import Arrays

FORMAT, FORMAT_VERSION = 'avmae_jax', 1
WEIGHTS, CONFIG, PREPROCESSING, LABELS = 'model.safetensors', 'config.json', 'preprocessing.json', 'labels.json'
SECTIONS = ('model', 'objective')


def write(folder: epath.Path, trained: Trained, dtype: str) -> None:
    """Parameters, and what rebuilds the model."""
    safetensors.write(folder / WEIGHTS, cast(named_arrays(trained.params), dtype), {'format': FORMAT})
    write_description(folder, trained)


def write_description(folder: epath.Path, trained: Trained) -> None:
    """All JSON but the digests; other formats have it beside them too."""
    dataset = json.loads(trained.info.to_json())
    labels = {head: entry for head, entry in dataset.pop('labels').items() if head in trained.heads}
    content = {
        'format': FORMAT,
        'format_version': FORMAT_VERSION,
        **{name: trained.config[name] for name in SECTIONS},
        'input_shapes': {m: list(shape) for m, shape in trained.shapes.items()},
        'dataset': dataset,
        'about': published(trained.about),
    }
    folders.write_json(folder / CONFIG, content)
    folders.write_json(folder / PREPROCESSING, describe_preprocessing(trained))
    if trained.heads:
        folders.write_json(folder / LABELS, labels)


class Stored(NamedTuple):
    """What an export holds, checked as far as that goes without the model.

    Attributes: config: of CONFIG; preprocessing: of PREPROCESSING; info: dataset with its labels; arrays: by name.
    """

    config: dict[str, Any]
    preprocessing: dict[str, Any]
    info: DatasetInfo
    arrays: Arrays


def is_export(path: epath.Path) -> bool:
    """Whether that is what a folder is meant to be: one that is damaged is an export too, and a run is none."""
    there = [name for name in (WEIGHTS, folders.DIGESTS_FILE) if (path / name).exists()]
    return bool(there) and not (path / 'checkpoints').is_dir()


def read(path: epath.Path) -> Stored:
    """An export, of which every file that counts is the one that was written; ValueError names what is not."""
    files = [CONFIG, PREPROCESSING, WEIGHTS]
    files += [LABELS] if LABELS in folders.read_json(path, folders.DIGESTS_FILE).get('files', {}) else []
    folders.check_digests(path, files)
    config = folders.read_json(path, CONFIG)
    if (config.get('format'), config.get('format_version')) != (FORMAT, FORMAT_VERSION):
        raise ValueError(
            f'{path / CONFIG} is of format {config.get("format")!r}, version {config.get("format_version")!r}; this '
            f'version of avmae_jax reads {FORMAT!r}, version {FORMAT_VERSION}.'
        )
    labels = folders.read_json(path, LABELS) if LABELS in files else {}
    try:
        info = DatasetInfo.from_json(json.dumps({**config['dataset'], 'labels': labels}))
        missing = [name for name in (*SECTIONS, 'input_shapes', 'about') if name not in config]
        if missing:
            raise KeyError(missing[0])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'{path / CONFIG} or {LABELS} does not tell what the model is: {error!r}.') from error
    arrays = safetensors.read(path / WEIGHTS)
    try:
        safetensors.check_finite(arrays)
    except ValueError as error:
        raise ValueError(f'{path / WEIGHTS}: {error}') from error
    return Stored(config, folders.read_json(path, PREPROCESSING), info, arrays)

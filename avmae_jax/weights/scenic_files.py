"""Checkpoints of Scenic's `av_mae` and `mbt` as files, and models of ours from them.

    imported = read_imported('checkpoint_100', compute, {}, 'av_mae')      # a model, its parameters, what was done
    write_checkpoint('checkpoint_100', scenic_avmae.dump(model, params), step=100)

A file holds a training state of flax in msgpack: the parameters lie under `params` (or `optimizer/target`, in files of
the time of `flax.optim`), beside them a state of the model, which none of these models has, and of the optimiser, which
is not read. What the model is, and what it was trained on, its config says, in JSON: config.json beside the
checkpoint, or whatever file `given` names. Configs are Python files there, which nobody runs who only wants weights;
the one who trusts them writes

    json.dumps(get_config().to_dict(), default=list)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.trunk import Trunk
from avmae_jax.structs import Modality
from avmae_jax.weights import scenic_config, scenic_mbt
from avmae_jax.weights.files import checked, is_file, read_msgpack, write_msgpack
from avmae_jax.weights.imported import Imported
from avmae_jax.weights.scenic_avmae import load_rows, scenic_rows
from avmae_jax.weights.table import Arrays, Row, as_float32, few, flatten, unflatten

CONFIG_FILE = 'config.json'
MAX_CONFIG = 1 << 20  # Bytes.
# What may be told of a checkpoint, for `weights/formats.py`.
GIVEN = {
    'config': 'its config in JSON; config.json beside it without',
    'video': 'what it was trained on, as 16x224x224, where the config does not say',
    'audio': 'the same, as 1000x128',
    'image': 'the same, as 224x224',
}


class Checkpoint(NamedTuple):
    """Attributes: arrays: parameters under Scenic's names; step: after which they were written."""

    arrays: Arrays
    step: int


def read_checkpoint(path: epath.PathLike) -> Checkpoint:
    """The parameters in a checkpoint, all float32 and finite."""
    state = read_msgpack(path)
    params = state.get('params')
    if params is None:
        optimizer = state.get('optimizer')
        params = optimizer.get('target') if isinstance(optimizer, Mapping) else None
    if not isinstance(params, Mapping) or not params:
        raise ValueError(
            f'{path} is no training state of Scenic: it has {few(sorted(state))}, and neither params nor '
            'optimizer/target.'
        )
    # Whole variables of flax, rather than their collection of parameters.
    params = params['params'] if isinstance(params.get('params'), Mapping) and len(params) == 1 else params
    beside = state.get('model_state')
    if beside is not None and not (isinstance(beside, Mapping) and not flatten(beside)):
        raise ValueError(f'{path}: its model has a state beside its parameters, which those read here have not.')
    arrays = flatten(params)
    other = sorted(
        name for name, array in arrays.items() if not isinstance(array, np.ndarray) or array.dtype.kind != 'f'
    )
    if other:
        raise ValueError(f'{path}: {few(other)} are no arrays of floats, as parameters are.')
    return Checkpoint(as_float32(checked(path, arrays)), _step(path, state.get('global_step')))


def _step(path: epath.PathLike, said: Any) -> int:
    """One integer, of which each device may have had a copy; 0 where nothing is said."""
    if said is None:
        return 0
    copies = np.unique(said) if isinstance(said, int | np.integer | np.ndarray) else np.empty(0)
    if copies.size != 1 or copies.dtype.kind not in 'iu' or copies[0] < 0:
        raise ValueError(f'{path}: global_step is {said!r:.80}, where one integer, 0 or above, was due.')
    return int(copies[0])


def write_checkpoint(path: epath.PathLike, arrays: Mapping[str, np.ndarray], step: int = 0) -> None:
    """Writes parameters as Scenic reads a model to start from, without a state of the optimiser."""
    state = {'global_step': step, 'params': unflatten(arrays), 'model_state': {}, 'opt_state': {}, 'rng': None}
    write_msgpack(path, {**state, 'metadata': None})


def read_config(path: epath.PathLike, given: Mapping[str, str]) -> dict[str, Any]:
    """The config of a checkpoint."""
    file = epath.Path(given['config'] if 'config' in given else epath.Path(path).parent / CONFIG_FILE)
    if not is_file(file):
        raise ValueError(
            f'{file} is not there: the config of a checkpoint of Scenic, in JSON, is needed to know its model. '
            'Write it there with json.dumps(get_config().to_dict(), default=list), or give --given=config=FILE.'
        )
    if file.stat().length > MAX_CONFIG:
        raise ValueError(f'{file} of {file.stat().length} bytes is no config.')
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file} is no config in JSON: {error}') from error
    if not isinstance(config, dict) or not isinstance(config.get('model'), dict):
        raise ValueError(f"{file} is no config of Scenic: it has no section 'model'.")
    scenic_config.check_values(f'{file}: config', config)
    return config


def read_imported(path: epath.PathLike, compute: Compute, given: Mapping[str, str], variant: str) -> Imported:
    """The model in a checkpoint, for `weights/formats.py`.

    Args:
      given: what GIVEN names.
      variant: 'av_mae', for its autoencoders, its classifiers of one modality and its MBT; 'mbt', for the older MBT.
    """
    config = read_config(path, given)  # First, as it is small.
    arrays, _ = read_checkpoint(path)
    try:
        model, rows = build(config, arrays, compute, variant)
        shapes = {m: input_shape(config, m, given) for m in model.tokenizers}
        inputs = {m: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for m, shape in shapes.items()}
        params = load_rows(model, rows, arrays, inputs)
        settings = source_settings(config, model)
    except KeyError as error:
        raise ValueError(f'{path}: its config has no {error}.') from error
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f'{path}: its config does not tell what the model is: {error!r}.') from error
    classes = None if isinstance(model, MaskedAutoencoder) else ()
    return Imported(model, params, shapes, rows, arrays, classes=classes, settings=settings)


def build(
    config: scenic_config.Config, arrays: Arrays, compute: Compute, variant: str
) -> tuple[MaskedAutoencoder | Classifier, list[Row]]:
    """The model of a config with its table: their names -> ours, for the layout with layers one by one."""
    # Configs of finetuning say nothing of a reconstruction.
    config = {'masked_feature_loss': {'target': 'rgb'}, **config}
    if 'modality_fusion' in config['model']:
        stem = arrays.get('embedding_spectrogram/kernel', arrays.get('embedding/kernel'))
        channels = stem.shape[2] if stem is not None and stem.ndim == 4 else 1  # That of video has five axes.
        mbt = scenic_config.build_mbt(config, num_classes(arrays), compute, variant, channels)
        return mbt, scenic_mbt.mbt_rows(mbt, variant)
    if variant != 'av_mae':
        raise ValueError("its config is of no MBT: config.model has no modality_fusion. Read it as 'scenic_avmae'.")
    if 'decoder_config' in config['model'] and 'mask_token' in ' '.join(arrays):
        autoencoder = scenic_config.build_autoencoder(config, compute)
        return autoencoder, scenic_rows(autoencoder, single='embedding/kernel' in arrays)
    classifier = scenic_config.build_classifier(
        config,
        num_classes(arrays),
        compute,
        final_norm='Transformer/encoder_norm/scale' in arrays,
        pooled_norm='encoder_norm/scale' in arrays,
    )
    return classifier, scenic_rows(classifier, single=True)


def num_classes(arrays: Arrays) -> int:
    heads = [array for name, array in arrays.items() if name.endswith('output_projection/bias')]
    if len(heads) != 1:
        raise ValueError(f'a classifier has one head, output_projection, and here are {len(heads)}.')
    return heads[0].shape[0]


def input_shape(config: scenic_config.Config, modality: Modality, given: Mapping[str, str]) -> tuple[int, ...]:
    """What one row of a modality is, as the model gets it."""
    colours = () if modality == 'audio' else (3,)
    if modality in given:
        sizes = given[modality].split('x')
        if len(sizes) != (3 if modality == 'video' else 2) or not all(size.isdecimal() for size in sizes):
            raise ValueError(f'--given={modality}={given[modality]} is no shape: {GIVEN[modality]}.')
        return (*map(int, sizes), *colours)
    data = config.get('dataset_configs') or {}
    needed = {'video': ('num_frames', 'crop_size'), 'audio': ('num_spec_frames', 'spec_shape')}.get(modality, ())
    if not needed or any(name not in data for name in needed):
        said = f'config.dataset_configs has no {" and ".join(needed)}' if needed else 'its config does not say'
        example = GIVEN[modality].split(' as ')[1].split(',')[0]
        raise ValueError(
            f'what {modality} it was trained on is not known, as {said}: give --given={modality}={example}.'
        )
    if modality == 'audio':
        bins, mels = data['spec_shape']
        return (data['num_spec_frames'] * bins, mels)
    return (data['num_frames'], data['crop_size'], data['crop_size'], 3)


def source_settings(config: scenic_config.Config, model: Trunk) -> dict[str, Any]:
    """What the config says of the data and the masks, under the names of our configs."""
    data, found = config.get('dataset_configs') or {}, dict[str, Any]()
    if 'video' in model.tokenizers:
        found |= {f'video.{name}': data[name] for name in ('num_frames', 'crop_size') if name in data}
    if 'audio' in model.tokenizers and 'spec_shape' in data and 'num_spec_frames' in data:
        bins, found['preprocess.num_mel_bins'] = data['spec_shape']
        found['preprocess.num_spec_frames'] = data['num_spec_frames'] * bins
        # The second pair of names is that of the project mbt.
        for names in (('normalization_mean_spec', 'normalization_std_spec'), ('spec_mean', 'spec_stddev')):
            if all(name in data for name in names):
                found['preprocess.audio_mean'], found['preprocess.audio_std'] = (float(data[name]) for name in names)
                if data[names[1]] <= 0:
                    raise ValueError(f'config.dataset_configs.{names[1]} is {data[names[1]]}, and not above 0.')
    if not isinstance(model, MaskedAutoencoder):
        return found
    objective = scenic_config.build_objective(config)
    found |= {f'objective.mask_ratio.{m}': float(ratio) for m, ratio in objective.mask_ratio.items()}
    return found

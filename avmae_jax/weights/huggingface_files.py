"""The files in a directory of transformers: config.json with its defaults, *.safetensors, preprocessor_config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from avmae_jax.structs import Modality
from avmae_jax.weights import files
from avmae_jax.weights.table import Arrays, as_float32, few

CONFIG_FILE, INDEX_FILE, PREPROCESSOR_FILE = 'config.json', 'model.safetensors.index.json', 'preprocessor_config.json'
MAX_JSON_BYTES = 2**24  # The index of a model of some thousands of arrays has less than 2**20.
MAX_NUMBER = float(np.finfo(np.float32).max)
# What stands in their config.json although it is the default of the library may be left out there.
DEFAULTS: dict[str, dict[str, Any]] = {
    'vit': dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act='gelu',
        layer_norm_eps=1e-12, image_size=224, patch_size=16, num_channels=3, qkv_bias=True, pooler_act='tanh',
    ),
}  # fmt: skip
DEFAULTS['vit_mae'] = DEFAULTS['vit'] | dict(
    decoder_num_attention_heads=16, decoder_hidden_size=512, decoder_num_hidden_layers=8,
    decoder_intermediate_size=2048, mask_ratio=0.75, norm_pix_loss=False,
)  # fmt: skip
DEFAULTS['videomae'] = DEFAULTS['vit'] | dict(
    num_frames=16, tubelet_size=2, qv_bias=True, use_mean_pooling=True, decoder_num_attention_heads=6,
    decoder_hidden_size=384, decoder_num_hidden_layers=4, decoder_intermediate_size=1536, norm_pix_loss=True,
)  # fmt: skip
AST = 'audio-spectrogram-transformer'
DEFAULTS[AST] = DEFAULTS['vit'] | dict(frequency_stride=10, time_stride=10, max_length=1024, num_mel_bins=128)


def read_config(folder: epath.Path, model_types: Mapping[str, str]) -> dict[str, Any]:
    """config.json with the defaults of its class.

    Args:
      model_types: class -> its key of DEFAULTS, of those that are read.
    """
    file = folder / CONFIG_FILE
    config = _read_json(file)
    names = config.get('architectures')
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in model_types:
        raise ValueError(f'{file}: architectures is {names!r:.80}, and read are {", ".join(model_types)}.')
    model_type = model_types[names[0]]
    if config.get('model_type', model_type) != model_type:
        raise ValueError(f'{file}: model_type is {config["model_type"]!r}, and that of {names[0]} is {model_type!r}.')
    config = DEFAULTS[model_type] | config
    for name, default in DEFAULTS[model_type].items():
        fits = isinstance(config[name], type(default)) and isinstance(config[name], bool) == isinstance(default, bool)
        pair = name in ('image_size', 'patch_size') and isinstance(config[name], list)
        if not fits and not pair and not (isinstance(default, float) and isinstance(config[name], int)):
            raise ValueError(f'{file}: {name} is {config[name]!r}, where a {type(default).__name__} was due.')
        if isinstance(default, float) and not (_is_number(config[name]) and config[name] >= 0):
            raise ValueError(f'{file}: {name} is {config[name]}, where a number, 0 or above, was due.')
        if fits and not isinstance(default, bool | str | float) and not 0 < config[name] < 2**20:
            raise ValueError(f'{file}: {name} is {config[name]}, where a size was due.')
    return config


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _read_json(file: epath.Path) -> dict[str, Any]:
    if not files.is_file(file):
        what = 'no file' if file.exists() else 'not there'
        raise ValueError(f'{file} is {what}: a model of Hugging Face is a folder with {CONFIG_FILE} in it.')
    if file.stat().length > MAX_JSON_BYTES:
        raise ValueError(f'{file} has {file.stat().length:,} bytes, and at most {MAX_JSON_BYTES:,} are read.')
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file} is no JSON: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{file} holds no settings by name.')
    return content


def read_arrays(folder: epath.Path) -> Arrays:
    """The arrays of *.safetensors by name: of one file, or of the shards that an index names."""
    index = folder / INDEX_FILE
    if not index.is_file():
        found = sorted(folder.glob('*.safetensors'))
        if len(found) != 1:
            raise ValueError(
                f'{len(found)} files *.safetensors and no {INDEX_FILE}: one file, or an index of several, is read '
                '(pytorch_model.bin is not: save the model with safe_serialization=True).'
            )
        return files.read_arrays(found[0])
    place = _read_json(index).get('weight_map')
    if not isinstance(place, dict) or not place:
        raise ValueError(f'{INDEX_FILE} has no weight_map.')
    arrays: Arrays = {}
    for name in sorted(set(map(str, place.values()))):
        if not re.fullmatch(r'[\w.-]+\.safetensors', name):
            raise ValueError(f'{INDEX_FILE} names {name!r}, which is no file *.safetensors beside it.')
        shard = files.read_arrays(folder / name)
        wrong = sorted(one for one in shard if place.get(one) != name)
        if wrong:
            raise ValueError(f'{name} holds {few(wrong)}, and {INDEX_FILE} says otherwise.')
        arrays |= shard
    missing = sorted(set(place) - set(arrays))
    if missing:
        raise ValueError(f'{INDEX_FILE} names {few(missing)}, which its files do not hold.')
    return arrays


# Names in memory, and in files of transformers 5, -> names of the published files.
OTHER_NAMES = (
    (r'(^|\.)decoder\.decoder_encoder\.layer\.', r'\1decoder.decoder_layers.'),
    (r'(^|\.)layers\.(\d+\.)', r'\1encoder.layer.\2'),
    (r'\.attention\.q_proj\.', '.attention.attention.query.'),
    (r'\.attention\.k_proj\.', '.attention.attention.key.'),
    (r'\.attention\.v_proj\.', '.attention.attention.value.'),
    (r'\.attention\.o_proj\.', '.attention.output.dense.'),
    (r'\.mlp\.fc1\.', '.intermediate.dense.'),
    (r'\.mlp\.fc2\.', '.output.dense.'),
)
VIDEOMAE_NAMES = (
    (r'\.attention\.attention\.query\.bias$', '.attention.attention.q_bias'),
    (r'\.attention\.attention\.value\.bias$', '.attention.attention.v_bias'),
)


def published_names(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The arrays under the names that published files have, whichever version of the library wrote them."""
    keyless = not any(re.search(r'(attention\.key|k_proj)\.bias$', name) for name in arrays)
    named: Arrays = {}
    for name, array in as_float32(arrays).items():
        for theirs, ours in (*OTHER_NAMES, *(VIDEOMAE_NAMES if keyless else ())):
            name = re.sub(theirs, ours, name)
        if name in named:
            raise ValueError(f'{name} is there under two names.')
        named[name] = array
    return named


def read_preprocessor(folder: epath.Path, modality: Modality) -> dict[str, Any]:
    """What preprocessor_config.json says of pixels or sound, in terms of our configs; {} where it is not there."""
    file = folder / PREPROCESSOR_FILE
    if not file.exists():
        return {}
    content = _read_json(file)
    if modality != 'audio':
        mean, std = content.get('image_mean'), content.get('image_std')
        if not content.get('do_normalize', True):
            mean, std = [0.0] * 3, [1.0] * 3
        if mean is None or std is None:
            return {}
        found = {'preprocess.rgb_mean': mean, 'preprocess.rgb_std': std}
        for name, values in (('image_mean', mean), ('image_std', std)):
            if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
                raise ValueError(f'{file}: {name} is {values!r:.80}, where a list of three numbers was due.')
        if not all(x > 0 for x in std):
            raise ValueError(f'{file}: image_std is {std}, where three numbers above 0 were due.')
        return found
    found = {'preprocess.convention': 'kaldi'}
    mean, std = content.get('mean', -4.2677393), content.get('std', 4.5689974)
    if not _is_number(mean) or not _is_number(std) or std <= 0:
        raise ValueError(f'{file}: mean and std are {mean!r:.80} and {std!r:.80}, where numbers were due, std above 0.')
    if not content.get('do_normalize', True):
        mean, std = 0.0, 0.5
    # AST divides by twice the deviation.
    return found | {'preprocess.audio_mean': float(mean), 'preprocess.audio_std': 2 * float(std)}

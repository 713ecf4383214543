"""Models of Hugging Face's transformers: a directory with config.json and *.safetensors is a model of ours.

    imported = read('facebook/vit-mae-base', Compute())      # A folder; nothing is downloaded.

Each class has a function that makes our model of its config.json, and a table of their names, those of the published
files. Newer versions of the library call some of them otherwise in memory, and a few in files too; `published_names`
brings these back first. Reversed (`Row.reverse`) the tables lead from our parameters to theirs.

    ViTMAEForPreTraining             an autoencoder of images
    VideoMAEForPreTraining           an autoencoder of video
    VideoMAEModel                    a classifier of video, whose head says nothing
    ViTModel                         a classifier of images, whose head says nothing; its pooler is `representation`
    ViTForImageClassification        the same with its head
    VideoMAEForVideoClassification   a classifier of video
    ASTModel                         a classifier of sound, whose head says nothing
    ASTForAudioClassification        the same with its head

Where ours differ, in what is computed nothing is lost: AST's tokens run over frequency first and ours over time first,
so its positions change places; a bias that keys do not have is one of zero, which is the same (`sizes.Architecture`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.decoders import SharedDecoder
from avmae_jax.models.encoders import SharedEncoder
from avmae_jax.models.sizes import Architecture, Size
from avmae_jax.models.tokenizers import AudioTokenizer, ImageTokenizer, Tokenizer, VideoTokenizer
from avmae_jax.ops import positions
from avmae_jax.structs import Modality
from avmae_jax.weights import files
from avmae_jax.weights.imported import HEAD, Imported, silent_head
from avmae_jax.weights.scenic_avmae import VECTOR, load_rows, row
from avmae_jax.weights.table import (
    Arrays,
    Row,
    Transform,
    as_float32,
    chain,
    constant,
    few,
    join_columns,
    layers_of,
    of_shape,
    permute,
    reshape,
    shape_of,
    transpose,
)

CONFIG_FILE, INDEX_FILE, PREPROCESSOR_FILE = 'config.json', 'model.safetensors.index.json', 'preprocessor_config.json'
MAX_JSON_BYTES = 2**24  # The index of a model of some thousands of arrays has less than 2**20.
MAX_NUMBER = float(np.finfo(np.float32).max)
GELUS = {'gelu': 'exact', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh'}
# Their own defaults, of `torch.nn.LayerNorm` and of VideoMAE's loss.
TORCH_EPSILON = 1e-5
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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


# -- Reading --


def read(path: epath.PathLike, compute: Compute, given: Mapping[str, str] | None = None) -> Imported:
    """The model in a directory; ValueError names the file and what is wrong."""
    folder = epath.Path(path)
    config = read_config(folder)
    try:
        kind = KINDS[config['architectures'][0]]
        arrays = published_names(read_arrays(folder))
        check_sizes(config, arrays, kind)
        made = kind.build(config, arrays, compute)
        arrays, ignored = without_ignored(arrays, kind.ignored)
        rows = kind.rows(made.model, made.shapes)
        inputs = {m: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for m, shape in made.shapes.items()}
        if isinstance(made.model, Classifier) and made.classes is None:
            # Its head says nothing, and is no parameter of theirs.
            rows = [*rows, *silent_head(made.model)]
        params = load_rows(made.model, rows, arrays, inputs)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return Imported(
        made.model,
        params,
        made.shapes,
        rows,
        arrays,
        classes=made.classes,
        settings={**made.settings, **read_preprocessor(folder, next(iter(made.shapes)))},
        ignored=ignored,
    )


def read_config(folder: epath.Path) -> dict[str, Any]:
    """config.json with the defaults of its class."""
    file = folder / CONFIG_FILE
    config = _read_json(file)
    names = config.get('architectures')
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in KINDS:
        raise ValueError(f'{file}: architectures is {names!r:.80}, and read are {", ".join(KINDS)}.')
    model_type = KINDS[names[0]].model_type
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
    if not file.is_file():
        raise ValueError(f'{file} is not there: a model of Hugging Face is a folder with {CONFIG_FILE} in it.')
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


def without_ignored(arrays: Arrays, ignored: Mapping[str, str]) -> tuple[Arrays, dict[str, str]]:
    """The arrays without those that nobody needs, and these with the reason."""
    dropped = {name: ignored[name] for name in arrays if name in ignored}
    return {name: array for name, array in arrays.items() if name not in dropped}, dropped


def read_preprocessor(folder: epath.Path, modality: Modality) -> dict[str, Any]:
    """What preprocessor_config.json says of pixels or sound, in terms of our configs; {} where it is not there."""
    file = folder / PREPROCESSOR_FILE
    if not file.is_file():
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


# -- Models --

MAX_TOKENS = 2**17  # Of a video, whose positions no file tells; VideoMAE has 1,568.


def check_sizes(config: Mapping[str, Any], arrays: Arrays, kind: Kind) -> None:
    """Compares what config.json says with the arrays that tell it too, before memory is taken for any of it."""
    embeddings, patch = f'{kind.prefix}embeddings', pair(config['patch_size'])
    shape: tuple[int, ...] = (config['hidden_size'], config['num_channels'], *patch)
    if kind.model_type == AST:
        shape = (config['hidden_size'], 1, *patch)
        axes = ((config['num_mel_bins'], config['frequency_stride']), (config['max_length'], config['time_stride']))
        tokens = 2 + math.prod((size - patch[0]) // stride + 1 for size, stride in axes)
    else:
        tokens = 1 + math.prod(size // part for size, part in zip(pair(config['image_size']), patch, strict=True))
    if kind.model_type == 'videomae':
        shape = (*shape[:2], config['tubelet_size'], *patch)
        tokens = (tokens - 1) * (config['num_frames'] // config['tubelet_size'])
        if not 0 < tokens <= MAX_TOKENS:
            raise ValueError(f'{CONFIG_FILE} makes {tokens} tokens of a video, and at most {MAX_TOKENS} are read.')
    wanted = {f'{embeddings}.patch_embeddings.projection.weight': shape}
    if kind.model_type != 'videomae':
        wanted[f'{embeddings}.position_embeddings'] = (1, tokens, config['hidden_size'])
    depths = {f'{kind.prefix}encoder.layer': config['num_hidden_layers']}
    if kind.decoder is not None:
        wanted[f'{kind.decoder}mask_token'] = (1, 1, config['decoder_hidden_size'])
        depths['decoder.decoder_layers'] = config['decoder_num_hidden_layers']
        if kind.model_type == 'vit_mae':
            wanted['decoder.decoder_pos_embed'] = (1, tokens, config['decoder_hidden_size'])
    if kind.model_type != AST and shape[1] != 3:
        raise ValueError(f'num_channels is {shape[1]}, and pictures have 3.')
    for name, expected in wanted.items():
        if name not in arrays:
            raise ValueError(f'{name} is missing.')
        if arrays[name].shape != expected:
            raise ValueError(f'{name} is {arrays[name].shape}, and by {CONFIG_FILE} it would be {expected}.')
    for name, depth in depths.items():
        found = len(layers_of(f'{name}.{{layer}}.layernorm_before.weight', arrays))
        if found != depth:
            raise ValueError(f'there are {found} layers {name}, and by {CONFIG_FILE} there would be {depth}.')


class Made(NamedTuple):
    """What config.json and the names of arrays make; the attributes are those of `Imported`."""

    model: MaskedAutoencoder | Classifier
    shapes: dict[Modality, tuple[int, ...]]
    settings: dict[str, Any]
    classes: tuple[str, ...] | None = None


def architecture_of(config: Mapping[str, Any], bias: str = 'qkv_bias') -> Architecture:
    if config['hidden_act'] not in GELUS:
        raise ValueError(f'hidden_act is {config["hidden_act"]!r}, and ours are {", ".join(GELUS)}.')
    return Architecture(GELUS[config['hidden_act']], config['layer_norm_eps'], config[bias])


def size_of(config: Mapping[str, Any], architecture: Architecture, prefix: str = '') -> Size:
    return Size(
        width=config[f'{prefix}hidden_size'],
        num_heads=config[f'{prefix}num_attention_heads'],
        mlp_width=config[f'{prefix}intermediate_size'],
        num_layers=config[f'{prefix}num_hidden_layers'],
        architecture=architecture,
    )


def pair(value: Any) -> tuple[int, int]:
    """A size along height and width, which may be given as one."""
    sizes = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sizes) != 2 or not all(isinstance(x, int) and 0 < x < 2**20 for x in sizes):
        raise ValueError(f'{value!r} is no size of a picture.')
    return sizes


def picture_of(config: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of pictures and of patches."""
    image, patch = pair(config['image_size']), pair(config['patch_size'])
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(f'patches of {patch} do not divide images of {image}.')
    return image, patch


def classes_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in their order; () where there are numbers alone."""
    names = config.get('id2label') or {}
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise ValueError('id2label does not name classes 0, 1, 2, ....')
    ordered = tuple(str(names[str(i)]) for i in range(len(names)))
    return () if all(name == f'LABEL_{i}' for i, name in enumerate(ordered)) else ordered


def build_head(config: Mapping[str, Any], arrays: Arrays, bias: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """num_classes and classes, of a model that has a head."""
    if bias not in arrays:
        raise ValueError(f'{bias} is missing: the model has no head.')
    count, names = shape_of(arrays, bias, 1)[0], classes_of(config)
    if names and len(names) != count:
        raise ValueError(f'{CONFIG_FILE} names {len(names)} classes, and the head has {count}.')
    return {HEAD: count}, names


def is_fixed(arrays: Arrays, name: str, table: np.ndarray) -> bool:
    """Whether a stored table of positions, class token in front, is the fixed one, with nothing for the token."""
    wanted = np.concatenate([np.zeros_like(table[:1]), table])[None]
    return shape_of(arrays, name, 3) == wanted.shape and np.allclose(arrays[name], wanted, rtol=0, atol=1e-5)


def fixed_2d(grid: Sequence[int], width: int) -> np.ndarray:
    """The fixed table of the image MAE; nothing like it where the width has no such table."""
    return np.full((1, 1), np.nan, np.float32) if width % 4 else positions.sincos_grid(grid, width)


def build_vit_mae(config: Mapping[str, Any], arrays: Arrays, compute: Compute) -> Made:
    (height, width), patch = picture_of(config)
    grid, architecture = (height // patch[0], width // patch[1]), architecture_of(config)
    encoder, decoder = size_of(config, architecture), size_of(config, architecture, 'decoder_')
    fixed = is_fixed(arrays, 'vit.embeddings.position_embeddings', fixed_2d(grid, encoder.width))
    decoder_fixed = is_fixed(arrays, 'decoder.decoder_pos_embed', fixed_2d(grid, decoder.width))
    model = MaskedAutoencoder(
        {
            'image': ImageTokenizer(
                patch, 'sincos_2d' if fixed else 'learned', class_token=True, class_position=not fixed
            )
        },
        SharedEncoder(encoder, compute),
        SharedDecoder(
            decoder, compute, positions='sincos_2d' if decoder_fixed else 'learned', class_position=not decoder_fixed
        ),
    )
    target = 'objective.terms.reconstruction.target.image'
    settings = {
        **crop('image', height, width),
        'objective.mask_ratio.image': config['mask_ratio'],
        f'{target}.standardise': 'patch' if config['norm_pix_loss'] else 'none',
        f'{target}.convention': 'mae',
    }
    return Made(model, {'image': (height, width, 3)}, settings)


def crop(modality: Modality, height: int, width: int) -> dict[str, Any]:
    """The size of pictures, if a config can tell it: ours are square."""
    return {f'{modality}.crop_size': height} if height == width else {}


def build_vit(config: Mapping[str, Any], arrays: Arrays, compute: Compute) -> Made:
    (height, width), patch = picture_of(config)
    size = size_of(config, architecture_of(config))
    has_head = config['architectures'][0] != 'ViTModel'
    num_classes, classes = build_head(config, arrays, 'classifier.bias') if has_head else ({HEAD: 1}, None)
    has_pooler = 'pooler.dense.bias' in arrays
    if has_pooler and config['pooler_act'] != 'tanh':
        raise ValueError(f'pooler_act is {config["pooler_act"]!r}, and ours is tanh.')
    model = Classifier(
        {'image': ImageTokenizer(patch, 'learned', class_token=True, class_position=True)},
        SharedEncoder(size, compute),
        num_classes=num_classes,
        pooling='token',
        representation=shape_of(arrays, 'pooler.dense.bias', 1)[0] if has_pooler else None,
    )
    return Made(model, {'image': (height, width, 3)}, crop('image', height, width), classes)


def video_shape(config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, int, int], dict[str, Any]]:
    """Shape of a video, of a tubelet, and the settings of both."""
    (height, width), patch = picture_of(config)
    frames, tubelet = config['num_frames'], config['tubelet_size']
    if frames % tubelet:
        raise ValueError(f'tubelets of {tubelet} frames do not divide num_frames={frames}.')
    settings = {'video.num_frames': frames, **crop('video', height, width)}
    return (frames, height, width, 3), (tubelet, *patch), settings


def build_videomae(config: Mapping[str, Any], arrays: Arrays, compute: Compute) -> Made:
    shape, patch, settings = video_shape(config)
    architecture = architecture_of(config, 'qv_bias')
    model = MaskedAutoencoder(
        {'video': VideoTokenizer(patch)},
        SharedEncoder(size_of(config, architecture), compute, final_norm=not config['use_mean_pooling']),
        SharedDecoder(
            size_of(config, architecture, 'decoder_'),
            compute,
            projection_bias=False,
            final_norm_epsilon=TORCH_EPSILON,
        ),
    )
    target = 'objective.terms.reconstruction.target.video'
    settings |= {
        f'{target}.standardise': 'channel' if config['norm_pix_loss'] else 'none',
        f'{target}.convention': 'videomae',
        f'{target}.rgb_mean': IMAGENET_MEAN,
        f'{target}.rgb_std': IMAGENET_STD,
    }
    return Made(model, {'video': shape}, settings)


def build_videomae_classifier(config: Mapping[str, Any], arrays: Arrays, compute: Compute) -> Made:
    shape, patch, settings = video_shape(config)
    num_classes, classes = build_head(config, arrays, 'classifier.bias')
    mean = config['use_mean_pooling']
    model = Classifier(
        {'video': VideoTokenizer(patch)},
        SharedEncoder(size_of(config, architecture_of(config, 'qv_bias')), compute, final_norm=not mean),
        num_classes=num_classes,
        pooling='mean' if mean else 'first',
        pooled_norm=mean,
        pooled_norm_epsilon=TORCH_EPSILON if mean else None,
    )
    return Made(model, {'video': shape}, settings, classes)


def build_videomae_encoder(config: Mapping[str, Any], arrays: Arrays, compute: Compute) -> Made:
    shape, patch, settings = video_shape(config)
    has_norm = not config['use_mean_pooling']
    model = Classifier(
        {'video': VideoTokenizer(patch)},
        SharedEncoder(size_of(config, architecture_of(config, 'qv_bias')), compute, final_norm=has_norm),
        num_classes={HEAD: 1},
    )
    return Made(model, {'video': shape}, settings)


def build_ast(config: Mapping[str, Any], arrays: Arrays, compute: Compute) -> Made:
    patch = pair(config['patch_size'])
    if patch[0] != patch[1]:
        raise ValueError(f'patch_size is {config["patch_size"]!r}, and patches of sound are squares.')
    has_head = config['architectures'][0] != 'ASTModel'
    num_classes, classes = build_head(config, arrays, 'classifier.dense.bias') if has_head else ({HEAD: 1}, None)
    tokenizer = AudioTokenizer(
        patch,
        'learned',
        class_token=True,
        class_position=True,
        distillation_token=True,
        stride=(config['time_stride'], config['frequency_stride']),
    )
    model = Classifier(
        {'audio': tokenizer},
        SharedEncoder(size_of(config, architecture_of(config)), compute),
        num_classes=num_classes,
        pooling='token',
        pooled_norm=has_head,
    )
    frames, bins = config['max_length'], config['num_mel_bins']
    settings = {'preprocess.num_spec_frames': frames, 'preprocess.num_mel_bins': bins}
    return Made(model, {'audio': (frames, bins)}, settings, classes)


# -- Tables --


def norm_rows(theirs: str, ours: str) -> list[Row]:
    return [row(f'{theirs}.weight', f'{ours}/scale'), row(f'{theirs}.bias', f'{ours}/bias')]


def linear_rows(theirs: str, ours: str, bias: bool = True) -> list[Row]:
    rows = [row(f'{theirs}.weight', f'{ours}/kernel', transpose())]
    return [*rows, row(f'{theirs}.bias', f'{ours}/bias')] if bias else rows


def keyless() -> Transform:
    """Biases of queries and values, between which one of zero comes for keys; backwards that of keys is dropped."""
    return Transform(lambda arrays: [arrays[0], 0 * arrays[0], arrays[1]], lambda arrays: [arrays[0], arrays[2]])


def layer_rows(theirs: str, ours: str, size: Size, key_bias: bool = True) -> list[Row]:
    """One layer of theirs is one Block of ours."""
    width, heads = size.width, (size.num_heads, size.width // size.num_heads)
    attention, qkv = f'{theirs}.attention.attention', f'{ours}/attention/qkv'
    names = [f'{attention}.{name}' for name in ('query', 'key', 'value')]
    rows = [
        *norm_rows(f'{theirs}.layernorm_before', f'{ours}/attention_norm'),
        Row(
            tuple(f'{name}.weight' for name in names),
            (f'{qkv}/kernel',),
            chain(transpose(), reshape((width, width), (width, *heads)), join_columns((width, *heads), (width, -1))),
        ),
        *linear_rows(f'{theirs}.attention.output.dense', f'{ours}/attention/out'),
        *norm_rows(f'{theirs}.layernorm_after', f'{ours}/mlp_norm'),
        *linear_rows(f'{theirs}.intermediate.dense', f'{ours}/mlp/up'),
        *linear_rows(f'{theirs}.output.dense', f'{ours}/mlp/down'),
    ]
    if size.architecture.qkv_bias:
        biases = [f'{name}.bias' for name in names] if key_bias else [f'{attention}.q_bias', f'{attention}.v_bias']
        join = chain(reshape((width,), heads), join_columns(heads, (-1,)))
        rows.append(Row(tuple(biases), (f'{qkv}/bias',), join if key_bias else chain(keyless(), join)))
    return rows


def stem_rows(theirs: str, ours: str, tokenizer: Tokenizer, width: int) -> list[Row]:
    """Their convolution [width, colours, *patch] is our product with a patch, colours last.

    A patch of AST's has frequency before time.
    """
    channels, patch = getattr(tokenizer, 'channels', 3), tuple(tokenizer.patch)
    axes = tuple(range(2, 2 + len(patch)))
    if isinstance(tokenizer, AudioTokenizer):
        patch, axes = patch[::-1], axes[::-1]
    return [
        row(f'{theirs}.weight', f'{ours}/kernel', permute((width, channels, *patch), (*axes, 1, 0), (-1, width))),
        row(f'{theirs}.bias', f'{ours}/bias'),
    ]


def position_rows(theirs: str, ours: str, kind: str, grid: Sequence[int], width: int) -> list[Row]:
    """A table with the class token in front; the fixed ones of the image MAE have zeros for it."""
    if kind == 'learned':
        return [row(theirs, ours, reshape((1, -1, width), (-1, width)))]
    table = fixed_2d(grid, width)
    return [Row((theirs,), (), constant(np.concatenate([np.zeros_like(table[:1]), table])[None]))]


def frequency_first(grid: Sequence[int], in_front: int, width: int) -> Transform:
    """AST's table, whose places run over frequency first, as ours, which run over time first."""
    time, frequency = grid

    def forward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        table = of_shape(arrays[0], (1, in_front + time * frequency, width))[0]
        places = table[in_front:].reshape(frequency, time, width).swapaxes(0, 1)
        return [np.concatenate([table[:in_front], places.reshape(-1, width)])]

    def backward(arrays: list[np.ndarray]) -> list[np.ndarray]:
        places = of_shape(arrays[0], (-1, width))[in_front:].reshape(time, frequency, width).swapaxes(0, 1)
        return [np.concatenate([arrays[0][:in_front], places.reshape(-1, width)])[None]]

    return Transform(forward, backward)


def encoder_rows(model: MaskedAutoencoder | Classifier, prefix: str, norm: str, key_bias: bool = True) -> list[Row]:
    """Stem, layers and last norm."""
    ((modality, tokenizer),) = model.tokenizers.items()
    size = model.encoder.size
    rows = [
        *stem_rows(
            f'{prefix}embeddings.patch_embeddings.projection',
            f'tokenizers_{modality}/embedding',
            tokenizer,
            size.width,
        ),
        *layer_rows(f'{prefix}encoder.layer.{{layer}}', 'encoder/shared/layer_{layer}', size, key_bias),
    ]
    return rows + norm_rows(norm, 'encoder/shared/norm') if model.encoder.final_norm else rows


def token_row(theirs: str, ours: str) -> Row:
    return row(theirs, ours, reshape(*VECTOR))


def vit_mae_rows(model: MaskedAutoencoder, shapes: Mapping[Modality, tuple[int, ...]]) -> list[Row]:
    tokenizer, decoder = model.tokenizers['image'], model.decoder
    grid, embeddings = tokenizer.grid((1, *shapes['image'])), 'vit.embeddings'
    tables = (
        (f'{embeddings}.position_embeddings', 'tokenizers_image/positions', tokenizer.positions, model.encoder.size),
        ('decoder.decoder_pos_embed', 'decoder/filler_image/positions', decoder.positions, decoder.size),
    )
    return [
        *encoder_rows(model, 'vit.', 'vit.layernorm'),
        token_row(f'{embeddings}.cls_token', 'tokenizers_image/class_token'),
        *(
            one
            for theirs, ours, kind, size in tables
            for one in position_rows(theirs, f'{ours}/table', kind, grid, size.width)
        ),
        *linear_rows('decoder.decoder_embed', 'decoder/projection_image'),
        token_row('decoder.mask_token', 'decoder/filler_image/mask_token'),
        *layer_rows('decoder.decoder_layers.{layer}', 'decoder/shared/layer_{layer}', decoder.size),
        *norm_rows('decoder.decoder_norm', 'decoder/shared/norm'),
        *linear_rows('decoder.decoder_pred', 'decoder/output_image'),
    ]


def vit_rows(model: Classifier, shapes: Mapping[Modality, tuple[int, ...]], prefix: str = '') -> list[Row]:
    width = model.encoder.size.width
    rows = [
        *encoder_rows(model, prefix, f'{prefix}layernorm'),
        token_row(f'{prefix}embeddings.cls_token', 'tokenizers_image/class_token'),
        *position_rows(
            f'{prefix}embeddings.position_embeddings', 'tokenizers_image/positions/table', 'learned', (), width
        ),
    ]
    if prefix:
        return rows + linear_rows('classifier', f'head_{HEAD}')
    return rows + linear_rows('pooler.dense', 'representation') if model.representation else rows


def vit_head_rows(model: Classifier, shapes: Mapping[Modality, tuple[int, ...]]) -> list[Row]:
    return vit_rows(model, shapes, 'vit.')


def videomae_rows(model: MaskedAutoencoder, shapes: Mapping[Modality, tuple[int, ...]]) -> list[Row]:
    return [
        *encoder_rows(model, 'videomae.', 'videomae.layernorm', key_bias=False),
        *linear_rows('encoder_to_decoder', 'decoder/projection_video', bias=False),
        token_row('mask_token', 'decoder/filler_video/mask_token'),
        *layer_rows(
            'decoder.decoder_layers.{layer}', 'decoder/shared/layer_{layer}', model.decoder.size, key_bias=False
        ),
        *norm_rows('decoder.norm', 'decoder/shared/norm'),
        *linear_rows('decoder.head', 'decoder/output_video'),
    ]


def videomae_classifier_rows(model: Classifier, shapes: Mapping[Modality, tuple[int, ...]]) -> list[Row]:
    rows = [
        *encoder_rows(model, 'videomae.', 'videomae.layernorm', key_bias=False),
        *linear_rows('classifier', f'head_{HEAD}'),
    ]
    return rows + norm_rows('fc_norm', 'norm') if model.pooled_norm else rows


def videomae_encoder_rows(model: Classifier, shapes: Mapping[Modality, tuple[int, ...]]) -> list[Row]:
    return encoder_rows(model, '', 'layernorm', key_bias=False)


def ast_rows(model: Classifier, shapes: Mapping[Modality, tuple[int, ...]], prefix: str = '') -> list[Row]:
    tokenizer, width = model.tokenizers['audio'], model.encoder.size.width
    grid = tokenizer.grid((1, *shapes['audio']))
    embeddings = f'{prefix}embeddings'
    rows = [
        *encoder_rows(model, prefix, f'{prefix}layernorm'),
        token_row(f'{embeddings}.cls_token', 'tokenizers_audio/class_token'),
        token_row(f'{embeddings}.distillation_token', 'tokenizers_audio/distillation_token'),
        row(
            f'{embeddings}.position_embeddings',
            'tokenizers_audio/positions/table',
            frequency_first(grid, tokenizer.num_in_front, width),
        ),
    ]
    if not prefix:
        return rows
    return [
        *rows,
        *norm_rows('classifier.layernorm', 'norm'),
        *linear_rows('classifier.dense', f'head_{HEAD}'),
    ]


def ast_head_rows(model: Classifier, shapes: Mapping[Modality, tuple[int, ...]]) -> list[Row]:
    return ast_rows(model, shapes, 'audio_spectrogram_transformer.')


class Kind(NamedTuple):
    """A class of theirs.

    Attributes:
      model_type: as in config.json.
      build: (config.json, arrays, how to compute) -> our model.
      rows: (model, shapes) -> the table, published names -> ours.
      prefix: of the encoder's names.
      decoder: of the name of the mask token; None without a decoder.
      ignored: arrays that nobody needs -> why.
    """

    model_type: str
    build: Callable[[Mapping[str, Any], Arrays, Compute], Made]
    rows: Callable[[Any, Mapping[Modality, tuple[int, ...]]], list[Row]]
    prefix: str = ''
    decoder: str | None = None
    ignored: Mapping[str, str] = {}


MASK_TOKEN = {'embeddings.mask_token': 'it is of masked image modelling, which this model is not used for'}
KINDS: dict[str, Kind] = {
    'ViTMAEForPreTraining': Kind('vit_mae', build_vit_mae, vit_mae_rows, 'vit.', 'decoder.'),
    'ViTModel': Kind('vit', build_vit, vit_rows, ignored=MASK_TOKEN),
    'ViTForImageClassification': Kind('vit', build_vit, vit_head_rows, 'vit.'),
    'VideoMAEForPreTraining': Kind('videomae', build_videomae, videomae_rows, 'videomae.', ''),
    'VideoMAEModel': Kind('videomae', build_videomae_encoder, videomae_encoder_rows),
    'VideoMAEForVideoClassification': Kind(
        'videomae', build_videomae_classifier, videomae_classifier_rows, 'videomae.'
    ),
    'ASTModel': Kind(AST, build_ast, ast_rows),
    'ASTForAudioClassification': Kind(AST, build_ast, ast_head_rows, 'audio_spectrogram_transformer.'),
}

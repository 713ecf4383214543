"""Models of Hugging Face's transformers: a directory with config.json and *.safetensors is a model of ours.

    imported = read('facebook/vit-mae-base', Compute())      # A folder; nothing is downloaded.

Each class has a function that makes our model of its config.json, and a table of their names, those of the published
files. Newer versions of the library call some of them otherwise in memory, and a few in files too; `published_names`
(`huggingface_files.py`) brings these back first. Reversed (`Row.reverse`), tables lead from our parameters to theirs.

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

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.decoders import SharedDecoder
from avmae_jax.models.encoders import SharedEncoder
from avmae_jax.models.sizes import Architecture, Size
from avmae_jax.models.tokenizers import AudioTokenizer, ImageTokenizer, Tokenizer, VideoTokenizer
from avmae_jax.structs import Modality
from avmae_jax.weights import bounds
from avmae_jax.weights.huggingface_files import (
    AST,
    CONFIG_FILE,
    published_names,
    read_arrays,
    read_config,
    read_preprocessor,
)
from avmae_jax.weights.imported import HEAD, Imported, silent_head
from avmae_jax.weights.scenic_avmae import load_rows, row
from avmae_jax.weights.table import (
    Arrays,
    Row,
    chain,
    join_columns,
    layers_of,
    permute,
    reshape,
    shape_of,
    transpose,
)
from avmae_jax.weights.torch_rows import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TORCH_EPSILON,
    Made,
    crop,
    fixed_2d,
    frequency_first,
    is_fixed,
    keyless,
    linear_rows,
    norm_rows,
    position_rows,
    token_row,
)

GELUS = {'gelu': 'exact', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh'}

# -- Reading --


def read(path: epath.PathLike, compute: Compute, given: Mapping[str, str] | None = None) -> Imported:
    """The model in a directory; ValueError names the file and what is wrong."""
    folder = epath.Path(path)
    config = read_config(folder, {name: kind.model_type for name, kind in KINDS.items()})
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


def without_ignored(arrays: Arrays, ignored: Mapping[str, str]) -> tuple[Arrays, dict[str, str]]:
    """The arrays without those that nobody needs, and these with the reason."""
    dropped = {name: ignored[name] for name in arrays if name in ignored}
    return {name: array for name, array in arrays.items() if name not in dropped}, dropped


# -- Models --


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
        if not 0 < tokens <= bounds.MAX_TOKENS:
            raise ValueError(
                f'{CONFIG_FILE} makes {tokens} tokens of a video, and at most {bounds.MAX_TOKENS} are read.'
            )
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

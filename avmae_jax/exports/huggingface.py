"""One stream of a model as a class of transformers, in a directory that its `from_pretrained` loads.

    image    ViTMAEForPreTraining, ViTForImageClassification, ViTModel
    video    VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel
    audio    ASTForAudioClassification, ASTModel

The first that the model has a counterpart in is taken: pretrained models as a whole if their decoder is like theirs, or
else their encoder; classifiers with their head, or without one that says nothing (all zeros). Of a model of several
modalities a stream is one only if it runs by itself: that of the encoders `separate`, `shared` and `early` (given one
modality), not of `mid` and MBT.

The tables are those of `weights/huggingface.py`, backwards; whether a class has what the model has is found out by
rebuilding it from the config.json that is to be written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from avmae_jax.data.views import ImageView, VideoView
from avmae_jax.exports import folder as folders
from avmae_jax.exports.trained import Trained, cast, difference
from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.encoders import EarlyEncoder, SeparateEncoder, SharedEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.ops import positions
from avmae_jax.structs import Modality
from avmae_jax.weights import safetensors
from avmae_jax.weights.huggingface import KINDS
from avmae_jax.weights.huggingface_files import CONFIG_FILE, DEFAULTS, PREPROCESSOR_FILE
from avmae_jax.weights.imported import HEAD
from avmae_jax.weights.scenic_avmae import dump_rows

ACTIVATIONS = {'tanh': 'gelu_pytorch_tanh', 'exact': 'gelu'}
# What is tried, in this order.
PRETRAINED = {
    'image': ('ViTMAEForPreTraining', 'ViTModel'),
    'video': ('VideoMAEForPreTraining', 'VideoMAEModel'),
    'audio': ('ASTModel',),
}
FINETUNED = {
    'image': ('ViTForImageClassification',),
    'video': ('VideoMAEForVideoClassification',),
    'audio': ('ASTForAudioClassification',),
}


class Stream(NamedTuple):
    """A model of one modality with the names of theirs, and what belongs to it."""

    model: MaskedAutoencoder | Classifier
    params: dict[str, Any]
    modality: Modality
    shape: tuple[int, ...]


def write(folder: epath.Path, trained: Trained, dtype: str) -> None:
    """config.json, model.safetensors and preprocessor_config.json."""
    if len(trained.modalities) != 1:
        raise ValueError(f'transformers has classes of one modality: choose --modality={trained.modalities[0]}.')
    stream = make_stream(trained)
    names = PRETRAINED[stream.modality]
    if isinstance(stream.model, Classifier):
        silent = not any(np.any(x) for x in stream.params[f'head_{HEAD}'].values())
        names = FINETUNED[stream.modality] + (names[-1:] if silent else ())
    reasons = []
    for name in names:
        try:
            config, arrays = convert(stream, name, trained)
        except ValueError as error:
            reasons.append(f'{name}: {error}')
            continue
        safetensors.write(folder / 'model.safetensors', cast(arrays, dtype), {'format': 'pt'})
        folders.write_json(folder / CONFIG_FILE, config | {'dtype': dtype})
        preprocessor = describe_preprocessor(trained)
        if preprocessor:
            folders.write_json(folder / PREPROCESSOR_FILE, preprocessor)
        return
    raise ValueError(f'transformers has no counterpart of the model. {" ".join(reasons)}')


def convert(stream: Stream, name: str, trained: Trained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and the arrays of a class of theirs."""
    whole = name.endswith(('ForPreTraining', 'Classification'))
    if not whole:
        stream = encoder_alone(stream, name)
    if not name.startswith('VideoMAE') and name != 'ViTMAEForPreTraining':
        stream = with_learned_positions(stream)
    if stream.modality == 'audio':
        stream = with_stride(stream)
    config = describe(stream, name, trained)
    shapes = {stream.modality: stream.shape}
    kind = KINDS[name]
    params = stream.params if whole else {n: value for n, value in stream.params.items() if not n.startswith('head_')}
    arrays = dump_rows(kind.rows(stream.model, shapes), params)
    made = kind.build({**DEFAULTS[kind.model_type], **config}, arrays, stream.model.encoder.compute)
    found = difference(stream.model, made.model)
    if found:
        raise ValueError(f'{found}.')
    return config, arrays


# -- Our side --


def make_stream(trained: Trained) -> Stream:
    """The model as one of a single modality, whose encoder is a SharedEncoder."""
    (modality,) = trained.modalities
    model, encoder = trained.model, trained.model.encoder
    given = copy.deepcopy(trained.params['encoder'])
    if isinstance(encoder, MBT) and len(model.tokenizers) == 1:
        owner = 'shared' if encoder.shared_weights else modality
        layers = {**given[owner], **({'norm': given['norm']} if encoder.final_norm else {})}
    elif isinstance(encoder, SeparateEncoder | SharedEncoder | EarlyEncoder):
        owner = {SeparateEncoder: modality, SharedEncoder: 'shared', EarlyEncoder: 'joint'}[type(encoder)]
        layers = given[owner]
    else:
        raise ValueError(
            f'transformers has no counterpart of the encoder: {modality} goes through a {type(encoder).__name__} of '
            f'{" and ".join(model.tokenizers)}.'
        )
    shared = SharedEncoder(encoder.size, encoder.compute, encoder.final_norm)
    if encoder.final_norm_epsilon not in (None, encoder.size.architecture.norm_epsilon):
        shared = shared.clone(final_norm_epsilon=encoder.final_norm_epsilon)
    tokenizer, tokens = without_modality_token(model, trained.params, modality)
    params = {f'tokenizers_{modality}': tokens, 'encoder': {'shared': layers}}
    if isinstance(model, Classifier):
        if len(model.num_classes) > 1:
            raise ValueError(f'transformers has one head a model; this one has {", ".join(model.num_classes)}.')
        ((head, count),) = model.num_classes.items()
        params |= {name: trained.params[name] for name in ('norm', 'representation') if name in trained.params}
        params[f'head_{HEAD}'] = trained.params[f'head_{head}']
        made: Any = model.clone(tokenizers={modality: tokenizer}, encoder=shared, num_classes={HEAD: count})
    else:
        params['decoder'] = trained.params['decoder']
        made = model.clone(tokenizers={modality: tokenizer}, encoder=shared)
    return Stream(made, params, modality, trained.shapes[modality])


def without_modality_token(model: Any, params: Mapping[str, Any], modality: Modality) -> tuple[Any, dict[str, Any]]:
    """The tokenizer and its parameters, the modality's token added to the bias, which every patch gets alike."""
    tokenizer, tokens = model.tokenizers[modality], copy.deepcopy(dict(params[f'tokenizers_{modality}']))
    if not tokenizer.modality_token:
        return tokenizer, tokens
    token = tokens.pop('modality_token')
    tokens['embedding']['bias'] = tokens['embedding']['bias'] + token
    if tokenizer.class_position:
        for name in ('class_token', 'distillation_token')[: tokenizer.num_in_front]:
            tokens[name] = tokens[name] + token
    return tokenizer.clone(modality_token=False), tokens


def encoder_alone(stream: Stream, name: str) -> Stream:
    """The model without its decoder or head, as the class `name` is read: with a head that says nothing."""
    model = stream.model
    if isinstance(model, Classifier):
        return stream._replace(model=model.clone(num_classes={HEAD: 1}))
    pooling = 'mean' if name.startswith('VideoMAE') else 'token'
    model = Classifier(model.tokenizers, model.encoder, num_classes={HEAD: 1}, pooling=pooling)
    return stream._replace(model=model, params={n: x for n, x in stream.params.items() if n != 'decoder'})


def with_learned_positions(stream: Stream) -> Stream:
    """Fixed positions as a table, with places for class tokens: zeros where they had none."""
    tokenizer, m = stream.model.tokenizers[stream.modality], stream.modality
    if not tokenizer.class_token or (tokenizer.positions == 'learned' and tokenizer.class_position):
        return stream
    tokens, width = dict(stream.params[f'tokenizers_{m}']), stream.model.encoder.size.width
    grid, front = tokenizer.grid((1, *stream.shape)), tokenizer.num_in_front
    if tokenizer.positions == 'learned':
        table = tokens['positions']['table']
    else:
        axes = (front + int(np.prod(grid)),) if tokenizer.class_position else grid
        if tokenizer.positions not in positions.TABLES:
            raise ValueError(f'tokenizers.{m}.positions is {tokenizer.positions!r}, and there is one table.')
        table = positions.TABLES[tokenizer.positions](axes, width)
    if not tokenizer.class_position:
        table = np.concatenate([np.zeros((front, width), np.float32), table])
    tokenizer = tokenizer.clone(positions='learned', class_position=True)
    tokens['positions'] = {'table': np.asarray(table)}
    return stream._replace(
        model=stream.model.clone(tokenizers={m: tokenizer}), params={**stream.params, f'tokenizers_{m}': tokens}
    )


def with_stride(stream: Stream) -> Stream:
    """Patches that lie side by side are as far apart as they are large."""
    tokenizer = stream.model.tokenizers['audio']
    apart = tokenizer.clone(stride=tuple(tokenizer.stride or tokenizer.patch))
    return stream._replace(model=stream.model.clone(tokenizers={'audio': apart}))


# -- Their side --


def describe(stream: Stream, name: str, trained: Trained) -> dict[str, Any]:
    """config.json of a class, as far as it can be like the model."""
    kind, model = KINDS[name], stream.model
    tokenizer, size = model.tokenizers[stream.modality], model.encoder.size
    config: dict[str, Any] = {'architectures': [name], 'model_type': kind.model_type, **_size(size)}
    config |= {
        'hidden_act': ACTIVATIONS[size.architecture.gelu],
        'layer_norm_eps': size.architecture.norm_epsilon,
        'hidden_dropout_prob': 0.0,
        'attention_probs_dropout_prob': 0.0,
    }
    bias = 'qv_bias' if stream.modality == 'video' else 'qkv_bias'
    config[bias] = size.architecture.qkv_bias
    if stream.modality == 'audio':
        stride = tokenizer.stride or tokenizer.patch
        config |= {
            'patch_size': _one('patch', tokenizer.patch),
            'time_stride': stride[0],
            'frequency_stride': stride[1],
            'max_length': stream.shape[0],
            'num_mel_bins': stream.shape[1],
        }
    else:
        config |= {
            'image_size': _one('crop_size', stream.shape[-3:-1]),
            'patch_size': _one('patch', tokenizer.patch[-2:]),
            'num_channels': 3,
        }
    if stream.modality == 'video':
        config |= {
            'num_frames': stream.shape[0],
            'tubelet_size': tokenizer.patch[0],
            'use_mean_pooling': not model.encoder.final_norm,
        }
    if isinstance(model, MaskedAutoencoder):
        config |= {f'decoder_{name}': value for name, value in _size(model.decoder.size).items()}
        config['mask_ratio'] = trained.objective.mask_ratio[stream.modality]
        terms = trained.objective.terms.values()
        asked = [term.target[stream.modality].standardise for term in terms if stream.modality in term.target]
        config['norm_pix_loss'] = bool(asked) and asked[0] != 'none'
    elif trained.heads and name in FINETUNED[stream.modality]:
        (head,) = trained.heads
        names = trained.info.labels[head].names
        config |= {'id2label': {str(i): label for i, label in enumerate(names)}}
        config |= {'label2id': {label: i for i, label in enumerate(names)}}
    return json.loads(json.dumps(config))


def _size(size: Size) -> dict[str, int]:
    return {
        'hidden_size': size.width,
        'num_hidden_layers': size.num_layers,
        'num_attention_heads': size.num_heads,
        'intermediate_size': size.mlp_width,
    }


def _one(what: str, sizes: Any) -> int:
    if len(set(sizes)) > 1:
        raise ValueError(f'{what} is {tuple(sizes)}, and theirs is square.')
    return int(sizes[0])


def describe_preprocessor(trained: Trained) -> dict[str, Any]:
    """preprocessor_config.json; {} for log-mels of a convention that theirs is not."""
    (modality,) = trained.modalities
    preprocess, part = trained.preprocess, trained.view.parts[modality]
    if modality == 'audio':
        if preprocess.convention != 'kaldi':
            return {}
        return {
            'feature_extractor_type': 'ASTFeatureExtractor',
            'sampling_rate': preprocess.sample_rate,
            'num_mel_bins': preprocess.num_mel_bins,
            'max_length': trained.shapes['audio'][0],
            'mean': preprocess.audio_mean,
            'std': preprocess.audio_std / 2,  # Theirs divides by twice the deviation.
            'do_normalize': True,
        }
    assert isinstance(part, VideoView | ImageView)
    return {
        # That of ViT would press pictures into a square; ours cuts one out of their middle, as that of CLIP does.
        'image_processor_type': 'VideoMAEImageProcessor' if modality == 'video' else 'CLIPImageProcessor',
        'do_resize': True,
        'size': {'shortest_edge': part.short_side},
        'resample': 2,  # Bilinear.
        'do_center_crop': True,
        'crop_size': {'height': part.crop_size, 'width': part.crop_size},
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': list(preprocess.rgb_mean),
        'image_std': list(preprocess.rgb_std),
    }

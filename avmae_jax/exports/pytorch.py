"""A PyTorch module that needs nothing of us: one readable file, and what it reads.

avmae_torch.py         the module, `AVMAE.from_pretrained(DIR)`; a copy of the file beside this one
model.safetensors      parameters under its names; a decoder is left out
config.json            the module's settings
preprocessing.json, labels.json
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from typing import Any

from etils import epath

from avmae_jax.exports import folder as folders
from avmae_jax.exports import native
from avmae_jax.exports.trained import Trained, cast, describe_preprocessing, published
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.encoders import ENCODERS
from avmae_jax.structs import Modality
from avmae_jax.weights import safetensors, torch_module

FORMAT, MODULE = 'avmae_torch', 'avmae_torch.py'
NAMES = {kind: name for name, kind in {**ENCODERS, 'mbt': MBT}.items()}
# Fields of ours that the module has by the same name, and those that it has no use for.
TOKENIZER_FIELDS = (
    'patch', 'positions', 'modality_token', 'class_token', 'class_position', 'distillation_token', 'stride', 'channels',
)  # fmt: skip
ENCODER_FIELDS = (
    'final_norm', 'final_norm_epsilon', 'drop_path', 'fusion_layer', 'fusion', 'num_bottlenecks', 'shared_weights',
    'test_with_bottlenecks', 'stream_norm', 'modality_norms',
)  # fmt: skip
HEAD_FIELDS = ('num_classes', 'pooling', 'pooled_norm', 'pooled_norm_epsilon', 'representation')
LEFT_OUT = ('parent', 'name', 'size', 'compute', 'central_frame', 'tokenizers', 'encoder', 'decoder')


def write(folder: epath.Path, trained: Trained, dtype: str) -> None:
    """The module's file and what it reads."""
    settings = describe(trained)
    arrays = cast(torch_module.dump(trained.model, trained.params), dtype)
    safetensors.write(folder / native.WEIGHTS, arrays, {'format': 'pt'})
    folders.write_json(folder / native.CONFIG, settings)
    folders.write_json(folder / native.PREPROCESSING, describe_preprocessing(trained))
    if trained.heads:
        names = {head: list(trained.info.labels[head].names) for head in trained.heads}
        folders.write_json(folder / native.LABELS, names)
    source = importlib.resources.files('avmae_jax.exports').joinpath(MODULE)
    (folder / MODULE).write_text(source.read_text())


def describe(trained: Trained) -> dict[str, Any]:
    """The settings of the module; a model with more than it has is refused."""
    model, encoder = trained.model, trained.model.encoder
    if type(encoder) not in NAMES:
        raise ValueError(f'the PyTorch module has no counterpart of {type(encoder).__name__}.')
    size = dataclasses.asdict(encoder.size)
    architecture = size.pop('architecture')
    described = {
        'name': NAMES[type(encoder)],
        'size': {**size, **architecture},
        **_fields(encoder, 'encoder', ENCODER_FIELDS),
        'has_bottlenecks': getattr(encoder, 'fusion', '') == 'bottleneck' and len(model.tokenizers) > 1,
    }
    if described['final_norm_epsilon'] is None:
        described['final_norm_epsilon'] = architecture['norm_epsilon']
    if isinstance(model, Classifier):
        head = _fields(model, 'model', HEAD_FIELDS)
        if head['pooled_norm_epsilon'] is None:
            head['pooled_norm_epsilon'] = architecture['norm_epsilon']
    else:
        head = dict.fromkeys(HEAD_FIELDS) | {'num_classes': {}, 'pooling': 'mean', 'pooled_norm': False}
    return {
        'format': FORMAT,
        'format_version': native.FORMAT_VERSION,
        'tokenizers': {m: _tokenizer(trained, m) for m in trained.modalities},
        'encoder': described,
        'classifier': head,
        'row_shapes': {m: list(shape) for m, shape in trained.row_shapes.items()},
        'about': published(trained.about),
    }


def _tokenizer(trained: Trained, modality: Modality) -> dict[str, Any]:
    tokenizer = trained.model.tokenizers[modality]
    found = {'channels': 3, **_fields(tokenizer, f'tokenizers.{modality}', TOKENIZER_FIELDS)}
    return {**found, 'grid': list(tokenizer.grid((1, *trained.shapes[modality])))}


def _fields(module: Any, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The fields that the module has, too; others must be as they are by default."""
    found = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name in known:
            found[field.name] = dict(value) if field.name == 'num_classes' else value
        elif field.name not in LEFT_OUT and value != field.default:
            raise ValueError(f'the PyTorch module has no counterpart of {where}.{field.name}={value!r}.')
    return found

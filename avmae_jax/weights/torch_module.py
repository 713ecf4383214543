"""Parameters of our models <-> those of the PyTorch module that exports bring along (`exports/avmae_torch.py`).

arrays = dump(model, params)              # its names; decoders are left out
params = load(model, arrays, inputs)      # and back, of a model without a decoder
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.encoders import EarlyEncoder, MidEncoder, SharedEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.models.trunk import Trunk
from avmae_jax.structs import JOINT_ORDER, Modality
from avmae_jax.weights.scenic_avmae import dump_rows, load_rows, row
from avmae_jax.weights.table import Arrays, Row, chain, permute, reshape, transpose


def dump(model: Trunk, params: Mapping[str, Any]) -> Arrays:
    """Their arrays by name."""
    return dump_rows(module_rows(model), {name: value for name, value in params.items() if name != 'decoder'})


def load(model: Classifier, arrays: Arrays, inputs: Mapping[Modality, Any]) -> dict[str, Any]:
    """Parameters of a classifier, such as one that was finetuned in PyTorch."""
    return load_rows(model, module_rows(model), arrays, inputs)


def module_rows(model: Trunk) -> list[Row]:
    """The table: their names -> ours, for the layout with layers one by one."""
    modalities = [m for m in JOINT_ORDER if m in model.tokenizers]
    rows = []
    for m in modalities:
        rows += tokenizer_rows(model, m)
    rows += encoder_rows(model, modalities)
    if isinstance(model, Classifier):
        rows += norm_rows('norm', 'norm') if model.pooled_norm else []
        rows += linear_rows('representation', 'representation') if model.representation else []
        for name in model.num_classes:
            rows += linear_rows(f'heads.{name}', f'head_{name}')
    return rows


def tokenizer_rows(model: Trunk, modality: Modality) -> list[Row]:
    tokenizer = model.tokenizers[modality]
    theirs, ours = f'tokenizers.{modality}', f'tokenizers_{modality}'
    tables = {'learned': ['table'], 'learned_space_time': ['time', 'space']}.get(tokenizer.positions, [])
    tokens = [name for name in ('modality_token', 'class_token', 'distillation_token') if getattr(tokenizer, name)]
    return [
        *linear_rows(f'{theirs}.embedding', f'{ours}/embedding'),
        *(row(f'{theirs}.positions.{name}', f'{ours}/positions/{name}') for name in tables),
        *(row(f'{theirs}.{name}', f'{ours}/{name}') for name in tokens),
    ]


def encoder_rows(model: Trunk, modalities: list[Modality]) -> list[Row]:
    encoder = model.encoder
    shared = isinstance(encoder, SharedEncoder) or (isinstance(encoder, MBT) and encoder.shared_weights)
    stacks = ['shared'] if shared else [] if isinstance(encoder, EarlyEncoder) else list(modalities)
    stacks += ['joint'] if isinstance(encoder, EarlyEncoder | MidEncoder) else []
    rows = []
    for name in stacks:
        rows += block_rows(f'encoder.stacks.{name}.layers.{{layer}}', f'encoder/{name}/layer_{{layer}}', encoder.size)
        ends = encoder.final_norm and not isinstance(encoder, MBT)
        if ends and (name == 'joint' or getattr(encoder, 'stream_norm', True)):
            rows += norm_rows(f'encoder.stacks.{name}.norm', f'encoder/{name}/norm')
    if isinstance(encoder, MidEncoder) and encoder.modality_norms:
        for m in modalities:
            theirs, ours = f'encoder.norms.{m}', f'encoder/joint_{m}'
            for norm in ('attention_norm', 'mlp_norm'):
                rows += norm_rows(f'{theirs}.layers.{{layer}}.{norm}', f'{ours}/layer_{{layer}}/{norm}')
            rows += norm_rows(f'{theirs}.norm', f'{ours}/norm') if encoder.final_norm else []
    if not isinstance(encoder, MBT):
        return rows
    rows += norm_rows('encoder.norm', 'encoder/norm') if encoder.final_norm else []
    if encoder.fusion == 'bottleneck' and len(modalities) > 1:
        rows.append(row('encoder.bottlenecks', 'encoder/bottlenecks'))
    return rows


def block_rows(theirs: str, ours: str, size: Size) -> list[Row]:
    """One Block of theirs is one of ours; rows of their qkv are ordered (which, head, channel)."""
    width, heads, channels = size.width, size.num_heads, size.width // size.num_heads
    matrix, vector = (3, heads, channels, width), (3, heads, channels)
    weight = chain(reshape((3 * width, width), matrix), permute(matrix, (3, 1, 0, 2), (width, -1)))
    bias = chain(reshape((3 * width,), vector), permute(vector, (1, 0, 2), (-1,)))
    rows = [
        *norm_rows(f'{theirs}.attention_norm', f'{ours}/attention_norm'),
        row(f'{theirs}.attention.qkv.weight', f'{ours}/attention/qkv/kernel', weight),
        *linear_rows(f'{theirs}.attention.out', f'{ours}/attention/out'),
        *norm_rows(f'{theirs}.mlp_norm', f'{ours}/mlp_norm'),
        *linear_rows(f'{theirs}.mlp.up', f'{ours}/mlp/up'),
        *linear_rows(f'{theirs}.mlp.down', f'{ours}/mlp/down'),
    ]
    if size.architecture.qkv_bias:
        rows.append(row(f'{theirs}.attention.qkv.bias', f'{ours}/attention/qkv/bias', bias))
    return rows


def linear_rows(theirs: str, ours: str) -> list[Row]:
    return [row(f'{theirs}.weight', f'{ours}/kernel', transpose()), row(f'{theirs}.bias', f'{ours}/bias')]


def norm_rows(theirs: str, ours: str) -> list[Row]:
    return [row(f'{theirs}.weight', f'{ours}/scale'), row(f'{theirs}.bias', f'{ours}/bias')]

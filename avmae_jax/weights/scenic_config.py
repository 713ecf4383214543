"""From a config of Scenic's `av_mae` to a model and an objective of ours, as plain dicts in and objects out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.decoders import DECODERS
from avmae_jax.models.encoders import ENCODERS, Encoder
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import TOKENIZERS, AudioTokenizer, Tokenizer, VideoTokenizer
from avmae_jax.objectives import Inpainting, Objective, Reconstruction, Target
from avmae_jax.settings import check_kinds
from avmae_jax.structs import Modality
from avmae_jax.weights.scenic_avmae import SCENIC_NAMES

Config = Mapping[str, Any]

ENCODER_NAMES = {
    'separate_encoders': 'separate',
    'same_encoder': 'shared',
    'concat_and_encode': 'early',
    'separate_encoders_and_concat': 'mid',
}
DECODER_NAMES = {'same_decoder': 'shared', 'separate_decoders': 'separate', 'concat_and_decode': 'joint'}
POSITION_NAMES = {
    'sinusoidal_1d': 'sincos_1d',
    'sinusoidal_2d': 'sincos_2d',
    'sinusoidal_3d': 'sincos_3d',
    'learned_1d': 'learned',
    'learned_space_time': 'learned_space_time',
}


# What their settings are, of those that are read. None stands for what a project does by itself.
_SIZE = {'hidden_size': int, 'num_heads': int, 'mlp_dim': int, 'num_layers': int}
KINDS: dict[str, dict[str, Any]] = {
    'model': {
        **_SIZE, 'classifier': str, 'patches': Config, 'decoder_config': Config | None,
        'temporal_encoding_config': Config, 'positional_embedding': str, 'positional_embedding_decoder': str,
        'encoder_strategy': str, 'decoder_strategy': str, 'fusion_layers': int | None, 'fusion_layer': int,
        'normalise_encoder_output': bool, 'use_modality_tokens': bool, 'use_inpainting': bool,
        'shuffle_inpainted_tokens': bool, 'modality_fusion': Sequence[str], 'use_bottleneck': bool,
        'n_bottlenecks': int, 'share_encoder': bool, 'test_with_bottlenecks': bool, 'representation_size': int | None,
        'stochastic_droplayer_rate': float | None,
    },
    'model.patches': {'size': Sequence[int]},
    'model.decoder_config': {**_SIZE, 'use_projection_bias': bool},
    'model.temporal_encoding_config': {'method': str},
    'masked_feature_loss': {
        'target': str | Sequence[str], 'token_mask_probability': float | None,
        'token_mask_probability_dict': Mapping[str, float] | None, 'modality_weight': Mapping[str, float] | None,
        'masking_strategy': str, 'select_central_frame': bool | None, 'loss_unmasked_tokens': bool,
        'normalise_by_output_dimension': bool, 'standardise_per_patch': bool, 'standardise_per_patch_channels': bool,
        'reconstruct_grayscale': bool,
    },
    'dataset_configs': {
        'num_frames': int, 'crop_size': int, 'num_spec_frames': int, 'spec_shape': Sequence[int],
        'normalization_mean_spec': float, 'normalization_std_spec': float, 'spec_mean': float, 'spec_stddev': float,
    },
}  # fmt: skip


def check_values(where: str, config: Config) -> None:
    """Refuses a setting of another kind than it is in Scenic; `where` comes before its name in what is said."""
    check_kinds(where, config, {'model': Config, 'masked_feature_loss': Config, 'dataset_configs': Config | None})
    for name, kinds in KINDS.items():
        section: Any = config
        for part in name.split('.'):
            section = section.get(part) or {}
        check_kinds(f'{where}.{name}', section, kinds)


def pick(table: Mapping[str, str], setting: str, name: str) -> str:
    if name not in table:
        raise ValueError(f'{setting}={name!r} is not known here; it may be one of {sorted(table)}.')
    return table[name]


def modalities_of(config: Config) -> list[Modality]:
    """Ours for their `masked_feature_loss.target`; with patches of two axes rgb are images."""
    target = config['masked_feature_loss']['target']
    rgb = 'video' if len(config['model']['patches']['size']) == 3 else 'image'
    ours = {'rgb': rgb, 'spectrogram': 'audio'}
    return [pick(ours, 'target', name) for name in ([target] if isinstance(target, str) else target)]


def build_size(section: Config) -> Size:
    return Size(
        width=section['hidden_size'],
        num_heads=section['num_heads'],
        mlp_width=section['mlp_dim'],
        num_layers=section['num_layers'],
    )


def build_tokenizers(config: Config, modalities: Sequence[Modality]) -> dict[Modality, Tokenizer]:
    """Their patch is (height, width, frames) for all modalities, of which sound uses the first two."""
    model = config['model']
    height, width, *frames = model['patches']['size']
    tokenizers = {}
    for m in modalities:
        fields = {
            'patch': (*frames, height, width) if m == 'video' else (height, width),
            'positions': pick(POSITION_NAMES, 'positional_embedding', model['positional_embedding']),
            'modality_token': model.get('use_modality_tokens', False),
            'class_token': model['classifier'] == 'token',
        }
        if m == 'video':
            fields['central_frame'] = config['masked_feature_loss'].get('select_central_frame') or False
        tokenizers[m] = TOKENIZERS[m](**fields)
    return tokenizers


def build_encoder(config: Config, compute: Compute, final_norm: bool) -> Encoder:
    model = config['model']
    name = pick(ENCODER_NAMES, 'encoder_strategy', model.get('encoder_strategy', 'separate_encoders'))
    # Theirs counts joint layers from the end, ours names the first one.
    extra = {'fusion_layer': model['num_layers'] - model['fusion_layers']} if name == 'mid' else {}
    return ENCODERS[name](build_size(model), compute, final_norm, **extra)


def build_autoencoder(config: Config, compute: Compute) -> MaskedAutoencoder:
    """The model of a pretraining config."""
    model = config['model']
    decoder = model['decoder_config']
    final_norm = model.get('normalise_encoder_output', True)
    name = pick(DECODER_NAMES, 'decoder_strategy', model.get('decoder_strategy', 'same_decoder'))
    return MaskedAutoencoder(
        tokenizers=build_tokenizers(config, modalities_of(config)),
        encoder=build_encoder(config, compute, final_norm),
        decoder=DECODERS[name](
            build_size(decoder),
            compute,
            final_norm,
            positions=pick(POSITION_NAMES, 'positional_embedding_decoder', model['positional_embedding_decoder']),
            projection_bias=decoder.get('use_projection_bias', True),
            modality_token=model.get('use_modality_tokens', False),
            inpainting_positions='before_shuffle',
        ),
    )


def build_objective(config: Config) -> Objective:
    """The objective of a pretraining config."""
    loss, model = config['masked_feature_loss'], config['model']
    modalities = modalities_of(config)
    by_modality = {m: SCENIC_NAMES[m] for m in modalities}
    ratios = loss.get('token_mask_probability_dict') or dict.fromkeys(
        by_modality.values(), loss.get('token_mask_probability')
    )
    weights = loss.get('modality_weight') or dict.fromkeys(by_modality.values(), 1.0)
    fields = {
        'weight': {m: weights[name] for m, name in by_modality.items()},
        'target': {m: build_target(loss, m) for m in modalities},
        'on_all_tokens': loss.get('loss_unmasked_tokens', False),
        'per_value': loss.get('normalise_by_output_dimension', False),
    }
    if model.get('use_inpainting', False):
        term: dict[str, Any] = {
            'inpainting': Inpainting(**fields, shuffle=model.get('shuffle_inpainted_tokens', False))
        }
    else:
        term = {'reconstruction': Reconstruction(**fields)}
    strategy = loss.get('masking_strategy', 'random')
    return Objective(
        mask_ratio={m: ratios[name] for m, name in by_modality.items()},
        masking=dict.fromkeys(modalities, strategy),
        terms=term,
    )


def build_target(loss: Config, modality: Modality) -> Target:
    """Their options for colours leave spectrograms raw."""
    colours = modality != 'audio'
    standardise = 'patch' if loss.get('standardise_per_patch', False) else 'none'
    if standardise == 'none' and colours and loss.get('standardise_per_patch_channels', False):
        standardise = 'channel'
    return Target(standardise, grayscale=colours and loss.get('reconstruct_grayscale', False))


HEAD = 'label'  # Theirs has no name.


def build_classifier(
    config: Config, num_classes: int, compute: Compute, final_norm: bool, pooled_norm: bool
) -> Classifier:
    """The model of a finetuning config for one modality, with the norms where that model has them."""
    return Classifier(
        tokenizers=build_tokenizers(config, modalities_of(config)),
        encoder=build_encoder(config, compute, final_norm),
        num_classes={HEAD: num_classes},
        pooling={'token': 'token', 'gap': 'mean'}[config['model']['classifier']],
        pooled_norm=pooled_norm,
    )


# Their names of a pooling, by variant of MBT: `mbt` has one mean over all tokens.
MBT_POOLINGS = {
    'av_mae': {'gap': 'mean', 'gmp': 'max', 'token': 'token'},
    'mbt': {'gap': 'joint_mean', 'token': 'token'},
}


def build_mbt(config: Config, num_classes: int, compute: Compute, variant: str, audio_channels: int = 1) -> Classifier:
    """The model of a finetuning config.

    Args:
      variant: 'av_mae' or 'mbt', the project of theirs that the config is for.
      audio_channels: of their spectrograms; `mbt` repeats them three times.
    """
    model = config['model']
    method = model['temporal_encoding_config']['method']
    if method != '3d_conv':
        raise ValueError(f"temporal_encoding_config.method={method!r} is not known here; it may be '3d_conv'.")
    pooling = pick(MBT_POOLINGS[variant], 'classifier', model['classifier'])
    token = pooling == 'token'
    height, width, frames = model['patches']['size']
    fields = {
        'positions': {'av_mae': 'sincos_1d', 'mbt': 'learned'}[variant],
        'modality_token': model.get('use_modality_tokens', False),
        'class_token': token,
        'class_position': token,
    }
    tokenizers = {
        'rgb': VideoTokenizer((frames, height, width), **fields),
        'spectrogram': AudioTokenizer((height, width), **fields, channels=audio_channels),
    }
    ours = {'rgb': 'video', 'spectrogram': 'audio'}
    return Classifier(
        tokenizers={ours[name]: tokenizers[name] for name in model['modality_fusion']},
        encoder=MBT(
            build_size(model),
            compute,
            drop_path=model.get('stochastic_droplayer_rate') or 0.0,
            fusion_layer=model['fusion_layer'],
            fusion='bottleneck' if model.get('use_bottleneck', False) else 'concatenation',
            # With class tokens theirs has one more than its config says.
            num_bottlenecks=model.get('n_bottlenecks', 4) + token,
            shared_weights=model.get('share_encoder', False),
            test_with_bottlenecks=model.get('test_with_bottlenecks', True),
        ),
        num_classes={HEAD: num_classes},
        pooling=pooling,
        representation=model.get('representation_size'),
    )

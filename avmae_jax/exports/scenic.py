"""A checkpoint for Scenic's `av_mae` (its autoencoders, its classifiers of one modality, its MBT) or `mbt`.

    checkpoint_STEP     flax's msgpack: the parameters under their names
    config.json         what their config says of the model, its masks and the shapes of its inputs

`python -m avmae_jax.convert` reads both, and gives back the parameters bit for bit. A model that has no counterpart
there is refused: whether it has one is found out by rebuilding it from the config that is to be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from avmae_jax.exports import folder as folders
from avmae_jax.exports.trained import Trained, difference
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import Classifier
from avmae_jax.structs import JOINT_ORDER, Modality
from avmae_jax.weights import scenic_avmae, scenic_config, scenic_files, scenic_mbt
from avmae_jax.weights.scenic_avmae import SCENIC_NAMES


def write(folder: epath.Path, trained: Trained, dtype: str) -> None:
    """The checkpoint and its config."""
    if dtype != 'float32':
        raise ValueError(f'--dtype={dtype}: Scenic keeps parameters in float32.')
    model, config = trained.model, describe(trained)
    variant = variant_of(model)
    try:
        if isinstance(model.encoder, MBT):
            arrays = scenic_mbt.dump(model, trained.params, variant)
        else:
            arrays = scenic_avmae.dump(model, trained.params, single=len(model.tokenizers) == 1)
    except ValueError as error:
        raise ValueError(f'Scenic has no counterpart of the model. {error}') from error
    rebuilt, _ = scenic_files.build(config, arrays, model.encoder.compute, variant)
    found = difference(model, rebuilt)
    if found:
        raise ValueError(f'Scenic has no counterpart of the model: {found}.')
    scenic_files.write_checkpoint(folder / f'checkpoint_{trained.about["step"]}', arrays, trained.about['step'])
    folders.write_json(folder / scenic_files.CONFIG_FILE, config)


def variant_of(model: Any) -> str:
    """The project of theirs: the older MBT has learned positions, and one mean over all tokens."""
    if not isinstance(model.encoder, MBT):
        return 'av_mae'
    learned = any(tokenizer.positions == 'learned' for tokenizer in model.tokenizers.values())
    return 'mbt' if learned or model.pooling == 'joint_mean' else 'av_mae'


def describe(trained: Trained) -> dict[str, Any]:
    """Their config, as far as a model of theirs can be like this one."""
    model = trained.model
    modalities = [m for m in JOINT_ORDER if m in model.tokenizers]
    names = [SCENIC_NAMES[m] for m in modalities]
    if len(set(names)) < len(names):
        raise ValueError('Scenic has no model of both images and videos.')
    if isinstance(model, Classifier) and len(model.num_classes) > 1:
        raise ValueError(f'Scenic has one head a model; this one has {", ".join(model.num_classes)}.')
    if isinstance(model, Classifier) and len(modalities) > 1 and not isinstance(model.encoder, MBT):
        raise ValueError(f'Scenic classifies several modalities by MBT alone, not by {type(model.encoder).__name__}.')
    first = model.tokenizers[modalities[0]]
    frames = model.tokenizers['video'].patch[:1] if 'video' in model.tokenizers else ()
    if isinstance(model.encoder, MBT) and not frames:
        frames = (1,)  # Their config of MBT always names some.
    section: dict[str, Any] = {
        **_size(model.encoder.size),
        'patches': {'size': [*first.patch[-2:], *frames]},
        'positional_embedding': _their(scenic_config.POSITION_NAMES, first.positions),
        'use_modality_tokens': first.modality_token,
        'classifier': 'token' if first.class_token else 'gap',
        'normalise_encoder_output': model.encoder.final_norm,
    }
    if isinstance(model.encoder, MBT):
        section |= _mbt(model, names)
    else:
        section['encoder_strategy'] = _strategy(scenic_config.ENCODERS, scenic_config.ENCODER_NAMES, model.encoder)
        if section['encoder_strategy'] == 'separate_encoders_and_concat':
            section['fusion_layers'] = model.encoder.size.num_layers - model.encoder.fusion_layer
    loss: dict[str, Any] = {'target': names if len(names) > 1 else names[0]}
    if not isinstance(model, Classifier):
        decoder = model.decoder
        section |= {
            'decoder_config': {**_size(decoder.size), 'use_projection_bias': decoder.projection_bias},
            'decoder_strategy': _strategy(scenic_config.DECODERS, scenic_config.DECODER_NAMES, decoder),
            'positional_embedding_decoder': _their(scenic_config.POSITION_NAMES, decoder.positions),
            'use_inpainting': 'inpainting' in trained.objective.terms,
        }
        ratios = trained.objective.mask_ratio
        loss['token_mask_probability_dict'] = {SCENIC_NAMES[m]: ratio for m, ratio in ratios.items()}
        loss['select_central_frame'] = getattr(model.tokenizers.get('video'), 'central_frame', False)
    return {'model': section, 'masked_feature_loss': loss, 'dataset_configs': _data(trained.shapes)}


def _size(size: Any) -> dict[str, int]:
    return {
        'hidden_size': size.width,
        'num_heads': size.num_heads,
        'mlp_dim': size.mlp_width,
        'num_layers': size.num_layers,
    }


def _mbt(model: Any, names: list[str]) -> dict[str, Any]:
    encoder = model.encoder
    return {
        'modality_fusion': names,
        'fusion_layer': encoder.fusion_layer,
        'use_bottleneck': encoder.fusion == 'bottleneck',
        # With class tokens theirs has one more than its config says.
        'n_bottlenecks': encoder.num_bottlenecks - (model.pooling == 'token'),
        'share_encoder': encoder.shared_weights,
        'test_with_bottlenecks': encoder.test_with_bottlenecks,
        'classifier': _their(scenic_config.MBT_POOLINGS[variant_of(model)], model.pooling),
        'representation_size': model.representation,
        'temporal_encoding_config': {'method': '3d_conv'},
    }


def _data(shapes: Mapping[Modality, tuple[int, ...]]) -> dict[str, Any]:
    """The shapes of the inputs; log-mels by the second, where that comes out even."""
    data: dict[str, Any] = {}
    if 'video' in shapes:
        data |= {'num_frames': shapes['video'][0], 'crop_size': shapes['video'][1]}
    if 'audio' in shapes:
        frames, mels = shapes['audio']
        bins = 100 if frames % 100 == 0 else frames
        data |= {'num_spec_frames': frames // bins, 'spec_shape': [bins, mels]}
    return data


def _their(ours: Mapping[str, str], name: str) -> str:
    """Their name of one of ours."""
    found = [theirs for theirs, our in ours.items() if our == name]
    if not found:
        raise ValueError(f'Scenic has no counterpart of {name!r}; it has those of {", ".join(ours.values())}.')
    return found[0]


def _strategy(classes: Mapping[str, type], names: Mapping[str, str], module: Any) -> str:
    (name,) = (name for name, kind in classes.items() if kind is type(module))
    return _their(names, name)

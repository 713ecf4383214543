"""The ways in which weights are published that `python -m avmae_jax.convert` reads: one table."""

from __future__ import annotations

import functools

from avmae_jax.weights import huggingface, scenic_files, torch_ast, torch_cavmae, torch_mae, torch_videomae, vit
from avmae_jax.weights.imported import Format

FORMATS: dict[str, Format] = {
    'huggingface': Format(f'a folder of transformers: {", ".join(huggingface.KINDS)}', huggingface.read),
    'vit_npz': Format('a ViT of images: .npz of vision_transformer, big_vision, Scenic', vit.read_imported),
    'scenic_avmae': Format(
        "a checkpoint of Scenic's av_mae: autoencoder, classifier of one modality, or MBT",
        functools.partial(scenic_files.read_imported, variant='av_mae'),
        scenic_files.GIVEN,
    ),
    'scenic_mbt': Format(
        "a checkpoint of Scenic's mbt",
        functools.partial(scenic_files.read_imported, variant='mbt'),
        scenic_files.GIVEN,
    ),
    'mae': Format(
        'a state dict of facebookresearch/mae: autoencoder, encoder, or classifier of images',
        torch_mae.read_mae,
        torch_mae.GIVEN,
    ),
    'audiomae': Format(
        'a state dict of facebookresearch/AudioMAE: autoencoder, encoder, or classifier of sound',
        torch_mae.read_audiomae,
        torch_mae.AUDIO_GIVEN,
    ),
    'videomae': Format(
        'a state dict of MCG-NJU/VideoMAE or OpenGVLab/VideoMAEv2: autoencoder or classifier of video',
        torch_videomae.read,
        torch_videomae.GIVEN,
    ),
    'cavmae': Format(
        'a state dict of YuanGongND/cav-mae: autoencoder, or classifier, of images and sound',
        torch_cavmae.read,
        torch_cavmae.GIVEN,
    ),
    'ast': Format('a state dict of YuanGongND/ast: classifier of sound', torch_ast.read_ast, torch_ast.GIVEN),
    'ssast': Format(
        'a state dict of YuanGongND/ssast: encoder or classifier of sound', torch_ast.read_ssast, torch_ast.SSAST_GIVEN
    ),
}

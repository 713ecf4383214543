"""The ways in which weights are published that `python -m avmae_jax.convert` reads: one table."""

from __future__ import annotations

import functools

from avmae_jax.weights import huggingface, scenic_files, vit
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
}

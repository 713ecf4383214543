"""The ways in which weights are published that `python -m avmae_jax.convert` reads: one table."""

from __future__ import annotations

from avmae_jax.weights import vit
from avmae_jax.weights.imported import Format

FORMATS: dict[str, Format] = {
    'vit_npz': Format('a ViT of images: .npz of vision_transformer, big_vision, Scenic', vit.read_imported),
}

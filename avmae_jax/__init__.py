"""Self-supervised pretraining of transformers on video and its sound, in JAX."""

from typing import Any

__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
    """`avmae_jax.load_pretrained`; what it needs is imported when it is asked for, and not with the package."""
    if name == 'load_pretrained':
        from avmae_jax.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

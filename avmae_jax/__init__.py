"""Self-supervised pretraining of transformers on video and its sound, in JAX."""

__version__ = '0.1.0'

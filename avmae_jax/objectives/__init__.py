"""What to hide, what to ask, and how much each answer counts; no parameters of its own."""

from avmae_jax.objectives.classification import Classification
from avmae_jax.objectives.inpainting import Inpainting
from avmae_jax.objectives.objective import Objective
from avmae_jax.objectives.reconstruction import Reconstruction
from avmae_jax.objectives.targets import Target

TERMS = {'reconstruction': Reconstruction, 'inpainting': Inpainting}

__all__ = ['TERMS', 'Classification', 'Objective', 'Target', 'Reconstruction', 'Inpainting']

"""What a trained model is asked: pure functions of its parameters and of rows of media, to be jitted or exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from avmae_jax.evaluation import passes, pictures
from avmae_jax.evaluation.painting import standardised_targets
from avmae_jax.exports.trained import Trained
from avmae_jax.ops import patches
from avmae_jax.structs import Array, Batch, Modality

Rows = Mapping[Modality, Array]
CHANNELS = {'image': 3, 'video': 3, 'audio': 1}


class Rebuilt(NamedTuple):
    """One modality of clips of which a part was hidden.

    Attributes:
      media: what the model was shown: RGB in [0, 1] or log-mel in nats; video [b t h w 3], image [b h w 3], audio
        [b s f]. Of a model that answers for the middle frame of each tubelet, those frames.
      rebuilt: the same, with the model's answers in the hidden places. One that was asked for standardised patches
        answers for what is within a patch; mean and deviation are then the true ones.
      hidden: the patches that were hidden, in token order.
    """

    media: Float[Array, 'b ...']
    rebuilt: Float[Array, 'b ...']
    hidden: Bool[Array, 'b n']


def make_inputs(trained: Trained, rows: Rows) -> dict[Modality, Float[Array, 'b ...']]:
    """Rows as the model takes them, as in evaluation: float32 pixels and log-mels, normalised."""
    count = next(iter(rows.values())).shape[0]
    batch = Batch(
        media=dict(rows),
        present=dict.fromkeys(rows, jnp.ones(count, bool)),
        labels={},
        record=jnp.zeros(count, jnp.int32),
        seed=jnp.zeros((count, 2), jnp.uint32),
        weight=jnp.ones(count),
        damaged=jnp.zeros(count, jnp.int32),
    )
    return trained.preprocess(batch, train=False)


def encode(trained: Trained, params: Any, rows: Rows) -> dict[Modality, Float[Array, 'b _n d']]:
    """Tokens after the encoder; a class token, where there is one, comes first."""
    return trained.model.apply({'params': params}, make_inputs(trained, rows), method='encode')


def embed(trained: Trained, params: Any, rows: Rows) -> dict[Modality, Float[Array, 'b d']]:
    """The mean over the tokens of each modality, float32; the features of `evaluation.passes`."""
    inputs = make_inputs(trained, rows)
    tokens = trained.model.apply({'params': params}, inputs, method='encode')
    grids = trained.model.grids(inputs)
    return {m: passes.pool(x, grids[m]) for m, x in tokens.items()}


def classify(trained: Trained, params: Any, rows: Rows) -> dict[str, Float[Array, 'b _c']]:
    """Head -> logits, float32: the mean over the parts that have some."""
    return trained.model.apply({'params': params}, make_inputs(trained, rows)).averaged


FUNCTIONS: dict[str, Callable[[Trained, Any, Rows], Any]] = {'encode': encode, 'embed': embed, 'classify': classify}


def reconstruct(
    trained: Trained, params: Any, rows: Rows, rng: jax.Array, mask_ratio: Mapping[Modality, float]
) -> dict[Modality, Rebuilt]:
    """Hides patches as training did, but for the ratios that are given, and answers for them."""
    objective = dataclasses.replace(trained.objective, mask_ratio={**trained.objective.mask_ratio, **mask_ratio})
    inputs = make_inputs(trained, rows)
    grids = trained.model.grids(inputs)
    drawn = objective.draw(rng, grids, next(iter(inputs.values())).shape[0])
    outputs = trained.model.apply({'params': params}, inputs, drawn.masks, drawn.places or None)
    if 'reconstruction' in objective.terms:
        answers = outputs.predicted
        asked = {m: _places(mask.hidden, outputs.patches[m].shape[1]) for m, mask in drawn.masks.items()}
    else:  # Trained to paint one modality by the other, and by nothing else.
        answers, asked = outputs.inpainted, {m: mask > 0 for m, mask in outputs.inpainted_mask.items()}
        if not answers:
            raise ValueError(f'this model rebuilds one of {" and ".join(trained.modalities)} by the other: give both.')
    standardised = standardised_targets(objective)
    found = {}
    for m, values in answers.items():
        true, kind = outputs.patches[m], standardised.get(m, 'none')
        values = pictures.restore_scale(values.astype(jnp.float32), true, kind, CHANNELS[m])
        filled = jnp.where(asked[m][:, :, None], values, true)
        media, rebuilt = (_join(trained, m, x, grids[m]) for x in (true, filled))
        found[m] = Rebuilt(media, rebuilt, asked[m])
    return found


def _places(hidden: Array, num_tokens: int) -> Bool[Array, 'b n']:
    """True where a token is among those hidden."""
    return jnp.any(hidden[:, :, None] == jnp.arange(num_tokens)[None, None], axis=1)


def _join(trained: Trained, modality: Modality, values: Array, grid: tuple[int, ...]) -> Array:
    """Patches as media, in units for people."""
    tokenizer = trained.model.tokenizers[modality]
    if getattr(tokenizer, 'central_frame', False):
        media = patches.unpatchify(values, grid, (1, *tokenizer.patch[1:]))
    else:
        media = tokenizer.join(values, grid)
    return trained.preprocess.undo({modality: media})[modality]

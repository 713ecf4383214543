"""Rows mixed in pairs, labels included: mixup (Zhang et al. 2018), by modality too, and CutMix (Yun et al. 2019).

The partner of row i of a batch is the i-th from its end, as in Scenic; where the batch lies on several devices, they
exchange their rows in pairs. How much of a row stays is drawn from its own seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, UInt32

from avmae_jax.ops import rows
from avmae_jax.structs import JOINT_ORDER, Array, Modality


class Mixing(NamedTuple):
    """What of each row stays, and what is its partner's.

    Attributes:
      weight: by modality, [b] the share that stays; of the labels, and of inputs that are blended.
      inside: [b h w] the places of pictures that are the partner's, and nothing of them is blended in a row that has
        any; None where nothing is cut.
    """

    weight: dict[Modality, Float[Array, 'b']]
    inside: Bool[Array, 'b h w'] | None = None


def partner(x: Array) -> Array:
    """What each row is mixed with."""
    return x[::-1]


def blend(x: Float[Array, 'b *any'], weight: Float[Array, 'b']) -> Float[Array, 'b *any']:
    """weight * row + (1 - weight) * partner; of inputs and of labels."""
    share = rows.per_row(weight, x).astype(x.dtype)
    return share * x + (1 - share) * partner(x)


def cut(pixels: Float[Array, 'b *thw 3'], inside: Bool[Array, 'b h w']) -> Float[Array, 'b *thw 3']:
    """The partner's pixels inside, in all frames alike; the row's own outside."""
    places = inside[..., None] if pixels.ndim == 4 else inside[:, None, :, :, None]
    return jnp.where(places, partner(pixels), pixels)


def mix(x: Float[Array, 'b *any'], modality: Modality, mixing: Mixing) -> Float[Array, 'b *any']:
    """The inputs of one modality, mixed."""
    mixed = blend(x, mixing.weight[modality])
    if mixing.inside is None or modality == 'audio':
        return mixed
    has_cut = rows.per_row(jnp.any(mixing.inside, axis=(1, 2)), x)
    return jnp.where(has_cut, cut(x, mixing.inside), mixed)


@dataclasses.dataclass(frozen=True)
class Mixup:
    """Shares from Beta(alpha, alpha).

    Attributes:
      alpha: 0.5 in the recipe; the smaller, the more rows stay what they were or become their partner.
      per_modality: each modality of a row has a share of its own, and so a label of its own ("mixmod").
    """

    alpha: int | float = 0.5
    per_modality: bool = False

    def __post_init__(self):
        if not self.alpha > 0:
            raise ValueError(f'alpha of mixup must be above 0; got {self.alpha}. Without mixup, leave the section out.')

    def draw(self, seed: UInt32[Array, 'b 2'], modalities: Iterable[Modality]) -> dict[Modality, Float[Array, 'b']]:
        """The share that stays of each row; that of a modality does not depend on which others there are."""
        keys = rows.row_keys(seed, rows.MIXUP)

        def draw_one(number: int) -> Float[Array, 'b']:
            return jax.vmap(lambda key: jax.random.beta(jax.random.fold_in(key, number), self.alpha, self.alpha))(keys)

        return {m: draw_one(JOINT_ORDER.index(m) if self.per_modality else 0) for m in modalities}


@dataclasses.dataclass(frozen=True)
class CutMix:
    """A rectangle of a picture is the partner's.

    Attributes:
      alpha: the area that stays is drawn from Beta(alpha, alpha), before what falls over the edge comes back.
      ratio: share of rows that are cut; the others are blended, where there is mixup as well.
    """

    alpha: int | float = 1.0
    ratio: int | float = 0.5

    def __post_init__(self):
        if not self.alpha > 0 or not 0 <= self.ratio <= 1:
            raise ValueError(f'cutmix needs an alpha above 0 and a ratio in [0, 1]; got {self.alpha} and {self.ratio}.')

    def draw(self, seed: UInt32[Array, 'b 2'], height: int, width: int) -> Bool[Array, 'b h w']:
        """The rectangles; rows that are not cut have none."""

        def draw_one(key: jax.Array) -> Float[Array, '4']:
            key, share_key = jax.random.split(key)
            return jnp.append(jax.random.uniform(key, (3,)), jax.random.beta(share_key, self.alpha, self.alpha))

        drawn = jax.vmap(draw_one)(rows.row_keys(seed, rows.CUTMIX))
        side = jnp.sqrt(1 - drawn[:, 3])

        def span(middle: Float[Array, 'b'], size: int) -> Bool[Array, 'b size']:
            middle, half = jnp.floor(middle * size)[:, None], (jnp.floor(side * size) / 2)[:, None]
            place = jnp.arange(size, dtype=jnp.float32)[None]
            return (place >= middle - half) & (place < middle + half)

        inside = span(drawn[:, 0], height)[:, :, None] & span(drawn[:, 1], width)[:, None, :]
        return inside & (drawn[:, 2] < self.ratio)[:, None, None]


def draw_mixing(
    seed: UInt32[Array, 'b 2'],
    inputs: Mapping[Modality, Float[Array, 'b ...']],
    counts: Mapping[Modality, Float[Array, 'b']],
    mixup: Mixup | None,
    cutmix: CutMix | None = None,
) -> Mixing:
    """What stays of each row.

    Args:
      counts: by modality, 0 for rows that lack it or do not count. They stay as they are and nobody gets anything of
        them; with one share for all modalities, so does a row that lacks any of them.
    """
    whole = {m: jnp.ones(len(seed), jnp.float32) for m in inputs}
    weight = whole if mixup is None else mixup.draw(seed, inputs)
    one_share = mixup is None or not mixup.per_modality
    able = {m: (counts[m] > 0) & (partner(counts[m]) > 0) for m in inputs}
    if one_share:
        everywhere = jnp.all(jnp.stack(list(able.values())), axis=0)
        able = dict.fromkeys(able, everywhere)
    inside = None
    if cutmix is not None:
        pictures = [m for m in inputs if m != 'audio']
        if len(pictures) != 1:
            raise ValueError(f'cutmix needs one modality with pictures; the inputs are {sorted(inputs)}.')
        (m,) = pictures
        height, width = inputs[m].shape[-3:-1]
        inside = cutmix.draw(seed, height, width) & able[m][:, None, None]
        stays = 1 - jnp.mean(inside, axis=(1, 2), dtype=jnp.float32)
        for other in inputs if one_share else pictures:
            weight = {**weight, other: jnp.where(stays < 1, stays, weight[other])}
    return Mixing({m: jnp.where(able[m], weight[m], 1.0) for m in inputs}, inside)

"""Optimisers of the recipe, and what treats parameters by where they stand: slower layers, frozen ones, an average.

Pretraining is Adam with decoupled decay on kernels; finetuning is SGD with momentum, or AdamW, with learning rates that
fall with the distance from the head. The learning rate warms up and fades out in both.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from avmae_jax.parallel.rules import path_name


def peak_learning_rate(base_learning_rate: float, batch_size: int) -> float:
    """The linear scaling rule: base rates are given for a batch of 256."""
    return base_learning_rate * batch_size / 256


class WarmupCosine(NamedTuple):
    """Linear warm-up from 0, then half a cosine down to `end_ratio` of the peak at `num_steps`.

    Steps count from 0, so the first update has learning rate 0, as in the public reference. Behind `num_steps` the
    rate stays at its end: the reference jumps back to its peak there, which nobody can want.

    Attributes:
      peak: the rate at the end of the warm-up.
      warmup_steps: may be a fraction of steps, like 2.5 epochs.
    """

    peak: float
    num_steps: int
    warmup_steps: float
    end_ratio: float = 0.0

    def __call__(self, step: Int[Array, ''] | int) -> Float[Array, '']:
        count = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, count / self.warmup_steps) if self.warmup_steps else 1.0
        decay_steps = self.num_steps - int(self.warmup_steps)
        progress = jnp.clip((count - self.warmup_steps) / decay_steps, 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return self.peak * warmup * (self.end_ratio + (1.0 - self.end_ratio) * cosine)


def is_kernel(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at a tree path is a kernel: those decay; biases, scales and tokens do not."""
    return 'kernel' in jax.tree_util.keystr(path[-1:], simple=True)


def kernel_mask(params: Any) -> Any:
    """True for kernels, in the tree of `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)


class _DecayState(NamedTuple):
    count: Int[Array, '']  # type: ignore[assignment]  # Hides tuple.count, as optax's own states do.


def decay_kernels(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Multiplies every kernel by `1 - lr * weight_decay` after the update before it in the chain.

    `optax.add_decayed_weights` decays the weights as they were before the update; the reference decays them after.
    """

    def init(params):
        del params
        return _DecayState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError('decay_kernels needs the parameters: optimizer.update(grads, state, params).')
        decay = schedule(state.count) * weight_decay

        def shrink(path, u, w):
            return u - decay * (w + u) if is_kernel(path) else u

        return jax.tree_util.tree_map_with_path(shrink, updates, params), _DecayState(state.count + 1)

    return optax.GradientTransformation(init, update)


FIRST_MOMENT_DTYPES = ('float32', 'bfloat16')


def _scale_by_adam(
    beta1: int | float, beta2: int | float, epsilon: int | float, first_moment_dtype: str
) -> optax.GradientTransformation:
    """The part that Adam and AdamW share.

    Args:
      first_moment_dtype: what the mean of the gradients is kept in; bfloat16 saves 2 of the 12 bytes a parameter of the
        state. It is rounded as it decays and as it is stored (optax); a step's own gradient is added in float32. The
        second moment stays float32: with beta2 near 1 its changes of a step are less than bfloat16 tells apart.
    """
    if first_moment_dtype not in FIRST_MOMENT_DTYPES:
        raise ValueError(f'first_moment_dtype must be one of {FIRST_MOMENT_DTYPES}; got {first_moment_dtype!r}.')
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and epsilon > 0):
        raise ValueError(
            f'beta1 and beta2 must lie in [0, 1) and epsilon above 0; got {beta1}, {beta2} and epsilon={epsilon}.'
        )
    return optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon, mu_dtype=first_moment_dtype)


def adam(
    schedule: optax.Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.05,
    clip_norm: float | None = None,
    first_moment_dtype: str = 'float32',
) -> optax.GradientTransformation:
    """Adam with bias correction, then decay; with `clip_norm`, gradients are first scaled to at most that norm."""
    parts = [_scale_by_adam(beta1, beta2, epsilon, first_moment_dtype), optax.scale_by_learning_rate(schedule)]
    if _decays(weight_decay):
        parts.append(decay_kernels(schedule, weight_decay))
    return optax.chain(*_clip(clip_norm), *parts)


def adamw(
    schedule: optax.Schedule,
    *,
    beta1: int | float = 0.9,
    beta2: int | float = 0.999,
    epsilon: int | float = 1e-8,
    weight_decay: int | float = 0.05,
    clip_norm: int | float | None = None,
    first_moment_dtype: str = 'float32',
) -> optax.GradientTransformation:
    """AdamW as published: kernels decay as they were before the update. Betas are those of finetuning ViTs."""
    parts = [_scale_by_adam(beta1, beta2, epsilon, first_moment_dtype)]
    if _decays(weight_decay):
        parts.append(optax.add_decayed_weights(weight_decay, mask=kernel_mask))
    return optax.chain(*_clip(clip_norm), *parts, optax.scale_by_learning_rate(schedule))


def sgd(
    schedule: optax.Schedule, *, momentum: int | float = 0.9, clip_norm: int | float | None = None
) -> optax.GradientTransformation:
    """Gradients are added up, the sum fading by `momentum` a step, and the rate multiplies the sum (as in Scenic)."""
    if not 0 <= momentum < 1:
        raise ValueError(f'momentum must lie in [0, 1); got {momentum}.')
    return optax.chain(*_clip(clip_norm), optax.trace(decay=momentum), optax.scale_by_learning_rate(schedule))


OPTIMIZERS = {'adam': adam, 'adamw': adamw, 'sgd': sgd}


def _decays(weight_decay: int | float) -> bool:
    if weight_decay < 0:
        raise ValueError(f'weight_decay must not be below 0; got {weight_decay}.')
    return weight_decay > 0


def _clip(norm: int | float | None) -> list[optax.GradientTransformation]:
    if norm is not None and not norm > 0:
        raise ValueError(f'clip_norm must be above 0; got {norm}. None clips nothing.')
    return [] if norm is None else [optax.clip_by_global_norm(norm)]


# -- Parameters by where they stand --


def tailored(
    optimizer: optax.GradientTransformation,
    *,
    layer_decay: int | float | None = None,
    frozen: Sequence[str] = (),
    average_decay: int | float | None = None,
) -> optax.GradientTransformation:
    """An optimiser that treats parameters by where they stand.

    Args:
      optimizer: one of OPTIMIZERS, made.
      layer_decay: updates, decay included, are multiplied by layer_decay^(L + 1 - id) with `layer_ids`; 0.75 in the
        recipe. None: all alike.
      frozen: see `frozen_layers`. What is frozen gets no update and no decay, counts in no norm that is clipped, and
        takes no memory for moments.
      average_decay: keeps a moving average of the parameters, see `average_params`; None keeps none.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f'layer_decay must lie in (0, 1]; got {layer_decay}. The recipe has 0.75.')
    for pattern in frozen:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f'frozen: {pattern!r} is no regular expression: {error}.') from error
    parts = [optimizer]
    if frozen:
        frozen = tuple(frozen)
        thaw = zero_frozen(frozen)
        parts = [thaw, optax.masked(optimizer, lambda params: _not_wholly(frozen_layers(params, frozen)))]
    if layer_decay is not None:
        parts.append(scale_layers(layer_decay))
    if frozen:
        parts.append(thaw)
    if average_decay is not None:
        parts.append(average_params(average_decay))
    return optax.chain(*parts) if len(parts) > 1 else optimizer


# Layer 0 wherever they are; the rest of it is tokenizers.
_FIRST = {'class_token', 'distillation_token', 'modality_token', 'positions'}


class _Place(NamedTuple):
    """Where a parameter stands: the stack of its layer ('encoder/joint'), the layer, or None for all of the stack's."""

    stack: str
    layer: int | None


def _place(name: str) -> _Place | None:
    """None for a parameter outside the layers of the encoder."""
    found = re.match(r'(encoder/.+?)/(?:layers|layer_(\d+))/', name)
    return _Place(found[1], int(found[2]) if found[2] else None) if found else None


def layer_ids(params: Any) -> Any:
    """The layer that each parameter belongs to, counted from the input; in the tree of `params`.

    0 tokenizers (stems), positions, class and modality tokens; i + 1 the encoder's block i; L + 1 the rest: bottleneck,
    norms, head. Stacks count side by side, but those of joint layers come after the deepest of their neighbours.
    A scanned stack has a vector: the ids of its layers, along the first axis of the parameter.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in leaves]
    places = [_place(name) for name in names]
    depths: dict[str, int] = {}
    for place, (_, leaf) in zip(places, leaves, strict=True):
        if place is not None:
            depth = leaf.shape[0] if place.layer is None else place.layer + 1
            depths[place.stack] = max(depth, depths.get(place.stack, 0))
    before = {stack: _layers_before(stack, depths) for stack in depths}
    last = 1 + max((before[stack] + depth for stack, depth in depths.items()), default=0)

    def layer_id(name: str, place: _Place | None) -> int | np.ndarray:
        if place is not None:
            first = before[place.stack] + 1
            return first + place.layer if place.layer is not None else first + np.arange(depths[place.stack])
        parts = name.split('/')
        decoder = parts[0] == 'decoder'
        return 0 if not decoder and (parts[0].startswith('tokenizers') or _FIRST & set(parts)) else last

    ids = [layer_id(name, place) for name, place in zip(names, places, strict=True)]
    return jax.tree_util.tree_unflatten(tree, ids)


def _layers_before(stack: str, depths: dict[str, int]) -> int:
    parent, _, name = stack.rpartition('/')
    if not name.startswith('joint'):  # 'joint_audio' holds norms of joint layers.
        return 0
    others = [other.rpartition('/') for other in depths]
    return max((depths[f'{parent}/{o}'] for p, _, o in others if p == parent and not o.startswith('joint')), default=0)


def _along_first_axis(values: Any, leaf: Any) -> jax.Array:
    """A number, or one for each layer of a scanned parameter, in a shape that multiplies the parameter."""
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim))


def scale_layers(decay: int | float) -> optax.GradientTransformation:
    """Multiplies updates by decay^(L + 1 - id): the deeper, the more they are kept; the head's are as they were."""

    def update(updates, params):
        if params is None:
            raise ValueError('scale_layers needs the parameters: optimizer.update(grads, state, params).')
        ids = layer_ids(params)
        last = max(int(np.max(i)) for i in jax.tree.leaves(ids))

        def scale(update, i):
            return update * _along_first_axis(np.asarray(decay ** (last - np.asarray(i)), update.dtype), update)

        return jax.tree.map(scale, updates, ids)

    return optax.stateless(update)


def frozen_layers(params: Any, patterns: Iterable[str]) -> Any:
    """True for the parameters that stay as they are; in the tree of `params`.

    Args:
      patterns: regular expressions, each for the beginning of a parameter's path, such as 'tokenizers_video/',
        'encoder/' or r'.*/layer_[0-3]/'. Layers are named layer_0, layer_1, ... whether they are scanned or not; a
        scanned parameter has a vector: True for its frozen layers.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    unmatched, names = dict.fromkeys(patterns), []

    def matches(name: str) -> bool:
        names.append(name)
        hits = [pattern for pattern in patterns if re.match(pattern, name)]
        for pattern in hits:
            unmatched.pop(pattern, None)
        return bool(hits)

    frozen = []
    for path, leaf in leaves:
        name = path_name(path)
        if '/layers/' in name:
            layers = [matches(name.replace('/layers/', f'/layer_{i}/')) for i in range(leaf.shape[0])]
            frozen.append(layers[0] if len(set(layers)) == 1 else np.asarray(layers))
        else:
            frozen.append(matches(name))
    if unmatched:
        raise ValueError(f'frozen: {_near_misses(unmatched, names)}')
    if all(np.all(x) for x in frozen):
        raise ValueError(f'frozen={[*patterns]} leaves nothing to train: leave out what the head is called.')
    return jax.tree_util.tree_unflatten(tree, frozen)


def _near_misses(patterns: Iterable[str], names: Sequence[str]) -> str:
    known = dict.fromkeys(name.rsplit('/', k)[0] for name in names for k in range(name.count('/') + 1))
    said = []
    for pattern in patterns:
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or [name for name in known if '/' not in name]
        said.append(f'{pattern!r} matches no parameter; near are {near}')
    return '; '.join(said) + '.'


def _not_wholly(frozen: Any) -> Any:
    return jax.tree.map(lambda x: not np.all(x), frozen)


def zero_frozen(patterns: Sequence[str]) -> optax.GradientTransformation:
    """Sets what comes for frozen parameters to zero."""

    def update(updates, params):
        if params is None:
            raise ValueError('zero_frozen needs the parameters: optimizer.update(grads, state, params).')
        return jax.tree.map(
            lambda u, frozen: jnp.where(_along_first_axis(frozen, u), jnp.zeros_like(u), u),
            updates,
            frozen_layers(params, patterns),
        )

    return optax.stateless(update)


class AverageState(NamedTuple):
    """Attributes: average: of the parameters, in their tree; count: updates that went into it."""

    count: Int[Array, '']  # type: ignore[assignment]  # Hides tuple.count, as optax's own states do.
    average: Any


def average_params(decay: int | float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters after each update; the last part of a chain.

    It begins at the first parameters, and the first updates count for more than `1 - decay`, so that a short run does
    not end with a look at its beginning. As a part of the optimiser's state it is saved, restored and spread over
    devices like the rest; `averaged` finds it there.
    """
    if not 0 < decay < 1:
        raise ValueError(f'average_decay must lie between 0 and 1; got {decay}, try 0.999.')

    def init(params):
        # A copy: the state is donated whole, and no buffer may be in it twice.
        return AverageState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError('average_params needs the parameters: optimizer.update(grads, state, params).')
        count = state.count.astype(jnp.float32)
        keep = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
        average = jax.tree.map(
            lambda a, p, u: a + (1.0 - keep).astype(a.dtype) * (p + u - a), state.average, params, updates
        )
        return updates, AverageState(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any) -> Any:
    """The moving average of the parameters in an optimiser's state; None where it keeps none."""
    is_average = lambda x: isinstance(x, AverageState)  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(x)]
    return found[0].average if found else None

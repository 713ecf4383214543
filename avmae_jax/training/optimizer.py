"""The recipe's optimiser: Adam with decoupled decay on kernels, and a learning rate that warms up and fades out."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


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


def adam(
    schedule: optax.Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.05,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adam with bias correction, then decay; with `clip_norm`, gradients are first scaled to at most that norm."""
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm is not None else []
    parts += [optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon), optax.scale_by_learning_rate(schedule)]
    if weight_decay:
        parts.append(decay_kernels(schedule, weight_decay))
    return optax.chain(*parts)


OPTIMIZERS = {'adam': adam}

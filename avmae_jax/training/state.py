"""Everything that training changes, in one tree; and how it comes into being, already in place on the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """What a step takes and gives back.

    Attributes:
      step: int32 [], updates done.
      params: the model's parameters.
      opt_state: the optimiser's, per parameter and scalar.
      teacher: the moving average of an objective that has one, or None.
      rng: the key of everything drawn on the device; each step folds its own number into it.
    """

    step: Any
    params: Any
    opt_state: Any
    teacher: Any
    rng: Any


def make_init(
    init_params: Callable[[jax.Array], Any],
    init_teacher: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
) -> Callable[[jax.Array], TrainState]:
    """A pure function from a key to the state before the first step."""

    def init(rng: jax.Array) -> TrainState:
        params_rng, rng = jax.random.split(rng)
        params = init_params(params_rng)
        return TrainState(
            step=jnp.zeros([], jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            teacher=init_teacher(params),
            rng=rng,
        )

    return init


def init_from(
    params: Any,
    rng: jax.Array,
    shardings: TrainState,
    init_teacher: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state before the first step for parameters that are already in place, and the key that `make_init` takes."""

    def init(params: Any, rng: jax.Array) -> TrainState:
        return make_init(lambda _: params, init_teacher, optimizer)(rng)

    return jax.jit(init, in_shardings=(shardings.params, shardings.rng), out_shardings=shardings)(params, rng)


def init_sharded(init: Callable[[jax.Array], TrainState], rng: jax.Array, shardings: TrainState) -> TrainState:
    """Runs `init` so that each device makes its own part: no device ever holds the whole state."""
    return jax.jit(init, out_shardings=shardings)(rng)


def abstract_state(init: Callable[[jax.Array], TrainState], shardings: TrainState | None = None) -> TrainState:
    """Shapes and types (and where they go) of the state, without computing or allocating any of it."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    if shardings is None:
        return shapes
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def to_items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state under the names they have in a checkpoint; step and rng go into its `meta`."""
    items = {'params': state.params, 'opt_state': state.opt_state}
    return items if state.teacher is None else {**items, 'teacher': state.teacher}


def to_meta(state: TrainState) -> dict[str, Any]:
    """Step and rng as JSON."""
    return {
        'step': int(state.step),
        'rng': {'impl': str(jax.random.key_impl(state.rng)), 'data': jax.random.key_data(state.rng).tolist()},
    }


def from_items(items: dict[str, Any], meta: dict[str, Any], shardings: TrainState) -> TrainState:
    """The inverse of `to_items` and `to_meta`."""

    def make() -> tuple[jax.Array, jax.Array]:
        data = jnp.asarray(meta['rng']['data'], jnp.uint32)
        return jnp.int32(meta['step']), jax.random.wrap_key_data(data, impl=meta['rng']['impl'])

    # Computed rather than put: devices of other processes cannot be put to.
    step, rng = jax.jit(make, out_shardings=(shardings.step, shardings.rng))()
    return TrainState(
        step=step, params=items['params'], opt_state=items['opt_state'], teacher=items.get('teacher'), rng=rng
    )

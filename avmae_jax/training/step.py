"""One update, as a pure function of state and batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from avmae_jax.ops import augment
from avmae_jax.parallel.rules import on_mesh
from avmae_jax.structs import Batch
from avmae_jax.training.state import TrainState

LossFunction = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_loss(
    model: Any, objective: Any, preprocess: Callable, *, lose_modality_ratio: int | float = 0.0
) -> LossFunction:
    """(params, teacher, batch, rng) -> (loss, losses by name): host bytes to the numbers that are minimised.

    Args:
      lose_modality_ratio: share of rows that lose one of their modalities, see `augment.lose_modality`.
    """

    def loss_function(params, teacher, batch, rng):
        if lose_modality_ratio:
            batch = augment.lose_modality(batch, lose_modality_ratio)
        inputs = preprocess(batch, train=True)
        loss, scored = objective(model, params, teacher, inputs, batch, rng)
        return loss, scored.losses

    return loss_function


def make_train_step(
    loss_function: LossFunction,
    *,
    objective: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate_steps: int = 1,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The function to jit with a donated state.

    It takes the number of the step besides state and batch and changes nothing unless the state has come that
    far. A step with a non-finite loss or gradient does not count, so none of the steps that were already
    dispatched behind it does: the state stays what it was before, to be looked into.

    Args:
      accumulate_steps: parts that the batch is worked through in, one after the other; their gradients are
        averaged. Activations take this many times less memory.
    """
    gradient = jax.value_and_grad(loss_function, has_aux=True)

    def accumulated(params, teacher, batch, rng):
        if accumulate_steps == 1:
            return gradient(params, teacher, batch, rng)
        # Part i takes every accumulate_steps-th row, so that each device cuts up its own rows.
        parts = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // accumulate_steps, accumulate_steps, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(total, part):
            index, rows = part
            result = gradient(params, teacher, rows, jax.random.fold_in(rng, index))
            return jax.tree.map(jnp.add, total, result), None

        shapes = jax.eval_shape(gradient, params, teacher, jax.tree.map(lambda x: x[0], parts), rng)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate_steps), parts))
        return jax.tree.map(lambda x: x / accumulate_steps, total)

    def train_step(state, batch, step):
        rng = jax.random.fold_in(state.rng, state.step)
        (loss, losses), grads = accumulated(state.params, state.teacher, batch, rng)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state._replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            teacher=objective.update(state.teacher, params),
        )
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        accept = finite & (state.step == step)
        # The key never changes, and a select between keys would hide that from the donation of buffers.
        new = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new._replace(rng=None), state._replace(rng=None))
        metrics = {
            'loss': loss,
            **losses,
            'learning_rate': schedule(state.step),
            'grad_norm': grad_norm,
            'param_norm': optax.global_norm(state.params),
            'update_norm': optax.global_norm(updates),
            'finite': finite,
        }
        return new._replace(rng=state.rng), metrics

    return train_step


OPTIMIZATION_LEVEL = 'xla_backend_optimization_level'
CPU_HEAP_BYTES = 30_000_000  # glibc's malloc keeps blocks of up to 32 MiB for the next step.


def compile_on(traced: jax.stages.Traced, platform: str) -> jax.stages.Compiled:
    """Compiles for devices of `platform` with the settings of XLA that suit a step; figures: docs/performance.md."""
    options: dict[str, Any] = {}
    if platform == 'cpu':
        # LLVM's first level of optimisation gives as fast a step as its third and compiles a tenth faster.
        if OPTIMIZATION_LEVEL not in os.environ.get('XLA_FLAGS', ''):
            options[OPTIMIZATION_LEVEL] = 1
        # One block of memory for all temporaries is given back after each step, and its pages are cleared again.
        if largest_array(traced.jaxpr) <= CPU_HEAP_BYTES:  # XLA warns of every larger one.
            options['xla_multiheap_size_constraint_per_heap'] = CPU_HEAP_BYTES
    if platform == 'tpu':
        # Weights are gathered whole before a product. Left alone the compiler makes products in as many pieces as there
        # are shards, each of which reads and writes the sum of the tokens once more.
        options['xla_jf_spmd_threshold_for_windowed_einsum_mib'] = 1_000_000
    return traced.lower().compile(compiler_options=options)


def largest_array(jaxpr: Any) -> int:
    """Bytes of the largest array that a traced function computes, those of loops and calls within it included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size * variable.aval.dtype.itemsize for variable in equation.outvars]
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, 'eqns'))
        sizes += [largest_array(value) for value in inner if hasattr(value, 'eqns')]
    return max(sizes)


def jit_train_step(
    train_step: Callable, *, state: TrainState, shardings: TrainState, batch: Batch, batch_sharding: Any
) -> Any:
    """Compiles the step ahead of time for these shapes; donates the state.

    Args:
      state, batch: arrays or ShapeDtypeStructs.

    Returns: the compiled step; call it with np.int32 for the number of the step.
    """
    replicated = jax.NamedSharding(batch_sharding.mesh, jax.P())
    jitted = jax.jit(
        on_mesh(train_step, batch_sharding.mesh),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding, replicated),
        out_shardings=(shardings, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32)
    platform = batch_sharding.mesh.devices.flat[0].platform
    return compile_on(jitted.trace(state, batch, step), platform)

"""What to look at when a loss is no number: which clips, which inputs, which module first."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from avmae_jax.ops import augment
from avmae_jax.structs import Batch
from avmae_jax.training.state import TrainState


class NonFiniteError(RuntimeError):
    """The loss or a gradient was not finite; the message says where it began, `folder` holds the evidence."""


class Diagnosis(NamedTuple):
    """Attributes (module: the first part of a parameter's path):
    losses: name -> value of the step that failed, computed again.
    inputs: modality -> rows of the batch whose input is not finite after preprocessing.
    param_norms, grad_norms: module -> norm.
    activations: (module path, norm of its output) in the order of the calls, where the model tells.
    """

    losses: dict[str, float]
    inputs: dict[str, list[int]]
    param_norms: dict[str, float]
    grad_norms: dict[str, float]
    activations: list[tuple[str, float]]

    def first_fault(self) -> str:
        """The earliest thing that is not finite, in words."""
        if rows := {modality: rows for modality, rows in self.inputs.items() if rows}:
            return 'the input: ' + ', '.join(f'{modality} of rows {found}' for modality, found in rows.items())
        if modules := [name for name, norm in self.param_norms.items() if not np.isfinite(norm)]:
            return f'the parameters of {", ".join(modules)}'
        if outputs := [name for name, norm in self.activations if not np.isfinite(norm)]:
            return f'the output of {outputs[0]}'
        if not np.isfinite(self.losses['loss']):
            return 'the loss itself'
        if modules := [name for name, norm in self.grad_norms.items() if not np.isfinite(norm)]:
            return f'the gradients of {", ".join(modules)}'
        return 'nothing when the step was computed again'


class _Recorder:
    """Lets the outputs of a model's modules be seen from outside of the objective that calls it.

    Of a stack, the output of every layer is seen (`models.blocks.Stack` tells it), and not the modules within layers.

    Attributes:
      model: the model, but its calls to `apply` are recorded.
      outputs: path of a module -> its output, in the order of the calls.
    """

    def __init__(self, model: nn.Module):
        self.outputs: dict[str, jax.Array] = {}
        self._apply = model.apply
        self.model = model.clone()
        object.__setattr__(self.model, 'apply', self._recorded)

    def _recorded(self, variables, *args, **kwargs):
        result, extra = self._apply(variables, *args, **kwargs, capture_intermediates=True, mutable=['intermediates'])
        self.outputs |= _outputs_in_order(extra['intermediates'])
        return result


def _outputs_in_order(intermediates: Mapping[str, Any], parents: tuple[str, ...] = ()) -> dict[str, jax.Array]:
    """Module path -> output, in the order of the calls; the second output of a module is `path/1`.

    flax enters a name when it first has something for it, so a module comes behind those that it calls itself.
    """
    found: dict[str, jax.Array] = {}
    for name, value in intermediates.items():
        path = parents if name == '__call__' else (*parents, name)
        if isinstance(value, Mapping):
            found |= _outputs_in_order(value, path)
            continue
        for call, output in enumerate(value):
            for keys, leaf in jax.tree_util.tree_leaves_with_path(output):
                number = (str(call),) if call else ()
                within = (jax.tree_util.keystr(keys, simple=True, separator='/'),) if keys else ()
                if jnp.issubdtype(leaf.dtype, jnp.floating):
                    found['/'.join((*path, *number, *within)) or 'the model'] = leaf
    return found


def diagnose(
    *,
    model: Any,
    objective: Any,
    preprocess: Callable,
    state: TrainState,
    batch: Batch,
    lose_modality_ratio: int | float = 0.0,
) -> Diagnosis:
    """Computes the failed step again and measures on the way; for the state from before it."""

    names: list[str] = []  # Written while jax traces: a dict that leaves a jitted function has its keys sorted.

    def measure(params, teacher, rows, rng):
        if lose_modality_ratio:
            rows = augment.lose_modality(rows, lose_modality_ratio)
        inputs = preprocess(rows, train=True)
        bad_rows = {modality: ~jnp.isfinite(x.reshape(x.shape[0], -1)).all(axis=1) for modality, x in inputs.items()}
        recorder = _Recorder(model)

        def loss_function(p):
            loss, scored = objective(recorder.model, p, teacher, inputs, rows, rng)
            names[:] = recorder.outputs
            norms = [_norm(output) for output in recorder.outputs.values()]
            return loss, ({'loss': loss, **scored.losses}, norms)

        grads, (losses, outputs) = jax.grad(loss_function, has_aux=True)(params)
        return bad_rows, losses, module_norms(params), module_norms(grads), outputs

    rng = jax.random.fold_in(state.rng, state.step)
    bad_rows, losses, params, grads, outputs = jax.jit(measure)(state.params, state.teacher, batch, rng)
    return Diagnosis(
        losses=_floats(losses),
        inputs={modality: np.flatnonzero(np.asarray(bad)).tolist() for modality, bad in bad_rows.items()},
        param_norms=_floats(params),
        grad_norms=_floats(grads),
        activations=list(zip(names, map(float, outputs), strict=True)),
    )


def module_norms(params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Norm of the parameters (or gradients) by the first part of their path."""
    return {name: _norm(tree) for name, tree in params.items()}


def _norm(tree: Any) -> jax.Array:
    """Global norm that is finite wherever all values are, however large: their squares may not be."""
    leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in leaves]))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return scale * jnp.sqrt(sum(jnp.sum(jnp.square(x / scale)) for x in leaves))


def _floats(tree: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in tree.items()}


def report_nonfinite(
    folder: epath.PathLike,
    *,
    step: int,
    diagnosis: Diagnosis,
    rows: Batch,
    clip_ids: Sequence[str],
) -> str:
    """Writes batch and diagnosis into `folder` and gives the message to stop with.

    Args:
      rows: this host's rows of the batch (numpy).
      clip_ids: one for each of them.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(rows):
        arrays[jax.tree_util.keystr(path, simple=True, separator='/')] = np.asarray(leaf)
    with (folder / f'batch-{jax.process_index()}.npz').open('wb') as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    report = {
        'step': step,
        'first_fault': diagnosis.first_fault(),
        'records': np.asarray(rows.record).tolist(),
        'clip_ids': list(clip_ids),
        **diagnosis._asdict(),
    }
    (folder / f'report-{jax.process_index()}.json').write_text(json.dumps(report, indent=1) + '\n')
    message = (
        f'The loss of step {step} is not finite; it began with {diagnosis.first_fault()}. '
        f'Clips of the batch: {", ".join(clip_ids[:8])}{" ..." if len(clip_ids) > 8 else ""}. '
        f'Parameter norms: {_table(diagnosis.param_norms)}. Gradient norms: {_table(diagnosis.grad_norms)}. '
        f'Batch, state and all norms are in {folder}.'
    )
    logging.error('%s', message)
    return message


def _table(norms: Mapping[str, float]) -> str:
    return ', '.join(f'{name} {norm:.4g}' for name, norm in norms.items())

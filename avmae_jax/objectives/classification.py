"""Say which classes a clip is of: what finetuning asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from avmae_jax.objectives.objective import rows_that_count
from avmae_jax.ops import losses
from avmae_jax.ops.mixup import CutMix, Mixing, Mixup, blend, draw_mixing, mix
from avmae_jax.structs import Array, Batch, Modality

LOSSES = {'softmax': losses.softmax_cross_entropy, 'sigmoid': losses.sigmoid_cross_entropy}


class Classified(NamedTuple):
    """What a step knows besides its loss.

    Attributes:
      losses: 'head/part' -> loss before weighting, float32.
      counts: the same names -> how many rows it is the mean of, float32.
      outputs: everything the model computed. Under `jit`, what nobody returns is not computed.
      mixing: what stayed of each row, or None where rows were left alone.
    """

    losses: dict[str, Array]
    counts: dict[str, Array]
    outputs: Any
    mixing: Mixing | None


class Accuracies(NamedTuple):
    """Attributes: values: 'head/accuracy' -> share of right answers; counts: of how many rows."""

    values: dict[str, Array]
    counts: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Classification:
    """Cross-entropy of every part that gives logits, and their mean.

    A part is a modality, or what pools several; each learns to tell the class by itself, as in MBT.

    Attributes:
      heads: head of the labels -> 'softmax' (one class) or 'sigmoid' (any number).
      weight: by head; None: equal shares that add up to one.
      label_smoothing: share of each label that is spread over all classes; 0.3 in the recipe.
      mixup, cutmix: mix rows in pairs in training, labels included; None leaves them alone.
    """

    heads: Mapping[str, str]
    weight: Mapping[str, int | float] | None = None
    label_smoothing: int | float = 0.0
    mixup: Mixup | None = None
    cutmix: CutMix | None = None

    def __post_init__(self):
        if not self.heads:
            raise ValueError("heads must name at least one head of the labels, such as {'label': 'softmax'}.")
        for head, kind in self.heads.items():
            if kind not in LOSSES:
                raise ValueError(f'heads.{head} must be one of {tuple(LOSSES)}; got {kind!r}.')
        if self.weight is not None and set(self.weight) != set(self.heads):
            raise ValueError(f'weight must name the heads {sorted(self.heads)}; got {sorted(self.weight)}.')
        if self.weight is not None and (min(self.weight.values()) < 0 or not any(self.weight.values())):
            raise ValueError(f'weight must not be below 0, nor 0 for all heads; got {dict(self.weight)}.')
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f'label_smoothing must lie in [0, 1); got {self.label_smoothing}.')

    def __call__(
        self,
        model: Any,
        params: Any,
        teacher: Any,
        inputs: Mapping[Modality, Float[Array, 'b ...']],
        batch: Batch,
        rng: jax.Array,
        *,
        train: bool = True,
        mixing: Mixing | None = None,
    ) -> tuple[Float[Array, ''], Classified]:
        """The loss and what goes into it.

        Args:
          model: a `models.classifier.Classifier`, or what calls like it: the result has logits, head -> part ->
            [b classes].
          params: of the model.
          teacher: what `init` and `update` gave.
          inputs: by modality, what preprocessing made of `batch.media`.
          batch: the labels, and which rows count (`weight`, `present`); mixing is drawn from `batch.seed`.
          rng: for what the model draws.
          train: otherwise rows are not mixed, labels not smoothed, and the model drops nothing.
          mixing: given from outside in place of a drawn one.
        """
        inputs = dict(inputs)
        batch_size = len(next(iter(inputs.values())))
        rows = {m: rows_that_count(m, batch, batch_size) for m in inputs}
        if train and mixing is None and (self.mixup is not None or self.cutmix is not None):
            mixing = draw_mixing(batch.seed, inputs, rows, self.mixup, self.cutmix)
        if mixing is not None:
            inputs = {m: mix(x, m, mixing) for m, x in inputs.items()}
        rngs = {'drop_path': rng} if train else {}
        outputs = model.apply({'params': params}, inputs, train=train, present=batch.present, rngs=rngs)
        found, counts = {}, {}
        for head, kind in self.heads.items():
            labels = self._labels(head, batch, outputs.logits)
            for part, logits in outputs.logits[head].items():
                found[f'{head}/{part}'], counts[f'{head}/{part}'] = self._loss(
                    kind, logits, labels, _rows_of(part, rows), self._share(part, mixing), train
                )
        return self.total(found), Classified(found, counts, outputs, mixing)

    def total(self, losses: Mapping[str, Any]) -> Any:
        """The loss that the losses by name, 'head/part', add up to."""
        total: Any = 0.0
        for head in self.heads:
            parts = [loss for name, loss in losses.items() if name.rpartition('/')[0] == head]
            share = 1 / len(self.heads) if self.weight is None else self.weight[head]
            total = total + share * sum(parts) / len(parts)
        return total

    def accuracies(self, scored: Classified, batch: Batch) -> Accuracies:
        """Of the heads with one class: by the mean of the parts' logits, over rows with a label."""
        found, counts = {}, {}
        for head in [head for head, kind in self.heads.items() if kind == 'softmax']:
            labels, logits = jnp.asarray(batch.labels[head]), scored.outputs.averaged[head]
            right = jnp.take_along_axis(labels, jnp.argmax(logits, axis=-1)[:, None], axis=-1)[:, 0] > 0
            rows = batch.weight * (jnp.sum(labels, axis=-1) > 0)
            found[f'{head}/accuracy'] = losses.masked_mean(right.astype(jnp.float32), rows)
            counts[f'{head}/accuracy'] = jnp.sum(rows)
        return Accuracies(found, counts)

    def _loss(self, kind, logits, labels, rows, weight, train) -> tuple[Float[Array, ''], Float[Array, '']]:
        """The mean over the rows that count, and how many they are."""
        if logits.shape != labels.shape:
            raise ValueError(f'the model scores {logits.shape[-1]} classes and the labels have {labels.shape[-1]}.')
        if weight is not None:
            labels = blend(labels, weight)
        if kind == 'softmax':
            # A clip without a label has nothing to say; as one of several classes it would be wrong whatever it is.
            rows = rows * (jnp.sum(labels, axis=-1) > 0)
        if train:
            labels = losses.smooth_labels(labels, self.label_smoothing)
        return losses.masked_mean(LOSSES[kind](logits, labels), rows), jnp.sum(rows)

    def _share(self, part: str, mixing: Mixing | None) -> Float[Array, 'b'] | None:
        """What stays of the labels of a part."""
        if mixing is None or part in mixing.weight:
            return None if mixing is None else mixing.weight[part]
        if self.mixup is not None and self.mixup.per_modality and len(mixing.weight) > 1:
            raise ValueError(
                f'the logits of {part!r} are of several modalities, which are mixed, and so labelled, each in its own '
                'way: set mixup.per_modality=False, or pool each modality by itself.'
            )
        return next(iter(mixing.weight.values()))

    def _labels(self, head: str, batch: Batch, logits: Mapping[str, Any]) -> Float[Array, 'b c']:
        for what, there in (('labels of the data', batch.labels), ('heads of the model', logits)):
            if head not in there:
                raise ValueError(f'heads names {head!r}, which is none of the {what}: {sorted(there)}.')
        return jnp.asarray(batch.labels[head], jnp.float32)

    def init(self, params: Any) -> Any:
        """The teacher to start with: None, the labels teach."""
        return None

    def update(self, teacher: Any, params: Any) -> Any:
        """The teacher after a step."""
        return teacher


def _rows_of(part: str, rows: Mapping[Modality, Float[Array, 'b']]) -> Float[Array, 'b']:
    """How much each row counts for a part; what pools several modalities counts where there is any of them."""
    return rows[part] if part in rows else jnp.max(jnp.stack(list(rows.values())), axis=0)

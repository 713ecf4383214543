"""Everything that needs a pass of the model over clips, on all devices and hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from avmae_jax.data.mixing import Mixture
from avmae_jax.evaluation import classes, painting, passes, pictures, reconstruction
from avmae_jax.parallel import hosts, rules
from avmae_jax.parallel import mesh as mesh_lib


class Evaluator:
    """Runs passes over the splits of a dataset, or over clips that are open already.

    Attributes:
      source: what is evaluated.
      splits: 'train' and 'test' -> the name of a split, or clips that are open.
    """

    def __init__(
        self,
        subject: Any,
        *,
        split: str | Mixture,
        train_split: str = 'train',
        batch_size: int | None = None,
        num_clips: int = 1,
        layers: Sequence[int] = (),
        in_workers: bool = True,
    ):
        """
        Args:
          subject: `subjects.Subject`.
          train_split: what is fitted on.
          batch_size: rows over all hosts, rounded up to what can be dealt to them; None for that of training.
          num_clips: moments of each clip that are averaged.
          layers: after which features are taken too, counted from 1.
          in_workers: False reads in this process.
        """
        self.subject = subject
        self.layers = tuple(layers)
        self.in_workers = in_workers
        self.mesh = mesh_lib.make_mesh()
        self.rows = rules.batch_sharding(self.mesh)
        shardings = rules.state_shardings(subject.params, self.mesh, subject.config['parallel']['rules'])
        self.params = jax.tree.map(hosts.global_array, subject.params, shardings)
        self.splits = {'train': train_split, 'test': split}
        self.source = subject.open(split) if isinstance(split, str) else split
        self.num_clips = num_clips
        self.batch_size = self._dealt(batch_size or subject.config['batch_size'], num_clips)

    def _dealt(self, rows: int, num_clips: int) -> int:
        """At least so many rows that a batch holds whole records on every host, and as many on every device."""
        unit = int(np.lcm(self.mesh.size, jax.process_count() * num_clips * self.subject.num_crops))
        return -(-rows // unit) * unit

    def collect(self, step: passes.RowStep, split: str | Mixture, *, num_clips: int = 1, what: str) -> dict[str, Any]:
        """What `step` gives for every record of a split."""
        with self.subject.stream(
            split, batch_size=self.batch_size, num_clips=num_clips, in_workers=self.in_workers
        ) as stream:
            return passes.run_pass(
                step,
                self.params,
                stream,
                sharding=self.rows,
                num_records=len(stream.source),
                num_batches=len(stream),
                what=what if isinstance(split, Mixture) else f'{what}, {split}',
            )

    def features(self) -> dict[str, dict[str, Any]]:
        """'train' and 'test' -> the table of a feature pass."""
        step = passes.make_feature_step(self.subject.model, self.subject.preprocess, self.layers)
        return {
            role: self.collect(step, split, num_clips=self.num_clips, what='features')
            for role, split in self.splits.items()
        }

    def logits(self, ways: Sequence[str] = (classes.EVERYTHING,), *, what: str = 'classes') -> dict[str, Any]:
        """The table of a pass that scores classes."""
        step = classes.make_logit_step(self.subject.model, self.subject.preprocess, ways)
        return self.collect(step, self.splits['test'], num_clips=self.num_clips, what=what)

    def reconstruction(self) -> list[dict[str, Any]]:
        """The rows of the table of errors."""
        subject = self.subject
        step = reconstruction.make_reconstruction_step(subject.model, subject.objective, subject.preprocess)
        table = self.collect(step, self.splits['test'], what='reconstruction')
        return [error._asdict() for error in reconstruction.summarise(table, subject.preprocess)]

    def paint(self, num_clips: int) -> tuple[dict[str, pictures.PatchedMedia], list[str]]:
        """The first clips of the split before and after the model, by modality; and their ids."""
        subject = self.subject
        everywhere = jax.NamedSharding(self.mesh, jax.P())
        paint = painting.make_painter(subject.model, subject.objective, subject.preprocess, num_clips)
        # One batch is not worth starting processes.
        with subject.stream(
            self.splits['test'], batch_size=self._dealt(num_clips, num_clips=1), in_workers=False
        ) as stream:
            batch = next(iter(stream))
            paint_batch = jax.jit(rules.on_mesh(paint, self.mesh), out_shardings=everywhere)
            painted = paint_batch(self.params, hosts.global_batch(batch, self.rows))
        media, record = painting.patched(painted, subject.model, subject.objective)
        return media, [self.source[int(i)].id for i in record]

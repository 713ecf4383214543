"""What a stranger needs to know of a run while it goes: figures, speed, and whether the device waits for data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview, profiler
from etils import epath

from avmae_jax.progress import Progress

# Dense bf16 FLOP/s of one device, by what jax calls it. A "device" is a chip, except on TPU v2 and v3 (a core).
PEAK_FLOPS: Mapping[str, float] = {
    'NVIDIA H200': 989.5e12,  # NVIDIA H200 datasheet: 1,979 TFLOPS with sparsity, half of it dense.
    'NVIDIA H100 80GB HBM3': 989.5e12,  # NVIDIA H100 SXM datasheet.
    'NVIDIA H100 PCIe': 756e12,  # NVIDIA H100 PCIe datasheet.
    'NVIDIA A100-SXM4-80GB': 312e12,  # NVIDIA A100 datasheet.
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA L4': 121e12,  # NVIDIA L4 datasheet: 242 with sparsity.
    'TPU v3': 61.5e12,  # cloud.google.com/tpu/docs/v3: 123 TFLOPS a chip of two cores.
    'TPU v4': 275e12,  # cloud.google.com/tpu/docs/v4
    'TPU v5 lite': 197e12,  # cloud.google.com/tpu/docs/v5e
    'TPU v5': 459e12,  # cloud.google.com/tpu/docs/v5p
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,  # cloud.google.com/tpu/docs/v6e
}


LINE_SECONDS = 10.0  # Between two lines in the log; scalars are written as often as the config says.


def peak_flops(device: Any) -> float | None:
    """Dense bf16 FLOP/s of a device, or None for one that the table does not know (a CPU)."""
    return PEAK_FLOPS.get(device.device_kind)


class Report:
    """Turns the metrics of steps into lines, scalars and warnings; never waits for the device.

    Attributes:
      writer: takes the scalars; see training/writer.py.
      log_every_steps: between two lines and two sets of scalars.
      clips_per_step: rows of the global batch.
      flops_per_step: of the whole job, by our own count; None leaves the utilisation out.
      wait_share_warning: share of the time without data on the device from which on the log warns.
    """

    def __init__(
        self,
        writer: Any,
        *,
        log_every_steps: int,
        clips_per_step: int,
        flops_per_step: float | None = None,
        wait_share_warning: float = 0.05,
    ):
        self.writer = writer
        self.log_every_steps = log_every_steps
        self._clips_per_step = clips_per_step
        self._flops_per_step = flops_per_step
        self._wait_share_warning = wait_share_warning
        peak = peak_flops(jax.devices()[0])
        self._peak_flops = None if peak is None else peak * jax.device_count()
        self._steps = 0
        self._damaged = 0
        self._waited_before = 0.0
        self._paused = 0.0
        self._since: float | None = None
        self._last_line = 0.0

    def start(self, waited_seconds: float) -> None:
        """Starts the clock; call when the first step is through, whose batch nothing could be computed beside."""
        self._since, self._waited_before = time.monotonic(), waited_seconds

    def pause(self, seconds: float) -> None:
        """Takes time that went into checkpoints and pictures out of the speed."""
        self._paused += seconds

    def is_due(self, step: int, last: bool = False) -> bool:
        return last or step == 1 or step % self.log_every_steps == 0

    def step_done(
        self,
        step: int,
        metrics: Mapping[str, Any],
        *,
        damaged: int,
        waited_seconds: float,
        bar: Progress,
        last: bool = False,
    ) -> None:
        """Takes the metrics of a step that is through.

        Args:
          step: steps done, this one included.
          damaged: damaged records that were passed over to make its batch.
          waited_seconds: `Prefetch.wait_seconds`, since the start.
        """
        self._damaged += damaged
        if self._since is not None:
            self._steps += 1
        if not self.is_due(step, last):
            return
        scalars = {name: float(value) for name, value in metrics.items() if name != 'finite'}
        speed = self._measure_speed(waited_seconds)
        share = speed.get('data_wait_share', 0.0)
        if self._damaged:
            scalars['damaged_records'] = self._damaged
        scalars |= speed
        self.writer.write_scalars(step, scalars)
        self.writer.flush()
        now = time.monotonic()
        if last or step == 1 or now - self._last_line > LINE_SECONDS:
            self._last_line = now
            logging.info('Step %d: %s.', step, ', '.join(f'{name} {value:.4g}' for name, value in scalars.items()))
            if share > self._wait_share_warning:
                logging.warning(
                    'Step %d: the device waited for data %.0f %% of the time. More data.num_workers, smaller frames at '
                    'preparation, or data.views_per_clip would help.', step, 100 * share,
                )  # fmt: skip
        bar.note(loss=f'{scalars["loss"]:.4g}', wait=f'{100 * share:.0f}%')

    def _measure_speed(self, waited_seconds: float) -> dict[str, float]:
        if self._since is None or not self._steps:
            return {}
        now = time.monotonic()
        seconds = max(now - self._since - self._paused, 1e-9)
        speed = {
            'clips_per_second': self._steps * self._clips_per_step / seconds,
            'step_seconds': seconds / self._steps,
            'data_wait_share': min(1.0, max(0.0, (waited_seconds - self._waited_before) / seconds)),
        }
        if self._flops_per_step is not None and self._peak_flops is not None:
            speed['flop_utilisation'] = self._flops_per_step * self._steps / seconds / self._peak_flops
        self._since, self._paused, self._steps, self._waited_before = now, 0.0, 0, waited_seconds
        return speed


def write_overview(params: Any, path: epath.PathLike) -> None:
    """Every parameter with shape, type and sharding: into the log and a file, once."""
    table = parameter_overview.get_parameter_overview(params, include_stats='sharding')
    if jax.process_index() == 0:
        logging.info('Parameters:\n%s', table)
        epath.Path(path).write_text(table + '\n')


class Profile:
    """Traces the steps of a chosen range with clu's profiler, for TensorBoard's profile page.

    Attributes:
      folder: where the trace goes.
      first_step: steps done when it starts; None for never.
      num_steps: how many are traced.
    """

    def __init__(self, folder: epath.PathLike, *, first_step: int | None = None, num_steps: int = 5):
        if first_step is not None and num_steps < 1:
            raise ValueError(f'report.profile_num_steps={num_steps} must be at least 1.')
        self._folder = epath.Path(folder)
        self._first_step = first_step
        self._num_steps = num_steps
        self._running = False

    def before_step(self, step: int) -> None:
        """Call with the number of steps done, before each step."""
        if self._first_step is None:
            return
        if step == self._first_step:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.start(str(self._folder))
            self._running = True
        elif self._running and step >= self._first_step + self._num_steps:
            self.close()

    def close(self) -> None:
        if self._running:
            profiler.stop()
            self._running = False
            logging.info('The profile of %d steps is in %s.', self._num_steps, self._folder)


def to_host(metrics: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values of metrics that the device has finished."""
    return {name: np.asarray(value) for name, value in jax.device_get(dict(metrics)).items()}

"""The loop: a batch, a step, and whatever is due. It knows neither the model nor what it is trained for."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from avmae_jax.parallel.hosts import Prefetch, Watchdog
from avmae_jax.progress import progress
from avmae_jax.structs import Batch
from avmae_jax.training.goodput import Account
from avmae_jax.training.report import Profile, Report, to_host
from avmae_jax.training.state import TrainState

# Steps dispatched before the oldest must be through. Two keep the device busy; more would only delay the news of
# a loss that is no number, and hold more batches in memory.
MAX_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something to do every so many steps: evaluate, paint pictures, save.

    Attributes:
      every_steps: 0 for never.
      run: gets the state after that many steps; what it returns under the name `metric` ranks the checkpoint of
        the step.
    """

    every_steps: int
    run: Callable[[TrainState], dict[str, float] | None]

    def is_due(self, step: int, last: bool) -> bool:
        return self.every_steps > 0 and (last or step % self.every_steps == 0)


class Finished(NamedTuple):
    """Attributes: state: the last one; preempted: whether the run stopped early because it was told to."""

    state: TrainState
    preempted: bool


class _Dispatched(NamedTuple):
    """A step under way: `step` counts from 0, `rows` is what this host gave to its `batch`."""

    step: int
    metrics: dict[str, jax.Array]
    rows: Batch
    batch: Batch


def _is_running(result: Any) -> bool:
    return not result.is_ready()


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Prefetch,
    *,
    num_steps: int,
    report: Report,
    account: Account,
    profile: Profile,
    watchdog: Watchdog,
    hooks: dict[str, Hook],
    save: Callable[[TrainState, float | None], None],
    save_every_steps: int,
    check_save: Callable[[], None],
    preempted: Callable[[int], bool],
    on_nonfinite: Callable[[TrainState, int, Batch, Batch], None],
) -> Finished:
    """Trains until `num_steps` are done, or until a preemption, which is saved first.

    Args:
      train_step: compiled; donates its state.
      save: writes a checkpoint; asynchronous. It is called with the `metric` that a hook gave at that step.
      account: where the time goes.
      watchdog: hears of every step, and of what is none; closed by the caller.
      check_save: raises when the save under way has failed.
      preempted: asked before each step with the number of steps done; the same answer on all processes.
      on_nonfinite: gets (state before the step, step, host rows, device batch) and raises.
    """
    done = int(state.step)
    saved = done
    in_flight: collections.deque[_Dispatched] = collections.deque()
    bar = progress(num_steps, what='training', unit='steps', initial=done)

    def settle(keep: int) -> None:
        """Waits until at most `keep` steps are under way, and looks at those that are through."""
        while len(in_flight) > keep:
            oldest = in_flight.popleft()
            metrics = to_host(oldest.metrics)
            if not metrics['finite']:
                watchdog.progress(slow=True)
                on_nonfinite(state, oldest.step, oldest.rows, oldest.batch)
            watchdog.progress()
            bar.update()
            report.step_done(
                oldest.step + 1,
                metrics,
                damaged=int(np.sum(oldest.rows.damaged)),
                waited_seconds=batches.wait_seconds,
                bar=bar,
                last=oldest.step + 1 == num_steps,
            )
            if oldest.step == first:
                report.start(batches.wait_seconds)
            if report.is_due(oldest.step + 1, oldest.step + 1 == num_steps):
                account.write(oldest.step + 1, batches.wait_seconds)

    first = done
    account.begin_steps(first)
    try:
        while done < num_steps:
            if preempted(done):
                settle(0)
                watchdog.progress(slow=True)
                if saved < done:
                    with account.spend('save'):
                        save(state, None)
                account.write(done, batches.wait_seconds)
                return Finished(state, preempted=True)
            profile.before_step(done)
            rows, batch = next(batches)
            state, metrics = train_step(state, batch, np.int32(done))
            in_flight.append(_Dispatched(done, metrics, rows, batch))
            batches.busy_while(functools.partial(_is_running, metrics['loss']))
            done += 1
            settle(MAX_IN_FLIGHT - 1)
            check_save()
            last = done == num_steps
            due = [hook for hook in hooks.values() if hook.is_due(done, last)]
            save_due = last or (save_every_steps > 0 and done % save_every_steps == 0)
            if due or save_due:
                settle(0)
                watchdog.progress(slow=True)
                began = time.monotonic()
                metric = None
                with account.spend('hooks'):
                    for hook in due:
                        metric = (hook.run(state) or {}).get('metric', metric)
                        watchdog.progress(slow=True)
                if save_due:
                    with account.spend('save'):
                        save(state, metric)
                    saved = done
                watchdog.progress(slow=last)
                report.pause(time.monotonic() - began)
        account.write(done, batches.wait_seconds)
        return Finished(state, preempted=False)
    finally:
        profile.close()
        bar.close()

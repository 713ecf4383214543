"""Where the time of a run went, over all its restarts: which share of it was steps that count.

Every process that trains in a workdir is a *session* and adds lines to `goodput.jsonl`, each with all the session has
spent so far, so that of one that was killed the last line is what is known. Seconds are those of a clock that only goes
forward; between sessions there is only the clock on the wall, and where that jumps back the gap counts as nothing.

    steps     the device worked, or was given work
    data      it waited for a batch
    compile, restore, save, hooks (evaluation, pictures), start (imports, opening data, the rest before the first step)
    lost      steps that were done again, as a session ended behind its last checkpoint
    down      between sessions
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from avmae_jax import whole
from avmae_jax.progress import format_seconds

FILE = 'goodput.jsonl'
PARTS = ('steps', 'data', 'compile', 'restore', 'save', 'hooks', 'start', 'lost', 'down')


class Account:
    """What a session spends its time on.

    Args:
      folder: gets FILE; None keeps nothing (all processes but the first).
      seconds_before: of the process before this account was opened.
    """

    def __init__(self, folder: epath.PathLike | None, seconds_before: float = 0.0):
        self._path = None if folder is None else epath.Path(folder) / FILE
        self._earlier = None if self._path is None else whole.text_in_store(self._path)  # Sessions.
        self._opened = time.monotonic() - seconds_before
        self._began = time.time() - seconds_before
        self._spent = dict.fromkeys(('compile', 'restore', 'save', 'hooks'), 0.0)
        self._first_step: int | None = None
        self._before_steps = 0.0

    @contextlib.contextmanager
    def spend(self, part: str) -> Iterator[None]:
        """What happens within goes to 'compile', 'restore', 'save' or 'hooks'."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent[part] += time.monotonic() - began

    def begin_steps(self, step: int) -> None:
        """From here on, time that goes to nothing else goes to steps."""
        self._first_step = step
        self._before_steps = time.monotonic() - self._opened - sum(self._spent.values())

    def write(self, step: int, waited_seconds: float) -> None:
        """Adds a line.

        Args:
          step: steps of the run that are done.
          waited_seconds: for data, since the first step.
        """
        if self._path is None or self._first_step is None:
            return
        total = time.monotonic() - self._opened
        rest = total - self._before_steps - sum(self._spent.values()) - waited_seconds
        line = {
            'began': self._began,
            'seconds': total,
            'first_step': self._first_step,
            'step': step,
            'parts': {
                **self._spent, 'start': self._before_steps, 'data': waited_seconds, 'steps': max(0.0, rest),
            },
        }  # fmt: skip
        if self._earlier is not None:
            self._path.write_text(f'{self._earlier}{json.dumps(line)}\n')  # The last line is all that counts.
            return
        with self._path.open('a') as file:
            file.write(json.dumps(line) + '\n')


class Goodput(NamedTuple):
    """Attributes:
    share: of the time, that went into steps that count.
    seconds: from the first session's beginning to the last one's end.
    parts: PARTS -> seconds; together they are `seconds`.
    num_sessions: processes that trained.
    """

    share: float
    seconds: float
    parts: dict[str, float]
    num_sessions: int

    def __str__(self) -> str:
        spent = ', '.join(f'{name} {format_seconds(self.parts[name])}' for name in PARTS if self.parts[name] >= 0.5)
        sessions = '' if self.num_sessions == 1 else f' over {self.num_sessions} sessions'
        return f'{100 * self.share:.0f} % of {format_seconds(self.seconds)}{sessions} were steps that count ({spent}).'


def read(folder: epath.PathLike) -> list[dict[str, Any]]:
    """The last line of every session, in the order in which they began; a line that was cut off is passed over."""
    path, last = epath.Path(folder) / FILE, {}
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            last[line['began']] = line
    return list(last.values())


def summarise(sessions: Sequence[dict[str, Any]]) -> Goodput | None:
    """What all sessions of a run come to; None where there is none."""
    if not sessions:
        return None
    parts = dict.fromkeys(PARTS, 0.0)
    for k, session in enumerate(sessions):
        for name, seconds in session['parts'].items():
            parts[name] += seconds
        following = sessions[k + 1 :]
        if following:
            done = session['step'] - session['first_step']
            again = session['step'] - min(later['first_step'] for later in following)
            share = min(1.0, max(0.0, again / done)) if done else 0.0
            lost = share * session['parts']['steps']
            parts['lost'] += lost
            parts['steps'] -= lost
            parts['down'] += max(0.0, following[0]['began'] - session['began'] - session['seconds'])
    total = sum(parts.values())
    return Goodput(parts['steps'] / total if total else 0.0, total, parts, len(sessions))


def tell(folder: epath.PathLike) -> Goodput | None:
    """Logs the summary of a run."""
    found = summarise(read(folder))
    if found is not None:
        logging.info('%s', found)
    return found

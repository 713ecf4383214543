"""Shows how far a long job is: a bar with time left on a terminal, a plain line now and then elsewhere.

with progress(len(clips), what='preparing', unit='clips') as bar:
    for clip in clips:
        bar.update()
        bar.note(failed=3)

for batch in progress(batches, what='evaluating', unit='batches'):
    ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 15.0  # Between two plain lines: rare enough for the log of a night, often enough to be trusted.


class Progress:
    """Counts towards `total`. Also an iterator over what it was given, if that was an iterable."""

    def __init__(
        self,
        iterable: Iterable | None,
        total: int | None,
        what: str,
        unit: str,
        initial: int = 0,
        stream: Any = None,
    ):
        self.what, self.unit, self.total, self.count, self.initial = what, unit, total, initial, initial
        self._iterable = iterable
        self._stream = stream or sys.stderr
        self._notes: dict[str, Any] = {}
        self._began = self._last_line = time.monotonic()
        self._closed = False
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, desc=what, unit=f' {unit}', initial=initial, file=self._stream, dynamic_ncols=True
            )

    def update(self, count: int = 1) -> None:
        self.count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print_line()

    def note(self, **notes: Any) -> None:
        """Short values to show behind the bar, such as loss=0.31."""
        self._notes.update(notes)
        if self._bar is not None:
            self._bar.set_postfix(self._notes, refresh=False)

    def _print_line(self, done: bool = False) -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._began
        rate = (self.count - self.initial) / seconds if seconds > 0 else 0.0
        parts = [f'{self.what}: {self.count:,}' + (f' of {self.total:,}' if self.total else '') + f' {self.unit}']
        if self.total and not done:
            parts.append(f'{100 * self.count / self.total:.0f} %')
        if done:
            parts.append(f'in {format_seconds(seconds)}')
        elif self.total and rate > 0:
            parts.append(f'{format_seconds((self.total - self.count) / rate)} left')
        parts.append(f'{rate:.3g} {self.unit}/s')
        parts += [f'{name}={value}' for name, value in self._notes.items()]
        print(', '.join(parts), file=self._stream, flush=True)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        else:
            self._print_line(done=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator:
        if self._iterable is None:
            raise ValueError(f'progress({self.total}, {self.what!r}) was given a number: there is nothing to go over.')
        try:
            for item in self._iterable:
                yield item
                self.update()
        finally:
            self.close()


def progress(
    iterable_or_total: Iterable | int | None,
    what: str,
    unit: str = 'items',
    total: int | None = None,
    initial: int = 0,
    stream: Any = None,
) -> Progress:
    """A `Progress` over an iterable, or towards a number that the caller counts up with `update`.

    Args:
      what: the job, as the line begins: 'preparing'.
      unit: what is counted, in the plural: 'clips'.
      total: of an iterable that has no length.
      initial: done before this run, so that the time left is right after a restart.
    """
    if iterable_or_total is None or isinstance(iterable_or_total, int):
        return Progress(None, iterable_or_total, what, unit, initial, stream)
    if total is None and isinstance(iterable_or_total, Sized):
        total = len(iterable_or_total)
    return Progress(iterable_or_total, total, what, unit, initial, stream)


def format_seconds(seconds: float | int) -> str:
    """'45 s', '3 min 20 s', '2 h 5 min'."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f'{seconds} s'
    if seconds < 3600:
        return f'{seconds // 60} min {seconds % 60} s'
    return f'{seconds // 3600} h {seconds % 3600 // 60} min'

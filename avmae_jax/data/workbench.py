"""What whoever computes an element of a grain dataset lends to the transformations it runs through.

grain hands a transformation its element and nothing else. One that makes large arrays, has work for several
threads or passes over damaged records asks for a workbench. Under grain's own loaders it gets new arrays, works
alone and logs the damage; under `data/stream.py` it writes straight into memory that another process reads.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

Damaged = list[tuple[int, str]]  # (record, where and why)


def _log(damaged: tuple[int, str]) -> None:
    logging.warning('Passed over damaged record %d: %s', *damaged)


class Workbench(NamedTuple):
    """
    Attributes:
      empty: makes an array of a shape and dtype.
      run: a map, perhaps over threads.
      report: takes (record, where and why) of a damaged record.
    """

    empty: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty
    run: Callable[[Callable, Iterable], Iterable] = map
    report: Callable[[tuple[int, str]], None] = _log


_ALONE = Workbench()
_lent: contextvars.ContextVar[Workbench] = contextvars.ContextVar('workbench', default=_ALONE)

current = _lent.get


@contextlib.contextmanager
def lend(bench: Workbench) -> Iterator[None]:
    """Lends a workbench to all that this thread computes meanwhile."""
    token = _lent.set(bench)
    try:
        yield
    finally:
        _lent.reset(token)

"""Which record comes at which place of an epoch: a shuffle that is computed, not stored.

A keyed bijection of [0, N) costs the same at two million records as at ten, needs no memory, and can be
entered at any place, so that resuming is arithmetic.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int64

_ROUNDS = 8


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit flips every output bit half of the time."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(*parts: int) -> np.ndarray:
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15) + np.array([part & (1 << 64) - 1], np.uint64))
    return _mix(state + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def shuffle(places: Int64[np.ndarray, 'n'], num_records: int, *key: int) -> Int64[np.ndarray, 'n']:
    """The records at these places of the order that `key` (seed, dataset, epoch) stands for.

    A Feistel network on two mixed-radix digits: each round adds to one digit a hash of the other, which can be
    undone, so all rounds together are a bijection of [0, rows * columns). That range is a little larger than
    [0, N); what falls outside walks on until it lands inside, which keeps it a bijection of [0, N).
    """
    columns = math.isqrt(num_records - 1) + 1
    rows = -(-num_records // columns)
    keys = _keys(*key)
    found = np.array(places, np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        high, low = np.divmod(found[outside], np.uint64(columns))
        for r in range(0, _ROUNDS, 2):
            high = (high + _mix(low ^ keys[r])) % np.uint64(rows)
            low = (low + _mix(high ^ keys[r + 1])) % np.uint64(columns)
        found[outside] = high * np.uint64(columns) + low
        outside = found >= num_records
    return found.astype(np.int64)

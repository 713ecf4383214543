"""Which record comes at which place of an epoch: a shuffle that is computed, not stored.

A keyed bijection of [0, N) costs the same at two million records as at ten, needs no memory, and can be
entered at any place, so that resuming is arithmetic.
"""

from __future__ import annotations

import functools
import math

_ROUNDS = 8
_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every input bit flips every output bit half of the time."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


@functools.lru_cache(maxsize=64)  # Asked for at every place of an epoch.
def _keys(*parts: int) -> list[int]:
    state = 0
    for part in parts:
        state = _mix(state + _STEP + part & _MASK)
    return [_mix(state + k * _STEP & _MASK) for k in range(1, _ROUNDS + 1)]


def shuffle(place: int, num_records: int, *key: int) -> int:
    """The record at a place of the order that `key` (seed, dataset, epoch) stands for.

    A Feistel network on two mixed-radix digits: each round adds to one digit a hash of the other, which can be
    undone, so all rounds together are a bijection of [0, rows * columns). That range is a little larger than
    [0, N); what falls outside walks on until it lands inside, which keeps it a bijection of [0, N).
    """
    columns = math.isqrt(num_records - 1) + 1
    rows = -(-num_records // columns)
    keys = _keys(*key)
    while True:
        high, low = divmod(place, columns)
        for r in range(0, _ROUNDS, 2):
            high = (high + _mix(low ^ keys[r])) % rows
            low = (low + _mix(high ^ keys[r + 1])) % columns
        place = high * columns + low
        if place < num_records:
            return place


def fraction(*key: int) -> float:
    """A number in [0, 1) that `key` stands for."""
    return (_mix(_keys(*key)[0] ^ _STEP) >> 11) * 2.0**-53

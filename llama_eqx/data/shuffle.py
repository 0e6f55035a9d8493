"""A new order of the rows for every epoch, computed row by row. No array as long as the data is ever made."""

import math
from collections.abc import Sequence

import numpy as np

ROUNDS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Shuffle:
    """An endless sequence for each of several sets of rows. In every epoch of `sizes[c]` draws from set c, each of its rows comes once.

    Draw number j of a set is in its epoch j // size. Orders of different seeds, sets and epochs have nothing in common.

    The order is a keyed bijection of 0 … size - 1: a Feistel network (Luby and Rackoff, 1988) over two digits of bases near the square root
    of the size, applied until the value lies inside (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains").
    With fewer than about 25 rows not all orders are as frequent: of 6 rows some come twice as often as the mean, and of 12 a row follows
    another up to a tenth too often.
    """

    def __init__(self, sizes: Sequence[int], seed: int):
        low = [math.isqrt(size - 1) + 1 for size in sizes]
        self.sizes, self._low = np.array(sizes, np.int64), np.array(low, np.uint64)
        self._high = np.array([-(-size // base) for size, base in zip(sizes, low, strict=True)], np.uint64)
        self._keys = np.random.SeedSequence([seed, 0x5EED]).generate_state(len(sizes), np.uint64)

    def __call__(self, sets: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """[count] int64: the row of each draw. `draws` are numbered within their set."""
        epochs, places = np.divmod(draws, self.sizes[sets])
        keys = _mixed(self._keys[sets] + epochs.astype(np.uint64) * GOLDEN)
        found = places.astype(np.uint64)
        sizes, low, high = self.sizes[sets].astype(np.uint64), self._low[sets], self._high[sets]
        at = np.arange(len(found))
        while len(at):
            found[at] = _permuted(found[at], low[at], high[at], keys[at])
            at = at[found[at] >= sizes[at]]
        return found.astype(np.int64)


def _permuted(values: np.ndarray, low: np.ndarray, high: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A bijection of 0 … low · high - 1."""
    left, right = np.divmod(values, low)  # left < high, right < low
    for _ in range(ROUNDS // 2):
        keys = keys + GOLDEN
        left = _added(left, right, high, keys)
        keys = keys + GOLDEN
        right = _added(right, left, low, keys)
    return left * low + right


def _added(values: np.ndarray, other: np.ndarray, base: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """`values` plus a random function of `other`, modulo `base` < 2³²."""
    half = np.uint64(32)
    moved = values + ((_mixed(other ^ keys) >> half) * base >> half)
    return np.where(moved >= base, moved - base, moved)


def _mixed(x: np.ndarray) -> np.ndarray:
    """64 bits that all depend on all of x: the finalizer of SplitMix64 (Steele et al., 2014, "Fast splittable pseudorandom generators")."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""The row at each place of the endless sequence of samples: a function of the seed and the place alone."""

import hashlib
from collections.abc import Sequence

import numpy as np

from llama_eqx.data.shuffle import Shuffle


class Order:
    """The rows of several sources (numbered through, one source after another) in the proportions of `shares`.

    Sample i is drawn from the source that `interleaved` gives it. Each source is drawn in a new order in each epoch of its own. With
    `distinct` only the first `distinct` samples are drawn. All of them come, in a new order, before any comes again.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[int], seed: int, distinct: int | None = None):
        self._again = None if distinct is None else Shuffle([distinct], seed)
        self._shuffle, self._sizes, self._shares = Shuffle(sizes, seed), sizes, np.array(shares)
        self._sources = interleaved(shares)
        drawn = self._sources[:, None] == np.arange(len(sizes))
        self._before = np.concatenate([np.zeros((1, len(sizes)), np.int64), np.cumsum(drawn, 0)])  # by place in the period
        self._firsts = np.cumsum([0, *sizes])

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """[count] int64: the row of each sample."""
        if self._again is not None:
            samples = self._again(np.zeros_like(samples), samples)
        periods, places = np.divmod(samples, len(self._sources))
        sources = self._sources[places]
        draws = periods * self._shares[sources] + self._before[places, sources]
        return self._firsts[sources] + self._shuffle(sources, draws)

    def epochs(self, samples: int) -> list[float]:
        """How many times each source has been seen in the first `samples` samples."""
        times = 1.0
        if self._again is not None:
            times, samples = max(1.0, samples / (distinct := int(self._again.sizes[0]))), min(samples, distinct)
        periods, place = divmod(samples, len(self._sources))
        draws = periods * self._shares + self._before[place]
        return [times * draw / size for draw, size in zip(draws.tolist(), self._sizes, strict=True)]


def interleaved(shares: Sequence[int]) -> np.ndarray:
    """[sum of shares] int64: a source for each place of a period.

    Every source has its exact share in a period. In the first n places, for any n, its count differs from its share of n by less than one.
    (Tijdeman, 1980, "The chairman assignment problem", Discrete Mathematics 32)
    """
    period, slack = sum(shares), max(2 * len(shares) - 2, 1)
    drawn, found = [0] * len(shares), np.empty(period, np.int64)
    for place in range(period):
        # How far each source is behind after this place, in draws times period times slack; and the place by which it must be drawn.
        behind = [slack * (share * (place + 1) - period * count) for share, count in zip(shares, drawn, strict=True)]
        due = [(period * (slack - 1) - late) / share if late >= period else np.inf for late, share in zip(behind, shares, strict=True)]
        found[place] = source = 0 if len(shares) == 1 else due.index(min(due))
        drawn[source] += 1
    return found


def digest(rows: np.ndarray) -> bytes:
    """A hash of the row numbers of a batch, in order."""
    return hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=16).digest()


def chained(ledger: int, digest: bytes) -> int:
    """The ledger after one more batch: 48 bits, which a float holds exactly."""
    return int.from_bytes(hashlib.blake2b(ledger.to_bytes(6) + digest, digest_size=6).digest())

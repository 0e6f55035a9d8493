"""What paired differences between two arms of an experiment prove. Differences are in the unit of the metric, one per seed."""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from llama_eqx.errors import DataError

Differences = Sequence[float] | np.ndarray

EXACT = 20  # number of differences up to which all 2^n signs are tried
SAMPLED = 100_000  # random signs tried beyond that


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval(differences: Differences, confidence: float = 0.95) -> Interval:
    """The mean and Student's t interval around it. Raises `DataError` for fewer than two differences."""
    mean, error, n = _moments(differences)
    reach = error * float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return Interval(mean, mean - reach, mean + reach)


def sign_flip_p(differences: Differences) -> float:
    """The two-sided p of a mean this far from 0 if every difference could as well have had the other sign (Fisher, 1935,
    "The Design of Experiments", section 21). With n differences it is never below 2^(1-n).
    """
    d = np.asarray(differences, float)
    least = abs(d.sum()) - 1e-12 * np.abs(d).sum()  # so that sums equal up to rounding, which scales with the terms, count
    if len(d) <= EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=len(d) - 1))).reshape(-1, len(d) - 1)
        sums = np.abs(d[0] + signs @ d[1:])  # the other half mirrors these
        return float((sums >= least).mean())
    signs = np.random.default_rng(0).choice((1, -1), (SAMPLED, len(d)))
    beyond = int((np.abs(signs @ d) >= least).sum())
    return (beyond + 1) / (SAMPLED + 1)


def least_pairs(alpha: float) -> int:
    """The least number of differences for which `sign_flip_p` can be below `alpha`."""
    return math.floor(2 - math.log2(alpha))


def sign_p(differences: Differences) -> float:
    """The two-sided p of the sign test. It asks only whether a difference lies above or below 0, so differences may be infinite. One that
    is 0 or NaN is neither.
    """
    return sign_flip_p(np.nan_to_num(np.sign(np.asarray(differences, float))))


def paired_t_p(differences: Differences) -> float:
    """The two-sided p of the paired t test."""
    mean, error, n = _moments(differences)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, n - 1))


def equivalence_p(differences: Differences, margin: float) -> float:
    """The p of two one-sided tests of a true difference beyond ±`margin`; a small p says that it lies within
    (Schuirmann, 1987, Journal of Pharmacokinetics and Biopharmaceutics 15).
    """
    mean, error, n = _moments(differences)
    if error == 0:
        return 0.0 if abs(mean) < margin else 1.0
    return float(stats.t.sf((margin - abs(mean)) / error, n - 1))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Each p of a family, adjusted so that one below alpha may be believed whatever else is in the family (Holm, 1979)."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def power(effect: float, sd: float, n: int, alpha: float = 0.05) -> float:
    """The power of a two-sided paired t test at `alpha` for `n` differences of mean `effect` and standard deviation `sd`."""
    if sd == 0:
        return float(effect != 0)
    away, critical = effect / sd * math.sqrt(n), stats.t.ppf(1 - alpha / 2, n - 1)
    other_side = np.nan_to_num(stats.nct.cdf(-critical, n - 1, away))  # SciPy gives NaN where it is almost 0
    return float(stats.nct.sf(critical, n - 1, away) + other_side)


def sample_size(effect: float, sd: float, *, target: float = 0.9, alpha: float = 0.05) -> int:
    """The least number of pairs with power `target`. Raises `DataError` when ten thousand are too few."""
    pairs = range(2, 10_001)
    n = bisect.bisect_left(pairs, target, key=lambda n: power(effect, sd, n, alpha))  # more pairs have more power
    if n < len(pairs):
        return pairs[n]
    raise DataError(f"an effect of {effect} with a standard deviation of {sd} would take more than 10,000 pairs")


def _moments(differences: Differences) -> tuple[float, float, int]:
    """The mean, its standard error and the number of differences."""
    d = np.asarray(differences, float)
    if len(d) < 2:
        raise DataError(f"{len(d)} paired differences say nothing about their spread", next="more seeds")
    return float(d.mean()), float(d.std(ddof=1)) / math.sqrt(len(d)), len(d)

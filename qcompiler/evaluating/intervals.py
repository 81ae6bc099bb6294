"""Intervals and tests of differences that were measured on the same samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Doubles = npt.NDArray[np.float64]
LEVEL = 0.95
"""Confidence of every interval."""
RESAMPLES = 2000
_AT_ONCE = 1 << 22
"""Drawn indices in memory at a time."""
FEW = 10
"""Discordant samples below which a bootstrap of zeros and ones says too little."""


@dataclass(frozen=True)
class Interval:
    """An interval of 95 % confidence.

    Attributes:
        low: lower end.
        high: upper end.
        method: how it was found, for people.
    """

    low: float
    high: float
    method: str

    def covers(self, value: float) -> bool:
        """Return whether a value lies inside."""
        return self.low <= value <= self.high


def bootstrap_sums(columns: Doubles, resamples: int = RESAMPLES, seed: int = 0) -> Doubles:
    """Return the column sums of resampled rows, float64 [resamples, columns].

    Rows are drawn with replacement, all columns of a row together, so that the result stays paired (Efron, 1979).

    Args:
        columns: float64 [samples, columns].
        resamples: number of draws.
        seed: the same seed gives the same draws.
    """
    generator = np.random.default_rng(seed)
    count = columns.shape[0]
    made = np.empty((resamples, columns.shape[1]))
    step = max(1, _AT_ONCE // max(count, 1))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn = generator.integers(0, count, (stop - start, count))
        offset = drawn + count * np.arange(stop - start)[:, None]
        times = np.bincount(offset.ravel(), minlength=count * (stop - start)).reshape(stop - start, count)
        made[start:stop] = times @ columns
    return made


def bootstrap_indices(count: int, resamples: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return samples drawn with replacement, int64 [resamples, count]."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def percentiles(values: Doubles, method: str) -> Interval:
    """Return the percentile interval of resampled figures."""
    tail = 50.0 * (1.0 - LEVEL)
    low, high = np.percentile(values, (tail, 100.0 - tail))
    return Interval(float(low), float(high), method)


def of_ratio(columns: Doubles, figure: Callable[[Doubles], Doubles], seed: int = 0) -> Interval | None:
    """Return the bootstrap interval of a figure of column sums; None of fewer than two samples.

    Args:
        columns: float64 [samples, columns], what is summed up per sample.
        figure: maps sums [resamples, columns] to figures [resamples].
        seed: of the draws.
    """
    if columns.shape[0] < 2 or not np.isfinite(columns).all():
        return None
    return percentiles(figure(bootstrap_sums(columns, seed=seed)), f"bootstrap over {columns.shape[0]} samples")


def of_sum(differences: Doubles, seed: int = 0, what: str = "samples") -> Interval | None:
    """Return the paired bootstrap interval of a sum of differences, one per sample; None of fewer than two."""
    if differences.size < 2:
        return None
    drawn = bootstrap_sums(differences.reshape(-1, 1), seed=seed)[:, 0]
    return percentiles(drawn, f"paired bootstrap over {differences.size} {what}")


def exact_mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p-value of McNemar's test on discordant pairs, by the binomial distribution.

    Args:
        better: samples that only the second is right on.
        worse: samples that only the first is right on.
    """
    return 1.0 if better + worse == 0 else float(stats.binomtest(better, better + worse, 0.5).pvalue)


def of_share(hits: int, count: int) -> Interval | None:
    """Return the exact interval of a share (Clopper and Pearson, 1934); None of no sample."""
    if count < 1:
        return None
    found = stats.binomtest(hits, count).proportion_ci(LEVEL, "exact")
    return Interval(float(found.low), float(found.high), f"exact, of {count} samples")


def of_paired_shares(better: int, worse: int, count: int) -> Interval:
    """Return the interval of a difference of two paired shares, also where few or no samples differ.

    One half discordant sample is added to each kind before the usual one of Wald (Bonett and Price, 2012): with no
    discordant sample at all a bootstrap would say that the difference is 0 for certain.
    """
    up, down, size = (better + 1) / (count + 2), (worse + 1) / (count + 2), count + 2
    half = float(stats.norm.ppf(0.5 + LEVEL / 2) * np.sqrt(max(up + down - (up - down) ** 2, 0.0) / size))
    method = f"adjusted Wald (Bonett and Price) over {count} samples, of which {better + worse} differ"
    return Interval(max(-1.0, up - down - half), min(1.0, up - down + half), method)

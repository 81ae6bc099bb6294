"""Range estimators: from streaming statistics to the interval that is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcompiler.errors import CalibrationError

ESTIMATORS = ("min-max", "moving-average", "percentile", "mse")


class Histogram(Protocol):
    """What estimators read; `TensorStatistics` is one."""

    @property
    def count(self) -> int:
        """Return the number of elements."""
        ...

    @property
    def minimum(self) -> float:
        """Return the smallest value."""
        ...

    @property
    def maximum(self) -> float:
        """Return the largest value."""
        ...

    @property
    def width(self) -> float:
        """Return the width of a bin."""
        ...

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Return the counts, bins anchored at zero in the middle."""
        ...

    @property
    def sums(self) -> list[tuple[float, float, int, float, float]]:
        """Return per-feed sums and extremes."""
        ...


def estimate(tensor: Histogram, estimator: str) -> tuple[float, float]:
    """Return (low, high) by an estimator given as text, such as ``min-max``, ``percentile:99.99`` or ``mse:8``.

    Raises:
        CalibrationError: unknown estimator or option.
    """
    name, _, option = estimator.partition(":")
    option, _, through = option.partition(":")
    if through and (name != "mse" or through not in THROUGH):
        raise CalibrationError(
            f"estimator {estimator!r}: only mse looks through a function, one of {', '.join(THROUGH)}"
        )
    try:
        number = float(option) if option else None
    except ValueError:
        raise CalibrationError(f"estimator {estimator!r}: {option!r} is not a number") from None
    if name == "min-max":
        return tensor.minimum, tensor.maximum
    if name == "percentile":
        return percentile(tensor, 99.99 if number is None else number)
    if name == "moving-average":
        return moving_average(tensor, 0.01 if number is None else number)
    if name == "mse":
        if number is not None and not (2 <= number <= 16 and number == int(number)):
            raise CalibrationError(f"estimator {estimator!r}: bits are a whole number from 2 to 16")
        return least_squares(tensor, 8 if number is None else int(number), through=through)
    raise CalibrationError(f"unknown estimator {name!r}; known: {', '.join(ESTIMATORS)}")


def percentile(tensor: Histogram, percent: float) -> tuple[float, float]:
    """Cut the same share off both tails, at bin borders (Wu et al. 2020, Integer Quantization for Deep Learning).

    Raises:
        CalibrationError: the percentile is not in (50, 100].
    """
    if not 50.0 < percent <= 100.0:
        raise CalibrationError(f"a percentile lies in (50, 100], not {percent:g}")
    # Ranks as NumPy counts them, rounded outwards: the bins hold the order statistics of its "lower" and "higher".
    rank = (tensor.count - 1) * (percent / 100.0)
    upward = np.cumsum(tensor.counts)
    half = tensor.counts.size // 2
    low_bin = int(np.searchsorted(upward, tensor.count - 1 - math.ceil(rank), side="right"))
    high_bin = int(np.searchsorted(upward, math.ceil(rank), side="right"))
    low = (low_bin - half) * tensor.width
    high = (high_bin + 1 - half) * tensor.width
    return max(low, tensor.minimum), min(high, tensor.maximum)


def moving_average(tensor: Histogram, constant: float = 0.01) -> tuple[float, float]:
    """Average the extremes of the feeds exponentially, in feed order (Jacob et al. 2018, arXiv:1712.05877)."""
    feeds = tensor.sums
    low, high = feeds[0][3], feeds[0][4]
    for entry in feeds[1:]:
        low += constant * (entry[3] - low)
        high += constant * (entry[4] - high)
    return low, high


def _sigmoid(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -700.0, 700.0))))


THROUGH: Mapping[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "silu": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
}
"""Functions that may stand between a quantized value and what matters of it."""


def least_squares(tensor: Histogram, bits: int = 8, steps: int = 48, through: str = "") -> tuple[float, float]:
    """Find the clipping range with the least expected squared error (Banner et al. 2019, arXiv:1810.05723).

    With ``through``, the error counts behind that function: what SiLU maps to almost zero may be clipped for free.

    The error of a candidate is scale^2 / 12 inside the range plus the squared distance outside it, over the histogram.
    Both ends are searched, one after the other, from the extremes inwards.
    """
    half = tensor.counts.size // 2
    filled = np.nonzero(tensor.counts)[0]
    centres = np.asarray((filled - half + 0.5) * tensor.width, np.float64)
    weights = tensor.counts[filled].astype(np.float64)
    low, high = min(tensor.minimum, 0.0), max(tensor.maximum, 0.0)
    shrink = np.linspace(1.0, 0.0, steps, endpoint=False)
    function = THROUGH.get(through)
    behind = centres if function is None else function(centres)
    if function is None:
        slope = weights.sum()
    else:
        delta = 1e-3
        slope = float(
            (np.square((function(centres + delta) - function(centres - delta)) / (2 * delta)) * weights).sum()
        )

    def error(lo: npt.NDArray[np.float64], hi: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        scale = (hi - lo) / (2**bits - 1)
        clipped = np.clip(centres, lo[:, None], hi[:, None])
        outside = (clipped if function is None else function(clipped)) - behind
        inside = np.maximum(centres - lo[:, None], 0.0) * np.maximum(hi[:, None] - centres, 0.0) > 0
        lost = (np.square(np.where(inside, 0.0, outside)) * weights).sum(axis=1)
        return np.asarray((scale**2 / 12.0) * slope + lost)

    for _ in range(2):
        if high > 0:
            candidates = max(tensor.maximum, 0.0) * shrink
            high = float(candidates[np.argmin(error(np.full(steps, low), candidates))])
        if low < 0:
            candidates = min(tensor.minimum, 0.0) * shrink
            low = float(candidates[np.argmin(error(candidates, np.full(steps, high)))])
    return low, high

"""What range estimators read of a tensor, and how they read it: points with weights, exact zeros left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Histogram(Protocol):
    """What estimators read; `TensorStatistics` is one."""

    @property
    def count(self) -> int:
        """Return the number of finite elements."""
        ...

    @property
    def zeros(self) -> int:
        """Return the number of elements equal to zero."""
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
    def mean(self) -> float:
        """Return E[x]."""
        ...

    @property
    def std(self) -> float:
        """Return the standard deviation."""
        ...

    @property
    def extremes(self) -> Floats:
        """Return (low, high) per feed in feed order, [feeds, 2]."""
        ...


@dataclass(frozen=True)
class Points:
    """A histogram as weighted points: the centre of every bin, and the extremes for the outermost two.

    Elements equal to zero are left out: zero is exact in every quantization, so they cost nothing in any range.

    Attributes:
        below: distance from zero of the bins below zero, nearest first, float64.
        below_weights: elements in each.
        above: the same above zero.
        above_weights: elements in each.
        width: width of a bin.
        minimum: smallest value, 0 if none is below.
        maximum: largest value, 0 if none is above.
    """

    below: Floats
    below_weights: Floats
    above: Floats
    above_weights: Floats
    width: float
    minimum: float
    maximum: float

    @property
    def values(self) -> Floats:
        """Return the signed values of all filled bins, ascending."""
        return np.concatenate([-self.below[self.below_weights > 0][::-1], self.above[self.above_weights > 0]])

    @property
    def weights(self) -> Floats:
        """Return the elements behind `values`."""
        below, above = self.below_weights, self.above_weights
        return np.concatenate([below[below > 0][::-1], above[above > 0]])


def points_of(tensor: Histogram) -> Points:
    """Return a histogram as points."""
    half = tensor.counts.size // 2
    low, high = max(-tensor.minimum, 0.0), max(tensor.maximum, 0.0)
    above = tensor.counts[half:].astype(np.float64)
    # An exact zero falls into the first bin above.
    above[0] = max(above[0] - tensor.zeros, 0.0)
    below = tensor.counts[:half][::-1].astype(np.float64)
    sides = [_side(counts, reach, tensor.width) for counts, reach in ((below, low), (above, high))]
    return Points(*sides[0], *sides[1], tensor.width, -low, high)


def _side(counts: Floats, reach: float, width: float) -> tuple[Floats, Floats]:
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    centres = (np.arange(used, dtype=np.float64) + 0.5) * width
    centres[-1:] = reach  # known exactly, and at the end of a tail mostly all there is
    return centres, counts[:used]

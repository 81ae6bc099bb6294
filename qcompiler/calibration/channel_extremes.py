"""Extremes per channel, and sums of squares per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.exact import ExactSums


@dataclass
class ChannelExtremes:
    """Smallest and largest value per index of one axis, and the sum of squares where it was asked for.

    Attributes:
        axis: which axis, counted from the end (negative).
        low: float32 [channels].
        high: float32 [channels].
        squares: sum of x squared per channel; infinite elements add nothing.
        count: elements seen per channel, infinite ones included.
    """

    axis: int
    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]
    squares: ExactSums | None = None
    count: int = 0

    @property
    def reach(self) -> npt.NDArray[np.float32]:
        """Return the largest absolute value per channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def mean_square(self) -> npt.NDArray[np.float64] | None:
        """Return E[x^2] per channel, None if it was not asked for; infinite elements count as zeros."""
        return None if self.squares is None else self.squares.values() / max(1, self.count)

    def take_in(self, other: ChannelExtremes) -> bool:
        """Take in the extremes of another, which is left alone; False if it is of another axis or length."""
        if (self.axis, self.low.shape) != (other.axis, other.low.shape):
            return False
        np.minimum(self.low, other.low, out=self.low)
        np.maximum(self.high, other.high, out=self.high)
        if self.squares is not None and other.squares is not None:
            self.squares.take_in(other.squares)
        else:
            self.squares = None
        self.count += other.count
        return True

    def merge(self, other: ChannelExtremes) -> ChannelExtremes | None:
        """Return the extremes of both, None if they are of different axes or lengths."""
        made = self.copy()
        return made if made.take_in(other) else None

    def copy(self) -> ChannelExtremes:
        """Return extremes that can be changed without touching these."""
        squares = None if self.squares is None else self.squares.copy()
        return ChannelExtremes(self.axis, self.low.copy(), self.high.copy(), squares, self.count)


def extremes_of(
    array: npt.NDArray[np.float32], axis: int | None, squares: bool
) -> tuple[float, float, ChannelExtremes | None]:
    """Return (smallest, largest, extremes per channel); NaN and infinity come through in the first two."""
    if axis is None or array.ndim < 2:
        return float(array.min()), float(array.max()), None
    axis = axis % array.ndim
    rest = tuple(i for i in range(array.ndim) if i != axis)
    lows, highs = array.min(axis=rest), array.max(axis=rest)
    low, high = float(lows.min()), float(highs.max())
    clean = array
    if not (math.isfinite(low) and math.isfinite(high)):
        finite = np.isfinite(array)
        lows = array.min(axis=rest, where=finite, initial=np.inf)
        highs = array.max(axis=rest, where=finite, initial=-np.inf)
        clean = np.where(finite, array, np.float32(0))
    sums = None
    if squares:
        sums = ExactSums(array.shape[axis])
        sums.add(np.square(clean, dtype=np.float64).sum(axis=rest))
    zero = np.float32(0)  # added, it makes -0.0 a plain zero
    return low, high, ChannelExtremes(axis - array.ndim, lows + zero, highs + zero, sums, array.size // lows.size)

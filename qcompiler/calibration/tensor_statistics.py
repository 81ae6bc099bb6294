"""The sketch of one tensor: fixed size, mergeable, and independent of the order of feeds.

Histogram bins have power-of-two widths anchored at zero, so merging two histograms of different widths is exact: the
finer one is folded pairwise until the widths agree. Counts are integers, sums are exact (`exact.ExactSums`), so a merge
is associative and commutative bit for bit, however the feeds were shared out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.channel_extremes import ChannelExtremes, extremes_of
from qcompiler.calibration.exact import LIMBS, ExactSums
from qcompiler.calibration.recent_extremes import RecentExtremes
from qcompiler.engine import Array
from qcompiler.errors import CalibrationError

HALF_BINS = 2048
"""Bins on each side of zero; a histogram has twice as many."""
_BLOCK = 1 << 15
"""Elements that are summed in their own precision; sums of blocks are added up in float64."""
_CHUNK = 4 * _BLOCK
"""Elements counted at a time: temporary arrays fit the second-level cache; less, and threads wait for each other."""
_FINEST = -126
_NARROW = 1e15
"""Below this a block is summed in float32 (blocks are added up in float64); above it squares could overflow there."""


@dataclass
class TensorStatistics:
    """What is kept of one tensor. Elements that are not finite are counted apart and are in nothing else.

    Attributes:
        count: finite elements seen.
        minimum: smallest of them.
        maximum: largest of them.
        zeros: elements equal to zero.
        nans: elements that are not a number.
        infinities: infinite elements; the masks of attention are so on purpose.
        executions: feeds in which the tensor had elements.
        exponent: bins are 2**exponent wide.
        counts: int64 [2 * HALF_BINS]; bin i covers [(i - HALF_BINS) * width, (i + 1 - HALF_BINS) * width).
        moments: exact sums of x and of x squared, each feed's own sum rounded to float64.
        recent: extremes feed by feed.
        channels: extremes per channel, None if the tensor has no channel axis of fixed length.
    """

    count: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    zeros: int = 0
    nans: int = 0
    infinities: int = 0
    executions: int = 0
    exponent: int = _FINEST
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * HALF_BINS, np.int64))
    moments: ExactSums = field(default_factory=lambda: ExactSums(2))
    recent: RecentExtremes = field(default_factory=RecentExtremes)
    channels: ChannelExtremes | None = None
    _mixed: bool = field(default=False, repr=False)

    # ---- what estimators read ----------------------------------------------------------------------------------

    @property
    def width(self) -> float:
        """Return the width of a bin."""
        return float(2.0**self.exponent)

    @property
    def mean(self) -> float:
        """Return E[x]."""
        return float(self.moments.values()[0]) / self.count if self.count else 0.0

    @property
    def mean_square(self) -> float:
        """Return E[x^2]."""
        return float(self.moments.values()[1]) / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Return the standard deviation."""
        total, square = self.moments.values()
        if not self.count:
            return 0.0
        return math.sqrt(max(0.0, float(square) / self.count - (float(total) / self.count) ** 2))

    @property
    def extremes(self) -> npt.NDArray[np.float64]:
        """Return (low, high) per feed in feed order, float64 [feeds, 2], of the latest `RECENT` feeds."""
        return self.recent.values.astype(np.float64)

    # ---- taking in ---------------------------------------------------------------------------------------------

    def add(self, values: Array, feed: int | None = None, axis: int | None = None, squares: bool = False) -> None:
        """Take in one execution's tensor.

        Args:
            values: any float type and shape.
            feed: index of the feed over the whole run, by default the one after the latest.
            axis: channel axis, if extremes per channel are wanted; every execution has the same length there.
            squares: keep the sum of squares per channel as well.
        """
        array = np.asarray(values, np.float32)
        if array.size == 0:
            return
        low, high, channels = extremes_of(array, axis, squares)
        if math.isfinite(low) and math.isfinite(high):
            flat = np.ascontiguousarray(array).reshape(-1)
        else:
            finite = np.isfinite(array)
            nans = int(np.count_nonzero(np.isnan(array)))
            self.nans += nans
            self.infinities += array.size - int(np.count_nonzero(finite)) - nans
            flat = array[finite]
            if flat.size == 0:
                return
            low, high = float(flat.min()), float(flat.max())
        low, high = low + 0.0, high + 0.0  # -0.0 becomes 0.0: the smaller of the two depends on the order
        self._widen(max(-low, high))
        self._add_finite(flat, low, high)
        self.executions += self.recent.note(self.recent.latest + 1 if feed is None else feed, low, high)
        self._take_in_channels(channels, fresh=self.count == flat.size)

    def _add_finite(self, flat: npt.NDArray[np.float32], low: float, high: float) -> None:
        total = square = 0.0
        zeros = 0
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            self._count(chunk, low)
            if low <= 0 <= high:
                zeros += int(np.count_nonzero(chunk == 0))
            narrow = chunk if max(-low, high) < _NARROW else chunk.astype(np.float64)
            for first in range(0, narrow.size, _BLOCK):
                block = narrow[first : first + _BLOCK]
                total += float(block.sum())
                square += float(np.einsum("i,i->", block, block))
        self.count += flat.size
        self.zeros += zeros
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.moments.add(np.array([total, square]))

    def _count(self, chunk: npt.NDArray[np.float32], low: float) -> None:
        """Add one chunk to the histogram, whose reach covers it; ``low`` is no larger than its smallest value.

        Scaling by a power of two is exact but for one case: a negative number made smaller may become a zero, and fall
        on the wrong side of it. Those are counted and put back, so that a wider histogram equals a finer one folded.
        """
        scaled = chunk * np.float32(2.0**-self.exponent)
        if low >= 0:  # cutting off rounds down
            self.counts[HALF_BINS:] += np.bincount(scaled.astype(np.int64), minlength=HALF_BINS)
            return
        np.floor(scaled, out=scaled)
        scaled += HALF_BINS  # exact: whole numbers below 2^24
        added = np.bincount(scaled.astype(np.int64), minlength=2 * HALF_BINS)
        if self.exponent > 0:
            lost = int(np.count_nonzero(chunk < 0)) - int(added[:HALF_BINS].sum())
            added[HALF_BINS] -= lost
            added[HALF_BINS - 1] += lost
        self.counts += added

    def _widen(self, reach: float) -> None:
        """Double the bin width until ``reach`` lies inside, folding neighbours together."""
        if reach <= 0:
            return
        wanted = math.ceil(math.log2(reach / HALF_BINS))
        if 2.0**wanted * HALF_BINS <= reach:
            wanted += 1
        self._fold_to(max(wanted, self.exponent, -120))

    def _fold_to(self, exponent: int) -> None:
        if self.count == 0:
            self.exponent = exponent
        while self.exponent < exponent:
            folded = self.counts.reshape(-1, 2).sum(axis=1)
            start = HALF_BINS - HALF_BINS // 2
            self.counts.fill(0)
            self.counts[start : start + HALF_BINS] = folded
            self.exponent += 1

    def _take_in_channels(self, channels: ChannelExtremes | None, fresh: bool) -> None:
        """Take over or merge extremes per channel; once an execution had none, or others, there are none for good."""
        if self._mixed:
            return
        if fresh:
            self.channels = channels
        elif self.channels is None or channels is None or not self.channels.take_in(channels):
            self.channels = None
        self._mixed = self.channels is None

    # ---- merging -----------------------------------------------------------------------------------------------

    def take_in(self, other: TensorStatistics) -> None:
        """Merge other statistics into these, the same bit for bit whichever way shards are merged.

        Shards number their feeds over the whole run, and no feed is in two of them.

        Args:
            other: used up: its arrays may be changed or become part of these statistics.
        """
        exponent = max(self.exponent, other.exponent)
        self._fold_to(exponent)
        other._fold_to(exponent)
        if other.count:
            self._take_in_channels(other.channels, fresh=self.count == 0)
            self._mixed = self._mixed or other._mixed
        self.counts += other.counts
        self.count += other.count
        self.zeros += other.zeros
        self.nans += other.nans
        self.infinities += other.infinities
        self.executions += other.executions
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        self.moments.take_in(other.moments)
        self.recent.take_in(other.recent)

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """Return the statistics of both and leave them alone; otherwise as `take_in`."""
        made = self.copy()
        made.take_in(other.copy())
        return made

    def copy(self) -> TensorStatistics:
        """Return statistics that can be changed without touching these."""
        fields, arrays = self.state()
        return TensorStatistics.restored(fields, {name: array.copy() for name, array in arrays.items()})

    def state(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return everything as (plain numbers and lists, arrays), the form that is written to files."""
        early = [None if math.isinf(v) else v for v in self.recent.earlier]
        fields: dict[str, Any] = {
            "count": self.count, "zeros": self.zeros, "nans": self.nans, "infinities": self.infinities,
            "executions": self.executions, "exponent": self.exponent, "mixed": self._mixed, "earlier": early,
            "minimum": self.minimum if self.count else None, "maximum": self.maximum if self.count else None,
        }  # fmt: skip
        arrays: dict[str, Array] = {
            "counts": self.counts, "moments": self.moments.canonical(), "feeds": self.recent.feeds,
            "extremes": self.recent.values,
        }  # fmt: skip
        if self.channels is not None:
            fields |= {"axis": self.channels.axis, "per_channel": self.channels.count}
            arrays |= {"channel_low": self.channels.low, "channel_high": self.channels.high}
            if self.channels.squares is not None:
                arrays["channel_squares"] = self.channels.squares.canonical()
        return fields, arrays

    @staticmethod
    def restored(fields: Mapping[str, Any], arrays: Mapping[str, Array]) -> TensorStatistics:
        """Make statistics of what `state` returned.

        Raises:
            CalibrationError: a field is missing or an array has another shape.
        """
        try:
            counts, moments = arrays["counts"], arrays["moments"]
            feeds, extremes = arrays["feeds"], arrays["extremes"]
            if counts.shape != (2 * HALF_BINS,) or moments.shape != (2, LIMBS) or extremes.shape != (feeds.size, 2):
                raise CalibrationError(f"statistics with a histogram of {counts.size} bins; expected {2 * HALF_BINS}")
            low, high = fields["earlier"]
            earlier = (math.inf if low is None else low, -math.inf if high is None else high)
            recent = RecentExtremes(feeds, extremes, earlier)
            return TensorStatistics(
                fields["count"], math.inf if fields["minimum"] is None else fields["minimum"],
                -math.inf if fields["maximum"] is None else fields["maximum"], fields["zeros"], fields["nans"],
                fields["infinities"], fields["executions"], fields["exponent"], counts, ExactSums(2, moments), recent,
                _restored_channels(fields, arrays), fields["mixed"],
            )  # fmt: skip
        except (KeyError, TypeError, IndexError) as error:
            raise CalibrationError(f"statistics lack a field: {error}") from error


def _restored_channels(fields: Mapping[str, Any], arrays: Mapping[str, Array]) -> ChannelExtremes | None:
    if "axis" not in fields:
        return None
    low, squares = arrays["channel_low"], arrays.get("channel_squares")
    return ChannelExtremes(
        fields["axis"], low, arrays["channel_high"], None if squares is None else ExactSums(low.size, squares),
        fields["per_channel"],
    )  # fmt: skip

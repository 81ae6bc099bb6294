"""Streaming statistics of activations: fixed size, mergeable, and independent of the order of feeds.

Histogram bins have power-of-two widths anchored at zero, so merging two histograms of different widths is exact: the
finer one is folded pairwise until the widths agree. Counts are integers, sums are exact (`exact.ExactSums`), so a merge
is associative and commutative bit for bit, however the feeds were shared out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.estimators import estimate
from qcompiler.calibration.exact import LIMBS, ExactSums
from qcompiler.engine import Array
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantSpec

HALF_BINS = 2048
"""Bins on each side of zero; a histogram has twice as many."""
RECENT = 1024
"""Feeds whose extremes are kept one by one, for the moving average and for how ranges moved."""
_BLOCK = 1 << 15
"""Elements that are summed in their own precision; sums of blocks are added up in float64."""
_CHUNK = 4 * _BLOCK
"""Elements counted at a time: temporary arrays fit the second-level cache; less, and threads wait for each other."""
_FINEST = -126
_NARROW = 1e15
"""Below this a block is summed in float32 (blocks are added up in float64); above it squares could overflow there."""


@dataclass
class ChannelExtremes:
    """Smallest and largest value per index of one axis, and the sum of squares where it was asked for.

    Attributes:
        axis: which axis, counted from the end (negative).
        low: float32 [channels].
        high: float32 [channels].
        squares: sum of x squared per channel.
        count: elements seen per channel.
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
        """Return E[x^2] per channel, None if it was not asked for."""
        return None if self.squares is None else self.squares.values() / max(1, self.count)

    def merge(self, other: ChannelExtremes) -> ChannelExtremes | None:
        """Return the extremes of both, None if they are of different axes or lengths."""
        if (self.axis, self.low.shape) != (other.axis, other.low.shape):
            return None
        both = self.squares is not None and other.squares is not None
        squares = self.squares.merged(other.squares) if both else None  # type: ignore[union-attr,arg-type]
        return ChannelExtremes(
            self.axis, np.minimum(self.low, other.low), np.maximum(self.high, other.high), squares,
            self.count + other.count,
        )  # fmt: skip


@dataclass
class RecentExtremes:
    """Extremes of the latest `RECENT` feeds, one by one, and of all earlier feeds together.

    Attributes:
        feeds: int64 [k], ascending.
        values: float32 [k, 2]: low and high.
        earlier: (low, high) of all feeds before those.
    """

    feeds: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    values: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    earlier: tuple[float, float] = (math.inf, -math.inf)

    def merge(self, other: RecentExtremes) -> RecentExtremes:
        """Return the extremes of both; a feed that is in both has the wider ones."""
        feeds, where = np.unique(np.concatenate([self.feeds, other.feeds]), return_inverse=True)
        values = np.empty((feeds.size, 2), np.float32)
        values[:, 0], values[:, 1] = np.inf, -np.inf
        both = np.concatenate([self.values, other.values])
        np.minimum.at(values[:, 0], where, both[:, 0])
        np.maximum.at(values[:, 1], where, both[:, 1])
        low, high = (f(a, b) for f, a, b in zip((min, max), self.earlier, other.earlier, strict=True))
        if feeds.size > RECENT:
            early, values = values[:-RECENT], values[-RECENT:]
            feeds = feeds[-RECENT:]
            low, high = min(low, float(early[:, 0].min())), max(high, float(early[:, 1].max()))
        return RecentExtremes(feeds, values, (low, high))


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
        low, high, channels = _extremes(array, axis, squares)
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
        self._take_in(flat, low, high)
        latest = int(self.recent.feeds[-1]) + 1 if self.recent.feeds.size else 0
        self._note_extremes(latest if feed is None else feed, low, high)
        self._merge_channels(channels, fresh=self.count == flat.size)

    def _take_in(self, flat: npt.NDArray[np.float32], low: float, high: float) -> None:
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

    def _note_extremes(self, feed: int, low: float, high: float) -> None:
        recent = self.recent
        if recent.feeds.size and feed == recent.feeds[-1]:  # once more in the same feed: a loop's body
            recent.values[-1] = min(recent.values[-1, 0], low), max(recent.values[-1, 1], high)
            return
        self.executions += 1
        self.recent = recent.merge(RecentExtremes(np.array([feed]), np.array([[low, high]], np.float32)))

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
            folded = np.zeros_like(self.counts)
            start = HALF_BINS - HALF_BINS // 2
            folded[start : start + HALF_BINS] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = folded
            self.exponent += 1

    def _merge_channels(self, channels: ChannelExtremes | None, fresh: bool) -> None:
        """Merge extremes per channel; once an execution had none, or others, there are none for good."""
        if self._mixed:
            return
        if fresh:
            self.channels = channels
        elif self.channels is not None and channels is not None:
            self.channels = self.channels.merge(channels)
        else:
            self.channels = None
        self._mixed = self.channels is None

    # ---- merging -----------------------------------------------------------------------------------------------

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """Return the statistics of both, the same bit for bit whichever way shards are merged.

        Shards number their feeds over the whole run, and no feed is in two of them.
        """
        mine, theirs = self.copy(), other.copy()
        exponent = max(mine.exponent, theirs.exponent)
        mine._fold_to(exponent)
        theirs._fold_to(exponent)
        if theirs.count:
            mine._merge_channels(theirs.channels, fresh=mine.count == 0)
            mine._mixed = mine._mixed or theirs._mixed
        mine.counts = mine.counts + theirs.counts
        mine.count += theirs.count
        mine.zeros += theirs.zeros
        mine.nans += theirs.nans
        mine.infinities += theirs.infinities
        mine.executions += theirs.executions
        mine.minimum = min(mine.minimum, theirs.minimum)
        mine.maximum = max(mine.maximum, theirs.maximum)
        mine.moments = mine.moments.merged(theirs.moments)
        mine.recent = mine.recent.merge(theirs.recent)
        return mine

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


def _extremes(
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


@dataclass
class Statistics:
    """Statistics by value name; a `qcompiler.quant.spec.RangeSource`.

    Attributes:
        tensors: what was observed.
        feeds: number of feeds.
        about: where the statistics come from: digests of graph and data, engine, threads (`qcal.Key` as a mapping).
        synthetic: how the feeds were made where there was no data; empty for real data.
    """

    tensors: dict[str, TensorStatistics] = field(default_factory=dict)
    feeds: int = 0
    about: dict[str, str] = field(default_factory=dict)
    synthetic: str = ""
    _ranges: dict[tuple[str, str, QuantSpec | None], tuple[float, float]] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def observed(self, name: str) -> bool:
        """Return whether calibration ever executed the value with at least one element."""
        return name in self.tensors and self.tensors[name].count > 0

    def range(self, name: str, estimator: str = "min-max", spec: QuantSpec | None = None) -> tuple[float, float]:
        """Return (low, high) of a value by an estimator.

        Args:
            name: the value.
            estimator: as `estimate` reads it, such as ``percentile:99.99``.
            spec: what the range is quantized to; unsigned 8 bits by default.

        Raises:
            CalibrationError: the value was never observed, or the estimator is unknown.
        """
        if not self.observed(name):
            raise CalibrationError(f"{name} was never executed during calibration")
        key = (name, estimator, spec)
        if key not in self._ranges:
            self._ranges[key] = estimate(self.tensors[name], estimator, spec)
        return self._ranges[key]

    def ranges(
        self, name: str, estimator: str = "min-max", spec: QuantSpec | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return (low, high) per channel or block of a value that was observed in parts.

        Args:
            name: the value.
            estimator: as for `range`.
            spec: as for `range`.

        Returns:
            float64 [parts] each.

        Raises:
            CalibrationError: the value was not observed in parts.
        """
        if part_name(name, 0) not in self.tensors:
            raise CalibrationError(f"{name} was not observed per channel or block; ask for it when calibrating")
        found: list[tuple[float, float]] = []
        while (part := part_name(name, len(found))) in self.tensors:
            found.append(self.range(part, estimator, spec))
        both = np.array(found, np.float64)
        return both[:, 0], both[:, 1]

    def mean_square(self, name: str) -> float:
        """Return E[x^2] of a value."""
        return self.tensors[name].mean_square

    def elements_per_feed(self, name: str) -> int:
        """Return the average number of elements that one feed gives the value."""
        tensor = self.tensors[name]
        return tensor.count // max(1, tensor.executions)

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of both shards of one run, the same bit for bit in any order."""
        names = dict.fromkeys([*self.tensors, *other.tensors])
        none = TensorStatistics()
        tensors = {n: self.tensors.get(n, none).merge(other.tensors.get(n, none)) for n in names}
        return Statistics(tensors, self.feeds + other.feeds, self.about | other.about, self.synthetic)

    def movement(self, share: float = 0.1) -> dict[str, float]:
        """Return by how much each range grew over the last feeds, relative to its final width.

        Zero says that the extremes were known before; a large number that more feeds would widen the range further.

        Args:
            share: which share of the feeds counts as last.
        """
        found: dict[str, float] = {}
        last = max(1, round(self.feeds * share))
        for name, tensor in self.tensors.items():
            recent = tensor.recent
            if not recent.feeds.size or tensor.maximum <= tensor.minimum:
                continue
            before = recent.values[recent.feeds < self.feeds - last]
            low = min(recent.earlier[0], float(before[:, 0].min(initial=np.inf)))
            high = max(recent.earlier[1], float(before[:, 1].max(initial=-np.inf)))
            grown = 1.0 if high < low else 1.0 - (high - low) / (tensor.maximum - tensor.minimum)
            found[name] = grown
        return found


def part_name(name: str, index: int) -> str:
    """Return the name under which one channel or block of a value is kept."""
    return f"{name}#{index}"


@dataclass(frozen=True)
class Parts:
    """How a value is cut into parts with a sketch of their own.

    Attributes:
        axis: the axis that is cut.
        block: indices of that axis in one part; 1 is per channel.
    """

    axis: int
    block: int = 1


def merge_all(shards: Iterable[Statistics]) -> Statistics:
    """Merge the shards of one run."""
    merged = Statistics()
    for shard in shards:
        merged = merged.merge(shard)
    return merged

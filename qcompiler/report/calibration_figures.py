"""What the picture of a calibration shows of each tensor: bars, ranges, channels, and the figures of the table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.histogram import Points, points_of
from qcompiler.calibration.statistics import ChannelExtremes, Statistics, TensorStatistics
from qcompiler.errors import CalibrationError
from qcompiler.quant.formats import FORMATS
from qcompiler.quant.spec import QuantSpec, affine_params

CHANNEL_FACTOR = 6.0
"""A channel is an outlier where it reaches farther than this times the median of the channels."""
TAIL = 0.9999
"""Share of the elements that the outlier ratio compares the largest one with."""
MOST_BARS = 320
"""Bars of a histogram; finer bins are drawn together."""

DEFAULT_SPEC = QuantSpec("uint8")


@dataclass(frozen=True)
class RangeFigure:
    """The range that one estimator chose.

    Attributes:
        estimator: its text, such as ``percentile:99.99``.
        low: lower end.
        high: upper end.
        clipped: share of the elements outside, from 0 to 1.
        sqnr_db: expected signal to quantization noise of the tensor in this range; None for formats of uneven steps.
        problem: why there is no range, empty if there is one.
    """

    estimator: str
    low: float = 0.0
    high: float = 0.0
    clipped: float = 0.0
    sqnr_db: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class ChannelFigure:
    """Extremes per channel.

    Attributes:
        axis: which axis, counted from the end.
        low: float32 [channels].
        high: float32 [channels].
        median: median reach of the channels that are not all zero.
        outliers: (channel, reach / median) above `CHANNEL_FACTOR`, farthest first.
    """

    axis: int
    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]
    median: float
    outliers: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TensorFigure:
    """One tensor.

    Attributes:
        name: its name.
        order: its place in the statistics.
        tensor: its statistics.
        zero_share: share of exact zeros.
        outlier_ratio: largest magnitude / magnitude that `TAIL` of the elements stay below.
        bars: (left, right, elements) without exact zeros, ascending, empty ones left out.
        ranges: one per estimator.
        channels: None where extremes per channel are not known.
    """

    name: str
    order: int
    tensor: TensorStatistics
    zero_share: float
    outlier_ratio: float
    bars: tuple[tuple[float, float, int], ...]
    ranges: tuple[RangeFigure, ...]
    channels: ChannelFigure | None

    @property
    def outlier_channels(self) -> int:
        """Return the number of outlier channels."""
        return 0 if self.channels is None else len(self.channels.outliers)

    @property
    def best(self) -> RangeFigure | None:
        """Return the range of the highest expected SQNR, the first of equals; None if that is not known."""
        known = [r for r in self.ranges if r.sqnr_db is not None]
        return max(known, key=lambda r: r.sqnr_db or 0.0, default=None)

    @property
    def view(self) -> tuple[float, float]:
        """Return the ends of the value axis: all values, all ranges and zero, with a little room."""
        lows = [r.low for r in self.ranges if not r.problem]
        highs = [r.high for r in self.ranges if not r.problem]
        low, high = min([0.0, self.tensor.minimum, *lows]), max([0.0, self.tensor.maximum, *highs])
        room = 0.02 * (high - low) or 1.0
        return low - room, high + room


def figures(
    statistics: Statistics, estimators: Sequence[str], names: Iterable[str] | None = None, spec: QuantSpec | None = None
) -> list[TensorFigure]:
    """Return the figures of all observed tensors, the most outlying first.

    Args:
        statistics: what calibration kept.
        estimators: whose ranges to show.
        names: which tensors; all by default.
        spec: what the ranges are quantized to; unsigned 8 bits by default.

    Raises:
        CalibrationError: a name is unknown, nothing was observed, or an estimator fails on every tensor.
    """
    wanted = list(statistics) if names is None else list(dict.fromkeys(names))
    if unknown := [n for n in wanted if n not in statistics.tensors]:
        raise CalibrationError(f"no statistics of {unknown[0]!r}; known are {', '.join(list(statistics)[:5])} ...")
    seen = [n for n in wanted if statistics.observed(n)]
    if not seen:
        raise CalibrationError("nothing to draw: no tensor was executed during calibration")
    order = {name: place for place, name in enumerate(statistics)}
    made = [_figure(statistics, name, order[name], estimators, spec) for name in seen]
    for place, estimator in enumerate(estimators):
        if all(figure.ranges[place].problem for figure in made):
            raise CalibrationError(f"estimator {estimator!r}: {made[0].ranges[place].problem}")
    return sorted(made, key=lambda f: (-f.outlier_ratio, -f.outlier_channels, f.order))


def _figure(
    statistics: Statistics, name: str, order: int, estimators: Sequence[str], spec: QuantSpec | None
) -> TensorFigure:
    tensor = statistics.tensors[name]
    points = points_of(tensor)
    return TensorFigure(
        name, order, tensor, tensor.zeros / tensor.count, outlier_ratio(tensor), bars(tensor),
        tuple(_range(statistics, name, points, e, spec) for e in estimators),
        None if tensor.channels is None else channel_figure(tensor.channels),
    )  # fmt: skip


def outlier_ratio(tensor: TensorStatistics) -> float:
    """Return the largest magnitude over the one that `TAIL` of the elements stay below, to within a bin; at least 1."""
    reach = max(-tensor.minimum, tensor.maximum)
    if reach <= 0:
        return 1.0
    half = tensor.counts.size // 2
    upward = np.cumsum(tensor.counts[half:] + tensor.counts[:half][::-1])
    place = int(np.searchsorted(upward, math.ceil(TAIL * tensor.count)))
    return reach / min(reach, (place + 1) * tensor.width)


def bars(tensor: TensorStatistics, most: int = MOST_BARS) -> tuple[tuple[float, float, int], ...]:
    """Return a histogram of at most about ``most`` bars as (left, right, elements), exact zeros left out."""
    counts = tensor.counts.copy()
    half = counts.size // 2
    counts[half] -= tensor.zeros
    filled = np.flatnonzero(counts)
    if not filled.size:
        return ()
    step = -(-int(filled[-1] - filled[0] + 1) // most)
    # Groups start at zero, so that no bar has both signs in it.
    group = (filled - half) // step
    found, first = np.unique(group, return_index=True)
    sums = np.add.reduceat(counts[filled], first)
    wide = step * tensor.width
    return tuple((float(g) * wide, float(g + 1) * wide, int(c)) for g, c in zip(found, sums, strict=True))


def channel_figure(channels: ChannelExtremes) -> ChannelFigure:
    """Find the channels that reach farther than `CHANNEL_FACTOR` times the median of those that are not all zero."""
    finite = np.isfinite(channels.low) & np.isfinite(channels.high)
    low = np.where(finite, channels.low, np.float32(0))
    high = np.where(finite, channels.high, np.float32(0))
    reach = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    median = float(np.median(reach[reach > 0])) if (reach > 0).any() else 0.0
    beyond = np.flatnonzero(reach > CHANNEL_FACTOR * median)
    farthest = beyond[np.argsort(-reach[beyond], kind="stable")]
    return ChannelFigure(channels.axis, low, high, median, tuple((int(c), float(reach[c] / median)) for c in farthest))


def _range(statistics: Statistics, name: str, points: Points, estimator: str, spec: QuantSpec | None) -> RangeFigure:
    try:
        low, high = statistics.range(name, estimator, spec)
    except CalibrationError as error:
        return RangeFigure(estimator, problem=str(error))
    values, weights = points.values, points.weights
    count = statistics.tensors[name].count
    clipped = float(weights[(values < low) | (values > high)].sum()) / count
    return RangeFigure(estimator, low, high, clipped, _sqnr(points, low, high, spec or DEFAULT_SPEC))


def _sqnr(points: Points, low: float, high: float, spec: QuantSpec) -> float | None:
    """Return the expected SQNR in dB, None for formats of uneven steps and where nothing is lost.

    The bins' centres are quantized as the plan would, zero point and all, and read back. Where a step is hardly wider
    than a bin, that would tell the bins' error instead: then scale^2 / 12 stands for what is inside.
    """
    values, weights = points.values, points.weights
    if spec.format not in FORMATS or not weights.size:
        return None
    params = affine_params(spec, low, high)
    scale, zero = float(params.scale), float(params.zero_point)
    least, most = spec.limits
    steps = np.clip(np.rint(values / scale) + zero, least, most) - zero
    errors = np.square(steps * scale - values)
    if scale < 4.0 * points.width:
        inside = (steps + zero > least) & (steps + zero < most)
        errors = np.where(inside, scale * scale / 12.0, errors)
    noise, signal = float((weights * errors).sum()), float((weights * np.square(values)).sum())
    return 10.0 * math.log10(signal / noise) if noise > 1e-13 * signal else None

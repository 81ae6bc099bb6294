"""The range with the least expected squared error, found exactly, and AIMET's search on a grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompiler.calibration.histogram import Floats, Points
from qcompiler.calibration.through import Function
from qcompiler.quant.spec import QuantSpec

_BLOCK = 32
"""Candidates per side that one lower bound covers."""


@dataclass(frozen=True)
class _Side:
    """What every candidate on one side of zero costs.

    Attributes:
        reach: distance of the candidate from zero, ascending from 0: bin borders, and the extreme last.
        slope: sum over the elements this side of the candidate of the function's slope squared.
        lost: squared error of the elements beyond it, which are clipped to it.
    """

    reach: Floats
    slope: Floats
    lost: Floats


def least_squares(points: Points, steps: int, function: Function, symmetric: bool = False) -> tuple[float, float]:
    """Find the clipping range with the least expected squared error, over all pairs of bin borders.

    The error of a range is scale^2 / 12 for each element inside (rounding noise, Banner et al. 2019, arXiv:1810.05723)
    and the squared distance for each outside, both behind ``function``: rounding noise times its slope squared,
    clipping as the difference of its values. Zeros and what lies at an end of the range cost nothing.

    Both ends are searched together. A pair costs (r1 + r2)^2 k (slope1 + slope2) + lost1 + lost2, in which reach and
    slope only grow from zero outwards: the first candidates of two blocks with the least ``lost`` of each bound what
    any pair of the two costs from below. Blocks that cannot beat the best pair known are never opened, so the result is
    that of trying all pairs (up to 2048 x 2048).

    Args:
        points: the values.
        steps: intervals of the format: 255 for 8 bits asymmetric, its largest integer (127) if symmetric.
        function: stands behind the value.
        symmetric: both ends are equally far from zero; a search in one dimension.

    Returns:
        (low, high) with low <= 0 <= high, inside the extremes extended to zero.
    """
    below = _side(points.below, points.below_weights, -points.minimum, points.width, function, -1.0)
    above = _side(points.above, points.above_weights, points.maximum, points.width, function, 1.0)
    noise = 1.0 / (12.0 * steps * steps)
    if symmetric:
        reach = _symmetric(below, above, noise)
        return max(points.minimum, -reach), min(points.maximum, reach)
    low, high = _pair(below, above, noise)
    return 0.0 - float(below.reach[low]), float(above.reach[high])


def keep_short_side(points: Points, steps: int, function: Function, found: tuple[float, float]) -> tuple[float, float]:
    """Decide about an end that lies within half a step of zero, which the zero point's rounding would cut off whole.

    The zero point is an integer: either nothing of that side is kept or a whole step. Where one outlier stretches the
    range, that step holds most of the values.

    Args:
        points: the values.
        steps: intervals of the format.
        function: stands behind the value.
        found: the range that `least_squares` gave.

    Returns:
        The range, with the short end at zero or at one step (or the extreme, if that is nearer), whichever has the
        smaller expected error.
    """
    low, high = found
    step = (high - low) / steps
    cut_low = 0 < -low < step / 2 < -points.minimum
    cut_high = 0 < high < step / 2 < points.maximum
    if not (cut_low or cut_high):
        return found
    below = _side(points.below, points.below_weights, -points.minimum, points.width, function, -1.0)
    above = _side(points.above, points.above_weights, points.maximum, points.width, function, 1.0)
    short, long, reach = (below, above, high) if cut_low else (above, below, -low)
    far = int(np.searchsorted(long.reach, reach))
    costs = []
    for kept in (0, 1):
        size = reach / (steps - kept)
        near = min(int(np.searchsorted(short.reach, kept * size)), short.reach.size - 1)
        costs.append(size * size / 12.0 * (short.slope[near] + long.slope[far]) + short.lost[near] + long.lost[far])
    end = min(reach / (steps - 1), float(short.reach[-1])) if costs[1] < costs[0] else 0.0
    return (0.0 - end, reach) if cut_low else (-reach, end)


def _side(values: Floats, weights: Floats, extreme: float, width: float, function: Function, sign: float) -> _Side:
    """Return the candidates of one side: zero, every bin border, and the extreme instead of the last border."""
    reach = np.arange(values.size + 1, dtype=np.float64) * width
    reach[-1] = extreme if values.size else 0.0
    behind, at = function(sign * values), function(sign * reach)
    # The mean slope over each bin: right at kinks as well, and no derivative has to be written down.
    borders = function(sign * width * np.arange(values.size + 1, dtype=np.float64))
    slopes = np.square(np.diff(borders) / width)
    slope = np.concatenate([[0.0], np.cumsum(weights * slopes)])
    slope[-1:] = slope[-2:-1] if values.size else 0.0  # what lies at the end of the range itself is exact
    count, total, square = (_beyond(weights * part) for part in (np.ones_like(behind), behind, np.square(behind)))
    lost = np.maximum(at * at * count - 2.0 * at * total + square, 0.0)
    lost[-1] = 0.0
    return _Side(reach, slope, lost)


def _beyond(parts: Floats) -> Floats:
    """Return the sums of what lies beyond each candidate; one longer than the parts."""
    return np.concatenate([np.cumsum(parts[::-1])[::-1], [0.0]])


def _costs(below: _Side, above: _Side, rows: slice, columns: slice, noise: float) -> Floats:
    width = below.reach[rows, None] + above.reach[None, columns]
    slope = below.slope[rows, None] + above.slope[None, columns]
    return np.asarray(noise * width * width * slope + (below.lost[rows, None] + above.lost[None, columns]))


def _pair(below: _Side, above: _Side, noise: float) -> tuple[int, int]:
    """Return the indices of the best pair by branch and bound over blocks; of equals the one with the least indices."""
    starts = [np.arange(0, side.reach.size, _BLOCK) for side in (below, above)]
    heads = [
        _Side(side.reach[start], side.slope[start], np.minimum.reduceat(side.lost, start))
        for side, start in zip((below, above), starts, strict=True)
    ]
    everything = slice(None)
    bounds = _costs(heads[0], heads[1], everything, everything, noise)
    best, found = np.inf, (0, 0)
    for flat in np.argsort(bounds, axis=None, kind="stable"):
        row, column = divmod(int(flat), bounds.shape[1])
        if bounds[row, column] > best:
            break
        first, second = int(starts[0][row]), int(starts[1][column])
        costs = _costs(below, above, slice(first, first + _BLOCK), slice(second, second + _BLOCK), noise)
        least = int(np.argmin(costs))
        i, j = divmod(least, costs.shape[1])
        cost, place = float(costs[i, j]), (first + i, second + j)
        if cost < best or (cost == best and place < found):
            best, found = cost, place
    return found


def _symmetric(below: _Side, above: _Side, noise: float) -> float:
    """Return the best reach, among the candidates of the side that reaches farther."""
    longer, shorter = (below, above) if below.reach[-1] > above.reach[-1] else (above, below)
    index = np.arange(longer.reach.size)
    other = np.where(
        longer.reach >= shorter.reach[-1], shorter.reach.size - 1, np.minimum(index, shorter.reach.size - 1)
    )
    costs = noise * np.square(longer.reach) * (longer.slope + shorter.slope[other]) + longer.lost + shorter.lost[other]
    return float(longer.reach[int(np.argmin(costs))])


@dataclass(frozen=True)
class SqnrGrid:
    """Candidates of the SQNR search, as many as AIMET tries by default.

    Attributes:
        scales: scales of an asymmetric range.
        offsets: offsets of an asymmetric range; the observed one is tried besides.
        symmetric_scales: scales of a symmetric range.
        gamma: weight of a clipped element's error; more than 1 clips less.
    """

    scales: int = 17
    offsets: int = 21
    symmetric_scales: int = 101
    gamma: float = 3.0


def sqnr_candidates(points: Points, spec: QuantSpec, grid: SqnrGrid) -> tuple[Floats, Floats]:
    """Return (scale, offset) of every candidate, offset being the integer that stands for the low end over zero."""
    low, high = spec.limits
    steps = high - low
    span = points.maximum - points.minimum
    if spec.symmetric:
        reach = max(-points.minimum, points.maximum)
        scales = reach / high * np.arange(1, grid.symmetric_scales + 1) / (grid.symmetric_scales - 1)
        return scales, np.full(scales.shape, float(low))
    widest = span / steps
    observed = np.rint(points.minimum / widest)
    numbers = min(steps + 2, grid.offsets)
    offsets = np.append(np.rint(np.linspace(-steps, 0.0, numbers - 1)), observed)
    scales = widest * np.arange(1, grid.scales + 1) / (grid.scales - 1)
    # A candidate is cut to what was observed, with its offset moved to the nearest integer.
    least = np.maximum(scales[:, None] * offsets, widest * observed)
    most = np.minimum(scales[:, None] * (offsets + steps), widest * (observed + steps))
    cut = ((most - least) / steps).reshape(-1)
    usable = cut > 0
    cut, least = cut[usable], least.reshape(-1)[usable]
    return cut, np.clip(np.rint(least / cut), -steps, 0)


def sqnr_errors(
    points: Points, spec: QuantSpec, scales: Floats, offsets: Floats, gamma: float, function: Function
) -> Floats:
    """Return the noise power of every candidate, with true rounding of the bins' centres.

    Args:
        points: the values.
        spec: gives the integers.
        scales: one per candidate.
        offsets: one per candidate.
        gamma: weight of clipped elements.
        function: stands behind the value.
    """
    steps = float(spec.limits[1] - spec.limits[0])
    values, weights = points.values, points.weights
    behind = function(values)
    errors = np.empty(scales.size)
    for index, (scale, offset) in enumerate(zip(scales, offsets, strict=True)):
        stored = np.rint(values / scale - offset)
        kept = np.clip(stored, 0.0, steps)
        noise = np.square(function((kept + offset) * scale) - behind)
        errors[index] = np.dot(noise, np.where(kept == stored, weights, gamma * weights))
    return errors


def best_sqnr(points: Points, spec: QuantSpec, function: Function, grid: SqnrGrid) -> tuple[float, float]:
    """Search scale and offset on a grid for the best signal-to-quantization-noise ratio.

    As AIMET's SqnrEncodingAnalyzer (github.com/quic/aimet, aimet_torch/v2/quantization/encoding_analyzer.py): true
    rounding of the centre of every bin, clipping noise weighted by gamma. Unlike `least_squares` it sees that a range's
    ends fall on multiples of its scale, which matters with few bits.

    Returns:
        (low, high) inside the extremes extended to zero, within one step.
    """
    if points.maximum <= points.minimum:
        return points.minimum, points.maximum
    scales, offsets = sqnr_candidates(points, spec, grid)
    best = int(np.argmin(sqnr_errors(points, spec, scales, offsets, grid.gamma, function)))
    scale, steps = float(scales[best]), spec.limits[1] - spec.limits[0]
    if spec.symmetric:
        reach = scale * spec.limits[1]
        return max(points.minimum, -reach), min(points.maximum, reach)
    low = float(offsets[best]) * scale
    return max(points.minimum, low), min(points.maximum, low + steps * scale)

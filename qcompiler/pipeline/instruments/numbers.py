"""The numbers behind a graph, as a dump keeps them: what was observed, and scale and zero point of every point."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qcompiler.errors import QCompilerError
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Point
from qcompiler.quant.spec import QuantParams, RangeSource, affine_params, fixed_params
from qcompiler.targets.points import root_point

BINS = 64
"""Bins of a dumped histogram: enough for a picture, few enough for thousands of values."""

_DIGITS = 7


class Sketch(Protocol):
    """What is dumped of the statistics of one value; bins are anchored at zero, in the middle of ``counts``."""

    count: int
    minimum: float
    maximum: float
    zeros: int
    nans: int
    infinities: int
    executions: int
    counts: npt.NDArray[np.int64]

    @property
    def width(self) -> float:
        """Return the width of a bin."""
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
    def mean_square(self) -> float:
        """Return E[x^2]."""
        ...


def sketches(statistics: RangeSource | None) -> Mapping[str, Sketch]:
    """Return the sketches by value name; empty where the statistics are ranges only, or absent."""
    found = getattr(statistics, "tensors", {})
    return found if isinstance(found, Mapping) else {}


def statistics_summary(statistics: RangeSource | None, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return counts, moments and a small histogram of each named value that was observed."""
    known = sketches(statistics)
    return {n: _sketch_summary(known[n]) for n in sorted(set(names) & set(known)) if known[n].count}


def _sketch_summary(sketch: Sketch) -> dict[str, Any]:
    filled = np.flatnonzero(sketch.counts)
    first, last = int(filled[0]), int(filled[-1])
    step = -(-(last - first + 1) // BINS)
    bins = np.add.reduceat(sketch.counts[first : last + 1], np.arange(0, last - first + 1, step))
    low = (first - sketch.counts.size // 2) * sketch.width
    plain = {"count": sketch.count, "zeros": sketch.zeros, "executions": sketch.executions}
    odd = {"nans": sketch.nans, "infinities": sketch.infinities}
    figures = {"minimum": sketch.minimum, "maximum": sketch.maximum, "mean": sketch.mean, "std": sketch.std}
    return {
        **{k: int(v) for k, v in plain.items()},
        **{k: int(v) for k, v in odd.items() if v},
        **{k: _short(v) for k, v in figures.items()},
        "low": _short(low),
        "step": _short(step * sketch.width),
        "bins": [int(b) for b in bins],
    }


def point_numbers(state: CompileState) -> dict[str, dict[str, Any]]:
    """Return each point of the plan with the numbers it resolves to and where they come from.

    Weight and bias points have no numbers here: those are constants of the graph. ``expected_db`` is the SQNR that the
    observed histogram predicts for the point: rounding noise of a twelfth of the squared step inside the range, the
    squared distance to its end outside.
    """
    return {name: _point_entry(state, name, point) for name, point in sorted(state.plan.points.items())}


def _point_entry(state: CompileState, name: str, point: Point) -> dict[str, Any]:
    spec, source = point.spec, point.source
    entry: dict[str, Any] = {"format": spec.format, "kind": source.kind}
    optional = {
        "axis": spec.axis, "block": spec.block or None, "bits": spec.bits or None, "symmetric": spec.symmetric or None,
        "dynamic": spec.dynamic or None, "scale_format": spec.scale_format or None,
        "points": list(source.points) or None, "estimator": source.estimator,
    }  # fmt: skip
    entry |= {key: value for key, value in optional.items() if value is not None}
    try:
        entry |= _resolved(state, name)
    except (QCompilerError, KeyError) as error:  # a plan edited by hand; the dump shows it as it is
        entry["note"] = str(error)
    return entry


def _resolved(state: CompileState, name: str) -> dict[str, Any]:
    root = root_point(state.plan, name)
    point = state.plan.points[root]
    entry: dict[str, Any] = {} if root == name else {"root": root}
    if point.source.kind == "fixed":
        return entry | _params_entry(fixed_params(point.spec, point.source))
    statistics = state.statistics
    if point.source.kind != "observed" or point.spec.dynamic or statistics is None or not statistics.observed(root):
        return entry
    estimator = point.source.estimator or "min-max"
    low, high = statistics.range(root, estimator, point.spec)
    params = affine_params(point.spec, low, high)
    entry |= {"estimator": estimator, "range": [_short(low), _short(high)], **_params_entry(params)}
    sketch = sketches(statistics).get(root)
    if sketch is not None and point.spec.storage.kind == "int" and params.scale.ndim == 0:
        entry["expected_db"] = _expected_db(sketch, params)
    return entry


def _params_entry(params: QuantParams) -> dict[str, Any]:
    scale, zero = params.scale.reshape(-1), params.zero_point.reshape(-1)
    if scale.size == 1:
        return {"scale": _short(float(scale[0])), "zero_point": int(zero[0])}
    return {
        "scales": int(scale.size),
        "scale": [_short(float(scale.min())), _short(float(scale.max()))],
        "zero_point": [int(zero.min()), int(zero.max())],
    }


def _expected_db(sketch: Sketch, params: QuantParams) -> float | None:
    scale, zero = float(params.scale), int(params.zero_point)
    least, most = params.spec.limits
    low, high = (least - zero) * scale, (most - zero) * scale
    half = sketch.counts.size // 2
    filled = np.flatnonzero(sketch.counts)
    # The outermost bins are known better than by their centres.
    centres = np.clip((filled - half + 0.5) * sketch.width, sketch.minimum, sketch.maximum)
    outside = np.maximum(np.maximum(low - centres, centres - high), 0.0)
    each = np.where(outside > 0, outside**2, scale**2 / 12)
    weights = sketch.counts[filled].astype(np.float64)
    zeros = np.where(filled == half, float(sketch.zeros), 0.0)  # zero is exact
    noise = float(((weights - zeros) * each).sum())
    signal = sketch.mean_square * sketch.count
    if noise <= 0 or signal <= 0:
        return None
    return round(10 * math.log10(signal / noise), 2)


def _short(value: float) -> float:
    """Return a number with as many digits as float32 has."""
    return float(f"{value:.{_DIGITS}g}")

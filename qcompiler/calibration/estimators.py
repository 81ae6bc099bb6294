"""Range estimators: from streaming statistics to the interval that is quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompiler.calibration.divergence import least_divergence
from qcompiler.calibration.histogram import Histogram, points_of
from qcompiler.calibration.squared_error import SqnrGrid, best_sqnr, keep_short_side, least_squares
from qcompiler.calibration.through import function_of
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantSpec

ESTIMATORS = ("min-max", "moving-average", "percentile", "entropy", "mse", "sqnr", "std", "auto")
"""Names of the estimators; README of the texts: ``name[:number][:function looked through]``."""

_LOOKING_THROUGH = ("mse", "sqnr")
_DEFAULT_SPEC = QuantSpec("uint8")
_FLOAT8 = {
    "float8e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8e5m2": ml_dtypes.float8_e5m2,
    "float8e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


@dataclass(frozen=True)
class _Wish:
    """An estimator's text, read."""

    name: str
    number: float | None
    through: str


def _parse(text: str) -> _Wish:
    name, _, rest = text.partition(":")
    option, _, through = rest.partition(":")
    if name not in ESTIMATORS:
        raise CalibrationError(f"unknown estimator {name!r}; known: {', '.join(ESTIMATORS)}")
    if through and name not in _LOOKING_THROUGH:
        raise CalibrationError(f"estimator {text!r}: only {' and '.join(_LOOKING_THROUGH)} look through a function")
    try:
        number = float(option) if option else None
    except ValueError:
        raise CalibrationError(f"estimator {text!r}: {option!r} is not a number") from None
    return _Wish(name, number, through)


def estimate(tensor: Histogram, estimator: str, spec: QuantSpec | None = None) -> tuple[float, float]:
    """Return (low, high) by an estimator given as text: its name, then a number and a function where it takes them.

    ``min-max``; ``moving-average:CONSTANT`` (0.01); ``percentile:PERCENT`` (99.99); ``entropy:LEVELS`` (half those of
    the format); ``mse:BITS:FUNCTION`` (the format's bits); ``sqnr:GAMMA:FUNCTION`` (3); ``std:SIGMAS`` (4);
    ``auto:OTHERWISE`` for a tensor of which nothing else is known, that is ``mse``. FUNCTION stands between the value
    and what matters of it, such as ``relu``, ``softmax`` or ``clip(0,6)``; see `qcompiler.calibration.through`.

    Args:
        tensor: statistics with at least one element.
        estimator: the text.
        spec: what the range is quantized to; unsigned 8 bits, asymmetric by default.

    Returns:
        low <= high, inside the extremes extended to zero (but ``std`` for 8-bit floats, whose rule knows no extremes).

    Raises:
        CalibrationError: unknown estimator, option or function; an estimator that does not know the format; no element.
    """
    spec = spec or _DEFAULT_SPEC
    if estimator.startswith("auto"):
        name, _, otherwise = estimator.partition(":")
        if name == "auto":
            return estimate(tensor, otherwise or "mse", spec)
    wish = _parse(estimator)
    if not tensor.count:
        raise CalibrationError(f"estimator {estimator!r}: the tensor has no finite element")
    if wish.name == "min-max":
        return tensor.minimum, tensor.maximum
    if wish.name == "percentile":
        return percentile(tensor, 99.99 if wish.number is None else wish.number)
    if wish.name == "moving-average":
        return moving_average(tensor, 0.01 if wish.number is None else wish.number)
    if wish.name == "std":
        return deviations(tensor, spec, 4.0 if wish.number is None else wish.number)
    if wish.name == "entropy":
        return _entropy(tensor, spec, wish)
    if wish.name == "sqnr":
        return _sqnr(tensor, spec, wish)
    return _mse(tensor, spec, wish)


def estimate_each(
    tensors: Sequence[Histogram], estimator: str, spec: QuantSpec | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Estimate each of several tensors (channels or blocks of one) by itself.

    Returns:
        (low, high), float64 of one number per tensor.

    Raises:
        CalibrationError: as `estimate`.
    """
    ranges = np.array([estimate(tensor, estimator, spec) for tensor in tensors], np.float64).reshape(-1, 2)
    return ranges[:, 0], ranges[:, 1]


def percentile(tensor: Histogram, percent: float) -> tuple[float, float]:
    """Cut the same share off both tails, at bin borders (Wu et al. 2020, arXiv:2004.09602).

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
    """Average the extremes of the feeds exponentially, in feed order (Jacob et al. 2018, arXiv:1712.05877).

    Statistics keep the latest 1024 feeds; what came before would weigh less than (1 - constant)^1024.

    Raises:
        CalibrationError: the constant is not in (0, 1].
    """
    if not 0.0 < constant <= 1.0:
        raise CalibrationError(f"a moving average takes a constant in (0, 1], not {constant:g}")
    feeds = tensor.extremes.tolist()
    low, high = feeds[0]
    for least, most in feeds[1:]:
        low += constant * (least - low)
        high += constant * (most - high)
    return low, high


def deviations(tensor: Histogram, spec: QuantSpec, sigmas: float = 4.0) -> tuple[float, float]:
    """Set the range by the standard deviation.

    For 8-bit floats the scale is std(x) / std(all finite numbers of the format), so that both spread alike: ONNX
    Runtime's ``distribution`` calibration (onnxruntime/python/tools/quantization, compute_scale_zp_float8); the range
    is then the format's largest number times that scale, on both sides. For integers it is the mean and so many
    standard deviations around it, no farther than the extremes; 4 is next to the best clipping of a normal
    distribution to 8 bits, 3.92 (Banner et al. 2019, arXiv:1810.05723, table 1).

    Raises:
        CalibrationError: the number of standard deviations is not positive.
    """
    if spec.format in _FLOAT8:
        largest, spread = _float8(spec.format)
        reach = tensor.std / spread * largest
        return -reach, reach
    if not (sigmas > 0 and math.isfinite(sigmas)):
        raise CalibrationError(f"std takes a positive number of standard deviations, not {sigmas:g}")
    low = min(max(tensor.minimum, tensor.mean - sigmas * tensor.std), tensor.maximum)
    return low, max(low, min(tensor.maximum, tensor.mean + sigmas * tensor.std))


@cache
def _float8(name: str) -> tuple[float, float]:
    """Return the largest finite number of a format and the standard deviation of all its finite numbers."""
    numbers = np.arange(256, dtype=np.uint8).view(_FLOAT8[name]).astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    return float(finite.max()), float(finite.std())


def _integers(spec: QuantSpec, wish: _Wish) -> None:
    if spec.format in _FLOAT8:
        raise CalibrationError(
            f"estimator {wish.name} knows formats with even steps, not {spec.format}; take std, percentile or min-max"
        )


def _entropy(tensor: Histogram, spec: QuantSpec, wish: _Wish) -> tuple[float, float]:
    _integers(spec, wish)
    levels = 1 << ((spec.bits or spec.storage.bits) - 1) if wish.number is None else wish.number
    if not (2 <= levels < math.inf and levels == int(levels)):
        raise CalibrationError(f"entropy takes a whole number of levels from 2 up, not {levels:g}")
    reach = least_divergence(points_of(tensor), int(levels))
    low, high = min(tensor.minimum, 0.0), max(tensor.maximum, 0.0)
    return max(low, -reach), min(high, reach)


def _mse(tensor: Histogram, spec: QuantSpec, wish: _Wish) -> tuple[float, float]:
    _integers(spec, wish)
    low, high = spec.limits
    if wish.number is not None:
        if not (2 <= wish.number <= 16 and wish.number == int(wish.number)):
            raise CalibrationError(f"estimator mse:{wish.number:g}: bits are a whole number from 2 to 16")
        bits = int(wish.number)
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if spec.symmetric else (0, (1 << bits) - 1)
    steps = (high if low < 0 else (high - low) // 2) if spec.symmetric else high - low
    points, function = points_of(tensor), function_of(wish.through, tensor)
    found = least_squares(points, steps, function, spec.symmetric)
    return found if spec.symmetric else keep_short_side(points, steps, function, found)


def _sqnr(tensor: Histogram, spec: QuantSpec, wish: _Wish) -> tuple[float, float]:
    _integers(spec, wish)
    grid = SqnrGrid() if wish.number is None else replace(SqnrGrid(), gamma=wish.number)
    if not (grid.gamma > 0 and math.isfinite(grid.gamma)):
        raise CalibrationError(f"sqnr takes a positive weight of clipping noise, not {grid.gamma:g}")
    return best_sqnr(points_of(tensor), spec, function_of(wish.through, tensor), grid)

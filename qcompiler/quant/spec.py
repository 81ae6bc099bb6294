"""What is wanted of a quantized tensor (`QuantSpec`), where its numbers come from (`QuantSource`), and the numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from qcompiler.errors import CalibrationError
from qcompiler.quant.formats import FORMATS, QuantFormat

SourceKind = Literal["observed", "fixed", "shared", "derived", "weight"]


@dataclass(frozen=True)
class QuantSpec:
    """A wanted quantization, without numbers.

    Attributes:
        format: name of the storage format.
        axis: None is one scale per tensor, else one per index of this axis.
        symmetric: zero point 0 (signed) if true.
        dynamic: scale found at run time.
        narrow: symmetric range [-qmax, qmax] (weights), so that negation is exact.
        bits: bits of the range that is used, 0 for all that the format has.
    """

    format: str
    axis: int | None = None
    symmetric: bool = False
    dynamic: bool = False
    narrow: bool = False
    bits: int = 0

    @property
    def limits(self) -> tuple[int, int]:
        """Return the smallest and largest integer that quantization may produce."""
        storage = self.storage
        high = storage.qmax if not self.bits else (1 << (self.bits - 1)) - 1 if storage.signed else (1 << self.bits) - 1
        low = storage.qmin if not self.bits else -high - 1 if storage.signed else 0
        return (-high if self.narrow and storage.signed else low), high

    @property
    def storage(self) -> QuantFormat:
        """Return the storage format."""
        return FORMATS[self.format]


@dataclass(frozen=True)
class QuantSource:
    """Where the numbers of a point come from.

    Attributes:
        kind: ``observed`` statistics, ``fixed`` numbers of an imported model, ``shared`` with another point,
            ``derived`` from points (bias = activation scale x weight scale), or the constant ``weight`` itself.
        points: the other points for ``shared`` and ``derived``.
        estimator: range estimator for ``observed``.
        scale: numbers for ``fixed`` (flat, one per channel).
        zero_point: integers for ``fixed``.
    """

    kind: SourceKind
    points: tuple[str, ...] = ()
    estimator: str | None = None
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuantParams:
    """A specification with its numbers.

    Attributes:
        spec: what was wanted.
        scale: float32, shape [] per tensor or [channels] per axis, all > 0 and finite.
        zero_point: int64 of the same shape, inside the format's range.
    """

    spec: QuantSpec
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((), np.int64))

    def __post_init__(self) -> None:
        """Check shapes, signs and ranges.

        Raises:
            CalibrationError: the numbers are not a valid quantization.
        """
        storage = self.spec.storage
        if self.scale.shape != self.zero_point.shape:
            raise CalibrationError(f"scale {self.scale.shape} and zero point {self.zero_point.shape} differ in shape")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise CalibrationError("a scale is not a positive finite number")
        if (self.zero_point < storage.qmin).any() or (self.zero_point > storage.qmax).any():
            raise CalibrationError(f"a zero point lies outside {storage.name}")


class RangeSource(Protocol):
    """Ranges of activations by value name; what calibration hands to planning."""

    def observed(self, name: str) -> bool:
        """Return whether calibration ever executed the value."""
        ...

    def range(self, name: str, estimator: str = "min-max", spec: QuantSpec | None = None) -> tuple[float, float]:
        """Return (min, max) of the value by an estimator, for a format; raises CalibrationError if never observed."""
        ...

    def mean_square(self, name: str) -> float:
        """Return E[x^2] of a value."""
        ...

    def elements_per_feed(self, name: str) -> int:
        """Return the average number of elements that one feed gives the value, 0 if unknown."""
        ...


def affine_params(spec: QuantSpec, low: npt.ArrayLike, high: npt.ArrayLike) -> QuantParams:
    """Turn a range into scale and zero point by the ONNX rule (QuantizeLinear, DynamicQuantizeLinear).

    The range is widened to hold zero, which must be exact: padding and Relu depend on it.

    Args:
        spec: wanted form.
        low: smallest value, [] or [channels].
        high: largest value, same shape.
    """
    storage = spec.storage
    lo = np.minimum(np.asarray(low, np.float64), 0.0)
    hi = np.maximum(np.asarray(high, np.float64), 0.0)
    tiny = float(np.finfo(np.float32).tiny)
    if spec.symmetric:
        reach = np.maximum(-lo, hi)
        steps = spec.limits[1] if storage.signed else (storage.qmax - storage.qmin) / 2
        scale = np.where(reach > 0, reach / steps, 1.0)
        middle = 0 if storage.signed else (storage.qmax + 1) // 2
        zero = np.full(scale.shape, middle, np.int64)
    else:
        scale = np.where(hi > lo, (hi - lo) / (storage.qmax - storage.qmin), 1.0)
        scale = np.maximum(scale, tiny)
        zero = np.clip(np.rint(storage.qmin - lo / scale), storage.qmin, storage.qmax).astype(np.int64)
    return QuantParams(spec, np.maximum(scale, tiny).astype(np.float32), zero)


def fixed_params(spec: QuantSpec, source: QuantSource) -> QuantParams:
    """Return the numbers that a ``fixed`` source carries, scalar if there is one."""
    scale, zero = np.asarray(source.scale, np.float32), np.asarray(source.zero_point, np.int64)
    if spec.axis is None:
        scale, zero = scale.reshape(()), zero.reshape(())
    return QuantParams(spec, scale, zero)

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
        axis: None is one scale per tensor, else one per index of this axis, or per block along it.
        symmetric: zero point 0 (signed) if true.
        dynamic: scale found at run time.
        narrow: symmetric range [-qmax, qmax] (weights), so that negation is exact.
        bits: bits of the range that is used, 0 for all that the format has.
        block: elements along ``axis`` that share one scale; 0 is all of them. Scales then have the tensor's shape, with
            ``ceil(size / block)`` along ``axis``.
        scale_format: format of block scales: ``float8e4m3fn`` (with one float32 scale above them), ``float8e8m0``
            (powers of two); empty for float32.
        pair_safe: scales are such that no pair of neighbouring products can saturate 16 bits
            (`qcompiler.quant.saturation`).
    """

    format: str
    axis: int | None = None
    symmetric: bool = False
    dynamic: bool = False
    narrow: bool = False
    bits: int = 0
    block: int = 0
    scale_format: str = ""
    pair_safe: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """Return the smallest and largest stored number that quantization may produce."""
        storage = self.storage
        if storage.kind == "float":
            return storage.qmin, storage.qmax
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
        scale: float32, shape [] per tensor, [channels] per axis, or the tensor's shape with one number per block along
            the axis; all > 0 and finite. In the grid of ``spec.scale_format`` if there is one.
        zero_point: int64 of the same shape, inside the format's range; 0 for float formats.
        outer: the one scale above block scales that are stored as float8e4m3fn; 1 otherwise.
    """

    spec: QuantSpec
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((), np.int64))
    outer: float = 1.0

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
        if storage.scales_only:
            raise CalibrationError(f"{storage.name} holds scales only; no tensor can be stored in it")
        if storage.kind == "float" and self.zero_point.any():
            raise CalibrationError(f"{storage.name} has no zero point; found one that is not 0")
        if self.spec.block and (self.spec.axis is None or not self.scale.ndim):
            raise CalibrationError(
                f"blocks of {self.spec.block} need an axis and one scale per block; found axis {self.spec.axis} and "
                f"scales of shape {self.scale.shape}"
            )
        if (self.zero_point < storage.qmin).any() or (self.zero_point > storage.qmax).any():
            raise CalibrationError(f"a zero point lies outside {storage.name}")

    @property
    def effective(self) -> npt.NDArray[np.float32]:
        """Return the scales that elements are multiplied by: ``scale`` times ``outer``, in float32."""
        return self.scale if self.outer == 1.0 else (self.scale * np.float32(self.outer)).astype(np.float32)


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
        low: smallest value, [], [channels], or one per block.
        high: largest value, same shape.
    """
    storage = spec.storage
    if storage.kind == "float":
        return _float_params(spec, np.maximum(np.abs(low), np.abs(high)).astype(np.float64))
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


def _float_params(spec: QuantSpec, reach: npt.NDArray[np.float64]) -> QuantParams:
    """Return the scales that bring the largest magnitudes (``reach``) to the ends of a float format.

    Block scales in float8e8m0 follow the OCP Microscaling specification 1.0, section 6.3: 2 to the power of
    floor(log2(largest magnitude)) - emax, where emax is the exponent of the element format's largest number. Those in
    float8e4m3fn (NVFP4) are themselves quantized, under one float32 scale: largest magnitude / (6 x 448).
    """
    zero, most = np.zeros(reach.shape, np.int64), spec.storage.qmax
    tiny = float(np.finfo(np.float32).tiny)
    if spec.scale_format == "float8e8m0":
        emax = int(np.floor(np.log2(most)))
        exponent = np.floor(np.log2(np.maximum(reach, 2.0**-120))) - emax
        scale = np.where(reach > 0, np.exp2(np.clip(exponent, -126, 127)), 1.0)
        return QuantParams(spec, scale.astype(np.float32), zero)
    if spec.scale_format == "float8e4m3fn":
        grid = FORMATS["float8e4m3fn"]
        outer = outer_scale(spec, float(reach.max(initial=0.0)))
        wanted = (reach / most / np.float64(outer)).astype(np.float32)
        # The least positive number of the grid: a scale of 0 would be no scale.
        stored = np.clip(wanted, 2.0**-9, grid.qmax).astype(grid.dtype).astype(np.float32)
        return QuantParams(spec, np.where(reach > 0, stored, np.float32(1.0)), zero, float(outer))
    if spec.scale_format:
        raise CalibrationError(
            f"scales cannot be stored as {spec.scale_format}; expected float8e4m3fn, float8e8m0 or none"
        )
    scale = np.where(reach > 0, np.maximum(reach / most, tiny), 1.0)
    return QuantParams(spec, scale.astype(np.float32), zero)


def outer_scale(spec: QuantSpec, reach: float) -> np.float32:
    """Return the one scale above block scales in float8e4m3fn: the largest magnitude over both formats' largest."""
    most = spec.storage.qmax * FORMATS["float8e4m3fn"].qmax
    return np.float32(max(reach / most, float(np.finfo(np.float32).tiny)) if reach > 0 else 1.0)


def fixed_params(spec: QuantSpec, source: QuantSource, shape: tuple[int, ...] = ()) -> QuantParams:
    """Return the numbers that a ``fixed`` source carries, scalar if there is one.

    Args:
        spec: what they belong to.
        source: carries them flat.
        shape: the tensor's shape; needed for scales per block, which have its rank.
    """
    scale, zero = np.asarray(source.scale, np.float32), np.asarray(source.zero_point, np.int64)
    if spec.axis is None:
        scale, zero = scale.reshape(()), zero.reshape(())
    elif spec.block and shape:
        wanted = tuple(-(-n // spec.block) if i == spec.axis % len(shape) else n for i, n in enumerate(shape))
        scale, zero = scale.reshape(wanted), zero.reshape(wanted)
    return QuantParams(spec, scale, zero)

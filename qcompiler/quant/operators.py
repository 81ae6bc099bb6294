"""The NumPy truth of integer operators: what each fused operator computes, by rounding rule and accumulator.

Weighted operators accumulate products of integers exactly and round once, in `requantize`; the multiplier is taken in
float32 as engines do. Arithmetic operators (Add, Mul, Concat, pools, tables) are the real-number function of the
dequantized inputs, computed in float64 and rounded once. Specifications: QLinearConv, QLinearMatMul,
DynamicQuantizeLinear in ONNX; QLinearAdd and its kind in ONNX Runtime's contrib operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.quant.arithmetic import Float, Int, along, dequantize, requantize
from qcompiler.quant.spec import QuantParams, QuantSpec
from qcompiler.quant.window import Window, windows

Double = npt.NDArray[np.float64]
UNBOUNDED = (float("-inf"), float("inf"))
"""The interval of an operator without an activation."""


@dataclass(frozen=True)
class Quantized:
    """Integers and what they mean.

    Attributes:
        q: integers of any dtype and shape.
        params: scale and zero point; per-channel ones lie along ``params.spec.axis``.
    """

    q: npt.NDArray[Any]
    params: QuantParams

    @property
    def centred(self) -> Int:
        """Return q - zero_point, int64 of the same shape."""
        zero = along(self.params.zero_point, self.q.ndim, self.params.spec.axis)
        return np.asarray(self.q.astype(np.int64) - zero, np.int64)

    @property
    def real(self) -> Double:
        """Return the represented numbers in float64, without rounding."""
        scale = along(self.params.scale, self.q.ndim, self.params.spec.axis)
        return np.asarray(self.centred * scale.astype(np.float64), np.float64)


def bounded(
    accumulator: Int, multiplier: npt.ArrayLike, params: QuantParams, bounds: tuple[float, float] = UNBOUNDED
) -> Int:
    """Requantize behind an activation that lets through only ``bounds``, given in real units (Relu: 0 to inf).

    A bound between two steps is rounded like any other value.
    """
    q: Int = requantize(accumulator, multiplier, params)
    if bounds == UNBOUNDED:
        return q
    storage = params.spec.storage
    scaled = [np.rint(np.float32(b) / np.float32(params.scale)) + int(params.zero_point) for b in bounds]
    low, high = np.clip(scaled, storage.qmin, storage.qmax)
    return np.asarray(np.clip(q, low, high), np.int64)


def _product(x: Int, w: Int) -> Int:
    """Multiply matrices of small integers exactly: float64 holds every sum below 2**53, and is fast."""
    return np.asarray(np.matmul(x.astype(np.float64), w.astype(np.float64)), np.int64)


def _rescale(x: QuantParams, w: QuantParams, y: QuantParams) -> Float:
    """Return x scale * w scale / y scale in float32, [] or [channels]; the order of operations is that of engines."""
    return np.asarray(x.scale.astype(np.float32) * w.scale.astype(np.float32) / y.scale.astype(np.float32), np.float32)


def qlinear_matmul(
    x: Quantized, w: Quantized, y: QuantParams, bias: Int | None = None, bounds: tuple[float, float] = UNBOUNDED
) -> Int:
    """Multiply matrices on integers with a quantized output (QLinearMatMul, QGemm).

    Args:
        x: activation [..., M, K], per tensor.
        w: weight [..., K, N], per tensor or per column.
        y: parameters of the output, per tensor.
        bias: int32 [N] in units of x scale * w scale.
        bounds: interval of an activation behind the product, in real units.

    Returns:
        int64 [..., M, N] in y's range.
    """
    accumulator = _product(x.centred, w.centred)
    if bias is not None:
        accumulator = accumulator + bias.astype(np.int64).reshape(-1)
    return bounded(accumulator, _rescale(x.params, w.params, y), y, bounds)


def matmul_integer_to_float(x: Quantized, w: Quantized, bias: Float | Int | None = None) -> Float:
    """Multiply matrices on integers with a float output (MatMulIntegerToFloat, DynamicQuantizeMatMul, QGemm).

    Args:
        x: activation [..., M, K], per tensor.
        w: weight [..., K, N], per tensor or per column.
        bias: [N]; float32 is added after scaling, integers (units of x scale * w scale) to the accumulator.

    Returns:
        float32 [..., M, N].
    """
    scale = np.asarray(x.params.scale.astype(np.float32) * w.params.scale.astype(np.float32), np.float32)
    sums = _product(x.centred, w.centred)
    if bias is not None and bias.dtype.kind == "i":
        sums = sums + bias.astype(np.int64).reshape(-1)
    made = sums.astype(np.float32) * scale
    if bias is not None and bias.dtype.kind == "f":
        made = made + bias.astype(np.float32).reshape(-1)
    return np.asarray(made, np.float32)


def qlinear_conv(
    x: Quantized,
    w: Quantized,
    y: QuantParams,
    window: Window,
    *,
    bias: Int | None = None,
    group: int = 1,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Int:
    """Convolve on integers with a quantized output (QLinearConv); padding adds zeros, that is, x's zero point.

    Args:
        x: activation [B, C, *spatial], per tensor.
        w: weight [M, C / group, *kernel], per tensor or per output channel (axis 0).
        y: parameters of the output, per tensor.
        window: strides, dilations and pads, resolved against x's shape.
        bias: int32 [M] in units of x scale * w scale.
        group: number of groups.
        bounds: interval of an activation behind it, in real units.

    Returns:
        int64 [B, M, *output] in y's range.
    """
    patches = windows(x.centred, window, 0)
    batch, spatial = x.q.shape[0], patches.shape[2 : 2 + window.rank]
    out_channels, in_channels = w.q.shape[0], w.q.shape[1]
    # [B, C, *out, *kernel] -> [B, group, out positions, C / group * kernel]
    order = (0, *range(2, 2 + window.rank), 1, *range(2 + window.rank, 2 + 2 * window.rank))
    length = int(np.prod(w.q.shape[2:], dtype=np.int64))
    rows = patches.transpose(order).reshape(batch, -1, group, in_channels * length).transpose(0, 2, 1, 3)
    columns = w.centred.reshape(group, out_channels // group, -1).transpose(0, 2, 1)
    sums = _product(rows, columns).transpose(0, 1, 3, 2).reshape(batch, out_channels, *spatial)
    if bias is not None:
        sums = sums + along(bias.astype(np.int64).reshape(-1), sums.ndim, 1)
    multiplier = along(_rescale(x.params, w.params, y), sums.ndim, 1)
    return bounded(sums, multiplier, y, bounds)


def dynamic_quantize_linear(x: Float) -> Quantized:
    """Quantize to uint8 by the tensor's own range, widened to hold zero (ONNX DynamicQuantizeLinear).

    All in float32: scale = (max - min) / 255, zero point = clip(rint(-min / scale)), q as in QuantizeLinear. A tensor
    of zeros gets scale 1, as ONNX Runtime has it (the specification would divide by zero).

    Returns:
        uint8 integers of x's shape and their per-tensor parameters.
    """
    low = np.float32(min(x.min(initial=0.0), 0.0))
    high = np.float32(max(x.max(initial=0.0), 0.0))
    scale = np.float32(1.0) if high == low else np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    q = np.clip(np.rint(x.astype(np.float32) / scale) + zero, 0, 255).astype(np.uint8)
    params = QuantParams(QuantSpec("uint8", dynamic=True), np.asarray(scale), np.asarray(zero, np.int64))
    return Quantized(q, params)


def round_real(real: Double, y: QuantParams, bounds: tuple[float, float] = UNBOUNDED) -> Int:
    """Quantize numbers known in float64 (one rounding), behind an activation that lets through ``bounds``."""
    storage = y.spec.storage
    scaled = np.rint(np.clip(real, *bounds) / np.float64(y.scale)) + int(y.zero_point)
    return np.asarray(np.clip(scaled, storage.qmin, storage.qmax), np.int64)


def qlinear_add(a: Quantized, b: Quantized, y: QuantParams, bounds: tuple[float, float] = UNBOUNDED) -> Int:
    """Add two quantized tensors with broadcasting (QLinearAdd)."""
    return round_real(a.real + b.real, y, bounds)


def qlinear_mul(a: Quantized, b: Quantized, y: QuantParams, bounds: tuple[float, float] = UNBOUNDED) -> Int:
    """Multiply two quantized tensors with broadcasting (QLinearMul)."""
    return round_real(a.real * b.real, y, bounds)


def qlinear_concat(parts: Sequence[Quantized], axis: int, y: QuantParams) -> Int:
    """Concatenate (QLinearConcat): parts with y's own parameters are copied, others requantized from float32."""
    made = []
    for part in parts:
        same = part.params.scale == y.scale and part.params.zero_point == y.zero_point
        # A table over the 256 integers, made in float32: that is what engines do, and ties fall as they do there.
        made.append(part.q.astype(np.int64) if same else _quantize_float(dequantize(part.q, part.params), y))
    return np.concatenate(made, axis=axis)


def _quantize_float(x: Float, y: QuantParams) -> Int:
    storage = y.spec.storage
    scaled = np.rint(x / y.scale.astype(np.float32)).astype(np.float64)
    return np.asarray(np.clip(scaled + int(y.zero_point), storage.qmin, storage.qmax), np.int64)


def qlinear_average_pool(x: Quantized, y: QuantParams, window: Window, count_include_pad: bool = False) -> Int:
    """Average over windows (QLinearAveragePool).

    Args:
        x: [B, C, *spatial], per tensor.
        y: parameters of the output.
        window: kernel, strides, dilations and pads, resolved against x's shape.
        count_include_pad: whether explicit padding counts as zeros (room that ceil_mode adds never counts).
    """
    axes = tuple(range(-window.rank, 0))
    sums = windows(x.centred, window, 0).sum(axis=axes)
    inside = np.ones((1, 1, *x.q.shape[2:]), np.int64)
    counts = windows(inside, window, 1 if count_include_pad else 0).sum(axis=axes)
    return round_real(sums * np.float64(x.params.scale) / np.maximum(counts, 1), y)


def qlinear_global_average_pool(x: Quantized, y: QuantParams) -> Int:
    """Average over all spatial axes of [B, C, *spatial], kept as axes of length 1 (QLinearGlobalAveragePool)."""
    axes = tuple(range(2, x.q.ndim))
    count = int(np.prod(x.q.shape[2:], dtype=np.int64))
    sums = x.centred.sum(axis=axes, keepdims=True)
    return round_real(sums * np.float64(x.params.scale) / max(count, 1), y)


def qlinear_lookup(x: Quantized, function: Callable[[Double], Double], y: QuantParams) -> Int:
    """Apply a function of one number through a table of all integers that x's format holds."""
    storage = x.params.spec.storage
    entries = Quantized(np.arange(storage.qmin, storage.qmax + 1), x.params)
    return np.asarray(round_real(function(entries.real), y)[x.q.astype(np.int64) - storage.qmin], np.int64)


def qlinear_sigmoid(x: Quantized, y: QuantParams) -> Int:
    """Apply 1 / (1 + exp(-x)) (QLinearSigmoid)."""

    def sigmoid(v: Double) -> Double:
        small = np.exp(-np.abs(v))  # cannot overflow
        return np.asarray(np.where(v >= 0, 1.0, small) / (1.0 + small))

    return qlinear_lookup(x, sigmoid, y)


def qlinear_leaky_relu(x: Quantized, y: QuantParams, alpha: float = 0.01) -> Int:
    """Apply max(x, 0) + alpha * min(x, 0) (QLinearLeakyRelu); ``alpha`` as float32."""
    slope = float(np.float32(alpha))
    return qlinear_lookup(x, lambda v: np.where(v >= 0, v, v * slope), y)

"""The NumPy truth: what every quantized operation means, bit for bit.

Rounding is to nearest, ties to even, as QuantizeLinear specifies, also to the small float formats, which saturate;
accumulators are int64 so that none overflows here (an engine's int32 accumulator agrees as long as the true sum fits,
which K <= 2**15 products of 8 bits guarantee).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantParams, QuantSpec, affine_params

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int64]


def along(values: npt.NDArray[Any], rank: int, axis: int | None) -> npt.NDArray[Any]:
    """Shape per-channel numbers [channels] for broadcasting along ``axis`` of a tensor of ``rank``."""
    if axis is None or values.ndim == 0:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = values.size
    return values.reshape(shape)


def spread(values: npt.NDArray[Any], params: QuantParams, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Shape numbers per tensor, channel or block for broadcasting over a tensor.

    Args:
        values: one number per scale of ``params``.
        params: whose axis and block they follow.
        shape: the tensor's shape.

    Raises:
        CalibrationError: the number of blocks does not fit the tensor.
    """
    spec = params.spec
    if not spec.block:
        return along(values, len(shape), spec.axis)
    assert spec.axis is not None  # QuantParams sees to it
    axis = spec.axis % len(shape)
    wanted = tuple(-(-n // spec.block) if i == axis else n for i, n in enumerate(shape))
    if values.shape != wanted:
        raise CalibrationError(
            f"blocks of {spec.block} along axis {axis} of a tensor {shape} need scales of shape {wanted}; "
            f"found {values.shape}"
        )
    cut = tuple(slice(n) if i == axis else slice(None) for i, n in enumerate(shape))
    return np.repeat(values, spec.block, axis)[cut]


def quantize(x: Array, params: QuantParams) -> Array:
    """Quantize float numbers as ONNX QuantizeLinear does.

    To integers: saturate(round_half_even(x / scale) + zero_point); to a float format: x / scale rounded to the nearest
    number of the format, ties to the even mantissa, and saturated.

    Args:
        x: float array of any shape.
        params: scale and zero point; per-axis and per-block numbers lie along ``params.spec.axis``.

    Returns:
        An array of x's shape inside the format's range: int64, or float32 numbers that the float format holds.
    """
    scale = spread(params.effective, params, x.shape)
    low, high = params.spec.limits
    if params.spec.storage.kind == "float":
        ratio = np.clip(x.astype(np.float32) / scale.astype(np.float32), low, high)
        return ratio.astype(params.spec.storage.dtype).astype(np.float32)
    zero = spread(params.zero_point, params, x.shape)
    # The quotient is taken in float32, as engines do: a float64 one rounds other ties.
    scaled = np.rint(x.astype(np.float32) / scale.astype(np.float32)).astype(np.float64)
    return np.asarray(np.clip(scaled + zero, low, high), np.int64)


def dequantize(q: npt.NDArray[Any], params: QuantParams) -> Float:
    """Turn stored numbers into float32: (q - zero_point) * scale (ONNX DequantizeLinear)."""
    scale = spread(params.effective, params, q.shape)
    if params.spec.storage.kind == "float":
        return np.asarray(q.astype(np.float32) * scale, np.float32)
    zero = spread(params.zero_point, params, q.shape)
    return np.asarray((q.astype(np.int64) - zero).astype(np.float32) * scale, np.float32)


def requantize(accumulator: npt.NDArray[np.int64], multiplier: npt.ArrayLike, params: QuantParams) -> Int:
    """Scale an integer accumulator to a quantized output: saturate(rint(acc * multiplier) + zero_point).

    Args:
        accumulator: int64, any shape; its unit is ``multiplier`` times the output's scale.
        multiplier: input scale x weight scale / output scale, broadcastable, float32.
        params: the output's parameters (per tensor).
    """
    storage = params.spec.storage
    scaled = np.rint(accumulator.astype(np.float32) * np.asarray(multiplier, np.float32)).astype(np.float64)
    return np.clip(scaled + int(params.zero_point), storage.qmin, storage.qmax).astype(np.int64)


def weight_params(weight: Array, spec: QuantSpec) -> QuantParams:
    """Find the parameters of a constant weight from its own largest values (round-to-nearest).

    A float16 or bfloat16 weight is taken as float32.
    """
    weight = weight.astype(np.float32) if weight.dtype != np.float64 else weight
    if spec.block:
        return affine_params(spec, *_block_extremes(weight, spec))
    axes = None if spec.axis is None else tuple(i for i in range(weight.ndim) if i != spec.axis)
    if weight.size == 0:
        count = () if spec.axis is None else (weight.shape[spec.axis],)
        return QuantParams(spec, np.ones(count, np.float32), np.zeros(count, np.int64))
    return affine_params(spec, weight.min(axis=axes), weight.max(axis=axes))


def _block_extremes(weight: Array, spec: QuantSpec) -> tuple[Array, Array]:
    """Return the smallest and largest number of each block along the axis; the last block may be short."""
    assert spec.axis is not None
    axis = spec.axis % weight.ndim
    starts = np.arange(0, weight.shape[axis], spec.block)
    return np.minimum.reduceat(weight, starts, axis), np.maximum.reduceat(weight, starts, axis)


def fit_bias(weight: QuantParams, x_scale: float, bias: Float, weight_is_zero: npt.NDArray[np.bool_]) -> QuantParams:
    """Raise weight scales where the int32 bias in units of x_scale * w_scale would not fit.

    A channel whose weights are all zero has no scale of its own; it gets the one that resolves its bias best.

    Args:
        weight: parameters of the weight, per channel or per tensor.
        x_scale: scale of the activation.
        bias: float32 [channels].
        weight_is_zero: bool [channels], channels without any weight.
    """
    least = np.abs(bias.astype(np.float64)) / (x_scale * 2.0**30)
    if weight.scale.ndim == 0:
        scale = np.maximum(weight.scale, least.max(initial=0.0)).astype(np.float32)
        return QuantParams(weight.spec, scale, weight.zero_point)
    own = np.where(weight_is_zero & (bias != 0), 0.0, weight.scale.astype(np.float64))
    scale = np.maximum(np.maximum(own, least), 1e-30)
    return QuantParams(weight.spec, scale.astype(np.float32), weight.zero_point)


def bias_scale(x: QuantParams, weight: QuantParams) -> Float:
    """Return the scale an int32 bias must have: activation scale x weight scale, in float32."""
    return (x.scale.astype(np.float32) * weight.scale.astype(np.float32)).astype(np.float32)


def quantize_bias(bias: Float, scale: Float) -> npt.NDArray[np.int32]:
    """Quantize a bias to int32 in units of ``scale`` (zero point 0)."""
    limits = np.iinfo(np.int32)
    q = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    return np.clip(q, limits.min, limits.max).astype(np.int32)

"""The epilogue in NumPy: the same operations in the same order, each rounded to float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from scipy.special import erf, expit

from qcompiler.engine import Array
from qcompiler.kernels.contract import Options
from qcompiler.quant.arithmetic import quantize
from qcompiler.quant.formats import FORMATS
from qcompiler.quant.spec import QuantParams, QuantSpec

Float = npt.NDArray[np.float32]


def finish(value: Float, given: Mapping[str, Any], options: Options) -> Array:
    """Turn scaled sums into the output: bias, residual, activation, output scale, rounding.

    Args:
        value: float32 [..., M, N], sums times their multiplier.
        given: arguments of the kernel by name.
        options: complete.
    """
    if options["bias"] == "channel":
        value = value + given["bias"].astype(np.float32)
    if options["residual"] == "before":
        value = value + _residual(given)
    value = activate(value, options["activation"], given)
    if options["residual"] == "after":
        value = value + _residual(given)
    if options["out_scale"] == "scalar":
        value = value * np.float32(given["out_inverse"])
    return store(value, options["out"], int(given.get("out_zero", 0)))


def activate(value: Float, activation: str, given: Mapping[str, Any]) -> Float:
    """Apply an activation of ``ACTIVATIONS``; functions are exact (float64) and rounded once, products are float32."""
    x = value.astype(np.float64)
    match activation:
        case "none":
            return value
        case "relu":
            return np.fmax(value, np.float32(0))
        case "clip":
            return np.fmin(np.fmax(value, np.float32(given["low"])), np.float32(given["high"]))
        case "leaky_relu":
            return np.where(value < 0, value * np.float32(given["low"]), value)
        case "gelu":
            result = 0.5 * x * (1 + erf(x / np.sqrt(2)))
        case "gelu_tanh":
            result = x * expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
        case "silu":
            result = x * expit(x)
        case "sigmoid":
            result = expit(x)
        case "tanh":
            result = np.tanh(x)
        case _:
            result = x * np.clip(x / 6 + 0.5, 0, 1)
    return np.asarray(result, np.float32)


def store(value: Float, dtype: str, zero: int) -> Array:
    """Round float32 numbers to an output dtype; 8-bit ones saturate, ties go to even (`qcompiler.quant.arithmetic`)."""
    if dtype in ("int8", "uint8"):
        params = QuantParams(QuantSpec(dtype), np.ones((), np.float32), np.asarray(zero, np.int64))
        return requantize_float(value, params).astype(dtype)
    if dtype == "float8e4m3fn":
        storage = FORMATS[dtype].dtype
        return quantize(value, QuantParams(QuantSpec(dtype), np.ones((), np.float32))).astype(storage)
    if dtype == "bfloat16":
        return value.astype(ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):  # float16 overflows to infinity, as on a device
        return value.astype(dtype)


def requantize_float(value: Float, params: QuantParams) -> npt.NDArray[np.int64]:
    """Round scaled float32 numbers: saturate(rint(value) + zero point), as `qcompiler.quant.arithmetic.requantize`.

    A NaN gives the smallest stored number, as the devices' maximum drops it.
    """
    finite = np.where(np.isnan(value), np.float32(-np.inf), value)
    storage = params.spec.storage
    zero = int(params.zero_point)
    return np.asarray(np.rint(np.clip(finite, storage.qmin - zero, storage.qmax - zero)) + zero, np.int64)


def _residual(given: Mapping[str, Any]) -> Float:
    stored = given["residual"].astype(np.float32) - np.float32(given["residual_zero"])
    return np.asarray(stored * np.float32(given["residual_scale"]), np.float32)

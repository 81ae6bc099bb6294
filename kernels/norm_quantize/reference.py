"""``norm_quantize`` in NumPy: float32 throughout, sums in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array
from qcompiler.kernels.contract import Options
from qcompiler.quant.arithmetic import quantize
from qcompiler.quant.formats import FORMATS
from qcompiler.quant.spec import QuantParams, QuantSpec

Float = npt.NDArray[np.float32]


def reference(given: Mapping[str, Any], options: Options) -> dict[str, Array]:
    """Compute the kernel's outputs.

    Args:
        given: arguments by name, checked against the contract.
        options: complete.

    Returns:
        ``out`` [M, N], and by the options ``scales`` [M], ``group_scales`` [M, N / group], ``zeros`` [M], ``kept`` and
        ``normed`` [M, N].
    """
    found: dict[str, Array] = {}
    h = given["x"].astype(np.float32)
    if options["residual"] != "none":
        h = h + given["residual"].astype(np.float32)
    if options["residual"] == "keep":
        found["kept"] = h.astype(given["x"].dtype)
        h = found["kept"].astype(np.float32)
    y = normalize(h, given, options)
    if options["also"] == "normed":
        found["normed"] = y.astype(given["x"].dtype)
    match options["scale"]:
        case "none":
            found["out"] = y.astype(ml_dtypes.bfloat16 if options["out"] == "bfloat16" else options["out"])
        case "static":
            found["out"] = _quantize(y, np.float32(given["scale"]), int(given["zero"]), options["out"])
        case "group":
            grouped = y.reshape(y.shape[0], -1, int(options["group"]))
            scales = symmetric_scales(grouped, options["out"])
            found["out"] = _quantize(grouped, scales[..., None], 0, options["out"]).reshape(y.shape)
            found["group_scales"] = scales
        case _ if options["zeros"] == "token":
            scales, zeros = dynamic_parameters(y)
            ratio = np.rint(y / scales[:, None]) + zeros[:, None]
            found |= {"out": np.clip(ratio, -128, 127).astype(np.int8), "scales": scales, "zeros": zeros}
        case _:
            scales = symmetric_scales(y, options["out"])
            found |= {"out": _quantize(y, scales[:, None], 0, options["out"]), "scales": scales}
    return found


def normalize(h: Float, given: Mapping[str, Any], options: Options) -> Float:
    """Normalize rows [M, N], each operation rounded to float32, sums and square roots taken exactly."""
    if options["norm"] != "none":
        if options["norm"] == "layer":
            h = h - h.mean(-1, keepdims=True, dtype=np.float64).astype(np.float32)
        square = np.mean(np.square(h.astype(np.float64)), -1, keepdims=True).astype(np.float32)
        factor = np.float32(1) / np.sqrt(square + np.float32(given["eps"]))
        h = h * factor * given["gamma"].astype(np.float32)
    return h + given["beta"].astype(np.float32) if options["beta"] == "channel" else h


def symmetric_scales(y: Float, dtype: str) -> Float:
    """Return the scale of each last axis: largest magnitude over the format's largest number, 1 for zeros."""
    reach = np.abs(y).max(-1)
    scale = np.maximum(reach / np.float32(FORMATS[dtype].qmax), np.finfo(np.float32).tiny)
    return np.asarray(np.where(reach > 0, scale, np.float32(1)), np.float32)


def dynamic_parameters(y: Float) -> tuple[Float, npt.NDArray[np.int32]]:
    """Return scale and zero point of each row for s8, by the rule of ONNX DynamicQuantizeLinear less 128."""
    low, high = np.minimum(y.min(-1), 0), np.maximum(y.max(-1), 0)
    scale = np.maximum((high - low) / np.float32(255), np.finfo(np.float32).tiny)
    scale = np.asarray(np.where(high > low, scale, np.float32(1)), np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 255) - 128
    return scale, zero.astype(np.int32)


def _quantize(y: Float, scale: Any, zero: int, dtype: str) -> Array:
    """Quantize by `qcompiler.quant.arithmetic`; its quotient is taken here, so that scales may lie along any axes."""
    one = QuantParams(QuantSpec(dtype), np.ones((), np.float32), np.asarray(zero, np.int64))
    return quantize(np.asarray(y / scale, np.float32), one).astype(FORMATS[dtype].dtype)

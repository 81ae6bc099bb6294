"""``pointwise`` in NumPy, bit for bit for piecewise linear activations; also how tables are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.reference import activate, store
from qcompiler.kernels.pointwise.contract import QUANTIZED

Real = npt.NDArray[Any]


def reference(given: Mapping[str, Any], options: Options) -> dict[str, Array]:
    """Compute the kernel's outputs.

    Args:
        given: arguments by name, checked against the contract.
        options: complete.

    Returns:
        ``out`` of shape [P, M, N].
    """
    if options["op"] == "table":
        least = -128 if given["x"].dtype == np.int8 else 0
        return {"out": given["table"][given["x"].astype(np.int64) - least]}
    kind = np.float64 if options["arithmetic"] == "float64" else np.float32
    value = _real(given, "a", kind)
    if options["op"] != "convert":
        value = _combine(options["op"], value, _real(given, "b", kind))
    if options["third"] != "none":
        value = _combine(options["third"], value, _real(given, "c", kind))
    value = _activated(value, given, options["activation"])
    if options["out"] not in QUANTIZED:
        return {"out": store(value, options["out"], 0)}
    scale = np.float32(given["out_scale"])
    with np.errstate(over="ignore"):
        scaled: Real = value * (np.float32(1) / scale) if options["arithmetic"] == "fast" else value / kind(scale)
    return {"out": store(scaled, options["out"], int(given["out_zero"]))}


def _real(given: Mapping[str, Any], name: str, kind: type[np.floating[Any]]) -> Real:
    stored = given[name].astype(np.float32) - np.float32(given[f"{name}_zero"])
    return np.asarray(stored.astype(kind) * kind(np.float32(given[f"{name}_scale"])))


def _combine(op: str, first: Real, second: Real) -> Real:
    made: Real = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[op](first, second)
    return made


def _activated(value: Real, given: Mapping[str, Any], activation: str) -> Real:
    if value.dtype == np.float32:
        return activate(value, activation, given)
    match activation:
        case "relu":
            return np.fmax(value, 0.0)
        case "clip":
            return np.fmin(np.fmax(value, float(np.float32(given["low"]))), float(np.float32(given["high"])))
        case "leaky_relu":
            return np.where(value < 0, value * float(np.float32(given["low"])), value)
        case _:
            return value


def make_table(
    function: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    x: tuple[str, float, int],
    out: tuple[str, float, int],
) -> Array:
    """Return the 256 entries of a function of one quantized tensor.

    Args:
        function: of float64 real numbers, element by element.
        x: dtype, scale and zero point of the argument.
        out: the same of the result; scale and zero point are 1 and 0 for floats.
    """
    dtype, scale, zero = x
    codes = np.arange(-128, 128) if dtype == "int8" else np.arange(256)
    with np.errstate(all="ignore"):
        real = np.asarray(function((codes - zero) * np.float64(np.float32(scale))), np.float64)
        return store(np.asarray(real / np.float64(np.float32(out[1]))), out[0], out[2])

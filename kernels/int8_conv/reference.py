"""``int8_conv`` in NumPy, bit for bit for piecewise linear activations; also how weights are packed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.reference import finish
from qcompiler.kernels.int8_matmul.reference import to_signed


def reference(given: Mapping[str, Any], options: Options) -> dict[str, Array]:
    """Compute the kernel's outputs.

    Args:
        given: arguments by name, checked against the contract.
        options: complete.

    Returns:
        ``out`` of shape [N, P, Q, O].
    """
    total = window_sums(given, options, int(given.get("x_zero", 0))).astype(np.int64)
    if options["offset"] == "channel":
        total = total + given["offset"]
    if options["out"] == "int32":
        return {"out": total.astype(np.int32)}
    factor = given["multiplier"] if options["multiplier"] == "channel" else np.float32(given["scale"])
    return {"out": finish(total.astype(np.float32) * np.asarray(factor, np.float32), given, options)}


def window_sums(given: Mapping[str, Any], options: Options, zero: int) -> npt.NDArray[np.float64]:
    """Return the sums of products [N, P, Q, O] in float64, which holds those of integers exactly, and is fast.

    Args:
        given: arguments by name: ``x``, the weights and the geometry.
        options: with ``kind``.
        zero: what lies outside the picture.
    """
    depthwise = options["kind"] == "depthwise"
    weight = given["w_rso"].transpose(2, 0, 1)[..., None] if depthwise else given["w"]
    padded = padded_picture(given, zero).astype(np.float64)
    columns, height, width, _ = weight.shape
    strides = int(given["stride_h"]), int(given["stride_w"])
    steps = int(given["dilation_h"]), int(given["dilation_w"])
    lengths = [(padded.shape[1 + i] - (n - 1) * steps[i] - 1) // strides[i] + 1 for i, n in enumerate((height, width))]
    group = padded.shape[3] if depthwise else int(given["group"])
    inputs, outputs = padded.shape[3] // group, columns // group
    total = np.zeros((padded.shape[0], *lengths, columns))
    for r in range(height):
        for s in range(width):
            rows = slice(r * steps[0], r * steps[0] + (lengths[0] - 1) * strides[0] + 1, strides[0])
            places = slice(s * steps[1], s * steps[1] + (lengths[1] - 1) * strides[1] + 1, strides[1])
            part = padded[:, rows, places].reshape(*total.shape[:3], group, inputs)
            taps = weight[:, r, s, :inputs].astype(np.float64).reshape(group, outputs, inputs)
            total += np.einsum("npqgc,goc->npqgo", part, taps, optimize=True).reshape(total.shape)
    return np.asarray(total)


def padded_picture(given: Mapping[str, Any], zero: int) -> Array:
    """Return ``x`` with the zero point around it."""
    rows, places = ((int(given[f"pad_{a}"]), int(given[f"pad_{b}"])) for a, b in (("top", "bottom"), ("left", "right")))
    return np.pad(given["x"], ((0, 0), rows, places, (0, 0)), constant_values=zero)


def pack_weight(weight: Array, channels: int | None = None) -> npt.NDArray[np.int8]:
    """Turn weights [O, C/g, R, S] or [O, C/g, R], s8 or u8, into s8 [O, R, S, D] for kind dense.

    Weights in u8 become s8 less 128, so their zero points must be 128.

    Args:
        weight: as ONNX has it.
        channels: D; zeros fill it. C/g if None.
    """
    plane = weight if weight.ndim == 4 else weight[:, :, None]
    signed = to_signed(plane).transpose(0, 2, 3, 1)
    more = 0 if channels is None else channels - signed.shape[3]
    return np.ascontiguousarray(np.pad(signed, ((0, 0), (0, 0), (0, 0), (0, more))))


def pack_depthwise(weight: Array) -> npt.NDArray[np.int8]:
    """Turn weights [O, 1, R, S] or [O, 1, R], s8 or u8, into s8 [R, S, O] for kind depthwise."""
    return np.ascontiguousarray(pack_weight(weight)[..., 0].transpose(1, 2, 0))


def fold_zero_point(weight: Array, zero: int, bias: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.int32]:
    """Return ``offset`` for a zero point of ``x``: bias - zero * sum of an output's weights.

    Args:
        weight: s8, as ONNX has it, [O, ...].
        zero: zero point of ``x`` as s8.
        bias: int32 [O] in the unit of the sum.
    """
    sums = weight.astype(np.int64).reshape(len(weight), -1).sum(-1)
    return np.asarray(-np.int64(zero) * sums + (0 if bias is None else bias.astype(np.int64)), np.int32)

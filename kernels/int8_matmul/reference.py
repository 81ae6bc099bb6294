"""``int8_matmul`` in NumPy, bit for bit for piecewise linear activations; also how weights are packed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.reference import finish


def reference(given: Mapping[str, Any], options: Options) -> dict[str, Array]:
    """Compute the kernel's outputs.

    Args:
        given: arguments by name, checked against the contract.
        options: complete.

    Returns:
        ``out`` of shape [B, M, N], or [G, H, M, N].
    """
    total = _sum(given, options)
    if options["out"] == "int32":
        return {"out": total.astype(np.int32)}
    factor: Any = given["multiplier"] if options["multiplier"] == "channel" else np.float32(given["scale"])
    if options["a_scale"] == "token":  # the scales first, as ONNX Runtime's MatMulIntegerToFloat
        factor = given["a_scale"][..., None] * factor
    elif options["a_scale"] == "tensor":
        factor = given["a_scale_one"] * factor
    return {"out": finish(total.astype(np.float32) * np.asarray(factor, np.float32), given, options)}


def _sum(given: Mapping[str, Any], options: Options) -> npt.NDArray[np.int64]:
    """Return the sum of products of numbers less their zero points, and the offset, int64, of the output's shape."""
    weight = given["w"].swapaxes(-1, -2) if options["w_layout"] == "nk" else given["w_kn"]
    a, w = given["a"].astype(np.int64), weight.astype(np.int64)
    if options["zeros"] == "kernel":
        a, w = a - int(given["a_point"]), w - int(given["w_point"])
    total = _product(a, w)
    zero = {"token": lambda: given["a_zero"][..., None], "tensor": lambda: given["a_zero_one"]}.get(options["zeros"])
    if zero is not None:
        total = total - zero().astype(np.int64) * given["column_sum"].astype(np.int64)
    return np.asarray(total + given["offset"] if options["offset"] == "channel" else total, np.int64)


def _product(a: npt.NDArray[np.int64], w: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Multiply matrices of small integers exactly: float64 holds all sums below 2**53, and is far faster."""
    return np.asarray(np.matmul(a.astype(np.float64), w.astype(np.float64)), np.int64)


def column_sums(w: Array) -> npt.NDArray[np.int32]:
    """Return the sum over K of weights [..., N, K], int32 [..., N]."""
    return np.asarray(w.astype(np.int64).sum(-1), np.int32)


def pack_weight(weight: Array) -> npt.NDArray[np.int8]:
    """Turn weights [K, N] or [W, K, N], s8 or u8, into s8 [W, N, K16] with K padded to a multiple of 16 by zeros.

    Weights in u8 become s8 less 128, so their zero points must be 128 (0 after it): others need ``zeros`` kernel.
    """
    stacked = weight if weight.ndim == 3 else weight[None]
    signed = to_signed(stacked).swapaxes(-1, -2)
    return np.ascontiguousarray(np.pad(signed, ((0, 0), (0, 0), (0, -signed.shape[-1] % 16))))


def to_signed(stored: Array) -> npt.NDArray[np.int8]:
    """Return u8 numbers as s8, less 128; their zero point becomes 128 less, too. Numbers in s8 stay."""
    return stored if stored.dtype == np.int8 else (stored ^ 0x80).view(np.int8)


def fold_zero_point(w: Array, zero: int, bias: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.int32]:
    """Return the ``offset`` of a static zero point of ``a``: bias - zero * sum_k w.

    Args:
        w: packed weights [1, N, K].
        zero: zero point of ``a`` as s8.
        bias: int32 [N] in the unit of the sum.
    """
    total = -np.int64(zero) * w[0].astype(np.int64).sum(-1) + (0 if bias is None else bias.astype(np.int64))
    return np.asarray(total, np.int32)

"""``fp8_matmul`` in NumPy: sums in float64, all after them in float32; also how block scales are found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.reference import finish
from qcompiler.kernels.fp8_matmul.contract import SCALE_BLOCK


def reference(given: Mapping[str, Any], options: Options) -> dict[str, Array]:
    """Compute the kernel's outputs.

    Args:
        given: arguments by name, checked against the contract.
        options: complete.

    Returns:
        ``out`` of shape [B, M, N]. The kernel's differs by its float32 sums: at most K * 2**-24 times the sum of the
        magnitudes of all terms, before the output is rounded (on sm90 more, see the contract).
    """
    a = given["a"].astype(np.float64)
    w = given["w"].astype(np.float64)
    if options["multiplier"] == "block":
        a = a * _spread(given["a_blocks"], -1)[..., : a.shape[-1]]
        w = w * _spread(_spread(given["w_scale"], -1), -2)[: w.shape[-2], : w.shape[-1]]
        return {"out": finish(np.matmul(a, w.swapaxes(-1, -2)).astype(np.float32), given, options)}
    factor: Any = given["multiplier"] if options["multiplier"] == "channel" else np.float32(given["scale"])
    if options["a_scale"] == "token":
        factor = given["a_scale"][..., None] * factor
    elif options["a_scale"] == "tensor":
        factor = given["a_scale_one"] * factor
    total = np.matmul(a, w.swapaxes(-1, -2)).astype(np.float32)
    return {"out": finish(total * np.asarray(factor, np.float32), given, options)}


def _spread(scales: Array, axis: int) -> npt.NDArray[np.float64]:
    return np.repeat(scales.astype(np.float64), SCALE_BLOCK, axis)

"""``float_matmul`` in NumPy: operands as the tensor cores take them, sums in float64, all after them in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.reference import finish

TF32_ERROR = 2.0**-10
"""Greatest relative error of a number by TF32: hardware may cut the 13 bits off that it does not keep."""


def reference(given: Mapping[str, Any], options: Options) -> dict[str, Array]:
    """Compute the kernel's outputs from operands that are not rounded to TF32.

    Args:
        given: arguments by name, checked against the contract.
        options: complete.

    Returns:
        ``out`` of shape [B, M, N], or [G, H, M, N]. The kernel's differs by its float32 sums, at most K * 2**-24 times
        the sum of the magnitudes of all terms; on a device, for operands of float32, by twice `TF32_ERROR` times it.
    """
    w = given["w"].swapaxes(-1, -2) if options["w_layout"] == "nk" else given["w_kn"]
    total: npt.NDArray[np.float32] = np.matmul(given["a"].astype(np.float64), w.astype(np.float64)).astype(np.float32)
    if options["factor"] == "scalar":
        total = total * np.float32(given["scale"])
    return {"out": finish(total, given, options)}

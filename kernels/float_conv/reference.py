"""``float_conv`` in NumPy: sums in float64, all after them in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qcompiler.engine import Array
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.reference import finish
from qcompiler.kernels.int8_conv.reference import window_sums


def reference(given: Mapping[str, Any], options: Options) -> dict[str, Array]:
    """Compute the kernel's outputs from operands that are not rounded to TF32.

    Args:
        given: arguments by name, checked against the contract.
        options: complete.

    Returns:
        ``out`` of shape [N, P, Q, O]. The kernel's differs as that of ``float_matmul`` does, K being the length of the
        sum over r, s and c.
    """
    return {"out": finish(np.asarray(window_sums(given, options, 0), np.float32), given, options)}

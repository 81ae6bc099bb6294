"""Every operator that has a torch function."""

from __future__ import annotations

from collections.abc import Mapping

from qcompiler.backends.triton.torch_ops.call import Function
from qcompiler.backends.triton.torch_ops.elementwise import ELEMENTWISE
from qcompiler.backends.triton.torch_ops.linear import LINEAR
from qcompiler.backends.triton.torch_ops.moving import MOVING
from qcompiler.backends.triton.torch_ops.quantization import QUANTIZATION
from qcompiler.backends.triton.torch_ops.reducing import REDUCING
from qcompiler.backends.triton.torch_ops.resizing import RESIZING
from qcompiler.backends.triton.torch_ops.windows import WINDOWS

FUNCTIONS: Mapping[str, Function] = {
    **ELEMENTWISE, **MOVING, **REDUCING, **LINEAR, **WINDOWS, **QUANTIZATION, **RESIZING,
}  # fmt: skip
"""Torch function by ONNX operator; If, Loop and Scan are the executor's."""

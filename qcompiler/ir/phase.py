"""The phases a model goes through; a pass declares which one it needs and which one it gives."""

from __future__ import annotations

import enum


class Phase(enum.IntEnum):
    """One representation of quantization at a time."""

    FLOAT = 0
    """Plain ONNX."""
    PLANNED = 1
    """The same graph, and a plan beside it."""
    QDQ = 2
    """QuantizeLinear and DequantizeLinear in the graph."""
    FUSED = 3
    """Integer operators of the ``qcompiler`` domain, as model-local functions."""
    LOWERED = 4
    """Only what the target lists."""

"""Operator-set versions and operator definitions, as the onnx package has them."""

from __future__ import annotations

import onnx_ir as ir
from onnx import defs

INTERNAL_OPSET = 21
"""The ONNX operator set that the compiler works in; a newer model keeps its own."""

OLDEST_OPSET = 7
"""The oldest operator set the compiler works in when a model cannot be raised further."""

LEAST_LOWERED = 13
"""The oldest operator set that a model is lowered to: below it QuantizeLinear has no axis."""

NOTE = "qcompiler.opset"
"""Metadata key of a model that stayed below the internal operator set, and why."""

MEANING_CHANGED = frozenset({("GroupNormalization", 21), ("GridSample", 20), ("Scan", 9), ("RoiAlign", 16)})
"""Versions whose signature alone does not show that the operator means something else."""


def onnx_opset(model: ir.Model) -> int:
    """Return the version of the ONNX operator set, or 0 if the model imports none."""
    return model.opset_imports.get("", 0)


def schema_of(op_type: str, opset: int, domain: str = "") -> defs.OpSchema | None:
    """Return an operator's definition in an operator set, or None if it has none there."""
    try:
        return defs.get_schema(op_type, opset, domain)
    except defs.SchemaError:
        return None

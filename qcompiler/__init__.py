"""qcompiler: a graph-level quantization compiler for ONNX.

In Python::

    import qcompiler
    compiled = qcompiler.compile("model.onnx", calibration=feeds)
    compiled.save("model.int8.onnx")
    print(compiled.report.to_dict()["speedup"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcompiler.errors import (
    BudgetError,
    CalibrationError,
    ModelError,
    PassError,
    QCompilerError,
    TargetError,
    VerifyError,
)

if TYPE_CHECKING:
    from qcompiler.api import calibrate, compile, compile_together, load
    from qcompiler.calibration.source_options import SourceOptions
    from qcompiler.calibration.statistics import Statistics
    from qcompiler.compiled import CompiledModel
    from qcompiler.compiled_set import CompiledSet
    from qcompiler.decisions import Decisions
    from qcompiler.doors.graphsurgeon import from_graphsurgeon as from_graphsurgeon
    from qcompiler.doors.graphsurgeon import to_graphsurgeon as to_graphsurgeon
    from qcompiler.engine import ShapeRange
    from qcompiler.ir_passes import ir_pass
    from qcompiler.recipes.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CalibrationError",
    "CompiledModel",
    "CompiledSet",
    "Decisions",
    "ModelError",
    "PassError",
    "QCompilerError",
    "Recipe",
    "ShapeRange",
    "SourceOptions",
    "Statistics",
    "TargetError",
    "VerifyError",
    "calibrate",
    "compile",
    "compile_together",
    "ir_pass",
    "load",
]

# Engines load on first use: importing the package must not start ONNX Runtime.
_LAZY = {
    "calibrate": "qcompiler.api",
    "compile": "qcompiler.api",
    "compile_together": "qcompiler.api",
    "ir_pass": "qcompiler.ir_passes",
    "load": "qcompiler.api",
    "CompiledModel": "qcompiler.compiled",
    "CompiledSet": "qcompiler.compiled_set",
    "Decisions": "qcompiler.decisions",
    "Recipe": "qcompiler.recipes.recipe",
    "ShapeRange": "qcompiler.engine",
    "SourceOptions": "qcompiler.calibration.source_options",
    "Statistics": "qcompiler.calibration.statistics",
    # A door to another library: by name only, since a star import should not ask for it.
    "from_graphsurgeon": "qcompiler.doors.graphsurgeon",
    "to_graphsurgeon": "qcompiler.doors.graphsurgeon",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'qcompiler' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)

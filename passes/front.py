"""The passes in front of every build, and of every calibration: from what was imported to the canonical FLOAT graph."""

from __future__ import annotations

from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.import_qdq import ImportQdq
from qcompiler.passes.widen_half_precision import WidenHalfPrecision
from qcompiler.pipeline.base import Pass


def front_passes() -> tuple[Pass, ...]:
    """Return the passes that make the canonical graph, the same for every target."""
    return WidenHalfPrecision(), ImportQdq(), Canonicalize()

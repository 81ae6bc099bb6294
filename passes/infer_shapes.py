"""Infer types and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir.phase import Phase
from qcompiler.ir.shapes import infer_shapes
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class InferShapes(Pass):
    """Infer the types and shapes that are not known yet."""

    needs: ClassVar[Phase | tuple[Phase, ...]] = (Phase.FLOAT, Phase.PLANNED, Phase.QDQ)

    def run(self, state: CompileState) -> int:
        """Infer in place; return how many values became better known."""
        return infer_shapes(state.model)

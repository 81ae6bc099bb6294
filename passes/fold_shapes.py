"""Fold shape arithmetic as far as the shapes are known."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompiler.ir.graph import is_op
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.language import Rule
from qcompiler.patterns.shape_arithmetic import SHAPE_ARITHMETIC
from qcompiler.patterns.shape_values import SHAPE_OPERATORS, shape_value
from qcompiler.patterns.symbolic_axes import named_axes
from qcompiler.pipeline.contract import Contract, Exact
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class FoldShapes(RewritePass):
    """Fold shape arithmetic as far as the shapes are known.

    Open lengths are followed as symbols: a target made of the input's own lengths becomes a constant.
    """

    numerics: ClassVar[Contract] = Exact()

    def run(self, state: CompileState) -> int:
        """Apply the rules and merge equal shape computations, while every axis has a name."""
        with named_axes(state.model):
            return super().run(state) + _merge_equal(state)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.shape_arithmetic``."""
        return SHAPE_ARITHMETIC


def _merge_equal(state: CompileState) -> int:
    """Let shape computations of the main graph that give the same lengths be done once, from wherever they start."""
    rewriter, merged = Rewriter(state.model), 0
    seen: dict[Hashable, ir.Value] = {}
    for node in list(state.model.graph):
        value = node.outputs[0] if len(node.outputs) == 1 else None
        if value is None or not is_op(node, *SHAPE_OPERATORS) or value.is_graph_output():
            continue
        found = shape_value(value)
        if found is None or None in found.elements or found.numbers is not None or value.dtype is None:
            continue
        first = seen.setdefault((found, value.dtype), value)
        if first is not value and value.uses() and state.allow("merge-equal-shapes", node):
            rewriter.replace(value, first)
            merged += 1
    return merged

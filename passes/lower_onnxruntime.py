"""lower-onnxruntime: replace fused calls by what ONNX Runtime runs on integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompiler.errors import PassError
from qcompiler.ir.graph import all_graphs, is_op
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.inlining import inline
from qcompiler.passes.integer_operators import EMITTERS, Emission
from qcompiler.patterns.outline import DOMAIN, ROOT, roles_of
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, WithinStep
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import use_point


@dataclass(frozen=True)
class LowerOnnxruntime(Pass):
    """Inline fused calls as Q/DQ that ONNX Runtime fuses itself, or emit its integer operator directly.

    Options:
        emit: ``auto`` follows the target's table and the plan; ``qdq`` keeps Q/DQ everywhere; ``qoperator`` emits
            integer operators wherever there is one.
    """

    needs = Phase.FUSED
    gives = Phase.LOWERED
    numerics: ClassVar[Contract] = WithinStep(1)
    emit: str = "auto"

    def run(self, state: CompileState) -> int:
        """Lower every call and return the number of changes."""
        if self.emit not in ("auto", "qdq", "qoperator"):
            raise PassError(f"emit is {self.emit!r}; expected auto, qdq or qoperator")
        rewriter = Rewriter(state.model)
        for graph in list(all_graphs(state.model)):
            for node in list(graph):
                if node.domain == DOMAIN:
                    self._lower(state, rewriter, node)
        for identifier in [i for i, f in state.model.functions.items() if f.domain == DOMAIN]:
            del state.model.functions[identifier]
        for graph in all_graphs(state.model):
            graph.opset_imports.pop(DOMAIN, None)
        if any(n.domain == "com.microsoft" for g in all_graphs(state.model) for n in g):
            state.model.graph.opset_imports["com.microsoft"] = 1
        return rewriter.changes

    def _lower(self, state: CompileState, rewriter: Rewriter, call: ir.Node) -> None:
        function = state.model.functions[call.op_identifier()]
        emitter = self._emitter(state, function, call)
        if emitter is not None:
            point = state.plan.points.get(use_point(call.name or "", 1))
            bits = 0 if point is None else point.spec.storage.bits
            made = emitter(Emission(rewriter, call, function, roles_of(function, call), bits))
            if made is not None:
                for old, new in zip(call.outputs, made, strict=True):
                    if old.uses() or old.is_graph_output():
                        rewriter.replace(old, new)
                rewriter.erase(call)
                return
            text = "this form of the group has no operator; kept as Q/DQ"
            state.remark(self.name(), call, "no-integer-operator", text)
        inline(rewriter, call, function)

    def _emitter(
        self, state: CompileState, function: ir.Function, call: ir.Node
    ) -> Callable[[Emission], tuple[ir.Value, ...] | None] | None:
        kind = function.metadata_props[ROOT]
        row = state.target.row(kind)
        form = state.plan.form(call.name or "")
        quantized_output = any(is_op(n, "QuantizeLinear") for n in function)
        named = row.emit.get(form) if row is not None else None
        if form == "weight-only":
            return EMITTERS[named] if named is not None and self.emit != "qdq" else None
        if named is None and row is not None and not quantized_output and kind in ("MatMul", "Gemm"):
            named = row.emit.get("static-float")
        forced = self.emit == "qoperator" or state.plan.engine_forms.get(f"emit:{call.name}") == "qoperator"
        if self.emit == "qdq":
            return None
        if named is not None and not quantized_output:
            return EMITTERS[named]
        return EMITTERS.get(kind) if forced else None

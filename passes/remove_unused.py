"""Remove what nothing reads."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from qcompiler.ir.constants import remove_unread_constants
from qcompiler.passes.inline_constant_if import release
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class RemoveUnused(Pass):
    """Remove nodes, initializers and functions that no output depends on."""

    def run(self, state: CompileState) -> int:
        """Walk every graph backwards; return the number of removed nodes, constants and functions.

        onnx-ir's pass leaves the captures of a removed If in place, and with them everything they depend on.
        """
        removed = _remove_nodes(state.model.graph)
        removed += remove_unread_constants(state.model)
        functions = len(state.model.functions)
        RemoveUnusedFunctionsPass()(state.model)  # type: ignore[no-untyped-call]  # onnx-ir declares no types
        return removed + functions - len(state.model.functions)


def _remove_nodes(graph: ir.Graph) -> int:
    removed = 0
    for node in reversed(list(graph)):
        bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        if any(v.uses() or v.is_graph_output() for v in node.outputs):
            removed += sum(_remove_nodes(body) for body in bodies)
            continue
        for body in bodies:
            release(body)
        graph.remove(node, safe=True)
        removed += 1
    return removed

"""Replace an If whose condition is known by the branch it takes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.analysis import open_graphs
from qcompiler.ir.graph import const_array, is_op
from qcompiler.ir.rewriter import Rewriter
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class InlineConstantIf(Pass):
    """Replace an If with a constant condition by the nodes of the branch it takes."""

    def run(self, state: CompileState) -> int:
        """Inline from the outside in; return the number of If nodes that went."""
        rewriter = Rewriter(state.model)
        changes = 0
        while (node := _next(state.model)) is not None and state.allow("inline-constant-if", node):
            _inline(rewriter, node)
            changes += 1
        return changes


def _next(model: ir.Model) -> ir.Node | None:
    for graph in open_graphs(model):
        for node in graph:
            if is_op(node, "If") and const_array(node.inputs[0]) is not None:
                return node
    return None


def _inline(rewriter: Rewriter, node: ir.Node) -> None:
    condition = const_array(node.inputs[0])
    graph = node.graph
    assert condition is not None
    assert graph is not None
    taken, other = ("then_branch", "else_branch") if bool(condition.any()) else ("else_branch", "then_branch")
    release(node.attributes[other].as_graph())
    body = node.attributes[taken].as_graph()
    results = list(body.outputs)
    body.outputs.clear()
    for value in list(body.initializers.values()):
        assert value.name is not None
        del body.initializers[value.name]
        graph.register_initializer(value)
    for inner in list(body):
        body.remove(inner)
        graph.insert_before(node, inner)
    for old, new in zip(node.outputs, results, strict=True):
        rewriter.replace(old, new)
    rewriter.erase_dead([node])


def release(graph: ir.Graph) -> None:
    """Let the nodes of a dropped body read nothing, so that outer values do not count them as readers."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                release(attribute.as_graph())
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)

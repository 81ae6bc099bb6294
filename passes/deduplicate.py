"""Compute and store everything once."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.analysis import CLOSED_BODIES, bodies
from qcompiler.ir.graph import ORIGIN, all_graphs, is_const, origins
from qcompiler.ir.rewriter import Rewriter
from qcompiler.patterns.operators import COMMUTATIVE, RANDOM
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.state import CompileState

_SMALL = 256
"""Constants of up to so many bytes are compared by contents when two nodes are compared."""


@dataclass(frozen=True)
class Deduplicate(Pass):
    """Merge equal constants and nodes that compute the same from the same.

    onnx-ir's pass leaves subgraphs out and gives the node that stays neither a name nor the origins of the other.

    Options:
        constants: merge equal constants as well as nodes.
    """

    constants: bool = True

    def run(self, state: CompileState) -> int:
        """Merge in program order; values of an outer graph are seen inside. Return the number of merged nodes."""
        rewriter = Rewriter(state.model)
        merged = _merge_nodes(state, rewriter, state.model.graph, {})
        return merged + (_merge_constants(state) if self.constants else 0)


def _merge_nodes(state: CompileState, rewriter: Rewriter, graph: ir.Graph, outer: dict[Hashable, ir.Node]) -> int:
    seen, merged = dict(outer), 0
    for node in list(graph):
        inner = list(bodies(node))
        for body in inner if node.op_type not in CLOSED_BODIES else ():
            merged += _merge_nodes(state, rewriter, body, seen)
        key = None if inner else _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is not node and _replaceable(node) and state.allow("merge-equal-nodes", node):
            _replace(rewriter, node, first)
            merged += 1
    return merged


def _replaceable(node: ir.Node) -> bool:
    """Return whether no output keeps the node: a graph output would only trade the node for an Identity."""
    return not any(v.is_graph_output() for v in node.outputs)


def _key(node: ir.Node) -> Hashable | None:
    if node.op_type in RANDOM or node.op_type == "Constant":
        return None
    attributes: list[tuple[str, Hashable]] = []
    for name, attribute in sorted(node.attributes.items()):
        value = attribute.value
        if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
            attributes.append((name, tuple(value)))
        elif attribute.type == ir.AttributeType.TENSOR:
            attributes.append((name, _contents(value)))
        elif isinstance(value, int | float | str):
            attributes.append((name, value))
        else:
            return None
    inputs = [_identity(v) for v in node.inputs]
    while inputs and inputs[-1] is None:
        inputs.pop()
    if node.op_type in COMMUTATIVE and node.domain == "" and len(inputs) == 2:
        inputs.sort(key=repr)
    return node.domain, node.op_type, len(node.outputs), tuple(inputs), tuple(attributes)


def _identity(value: ir.Value | None) -> Hashable:
    if value is None:
        return None
    tensor = value.const_value
    if is_const(value) and tensor is not None and tensor.nbytes <= _SMALL and tensor.dtype != ir.DataType.STRING:
        return _contents(tensor)
    return id(value)


def _contents(tensor: ir.TensorProtocol) -> Hashable:
    if tensor.dtype == ir.DataType.STRING:
        return id(tensor)
    return int(tensor.dtype), tuple(tensor.shape.numpy()), tensor.tobytes()


def _replace(rewriter: Rewriter, node: ir.Node, first: ir.Node) -> None:
    for old, new in zip(node.outputs, first.outputs, strict=True):
        rewriter.replace(old, new)
    tags = dict.fromkeys((*origins(first), *origins(node)))
    if tags:
        first.metadata_props[ORIGIN] = ";".join(tags)
    rewriter.erase(node)


def _merge_constants(state: CompileState) -> int:
    """Merge equal initializers of each graph."""
    merged = 0
    for graph in all_graphs(state.model):
        seen: dict[Hashable, ir.Value] = {}
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING:
                continue
            if value.is_graph_output() or value.is_graph_input():
                continue
            digest = hashlib.sha256(tensor.tobytes()).digest()
            first = seen.setdefault((int(tensor.dtype), tuple(tensor.shape.numpy()), digest), value)
            if first is value:
                continue
            value.replace_all_uses_with(first)
            del graph.initializers[name]
            merged += 1
    return merged

"""Small questions about an onnx-ir graph, asked everywhere: constants, shapes, consumers, scopes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array

ORIGIN = "qcompiler.origin"
"""Metadata key that holds the names of the imported nodes a node comes from, joined by ``;``."""


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the main graph, then every subgraph of an attribute, depth first in program order."""
    yield from _graphs(model.graph)


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _graphs(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    yield from _graphs(body)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node of the model, those of subgraphs right after the graph that holds them."""
    for graph in all_graphs(model):
        yield from graph


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> TypeGuard[ir.Node]:
    """Return whether ``node`` is one of the operators of a domain (the ONNX domain by default); None is none."""
    if node is None or node.op_type not in op_types:
        return False
    return node.domain == domain or (domain == "" and node.domain == "ai.onnx")


def const_array(value: ir.Value | None) -> Array | None:
    """Return the contents of an initializer or of a Constant node's output, else None.

    An initializer that is also a graph input can be overridden by the caller: it counts as a constant only if it is
    not listed as an input (import removes such listings).
    """
    if value is None:
        return None
    if value.const_value is not None and not value.is_graph_input():
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and is_op(node, "Constant") and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return None


def is_const(value: ir.Value | None) -> bool:
    """Return whether the value's contents are known at compile time."""
    if value is None:
        return False
    if value.const_value is not None and not value.is_graph_input():
        return True
    return is_op(value.producer(), "Constant")


def scalar(value: ir.Value | None) -> float | None:
    """Return the single number a constant holds, or None if it is not a constant of one element."""
    array = const_array(value)
    if array is None or array.size != 1:
        return None
    return float(np.asarray(array, dtype=np.float64).reshape(()))


def shape_of(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """Return the value's shape with symbolic axes as names (or None), or None if the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def rank_of(value: ir.Value | None) -> int | None:
    """Return the value's rank, or None if unknown."""
    shape = shape_of(value)
    return None if shape is None else len(shape)


def is_float(value: ir.Value | None) -> bool:
    """Return whether the value is known to be float32, float16 or bfloat16."""
    return value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def consumers(value: ir.Value) -> tuple[ir.Node, ...]:
    """Return the nodes that read the value, each once, in first-use order (subgraph captures included)."""
    return tuple(dict.fromkeys(use.node for use in value.uses()))


def single_consumer(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads the value once, if nothing else does and it is not a graph output."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def attr_int(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute, or the default the operator's specification gives."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def attr_ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """Return a list-of-integers attribute, or None if absent."""
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(attribute.as_ints())


def attr_float(node: ir.Node, name: str, default: float) -> float:
    """Return a float attribute, or the default the operator's specification gives."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def attr_str(node: ir.Node, name: str, default: str) -> str:
    """Return a string attribute, or the default the operator's specification gives."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def origins(node: ir.Node) -> tuple[str, ...]:
    """Return the names of the imported nodes this node comes from."""
    text = node.metadata_props.get(ORIGIN, "")
    return tuple(text.split(";")) if text else ()

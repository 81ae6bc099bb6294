"""Constant nodes become initializers of the graph that holds them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, is_op
from qcompiler.ir.reader import own_tensor


def lift_constants(model: ir.Model) -> None:
    """Turn Constant nodes into initializers of the graph that holds them, in place.

    Sparse constants, and constants that are a graph's output, stay nodes.
    """
    for graph in all_graphs(model):
        for node in list(graph):
            if not is_op(node, "Constant") or node.outputs[0].is_graph_output():
                continue
            tensor = constant_tensor(node)
            if tensor is not None:
                _lift(graph, node, tensor)


def _lift(graph: ir.Graph, node: ir.Node, tensor: ir.TensorProtocol) -> None:
    output = node.outputs[0]
    name = output.name or f"{node.name}:out0"
    count = 1
    while name in graph.initializers:
        count += 1
        name = f"{output.name}_{count}"
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=own_tensor(tensor, name),
    )
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    graph.register_initializer(value)


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the tensor a Constant node stands for, or None (a sparse one, or a function's attribute)."""
    if len(node.attributes) != 1:
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.is_ref():
        return None
    if attribute.name == "value":
        return attribute.as_tensor()
    if attribute.name in ("value_int", "value_ints"):
        return ir.Tensor(np.asarray(attribute.value, np.int64))
    if attribute.name in ("value_float", "value_floats"):
        return ir.Tensor(np.asarray(attribute.value, np.float32))
    if attribute.name in ("value_string", "value_strings"):
        texts = [attribute.value] if attribute.name == "value_string" else list(attribute.value)
        array = np.array([t.encode() for t in texts], object)
        return ir.StringTensor(array.reshape(()) if attribute.name == "value_string" else array)
    return None


def remove_unread_constants(model: ir.Model) -> int:
    """Remove initializers that nothing reads, in place, and return how many: engines warn of them at every load."""
    removed = 0
    for graph in all_graphs(model):
        for name, value in list(graph.initializers.items()):
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                del graph.initializers[name]
                removed += 1
    return removed

"""Recognise the expansion that ONNX's converter makes of an old Softmax."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, attr_int, is_op, shape_of


def undo_softmax_expansion(model: ir.Model) -> None:
    """Turn Reshape(Softmax(Flatten(x, axis=a), axis=-1), Shape(x)) back into a Softmax of x, in place.

    ONNX's converter expands every Softmax, LogSoftmax and Hardmax of opset 12 and below so, also where the old meaning
    (flatten to two axes) is the new one: where all flattened axes but one have length 1.
    """
    for graph in all_graphs(model):
        for node in list(graph):
            if is_op(node, "Reshape") and node.graph is graph:
                _undo_expansion(graph, node)


def _plain_axis(flat: ir.Node) -> int | None:
    """Return the one axis (counted from the end) that a Flatten puts into its second axis, the others being 1."""
    shape = shape_of(flat.inputs[0])
    axis = attr_int(flat, "axis", 1)
    if not shape or not -len(shape) <= axis < len(shape):
        return None
    first = axis % len(shape)
    long = [index for index in range(first, len(shape)) if shape[index] != 1]
    if len(shape) - first == 1 or not long:
        return -1
    return long[0] - len(shape) if len(long) == 1 else None


def _undo_expansion(graph: ir.Graph, reshape: ir.Node) -> None:
    middle, target = reshape.inputs[0], reshape.inputs[1]
    soft = middle.producer() if middle is not None else None
    shape = target.producer() if target is not None else None
    if soft is None or shape is None or not is_op(shape, "Shape") or shape.attributes:
        return
    flat = soft.inputs[0].producer() if soft.inputs and soft.inputs[0] is not None else None
    if flat is None or not is_op(flat, "Flatten") or flat.inputs[0] is not shape.inputs[0]:
        return
    axis = _plain_axis(flat)
    old_soft = is_op(soft, "Softmax", "LogSoftmax", "Hardmax") and attr_int(soft, "axis", -1) in (1, -1)
    if axis is None or not old_soft:
        return
    only_here = all(len(v.uses()) == 1 and not v.is_graph_output() for v in (flat.outputs[0], soft.outputs[0]))
    if not only_here or attr_int(reshape, "allowzero", 0) or len({n.graph for n in (flat, soft, shape, reshape)}) > 1:
        return
    soft.replace_input_with(0, flat.inputs[0])
    soft.attributes["axis"] = ir.AttrInt64("axis", axis)
    old, new = reshape.outputs[0], soft.outputs[0]
    new.type, new.shape, name = old.type or new.type, old.shape, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(reshape, safe=True)
    new.name = name
    graph.remove(flat, safe=True)
    if not shape.outputs[0].uses() and not shape.outputs[0].is_graph_output():
        graph.remove(shape, safe=True)

"""Nodes whose meaning an older operator set writes in another way."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qcompiler.ir.graph import attr_int, const_array
from qcompiler.ir.shapes import static_dim

_AXES_AS_INPUT = 18
"""From this operator set on reductions take their axes as an input, before as an attribute (ReduceSum from 13 on)."""
_SPLIT_COUNTS = 18
"""From this operator set on a Split may say how many parts it makes."""
_REDUCTIONS = frozenset(
    {"ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
     "ReduceSumSquare"}
)  # fmt: skip


def older_form(node: ir.Node, version: int) -> Callable[[], None] | None:
    """Return what rewrites a node for an operator set below its own, or None if nothing here does.

    Args:
        node: of the ONNX domain.
        version: the wanted operator set.
    """
    if version < _AXES_AS_INPUT and node.op_type in _REDUCTIONS:
        return _axes_as_attribute(node)
    if version < _SPLIT_COUNTS and node.op_type == "Split" and "num_outputs" in node.attributes:
        length = static_dim(node.inputs[0], attr_int(node, "axis", 0))
        if length is not None and length % attr_int(node, "num_outputs", 1) == 0:
            # Without sizes an older Split makes equal parts, too.
            return lambda: _forget(node, "num_outputs")
    return None


def _forget(node: ir.Node, attribute: str) -> None:
    del node.attributes[attribute]


def _axes_as_attribute(node: ir.Node) -> Callable[[], None] | None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    found = const_array(axes)
    if (axes is not None and found is None) or (axes is None and attr_int(node, "noop_with_empty_axes", 0)):
        return None
    if found is not None and not found.size and attr_int(node, "noop_with_empty_axes", 0):
        return None

    def rewrite() -> None:
        if axes is not None:
            node.resize_inputs(1)
            if axes.is_initializer() and not axes.uses() and not axes.is_graph_output() and axes.graph is not None:
                del axes.graph.initializers[str(axes.name)]
        if found is not None and found.size:
            node.attributes["axes"] = ir.AttrInt64s("axes", [int(a) for a in found.reshape(-1)])
        node.attributes.pop("noop_with_empty_axes", None)

    return rewrite

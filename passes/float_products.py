"""Products that stay in float, as nodes of the kernel for them: one rule for MatMul, one for Gemm.

An operand of float32 is multiplied in TF32 there, whose 11 bits are far above the 8 around it.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompiler.ir.graph import attr_int, const_array, is_op, rank_of
from qcompiler.ir.rewriter import Rewriter
from qcompiler.ir.shapes import static_dim
from qcompiler.passes.kernel_nodes import kernel_node, stand_in
from qcompiler.patterns.operators import attribute_value


def lower_float_products(rewriter: Rewriter, graph: ir.Graph) -> None:
    """Replace every MatMul and Gemm of float32 matrices that is left in a graph by a node of ``float_matmul``."""
    for node in list(graph):
        if not is_op(node, "MatMul", "Gemm") or node.outputs[0].dtype is not ir.DataType.FLOAT:
            continue
        x, w = node.inputs[:2]
        if any(v is None or v.dtype is not ir.DataType.FLOAT or (rank_of(v) or 0) < 2 for v in (x, w)):
            continue
        arguments: dict[str, ir.Value | None] = {"x": x, "w": w}
        settings: dict[str, Any] = {"out": "float32"}
        if node.op_type == "Gemm":
            if not _plain(node):
                continue
            arguments["b"] = node.inputs[2] if len(node.inputs) > 2 else None
            settings |= {"w_layout": "nk"} if attr_int(node, "transB", 0) else {}
        made = kernel_node(
            rewriter, "float_matmul", arguments, settings, before=node, origin=[node], name=f"{node.name}:node"
        )
        stand_in(rewriter, node, made)


def _plain(node: ir.Node) -> bool:
    """Return whether a Gemm is a product, by the second operand as it is or transposed, and a bias per column."""
    if any(attribute_value(node, k, 21) != v for k, v in {"alpha": 1.0, "beta": 1.0, "transA": 0}.items()):
        return False
    return len(node.inputs) < 3 or node.inputs[2] is None or is_column_bias(node.inputs[2], node.outputs[0])


def is_column_bias(value: ir.Value | None, result: ir.Value) -> bool:
    """Return whether a value is a constant of one float per column of a result, and lies along its last axis."""
    array, columns = const_array(value), static_dim(result, -1)
    if array is None or array.dtype.kind != "f" or columns is None or array.size != columns:
        return False
    return array.ndim <= (rank_of(result) or 0) and (array.ndim > 0 and array.shape[-1] == columns)

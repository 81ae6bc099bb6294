"""What stands between a DequantizeLinear and its own QuantizeLinear, and is no fused call, on integers.

Unary functions become tables, a Split moves bytes.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.graph import is_op, single_consumer
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.kernel_nodes import kernel_node, scalar_params, stored
from qcompiler.passes.lookup_tables import FUNCTIONS, all_reals

_INT8 = ir.DataType.INT8


def lower_pairs(rewriter: Rewriter, graph: ir.Graph) -> None:
    """Lower what stands between a DequantizeLinear and its own QuantizeLinear, and is no fused call."""
    for node in list(graph):
        if node.graph is graph and is_op(node, *FUNCTIONS):
            _table_of_pair(rewriter, node)
        elif node.graph is graph and is_op(node, "Split"):
            _split_integers(rewriter, node)


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    if not is_op(node, "DequantizeLinear") or scalar_params(node.inputs[1], _third(node)) is None:
        return None
    stored = node.inputs[0]
    return node if stored is not None and stored.dtype is _INT8 else None


def _third(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _own_quantize(node: ir.Node, value: ir.Value) -> ir.Node | None:
    """Return the QuantizeLinear that alone reads a value and stores its operator's result as int8."""
    reader = single_consumer(value)
    if not is_op(reader, "QuantizeLinear") or reader.graph is not node.graph:
        return None
    params = scalar_params(reader.inputs[1], _third(reader))
    return reader if params is not None and reader.outputs[0].dtype is _INT8 else None


def _table_of_pair(rewriter: Rewriter, node: ir.Node) -> None:
    dequantize, quantize = _dequantized(node.inputs[0]), _own_quantize(node, node.outputs[0])
    if dequantize is None or quantize is None:
        return
    own, out = (scalar_params(n.inputs[1], _third(n)) for n in (dequantize, quantize))
    assert own is not None
    assert out is not None
    attributes = {k: a.value for k, a in node.attributes.items()}
    table = rewriter.constant(stored(FUNCTIONS[node.op_type](all_reals(*own), attributes), *out), f"{node.name}:table")
    made = kernel_node(
        rewriter, "int8_lookup", {"x": dequantize.inputs[0], "table": table}, {}, before=node, origin=[node],
        name=f"{node.name}:node",
    )  # fmt: skip
    name = node.name
    node.name = rewriter.unique(f"{name}:was")
    made.name = name
    rewriter.take_over(quantize.outputs[0], made.outputs[0])
    rewriter.replace(quantize.outputs[0], made.outputs[0])
    rewriter.erase_dead([quantize])


def _split_integers(rewriter: Rewriter, node: ir.Node) -> None:
    dequantize = _dequantized(node.inputs[0])
    quantizers = [_own_quantize(node, value) for value in node.outputs]
    if dequantize is None or any(q is None for q in quantizers):
        return
    own = scalar_params(dequantize.inputs[1], _third(dequantize))
    if any(scalar_params(q.inputs[1], _third(q)) != own for q in quantizers if q is not None):
        return
    made = rewriter.node(
        "Split", [dequantize.inputs[0], *node.inputs[1:]], before=node, origin=[node], name=f"{node.name}:node",
        attributes={a.name: a for a in node.attributes.values()}, outputs=len(node.outputs),
    )  # fmt: skip
    name = node.name
    node.name = rewriter.unique(f"{name}:was")
    made.name = name
    dead = []
    for new, quantize in zip(made.outputs, quantizers, strict=True):
        assert quantize is not None
        rewriter.take_over(quantize.outputs[0], new)
        rewriter.replace(quantize.outputs[0], new)
        dead.append(quantize)
    rewriter.erase_dead(dead)

"""fuse-epilogues: let products and convolutions do what stands behind them before their results leave the chip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, attr_str, consumers, is_op, rank_of, single_consumer
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.activation_products import fold_transposes, multiplies_activations
from qcompiler.passes.float_products import is_column_bias
from qcompiler.passes.kernel_nodes import (
    FOLDED,
    arguments_of,
    is_kernel,
    kernel_node,
    number_of,
    scalar_params,
    settings_of,
)
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, WithinStep
from qcompiler.pipeline.state import CompileState

_PRODUCTS = ("int8_matmul", "fp8_matmul", "block_matmul", "float_matmul", "float_conv")
_ACTIVATIONS = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "HardSwish": "hard_swish"}
_STORED = {ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "float8e4m3fn"}
_WRITES = {
    "int8_matmul": ("int8",),
    "fp8_matmul": ("float8e4m3fn",),
    "float_matmul": ("int8", "float8e4m3fn"),
    "float_conv": ("int8", "float8e4m3fn"),
}


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Fold residual sums, activations and quantizations into the products in front of them.

    So it does with a constant factor behind a product, such as that of an attention's scores, and with the transposes
    around a product of two activations, which it reads and writes by strides.
    """

    needs = Phase.LOWERED
    numerics: ClassVar[Contract] = WithinStep(1)

    def run(self, state: CompileState) -> int:
        """Rewrite every graph and return the number of changes."""
        rewriter = Rewriter(state.model)
        for graph in all_graphs(state.model):
            for node in list(graph):
                if node.graph is not graph:
                    continue
                if is_kernel(node, "int8_add") and "residual" in node.attributes:
                    _fold_sum(rewriter, node)
                elif is_kernel(node, "int8_mul") and "silu" in node.attributes:
                    _fold_silu(rewriter, node)
                elif is_kernel(node, *_PRODUCTS) and settings_of(node)["out"] == "float32":
                    _fold_behind(rewriter, node)
            for node in [n for n in graph if multiplies_activations(n)]:
                fold_transposes(rewriter, node)
        return rewriter.changes


def _rebuild(
    rewriter: Rewriter, node: ir.Node, arguments: dict[str, ir.Value | None], settings: dict[str, Any], last: ir.Node
) -> ir.Node:
    """Insert a kernel that also does the work of ``last``, whose result it gives under its own name."""
    name = node.name or node.op_type
    made = kernel_node(
        rewriter, node.op_type, arguments, settings, before=last, origin=[node, last], name=f"{name}:fused"
    )
    node.name = rewriter.unique(f"{name}:was")
    made.name = name
    folded = (node.metadata_props.get(FOLDED, ""), str(last.name))
    made.metadata_props[FOLDED] = "\n".join(filter(None, folded))
    rewriter.take_over(last.outputs[0], made.outputs[0])
    rewriter.replace(last.outputs[0], made.outputs[0])
    rewriter.erase_dead([last])
    return made


def _fold_sum(rewriter: Rewriter, add: ir.Node) -> None:
    """Let the convolution in front of a sum of quantized branches add the other branch and store the sum."""
    found, settings = arguments_of(add), settings_of(add)
    residual = ("x", "w")[settings.pop("residual")]
    own = "w" if residual == "x" else "x"
    conv = found[own].producer()
    if conv is None or not is_kernel(conv, "int8_conv") or single_consumer(found[own]) is not add:
        del add.attributes["residual"]
        return
    arguments: dict[str, ir.Value | None] = dict(arguments_of(conv))
    arguments |= {
        "residual": found[residual], "rs": found[residual + "s"], "rz": found.get(residual + "z"),
        "ys": found["ys"], "yz": found.get("yz"),
    }  # fmt: skip
    own_settings = {k: v for k, v in settings_of(conv).items() if k not in ("activation", "low", "high")}
    _rebuild(rewriter, conv, arguments, {**own_settings, **settings, "residual": "before"}, add)


def _fold_silu(rewriter: Rewriter, product: ir.Node) -> None:
    """Let what computes x store x * sigmoid(x)."""
    found = arguments_of(product)
    name = str(product.attributes.pop("silu").as_string())
    table = next((n for n in (found[r].producer() for r in "xw") if n is not None and n.name == name), None)
    if table is None or not is_kernel(table, "int8_lookup"):
        return
    x = arguments_of(table)["x"]
    maker = x.producer()
    if not is_kernel(maker, "int8_conv", "int8_matmul") or any(found[r] not in (x, table.outputs[0]) for r in "xw"):
        return
    assert maker is not None
    settings = settings_of(maker)
    if settings["out"] != "int8" or settings.get("activation", "none") != "none" or "residual" in settings:
        return
    arguments: dict[str, ir.Value | None] = dict(arguments_of(maker))
    arguments |= {"ys": found["ys"], "yz": found.get("yz")}
    made = _rebuild(rewriter, maker, arguments, {**settings, "activation": "silu", "stage": "float"}, product)
    made.metadata_props[FOLDED] += f"\n{name}"


def _fold_behind(rewriter: Rewriter, node: ir.Node) -> None:
    """Fold an activation or a sum of floats behind a product, then the quantization of the result."""
    current: ir.Node | None = node
    while current is not None:
        node, current = current, _fold_one(rewriter, current)


def _fold_one(rewriter: Rewriter, node: ir.Node) -> ir.Node | None:
    arguments: dict[str, ir.Value | None] = dict(arguments_of(node))
    settings, out = settings_of(node), node.outputs[0]
    if settings["out"] != "float32":
        return None
    free = settings.get("activation", "none") == "none"
    if free and "residual" not in settings and (last := _silu(out)) is not None:
        return _rebuild(rewriter, node, arguments, {**settings, "activation": "silu"}, last)
    reader = single_consumer(out)
    if reader is None or reader.graph is not node.graph:
        return None
    if free and "residual" not in settings and "b" not in arguments and (factor := _factor(node, reader)) is not None:
        settings["factor"] = float(np.float32(settings.get("factor", 1.0) * factor))
        return _rebuild(rewriter, node, arguments, settings, reader)
    if free and "residual" not in settings and (bias := _bias(node, reader)) is not None:
        arguments["b"] = bias
        return _rebuild(rewriter, node, arguments, settings, reader)
    if free and "residual" not in settings and (name := _activation(reader)):
        return _rebuild(rewriter, node, arguments, {**settings, "activation": name}, reader)
    if is_op(reader, "Add") and "residual" not in settings:
        other = reader.inputs[1] if reader.inputs[0] is out else reader.inputs[0]
        if other is not None and _same_shape(other, out) and other.dtype is ir.DataType.FLOAT:
            arguments["residual"] = other
            return _rebuild(rewriter, node, arguments, {**settings, "residual": "after"}, reader)
    if is_op(reader, "QuantizeLinear"):
        zero = reader.inputs[2] if len(reader.inputs) > 2 else None
        kind = _STORED.get(reader.outputs[0].dtype or ir.DataType.UNDEFINED)
        if scalar_params(reader.inputs[1], zero) is not None and kind in _WRITES.get(node.op_type, ()):
            arguments |= {"ys": reader.inputs[1], "yz": zero if kind == "int8" else None}
            _rebuild(rewriter, node, arguments, {**settings, "out": kind, "stage": "float"}, reader)
    return None


def _bias(node: ir.Node, reader: ir.Node) -> ir.Value | None:
    """Return the constant per column that an Add puts behind a product of floats; others have theirs in the call."""
    if not is_op(reader, "Add") or not is_kernel(node, "float_matmul") or "b" in arguments_of(node):
        return None
    other = reader.inputs[1] if reader.inputs[0] is node.outputs[0] else reader.inputs[0]
    return other if is_column_bias(other, node.outputs[0]) else None


def _factor(node: ir.Node, reader: ir.Node) -> float | None:
    """Return what a Mul or Div by one constant multiplies a product by, None if the reader is neither."""
    if not is_op(reader, "Mul", "Div") or not is_kernel(node, "int8_matmul", "fp8_matmul", "float_matmul"):
        return None
    first = reader.inputs[0] is node.outputs[0]
    other = reader.inputs[1 if first else 0]
    number, rank = number_of(other), rank_of(node.outputs[0])
    if other is None or number is None or rank is None or (rank_of(other) or 0) > rank:
        return None
    if not np.isfinite(number) or number == 0 or (reader.op_type == "Div" and not first):
        return None
    return number if reader.op_type == "Mul" else 1.0 / number


def _activation(node: ir.Node) -> str:
    """Return the kernel's name of an activation, empty if it has none."""
    if is_op(node, "Gelu"):
        return "gelu_tanh" if attr_str(node, "approximate", "none") == "tanh" else "gelu"
    return _ACTIVATIONS.get(node.op_type, "") if node.domain == "" else ""


def _silu(value: ir.Value) -> ir.Node | None:
    """Return the Mul of x * sigmoid(x), if these two alone read the value."""
    readers = consumers(value)
    if value.is_graph_output() or len(readers) != 2:
        return None
    sigmoid = next((n for n in readers if is_op(n, "Sigmoid")), None)
    product = next((n for n in readers if is_op(n, "Mul")), None)
    if sigmoid is None or product is None or product.graph is not value.graph:
        return None
    return product if single_consumer(sigmoid.outputs[0]) is product else None


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Return whether two shapes are known to be equal, axis by axis, by length or by name."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    pairs = zip(a.shape, b.shape, strict=True)
    return all(x == y and (isinstance(x, int) or x.value is not None) for x, y in pairs)

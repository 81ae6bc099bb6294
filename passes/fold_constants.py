"""Evaluate what depends on constants only."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from qcompiler.engine import Array
from qcompiler.ir.analysis import open_graphs
from qcompiler.ir.graph import const_array, is_const, is_op, scalar, shape_of
from qcompiler.ir.rewriter import Rewriter
from qcompiler.patterns.operators import RANDOM
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Reassociates
from qcompiler.pipeline.state import CompileState

_KEPT = frozenset(
    {
        "Constant", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "If", "Loop", "Scan", "Optional",
        "OptionalGetElement", "OptionalHasElement", "ImageDecoder", "RegexFullMatch", "StringSplit",
        "StringConcat", "StringNormalizer",
    }
)  # fmt: skip
"""Operators that stay: quantized weights stay quantized, control flow and sequences are no tensors."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate nodes whose inputs are all constant, and turn Constant nodes into initializers.

    Options:
        max_growth: bytes that one folded value may add to the model (net of inputs that nothing else reads).
    """

    numerics: ClassVar[Contract] = Reassociates(1e-6)
    max_growth: int = 2**20

    def run(self, state: CompileState) -> int:
        """Fold in program order, so that one walk is enough; return the number of folded nodes."""
        rewriter = Rewriter(state.model)
        opset = state.model.opset_imports.get("", 0)
        folded = 0
        for graph in list(open_graphs(state.model)):
            for node in list(graph):
                if node.graph is not graph:
                    continue
                if is_op(node, "Constant"):
                    folded += _lift(state, rewriter, node)
                elif _is_candidate(node):
                    folded += self._fold(state, rewriter, node, opset)
        return folded

    def _fold(self, state: CompileState, rewriter: Rewriter, node: ir.Node, opset: int) -> int:
        name = self.name()
        if is_op(node, "Identity") and node.outputs[0].is_graph_output():
            return 0  # the one way to return a constant
        predicted = predicted_bytes(node)
        freed = _freed_bytes(node)
        if predicted is not None and predicted - freed > self.max_growth:
            state.remark(name, node, "size-limit", f"the result has {predicted} bytes", rule="fold-constant")
            return 0
        try:
            results = evaluate(node, opset)
        except Exception as error:  # the reference implementation raises whatever NumPy raises
            state.remark(name, node, "not-evaluated", f"{type(error).__name__}: {error}", rule="fold-constant")
            return 0
        if any(not isinstance(r, np.ndarray | np.generic) or np.asarray(r).dtype.kind in "OSU" for r in results):
            state.remark(name, node, "not-a-tensor", "the result is a sequence or text", rule="fold-constant")
            return 0
        arrays = [np.asarray(r) for r in results]
        if any(_mistyped(array, value) for array, value in zip(arrays, node.outputs, strict=True)):
            state.remark(name, node, "type", "the evaluated type is not the declared one", rule="fold-constant")
            return 0
        if sum(array.nbytes for array in arrays) - freed > self.max_growth:
            state.remark(name, node, "size-limit", f"the result has {arrays[0].nbytes} bytes", rule="fold-constant")
            return 0
        if not state.allow("fold-constant", node):
            return 0
        for array, value in zip(arrays, node.outputs, strict=True):
            if value.uses() or value.is_graph_output():
                rewriter.replace(value, rewriter.constant(array, f"{value.name}:value"))
        rewriter.erase_dead([node])
        return 1


def _is_candidate(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _KEPT | RANDOM or not node.outputs:
        return False
    if node.op_type.startswith(("Sequence", "SplitToSequence", "ConcatFromSequence")):
        return False
    inputs = [v for v in node.inputs if v is not None]
    if not inputs or not all(is_const(v) and v.dtype != ir.DataType.STRING for v in inputs):
        return False
    if is_op(node, "Dropout") and len(node.inputs) > 2:
        return False
    return not any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _lift(state: CompileState, rewriter: Rewriter, node: ir.Node) -> int:
    """Turn one Constant node into an initializer.

    onnx-ir's pass of this kind fails on sparse ones.
    """
    value = node.outputs[0]
    if value.is_graph_output() or len(node.attributes) != 1:
        return 0
    key, attribute = next(iter(node.attributes.items()))
    if key == "value":
        tensor: ir.TensorProtocol = attribute.as_tensor()
    elif key in ("value_int", "value_ints"):
        tensor = ir.tensor(np.asarray(attribute.value, dtype=np.int64))
    elif key in ("value_float", "value_floats"):
        tensor = ir.tensor(np.asarray(attribute.value, dtype=np.float32))
    else:
        return 0
    if not state.allow("lift-constant", node):
        return 0
    rewriter.replace(value, rewriter.constant(tensor, f"{value.name}:value"))
    rewriter.erase(node)
    return 1


def _mistyped(array: Array, value: ir.Value) -> bool:
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        return True
    shape = shape_of(value)
    return shape is not None and (
        len(shape) != array.ndim
        or any(isinstance(d, int) and d != size for d, size in zip(shape, array.shape, strict=True))
    )


def _freed_bytes(node: ir.Node) -> int:
    """Return the size of the inputs that nothing else reads."""
    inputs = {v for v in node.inputs if v is not None}
    return sum(
        v.const_value.nbytes
        for v in inputs
        if v.const_value is not None and not v.is_graph_output() and all(use.node is node for use in v.uses())
    )


def predicted_bytes(node: ir.Node) -> int | None:
    """Return the size of a node's first output as far as it is known before evaluation."""
    value = node.outputs[0]
    shape = shape_of(value)
    itemsize = 4.0 if value.dtype is None else value.dtype.itemsize
    if shape is not None and all(isinstance(d, int) for d in shape):
        return int(math.prod(d for d in shape if isinstance(d, int)) * itemsize)
    first = const_array(node.inputs[0])
    if first is not None and is_op(node, "ConstantOfShape"):
        return int(np.prod(first.astype(np.float64)) * itemsize)
    second = const_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if second is not None and is_op(node, "Expand", "Tile"):
        assert first is not None
        return int(np.prod(second.astype(np.float64)) * max(1, first.nbytes))
    if is_op(node, "Range"):
        start, limit, delta = (scalar(v) or 0.0 for v in node.inputs)
        return int(max(0.0, (limit - start) / delta) * itemsize) if delta else None
    return None


def evaluate(node: ir.Node, opset: int) -> list[object]:
    """Return the outputs of a node on constant inputs, by ONNX's reference implementation.

    Raises:
        Exception: whatever the reference implementation raises.
    """
    proto = ir.to_proto(node)
    inputs: list[onnx.ValueInfoProto] = []
    feeds: dict[str, Any] = {}
    for value in dict.fromkeys(v for v in node.inputs if v is not None):
        assert value.dtype is not None
        assert value.name is not None
        inputs.append(onnx.helper.make_tensor_value_info(value.name, int(value.dtype), None))
        feeds[value.name] = const_array(value)
    outputs = [onnx.helper.make_tensor_value_info(v.name, 0, None) for v in node.outputs if v.name]
    graph = onnx.helper.make_graph([proto], "fold", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return list(ReferenceEvaluator(model).run(None, feeds))

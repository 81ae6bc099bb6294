"""lower-openvino: replace fused calls by the Q/DQ that OpenVINO's own transformations turn into integer layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import all_graphs, const_array, consumers, is_op, rank_of
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.inlining import inline
from qcompiler.patterns.outline import DOMAIN
from qcompiler.patterns.scales import MOVERS, same_params, selects_only
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, WithinStep
from qcompiler.pipeline.state import CompileState

_MOVERS = (*MOVERS, "Split")

PRECISION = "qcompiler.precision"
"""Engine form, and metadata of a model: in what OpenVINO computes float operators; its own choice without."""
EXACT = {PRECISION: "f32"}
"""The engine form in which float operators compute in float32."""
_FEW = 16
"""Rows of a product that OpenVINO may compute together with its neighbours; seen with up to 8, not with 12."""
_TINY = 1e-30


@dataclass(frozen=True)
class LowerOpenvino(Pass):
    """Inline fused calls as Q/DQ: OpenVINO has no quantized operators of its own in ONNX.

    Then the form is fitted to what its transformations do:

    - A Q/DQ pair behind an operator that only moves integers, with the parameters of those integers, is dropped: it
      changes no number, and costs a pass over the data.
    - The bias of a convolution that reads integers becomes an Add behind it. OpenVINO makes it the bias of its integer
      layer either way, but from a Conv with a bias it loses it where the batch is open and the shape of an activation
      is asked for further on (seen on 2026.4).
    - A product of integers of few rows whose columns have scales of their own gets a bias that differs from column to
      column, of 1e-30 where it has none: two such products behind one another, of fixed shapes, become one layer that
      writes zeros where the first has no bias of its own per column (seen on 2026.4).
    - Where float regions have to stay in float32 (engine form `PRECISION`), the model says so to `qcompiler.load`.
    """

    needs = Phase.FUSED
    gives = Phase.LOWERED
    numerics: ClassVar[Contract] = WithinStep(1)

    def run(self, state: CompileState) -> int:
        """Lower every call and return the number of changes."""
        rewriter = Rewriter(state.model)
        for graph in list(all_graphs(state.model)):
            for node in list(graph):
                if node.domain == DOMAIN:
                    inline(rewriter, node, state.model.functions[node.op_identifier()])
        state.model.functions.clear()
        for graph in all_graphs(state.model):
            graph.opset_imports.pop(DOMAIN, None)
            for node in list(graph):
                if is_op(node, "QuantizeLinear"):
                    _drop_pair(rewriter, node)
                elif is_op(node, "Conv"):
                    _split_bias(rewriter, node)
                elif is_op(node, "MatMul", "Gemm"):
                    _bias_columns(rewriter, node)
        if state.plan.engine_forms.get(PRECISION) == EXACT[PRECISION]:
            state.model.metadata_props[PRECISION] = EXACT[PRECISION]
            rewriter.changes += 1
        return rewriter.changes


def _drop_pair(rewriter: Rewriter, quantize: ir.Node) -> None:
    """Let the readers of a Q/DQ pair read what it is made of, if those are the same numbers already."""
    value = quantize.inputs[0]
    if value is None or quantize.outputs[0].is_graph_output() or not _on_grid(value, quantize):
        return
    readers = [use.node for use in quantize.outputs[0].uses()]
    if not all(is_op(node, "DequantizeLinear") and same_params(quantize, node) for node in readers):
        return
    if any(node.outputs[0].is_graph_output() or node.graph is not quantize.graph for node in readers):
        return
    for node in readers:
        rewriter.replace(node.outputs[0], value)
        rewriter.erase(node)
    rewriter.erase(quantize)


def _on_grid(value: ir.Value | None, quantize: ir.Node, moved: bool = False) -> bool:
    """Return whether moving put a value where it is, and a QuantizeLinear would leave its numbers as they are."""
    while value is not None and (node := value.producer()) is not None:
        if is_op(node, "DequantizeLinear"):
            return moved and same_params(node, quantize)
        if is_op(node, "Concat"):
            return all(_on_grid(v, quantize, moved=True) for v in node.inputs)
        if not is_op(node, *_MOVERS) or selects_only(node) is not None:
            return False
        value, moved = node.inputs[0], True
    return False


def _bias_columns(rewriter: Rewriter, node: ir.Node) -> None:
    """Give a product of integers with scales per column a bias that is not the same in all columns."""
    data, scales = node.inputs[0], node.inputs[1].producer() if node.inputs[1] is not None else None
    if not is_op(scales, "DequantizeLinear") or not (_dequantized(data) and _few_rows(data)):
        return
    assert scales is not None
    scale = const_array(scales.inputs[1])
    if scale is None or scale.ndim != 1 or scale.size < 2:
        return
    bias = _bias_behind(node)
    if bias is None or np.any(bias != bias.reshape(-1)[0]):
        return
    # What is added to every other column is lost in rounding, or next to nothing where there is no bias.
    row = np.zeros(scale.size, np.float32)
    row[::2] = max(_TINY, float(np.spacing(np.abs(bias.reshape(-1)[0]))))
    _add_behind(rewriter, node, rewriter.constant(row, f"{node.name}:columns"), f"{node.name}/Columns")


def _bias_behind(node: ir.Node) -> Array | None:
    """Return the constant bias that OpenVINO adds in a product's layer, zero if there is none, None if not constant."""
    biases = list(node.inputs[2:])
    readers = consumers(node.outputs[0])
    if not biases and len(readers) == 1 and is_op(readers[0], "Add") and not node.outputs[0].is_graph_output():
        biases = [v for v in readers[0].inputs if v is not node.outputs[0]]
    if not biases or biases[0] is None:
        return np.zeros(1, np.float32)
    return _bias_of(biases[0])


def _few_rows(value: ir.Value | None) -> bool:
    """Return whether a dequantized value may be a matrix of at most `_FEW` rows."""
    while value is not None and value.shape is None and is_op(value.producer(), "QuantizeLinear", "DequantizeLinear"):
        node = value.producer()
        value = node.inputs[0] if node is not None else None
    if value is None or value.shape is None:
        return True
    rows = value.shape[0] if len(value.shape) == 2 else None
    return len(value.shape) == 2 and not (isinstance(rows, int) and rows > _FEW)


def _add_behind(rewriter: Rewriter, node: ir.Node, constant: ir.Value, name: str) -> None:
    """Put an Add of a constant behind a node; its sum takes over the name of the node's result."""
    result = node.outputs[0]
    made = rewriter.node("Add", [result, constant], after=node, origin=[node], name=name)
    rewriter.take_over(result, made.outputs[0])
    rewriter.replace(result, made.outputs[0])
    rewriter.set_input(made, 0, result)
    rewriter.declare(result, made.outputs[0].dtype, made.outputs[0].shape)


def _split_bias(rewriter: Rewriter, node: ir.Node) -> None:
    """Write the bias of a Conv that reads integers as an Add behind it."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    weight = node.inputs[1].producer() if node.inputs[1] is not None else None
    if bias is None or weight is None or not all(_dequantized(v) for v in node.inputs[:2]):
        return
    rank, numbers = rank_of(weight.inputs[0]), _bias_of(bias)
    if rank is None or numbers is None:
        return
    source = bias.producer()
    constant = rewriter.constant(numbers.reshape((-1,) + (1,) * (rank - 2)), f"{bias.name}:behind")
    node.resize_inputs(2)
    _add_behind(rewriter, node, constant, f"{node.name}/Add")
    if source is not None:
        rewriter.erase_dead([source])
    elif not bias.uses() and bias.is_initializer() and bias.graph is not None and not bias.is_graph_output():
        del bias.graph.initializers[str(bias.name)]


def _dequantized(value: ir.Value | None) -> bool:
    """Return whether a value is read from a DequantizeLinear, also through operators that only move."""
    while value is not None and (node := value.producer()) is not None:
        if is_op(node, "DequantizeLinear"):
            return True
        if not is_op(node, *_MOVERS):
            return False
        value = node.inputs[0]
    return False


def _bias_of(bias: ir.Value) -> Array | None:
    """Return the numbers of a constant bias, float32 [channels], or None if it is none."""
    numbers = const_array(bias)
    if numbers is None and is_op(bias.producer(), "DequantizeLinear"):
        source = bias.producer()
        assert source is not None
        integers, scale = const_array(source.inputs[0]), const_array(source.inputs[1])
        if integers is not None and scale is not None and integers.ndim == 1:
            numbers = integers.astype(np.float32) * scale  # the zero point of a bias is 0
    return None if numbers is None or numbers.dtype != np.float32 else numbers

"""lower-openvino: replace fused calls by the Q/DQ that OpenVINO's own transformations turn into integer layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import all_graphs, const_array, is_op, rank_of
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.inlining import inline
from qcompiler.patterns.outline import DOMAIN
from qcompiler.patterns.scales import MOVERS, same_params, selects_only
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, WithinStep
from qcompiler.pipeline.state import CompileState

_MOVERS = (*MOVERS, "Split")


@dataclass(frozen=True)
class LowerOpenvino(Pass):
    """Inline fused calls as Q/DQ: OpenVINO has no quantized operators of its own in ONNX.

    Then the form is fitted to what its transformations do:

    - A Q/DQ pair behind an operator that only moves integers, with the parameters of those integers, is dropped: it
      changes no number, and costs a pass over the data.
    - The bias of a convolution that reads integers becomes an Add behind it. OpenVINO makes it the bias of its integer
      layer either way, but from a Conv with a bias it loses it where the batch is open and the shape of an activation
      is asked for further on (seen on 2026.4).
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
    result = node.outputs[0]
    constant = rewriter.constant(numbers.reshape((-1,) + (1,) * (rank - 2)), f"{bias.name}:behind")
    node.resize_inputs(2)
    made = rewriter.node("Add", [result, constant], after=node, origin=[node], name=f"{node.name}/Add")
    rewriter.take_over(result, made.outputs[0])
    rewriter.replace(result, made.outputs[0])
    rewriter.set_input(made, 0, result)
    rewriter.declare(result, made.outputs[0].dtype, made.outputs[0].shape)
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

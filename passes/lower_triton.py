"""lower-triton: replace fused calls by nodes of the project's kernels, and write the rest out as Q/DQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, consumers, is_op, single_consumer
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.float_convs import lower_float_convs
from qcompiler.passes.float_products import lower_float_products
from qcompiler.passes.inlining import inline
from qcompiler.passes.integer_operators import Emission
from qcompiler.passes.integer_pairs import lower_pairs
from qcompiler.passes.kernel_lowerers import LOWERERS, reads_second
from qcompiler.passes.kernel_nodes import KERNEL_DOMAIN
from qcompiler.patterns.outline import DOMAIN, ROOT, roles_of
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, WithinStep
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import use_point


@dataclass(frozen=True)
class LowerTriton(Pass):
    """Replace fused calls by kernels; what no kernel takes is written out as Q/DQ and runs as torch functions.

    Convolutions, and products of matrices, that stay in float are kernels, too.

    A sum of two quantized branches reads in float what a convolution computes for it alone: it stands in the epilogue
    of that convolution, with one rounding less. So does x * sigmoid(x) behind a convolution or product that nothing
    else reads, with two roundings less: eight bits over the whole range of x would leave few for where the function
    bends.

    Options:
        standard: write everything out as Q/DQ, with the same sums read in float: what ONNX Runtime can run, with the
            numbers that the kernels compute.
    """

    needs = Phase.FUSED
    gives = Phase.LOWERED
    numerics: ClassVar[Contract] = WithinStep(1)
    standard: bool = False

    def run(self, state: CompileState) -> int:
        """Lower every call and return the number of changes."""
        rewriter = Rewriter(state.model)
        for graph in list(all_graphs(state.model)):
            residuals, silus = _residual_sums(state, graph), _silus(state, graph)
            for node in list(graph):
                if node.domain == DOMAIN:
                    self._lower(state, rewriter, node)
            for name, index in residuals.items():
                self._free(rewriter, graph, name, index)
            for product, sigmoid in silus.items():
                self._free_silu(rewriter, graph, product, sigmoid)
        for identifier in [i for i, f in state.model.functions.items() if f.domain == DOMAIN]:
            del state.model.functions[identifier]
        for graph in all_graphs(state.model):
            graph.opset_imports.pop(DOMAIN, None)
            if not self.standard:
                lower_pairs(rewriter, graph)
                lower_float_convs(rewriter, graph)
                lower_float_products(rewriter, graph)
        if not self.standard:
            state.model.graph.opset_imports[KERNEL_DOMAIN] = 1
        return rewriter.changes

    def _lower(self, state: CompileState, rewriter: Rewriter, call: ir.Node) -> None:
        function = state.model.functions[call.op_identifier()]
        kind = function.metadata_props[ROOT]
        point = state.plan.points.get(use_point(call.name or "", 1))
        bits = 0 if point is None else point.spec.storage.bits
        emission = Emission(rewriter, call, function, roles_of(function, call), bits)
        lower = None if self.standard else LOWERERS.get(kind)
        if lower is not None:
            reason = lower(emission)
            if reason is None:
                return
            state.remark(self.name(), call, "no-kernel", f"{reason}; kept as Q/DQ in float")
        inline(rewriter, call, function)

    def _free(self, rewriter: Rewriter, graph: ir.Graph, name: str, index: int) -> None:
        """Let a sum read in float, or as the epilogue of a convolution, what that computes for it alone."""
        add = next((n for n in graph if n.name == name), None)
        if add is None:
            return
        if self.standard:
            _read_float(rewriter, add, index)
            return
        add.attributes["residual"] = ir.AttrInt64("residual", 1 - index)

    def _free_silu(self, rewriter: Rewriter, graph: ir.Graph, product: str, sigmoid: str) -> None:
        """Let x * sigmoid(x) read floats, or stand in the epilogue of what computes x."""
        found = {n.name: n for n in graph if n.name in (product, sigmoid)}
        if len(found) < 2:
            return
        if not self.standard:
            found[product].attributes["silu"] = ir.AttrString("silu", sigmoid)
            return
        for index in range(2):
            _read_float(rewriter, found[product], index)
        _read_float(rewriter, found[sigmoid], 0)


def _read_float(rewriter: Rewriter, node: ir.Node, index: int) -> None:
    """Let a node read what was quantized and dequantized for it before that."""
    value = node.inputs[index]
    dequantize = None if value is None else value.producer()
    stored = None if dequantize is None else dequantize.inputs[0]
    quantize = None if stored is None else stored.producer()
    if is_op(dequantize, "DequantizeLinear") and is_op(quantize, "QuantizeLinear"):
        rewriter.set_input(node, index, quantize.inputs[0])
        rewriter.erase_dead([dequantize])


def _silus(state: CompileState, graph: ir.Graph) -> dict[str, str]:
    """Return the products x * sigmoid(x) that can stand in the epilogue of what computes x, with their sigmoids."""
    kinds = {i: f.metadata_props[ROOT] for i, f in state.model.functions.items() if f.domain == DOMAIN}
    found = {}
    for node in graph:
        if kinds.get(node.op_identifier()) != "Mul" or not _plain(state, node):
            continue
        roles = roles_of(state.model.functions[node.op_identifier()], node)
        for own, other in (("x", "w"), ("w", "x")):
            value, gate = roles.get(own), roles.get(other)
            sigmoid = None if gate is None else gate.producer()
            maker = None if value is None else value.producer()
            if value is None or gate is None or sigmoid is None or maker is None or value.is_graph_output():
                continue
            if value.dtype is not ir.DataType.INT8 or single_consumer(gate) is not node:
                continue
            if kinds.get(sigmoid.op_identifier()) != "Sigmoid":
                continue
            read = roles_of(state.model.functions[sigmoid.op_identifier()], sigmoid).get("x")
            alone = {id(n) for n in consumers(value)} == {id(node), id(sigmoid)}
            if read is value and alone and kinds.get(maker.op_identifier()) in _WEIGHTED and _plain(state, maker):
                found[str(node.name)] = str(sigmoid.name)
    return found


def _plain(state: CompileState, call: ir.Node) -> bool:
    """Return whether a call has no activation of its own."""
    return not any(is_op(n, "Relu", "Clip") for n in state.model.functions[call.op_identifier()])


_WEIGHTED = ("Conv", "MatMul", "Gemm")


def _residual_sums(state: CompileState, graph: ir.Graph) -> dict[str, int]:
    """Return the fused sums that can stand in the epilogue of a convolution, with the index of its result.

    Where both branches come from such a convolution, the later one takes the sum: the other one's result exists by
    then.
    """
    kinds = {i: f.metadata_props[ROOT] for i, f in state.model.functions.items() if f.domain == DOMAIN}
    places = {node: index for index, node in enumerate(graph)}
    found = {}
    for node in graph:
        if kinds.get(node.op_identifier()) != "Add":
            continue
        function = state.model.functions[node.op_identifier()]
        roles = roles_of(function, node)
        root = next(n for n in function if n.op_type == "Add")
        swapped = reads_second(function, root)
        branches = []
        for index, role in enumerate(("w", "x") if swapped else ("x", "w")):
            value = roles.get(role)
            maker = None if value is None else value.producer()
            if value is None or maker is None or maker not in places or value.shape is None:
                continue
            if kinds.get(maker.op_identifier()) == "Conv" and value.shape == node.outputs[0].shape:
                body = state.model.functions[maker.op_identifier()]
                plain = not any(is_op(n, "Relu", "Clip") for n in body)
                if plain and single_consumer(value) is node:
                    branches.append((places[maker], index))
        if branches:
            found[str(node.name)] = max(branches)[1]
    return found

"""lower-tensorrt: replace fused calls by the explicit Q/DQ that TensorRT's parser accepts and its builder fuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.errors import TargetError
from qcompiler.ir.graph import all_graphs, attr_int, const_array, is_op, rank_of
from qcompiler.ir.opset import least_ir_version, min_opset, set_opset
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.ir.schemas import onnx_opset
from qcompiler.passes.block_operators import two_blocks, write_block_operators
from qcompiler.passes.inlining import inline
from qcompiler.passes.split_projections import split_projection
from qcompiler.patterns.outline import DOMAIN
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, WithinStep
from qcompiler.pipeline.state import CompileState

_STORED = {
    ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1,
}  # fmt: skip
"""Element types that TensorRT quantizes to and from."""


@dataclass(frozen=True)
class LowerTensorrt(Pass):
    """Inline fused calls as Q/DQ; TensorRT has no other form of 8-bit integers since version 11.

    Then the form is fitted to its rules:

    - A bias stays float: DequantizeLinear of int32 is refused.
    - A residual addition reads in float what a convolution or product computes for it alone, and through Q/DQ only a
      skip branch that is stored quantized anyway: as many layers, the same bytes, one rounding less (seen on TensorRT
      for RTX 1.7.1).
    - A product whose result is split into queries, keys and values becomes one product for each.
    - A pair behind an operator that only moves integers stays, though it changes no number: behind a Resize the next
      product runs in float without it; behind the others it costs no layer (seen on TensorRT for RTX 1.7.1), and ONNX
      Runtime, which puts it back by itself, then gives it a wrong type and refuses the model (seen on 1.31).
    - A Q or DQ with a zero point that is not 0, or of uint8 (the model's own input or output is quantized so), is
      written out as Cast, Sub, Mul: the parser refuses the first, and reads the second as int8.
    - Every Q and DQ that stays carries its zero point: without one, the parser reads int8 where ONNX says uint8.
    - The operator set is the one that the target's table asks for, or more where an operator needs it, never above the
      newest that the table allows.
    - Activations quantized in blocks at run time (NVFP4, MXFP8) become TensorRT's own operators.

    Options:
        standard: leave that last step out, so that ONNX Runtime can run the model and its accuracy be measured.
    """

    needs = Phase.FUSED
    gives = Phase.LOWERED
    numerics: ClassVar[Contract] = WithinStep(1)
    standard: bool = False

    def run(self, state: CompileState) -> int:
        """Lower every call and return the number of changes.

        Raises:
            TargetError: a node needs an operator set that the target does not read, or a quantized type it lacks.
        """
        rewriter = Rewriter(state.model)
        for graph in list(all_graphs(state.model)):
            for node in list(graph):
                if node.domain == DOMAIN:
                    inline(rewriter, node, state.model.functions[node.op_identifier()])
        for identifier in [i for i, f in state.model.functions.items() if f.domain == DOMAIN]:
            del state.model.functions[identifier]
        for graph in all_graphs(state.model):
            graph.opset_imports.pop(DOMAIN, None)
            self._fit(state, rewriter, graph)
        if not self.standard:
            write_block_operators(rewriter)
        self._cap_opset(state)
        return rewriter.changes

    def _fit(self, state: CompileState, rewriter: Rewriter, graph: ir.Graph) -> None:
        for node in list(graph):
            if node.graph is not graph:
                continue
            if is_op(node, "DequantizeLinear"):
                if not _float_constant(rewriter, node) and not two_blocks(rewriter, node):
                    _write_out_dequantize(rewriter, node)
            elif is_op(node, "Add") and (freed := _free_products(rewriter, node)):
                text = (
                    f"the sum reads {' and '.join(freed)} in float, in the epilogue of the product: one rounding less"
                )
                state.remark(self.name(), node, "residual", text, done=True)
            elif is_op(node, "MatMul") and (parts := split_projection(rewriter, node)):
                text = f"its result is split into {parts}: one product for each, or its weight would be read as floats"
                state.remark(self.name(), node, "projection", text, done=True)
        for node in list(graph):
            quantizes = node.graph is graph and is_op(node, "QuantizeLinear")
            if quantizes and not _write_out_quantize(rewriter, node):
                _say_type(rewriter, node)

    def _cap_opset(self, state: CompileState) -> None:
        """Set the operator set that the target's table asks for.

        Raises:
            TargetError: the model needs a newer one than the target reads.
        """
        model, target = state.model, state.target
        current, wanted, most = onnx_opset(model), target.opset or target.max_opset, target.max_opset
        least = min_opset(model)
        if least > most:
            raise TargetError(
                f"the model needs ONNX opset {least}, and {target.name} reads up to {most}; export it with opset "
                f"{most} or less"
            )
        version = max(least, min(wanted, most))
        if version < current:
            set_opset(model, version)
        elif current < wanted <= most and _needs_newer(model):
            set_opset(model, wanted)
        model.ir_version = max(least_ir_version(model), 10 if onnx_opset(model) >= 21 else 0)


def _needs_newer(model: ir.Model) -> bool:
    """Return whether an element type is there that only opset 23 quantizes to."""
    return any(
        value.dtype is ir.DataType.FLOAT4E2M1
        for graph in all_graphs(model)
        for value in (*graph.initializers.values(), *(v for node in graph for v in node.outputs))
    )


def _numbers(node: ir.Node) -> tuple[Array, Array | None, ir.DataType] | None:
    """Return (scale, zero point or None, stored type) of a Q or DQ with constant numbers, else None."""
    scale = const_array(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero = const_array(given)
    if scale is None or (given is not None and zero is None):
        return None
    stored = node.outputs[0] if is_op(node, "QuantizeLinear") else node.inputs[0]
    named = ir.DataType(attr_int(node, "output_dtype", 0)) if is_op(node, "QuantizeLinear") else ir.DataType.UNDEFINED
    kind = given.dtype if given is not None else named if named else None if stored is None else stored.dtype
    return scale, zero, ir.DataType.UINT8 if kind is None else kind


# ---- constants ----------------------------------------------------------------------------------------------------


def _float_constant(rewriter: Rewriter, node: ir.Node) -> bool:
    """Replace a DequantizeLinear of constant 32-bit integers (a bias) by the floats it gives.

    Returns:
        whether the node was one.
    """
    integers, numbers = const_array(node.inputs[0]), _numbers(node)
    if integers is None or numbers is None or integers.dtype != np.int32 or attr_int(node, "block_size", 0):
        return False
    scale, zero, _ = numbers
    axis = attr_int(node, "axis", 1) % max(integers.ndim, 1)
    shape = [1] * integers.ndim
    if scale.ndim and integers.ndim:
        shape[axis] = scale.size
    wide = integers.astype(np.int64) - (0 if zero is None else zero.astype(np.int64).reshape(shape))
    made = (wide.astype(np.float32) * scale.astype(np.float32).reshape(shape)).astype(scale.dtype)
    source = node.inputs[0]
    assert source is not None
    rewriter.replace(node.outputs[0], rewriter.constant(made, f"{source.name}:float", node.graph))
    rewriter.erase_dead([node])
    return True


# ---- the residual addition ------------------------------------------------------------------------------------------


def _free_products(rewriter: Rewriter, add: ir.Node) -> list[str]:
    """Let an Add of Q/DQ branches read those in float that a product computes for it alone.

    Returns:
        the names of the values it now reads in float.
    """
    freed = []
    for index, read in enumerate(add.inputs):
        pair = _own_pair(read)
        if pair is None:
            continue
        dequantize, quantize = pair
        value = quantize.inputs[0]
        if value is None or len(value.uses()) != 1 or value.is_graph_output() or not _from_product(value):
            continue
        if len(quantize.outputs[0].uses()) != 1 or len(dequantize.outputs[0].uses()) != 1:
            continue
        rewriter.set_input(add, index, value)
        rewriter.erase_dead([dequantize])
        freed.append(str(value.name))
    return freed


def _own_pair(value: ir.Value | None) -> tuple[ir.Node, ir.Node] | None:
    """Return (dequantize, quantize) in front of a value, in one graph and read by nothing outside, else None."""
    dequantize = None if value is None else value.producer()
    if dequantize is None or not is_op(dequantize, "DequantizeLinear") or dequantize.outputs[0].is_graph_output():
        return None
    quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
    if quantize is None or not is_op(quantize, "QuantizeLinear") or quantize.outputs[0].is_graph_output():
        return None
    return dequantize, quantize


def _from_product(value: ir.Value) -> bool:
    """Return whether a Conv, MatMul or Gemm gives a value, its bias and activation included."""
    node = value.producer()
    for _ in range(2):  # at most an activation and an Add of a bias in between
        if node is not None and (is_op(node, "Relu", "Clip") or (is_op(node, "Add") and _adds_constant(node))):
            first = next((v for v in node.inputs if v is not None and const_array(v) is None), None)
            node = None if first is None or len(first.uses()) != 1 else first.producer()
    return is_op(node, "Conv", "MatMul", "Gemm", "ConvTranspose")


def _adds_constant(node: ir.Node) -> bool:
    return any(const_array(v) is not None for v in node.inputs)


# ---- what the parser does not take ----------------------------------------------------------------------------------


def _plain(numbers: tuple[Array, Array | None, ir.DataType]) -> bool:
    """Return whether TensorRT takes these numbers: a type it stores, and zero points of 0."""
    _, zero, kind = numbers
    return kind in _STORED and (zero is None or not np.any(zero.astype(np.float32)))


def _write_out_dequantize(rewriter: Rewriter, node: ir.Node) -> None:
    """Write a DequantizeLinear with a zero point, or of uint8, as Cast, Sub and Mul; exact in float32."""
    numbers, source = _numbers(node), node.inputs[0]
    if numbers is None or source is None or _plain(numbers) or attr_int(node, "block_size", 0):
        return
    scale, zero, _ = numbers
    constant = const_array(source)
    if constant is not None and constant.dtype != np.uint8:
        return
    out = node.outputs[0]
    shape = _along(scale, rank_of(source), attr_int(node, "axis", 1))
    value = rewriter.node(
        "Cast", [source], before=node, origin=[node], name=f"{node.name}/Cast", attributes={"to": ir.DataType.FLOAT}
    ).outputs[0]
    rewriter.declare(value, ir.DataType.FLOAT, out.shape)
    if zero is not None and np.any(zero.astype(np.float32)):
        shift = rewriter.constant(zero.astype(np.float32).reshape(shape), f"{node.name}:zero", node.graph)
        value = rewriter.node("Sub", [value, shift], before=node, origin=[node], name=f"{node.name}/Sub").outputs[0]
        rewriter.declare(value, ir.DataType.FLOAT, out.shape)
    factor = rewriter.constant(scale.astype(np.float32).reshape(shape), f"{node.name}:factor", node.graph)
    made = rewriter.node("Mul", [value, factor], before=node, origin=[node], name=f"{node.name}/Mul").outputs[0]
    rewriter.take_over(out, made)
    rewriter.replace(out, made)
    rewriter.erase_dead([node])


def _write_out_quantize(rewriter: Rewriter, node: ir.Node) -> bool:
    """Write a QuantizeLinear with a zero point, or of uint8, as Div, Round, Add, Clip and Cast; exact in float32."""
    numbers, source = _numbers(node), node.inputs[0]
    if numbers is None or source is None or _plain(numbers) or attr_int(node, "block_size", 0):
        return False
    scale, zero, kind = numbers
    if kind not in (ir.DataType.INT8, ir.DataType.UINT8):
        return False
    out = node.outputs[0]
    shape = _along(scale, rank_of(source), attr_int(node, "axis", 1))
    limits = np.iinfo(kind.numpy())

    def step(op_type: str, *inputs: ir.Value | None, to: ir.DataType | None = None) -> ir.Value:
        made = rewriter.node(
            op_type, inputs, before=node, origin=[node], name=f"{node.name}/{op_type}",
            attributes=None if to is None else {"to": to},
        ).outputs[0]  # fmt: skip
        rewriter.declare(made, to or ir.DataType.FLOAT, out.shape)
        return made

    def number(array: Array, name: str) -> ir.Value:
        return rewriter.constant(np.asarray(array, np.float32), f"{node.name}:{name}", node.graph)

    value = step("Round", step("Div", source, number(scale.reshape(shape), "divisor")))
    if zero is not None and np.any(zero):
        value = step("Add", value, number(zero.reshape(shape), "zero"))
    value = step("Clip", value, number(np.asarray(limits.min), "low"), number(np.asarray(limits.max), "high"))
    made = step("Cast", value, to=kind)
    rewriter.take_over(out, made)
    rewriter.replace(out, made)
    rewriter.erase_dead([node])
    return True


def _along(scale: Array, rank: int | None, axis: int) -> tuple[int, ...]:
    """Return the shape in which per-channel numbers broadcast along ``axis``."""
    if scale.size == 1 or rank is None:
        return () if scale.size == 1 else scale.shape
    return tuple(scale.size if i == axis % rank else 1 for i in range(rank))


def _say_type(rewriter: Rewriter, node: ir.Node) -> None:
    """Give a QuantizeLinear, and every DequantizeLinear of it, a zero point, so that its type is not guessed."""
    numbers = _numbers(node)
    if numbers is None or (len(node.inputs) > 2 and node.inputs[2] is not None):
        return
    scale, _, kind = numbers
    zero = rewriter.constant(np.zeros(scale.shape, kind.numpy()), f"{node.name}:zero_point", node.graph)
    for each in (node, *(use.node for use in node.outputs[0].uses())):
        if is_op(each, "QuantizeLinear", "DequantizeLinear") and (len(each.inputs) < 3 or each.inputs[2] is None):
            each.resize_inputs(3)
            rewriter.set_input(each, 2, zero)

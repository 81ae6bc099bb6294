"""Rules that fold Q/DQ around an operator into one fused call, by operator family.

Inputs of the call are named by role: ``x`` the quantized data with ``xs`` and ``xz`` (scale, zero point), ``w`` the
weight, ``b`` the bias, ``y`` the output. The lowering reads the roles back.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.graph import is_const, is_op, rank_of, shape_of, single_consumer
from qcompiler.patterns.language import Clause, Op, Pattern, Rest, Rule, any_of, const, maybe, op, opt, rest, rule, var
from qcompiler.patterns.match import Match
from qcompiler.patterns.outline import outline
from qcompiler.patterns.scales import MOVERS, same_params, selects_only

ACTIVATIONS = ("Relu", "Clip")
UNARY = ("AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax")


def dq(role: str) -> Op:
    """Match DequantizeLinear; the integers are bound to ``role``, scale and zero point to ``role`` + s and z."""
    return op("DequantizeLinear", var(role), var(role + "s"), maybe(var(role + "z")))


def q(inner: Pattern, role: str = "y") -> Op:
    """Match QuantizeLinear around ``inner``; its scale and zero point are bound to ``role`` + s and z."""
    return op("QuantizeLinear", inner, var(role + "s"), maybe(var(role + "z")))


_CONV = op("Conv", dq("x"), dq("w"), maybe(dq("b")), name="root")
_MATMUL = op("MatMul", dq("x"), dq("w"), name="root")
_GEMM_INT_BIAS = op("Gemm", dq("x"), dq("w"), maybe(dq("b")), name="root")
_GEMM_FLOAT_BIAS = op("Gemm", dq("x"), dq("w"), maybe(const("b")), name="root")
_OTHERS: Rest = rest("other")


def _larger_group(m: Match) -> str | None:
    """Refuse where a bias or a quantization follows: the rule that includes it is to fire there."""
    if m.get("b") is not None and m.get("bs") is None:
        return None  # a float bias is added behind the integers: no larger group has one
    reader = single_consumer(m.root.outputs[0])
    if reader is None:
        return None
    if is_op(reader, *ACTIVATIONS):
        reader = single_consumer(reader.outputs[0])
        return "larger-group: an activation and a quantization follow" if is_op(reader, "QuantizeLinear") else None
    if is_op(reader, "QuantizeLinear"):
        return "larger-group: a quantization follows"
    if is_op(reader, "Add") and m.root.op_type == "MatMul" and any(_is_bias(v, m.w) for v in reader.inputs):
        return "larger-group: a bias follows"
    return None


def _is_bias(value: ir.Value | None, weight: ir.Value) -> bool:
    """Return whether a value is a constant with one number per column of the weight."""
    shape, columns = shape_of(value), shape_of(weight)
    if not is_const(value) or not shape or not columns or len(columns) != 2:
        return False
    return shape[-1] == columns[-1] and all(d == 1 for d in shape[:-1])


def _per_column(m: Match) -> str | None:
    if not _is_bias(m.b, m.w):
        return "bias-shape: the added constant is not one number per column of the weight"
    shape, rank = shape_of(m.b), rank_of(m.root.outputs[0])
    if shape is not None and len(shape) > 1 and (rank is None or len(shape) > rank):
        return "bias-shape: the added constant may add axes"
    return None


def _moves_integers(m: Match) -> str | None:
    node = m.node("root")
    first = node.inputs[0]
    assert first is not None
    dequantize = first.producer()
    assert dequantize is not None
    if not same_params(dequantize, m.root):
        return "parameters-differ: the operator moves integers only with equal parameters on both sides"
    return selects_only(node)


_WHOLE = (Clause("whole_group", _larger_group),)

FUSE_RULES: tuple[Rule, ...] = (
    rule(
        "dq-conv-q",
        match=q(opt(ACTIVATIONS, _CONV, name="activation")),
        build=outline,
        doc="Fold the dequantizations and the quantization around a convolution into one integer convolution.",
    ),
    rule(
        "dq-gemm-q",
        match=q(opt(ACTIVATIONS, _GEMM_INT_BIAS, name="activation")),
        build=outline,
        doc="Fold the dequantizations and the quantization around a Gemm into one integer Gemm.",
    ),
    rule(
        "dq-matmul-q",
        match=q(opt(ACTIVATIONS, _MATMUL, name="activation")),
        build=outline,
        doc="Fold the dequantizations and the quantization around a MatMul into one integer MatMul.",
    ),
    rule(
        "dq-matmul-add",
        match=op("Add", _MATMUL, const("b"), name="bias"),
        where=[Clause("per_column", _per_column)],
        build=outline,
        doc="Fold the dequantizations of a MatMul, and the bias behind it, into an integer MatMul with float output.",
    ),
    rule(
        "dq-matmul",
        match=_MATMUL,
        where=_WHOLE,
        build=outline,
        doc="Fold the dequantizations of a MatMul into an integer MatMul with float output.",
    ),
    rule(
        "dq-gemm",
        match=any_of(_GEMM_FLOAT_BIAS, _GEMM_INT_BIAS),
        where=_WHOLE,
        build=outline,
        doc="Fold the dequantizations of a Gemm into an integer MatMul with float bias and output.",
    ),
    rule(
        "dq-binary-q",
        match=q(opt(ACTIVATIONS, op(("Add", "Mul"), dq("x"), dq("w"), name="root"), name="activation")),
        build=outline,
        doc="Fold Q/DQ around an addition or a multiplication.",
    ),
    rule(
        "dq-concat-q",
        match=q(op("Concat", rest("part", dq("x")), name="root")),
        build=outline,
        doc="Fold Q/DQ around a concatenation.",
    ),
    rule(
        "dq-unary-q",
        match=q(op(UNARY, dq("x"), name="root")),
        build=outline,
        doc="Fold Q/DQ around an operator of one input.",
    ),
    rule(
        "dq-move-q",
        match=q(op(MOVERS, dq("x"), _OTHERS, name="root")),
        where=[Clause("moves_integers", _moves_integers)],
        build=outline,
        doc="Let an operator that only moves or selects elements move integers.",
    ),
    rule(
        "dq-lstm",
        match=op("LSTM", var("x"), dq("w"), dq("r"), _OTHERS, name="root"),
        build=outline,
        doc="Fold the dequantizations of the weights of an LSTM into a dynamically quantized LSTM.",
    ),
)
"""Tried in this order at each root, so that the larger pattern comes first."""

"""Rules that fold Q/DQ around an operator into one fused call, by operator family.

Inputs of the call are named by role: ``x`` the quantized data with ``xs`` and ``xz`` (scale, zero point), ``w`` the
weight, ``b`` the bias, ``y`` the output. The lowering reads the roles back.
"""

from __future__ import annotations

from qcompiler.ir.graph import is_const, is_op, single_consumer
from qcompiler.patterns.language import Clause, Op, Pattern, Rest, Rule, any_of, const, maybe, op, opt, rest, rule, var
from qcompiler.patterns.match import Match
from qcompiler.patterns.outline import outline

ACTIVATIONS = ("Relu", "Clip")
UNARY = ("AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax")
MOVERS = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand", "Tile", "DepthToSpace",
    "MaxPool", "Resize",
)  # fmt: skip


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
    reader = single_consumer(m.root.outputs[0])
    if reader is None:
        return None
    if is_op(reader, *ACTIVATIONS):
        reader = single_consumer(reader.outputs[0])
        return "larger-group: an activation and a quantization follow" if is_op(reader, "QuantizeLinear") else None
    if is_op(reader, "QuantizeLinear"):
        return "larger-group: a quantization follows"
    if is_op(reader, "Add") and m.root.op_type == "MatMul" and any(is_const(v) for v in reader.inputs):
        return "larger-group: a bias follows"
    return None


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
        where=_WHOLE,
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

"""Rules that fold Q/DQ around an operator into one fused call, by operator family.

Inputs of the call are named by role: ``x`` the quantized data with ``xs`` and ``xz`` (scale, zero point), ``w`` the
weight, ``b`` the bias (int32 with ``bs`` and ``bz``, or float), ``y`` the output. The lowering reads the roles back.

Weight-only calls have a float ``x`` without ``xs``, and a ``w`` that is dequantized, in blocks along K where its
DequantizeLinear says so. Block scales that are stored in float8 are ``wb`` under the one scale ``wo``, instead of
``ws``; a float4e2m1 weight is carried as int8 holding twice its numbers (`qcompiler.passes.stored_constants`), which
the point of the plan (``plan.points["GROUP#1"].spec``) tells: format, axis, block and scale format.

Calls whose activation is quantized in blocks at run time read ``x`` through a function of
`qcompiler.patterns.block_dynamic`, which says how a lowering finds it.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.graph import attr_int, is_const, is_op, rank_of, shape_of, single_consumer
from qcompiler.patterns.block_dynamic import BLOCK_DOMAIN, BLOCK_QUANTIZERS
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


def _stored(role: str) -> Pattern:
    """Match a dequantized weight: by float scales, or by float8 block scales under one scale above them."""
    scales = op("DequantizeLinear", const(role + "b"), const(role + "o"))
    return any_of(op("DequantizeLinear", const(role), scales), dq(role))


_BIAS = any_of(dq("b"), const("b"))
_CONV = op("Conv", dq("x"), dq("w"), maybe(_BIAS), name="root")
_MATMUL = op("MatMul", dq("x"), dq("w"), name="root")
_GEMM = op("Gemm", dq("x"), dq("w"), maybe(_BIAS), name="root")
_GEMM_INT_BIAS = op("Gemm", dq("x"), dq("w"), maybe(dq("b")), name="root")
_GEMM_FLOAT_BIAS = op("Gemm", dq("x"), dq("w"), maybe(const("b")), name="root")
_BLOCKS = op(BLOCK_QUANTIZERS, var("x"), maybe(var("xo")), domain=BLOCK_DOMAIN)
_FLOAT_OR_BLOCKS = any_of(_BLOCKS, var("x"))
_W_MATMUL = op("MatMul", _FLOAT_OR_BLOCKS, _stored("w"), name="root")
_OTHERS: Rest = rest("other")


def _own_quantize(node: ir.Node | None, root: ir.Node) -> bool:
    """Return whether a QuantizeLinear stores a group's result (and does not merely prepare another group's input)."""
    return node is not None and is_op(node, "QuantizeLinear") and node.name == f"{root.name}/QuantizeLinear"


def _written_as_float(m: Match) -> str | None:
    reader = single_consumer(m.root.outputs[0])
    if is_op(reader, *ACTIVATIONS):
        reader = single_consumer(reader.outputs[0])
    if _own_quantize(reader, m.node("root")):
        return "larger-group: the group's own quantization follows"
    return None


def _larger_group(m: Match) -> str | None:
    """Refuse where a bias or a quantization follows: the rule that includes it is to fire there."""
    if m.get("b") is not None and m.get("bs") is None:
        return _written_as_float(m)  # a float bias is added behind the integers: only an output of its own is larger
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


def _stores_result(m: Match) -> str | None:
    if _own_quantize(m.root, m.node("root")):
        return None
    return "other-group: the quantization belongs to a reader, the group itself writes floats"


def _stored_bias(m: Match) -> str | None:
    reader = single_consumer(m.root.outputs[0])
    if is_op(reader, "Add") and any(_is_bias(v, m.w) for v in reader.inputs):
        return "larger-group: a bias follows"
    return None


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


def _not_in_blocks(m: Match) -> str | None:
    """Refuse a weight in blocks beside quantized data: no integer kernel has one, it is dequantized first."""
    weight = m.node("root").inputs[1]
    node = weight.producer() if weight is not None else None
    return "block: the weight is quantized in blocks" if node is not None and attr_int(node, "block_size", 0) else None


def _reads_float(m: Match) -> str | None:
    """Refuse where the data is quantized too: another rule folds that, or says why not."""
    node = m.node("root")
    data = node.inputs[1 if node.op_type == "Gather" else 0]
    weight = node.inputs[0 if node.op_type == "Gather" else 1]
    dequantize = weight.producer() if weight is not None else None
    if dequantize is None or not is_const(dequantize.inputs[0]):
        return "weight-not-constant: the quantized operand is not a constant"
    if data is None or not is_op(data.producer(), "DequantizeLinear") or attr_int(dequantize, "block_size", 0):
        return None
    return "data-quantized: both operands are quantized"


_WHOLE = (Clause("whole_group", _larger_group), Clause("not_in_blocks", _not_in_blocks))
_CHANNELS = (Clause("not_in_blocks", _not_in_blocks),)
_FLOAT_DATA = (Clause("reads_float", _reads_float, structural=True),)

FUSE_RULES: tuple[Rule, ...] = (
    rule(
        "dq-conv-q",
        match=q(opt(ACTIVATIONS, _CONV, name="activation")),
        build=outline,
        doc="Fold the dequantizations and the quantization around a convolution into one integer convolution.",
    ),
    rule(
        "dq-gemm-q",
        match=q(opt(ACTIVATIONS, _GEMM, name="activation")),
        where=_CHANNELS,
        build=outline,
        doc="Fold the dequantizations and the quantization around a Gemm into one integer Gemm.",
    ),
    rule(
        "dq-matmul-q",
        match=q(opt(ACTIVATIONS, _MATMUL, name="activation")),
        where=_CHANNELS,
        build=outline,
        doc="Fold the dequantizations and the quantization around a MatMul into one integer MatMul.",
    ),
    rule(
        "dq-matmul-add-q",
        match=q(opt(ACTIVATIONS, op("Add", _MATMUL, const("b"), name="bias"), name="activation")),
        where=[Clause("stores_result", _stores_result), Clause("per_column", _per_column), *_CHANNELS],
        build=outline,
        doc="Fold the dequantizations, the bias and the quantization around a MatMul into one integer MatMul.",
    ),
    rule(
        "dq-matmul-add",
        match=op("Add", _MATMUL, const("b"), name="bias"),
        where=[Clause("whole_group", _written_as_float), Clause("per_column", _per_column), *_CHANNELS],
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
    rule(
        "stored-matmul-add",
        match=op("Add", _W_MATMUL, const("b"), name="bias"),
        where=[*_FLOAT_DATA, Clause("per_column", _per_column)],
        build=outline,
        doc="Fold the dequantization of a weight that alone is stored quantized, and the bias, into the product.",
    ),
    rule(
        "stored-matmul",
        match=_W_MATMUL,
        where=[*_FLOAT_DATA, Clause("whole_group", _stored_bias)],
        build=outline,
        doc="Fold the dequantization of a weight that alone is stored quantized into the product.",
    ),
    rule(
        "stored-gemm",
        match=op("Gemm", _FLOAT_OR_BLOCKS, _stored("w"), maybe(var("b")), name="root"),
        where=_FLOAT_DATA,
        build=outline,
        doc="Fold the dequantization of a weight that alone is stored quantized into the Gemm.",
    ),
    rule(
        "stored-conv",
        match=op("Conv", var("x"), _stored("w"), maybe(var("b")), name="root"),
        where=_FLOAT_DATA,
        build=outline,
        doc="Fold the dequantization of a weight that alone is stored quantized into the convolution.",
    ),
    rule(
        "stored-gather",
        match=op("Gather", _stored("w"), var("x"), name="root"),
        where=_FLOAT_DATA,
        build=outline,
        doc="Fold the dequantization of a table into the Gather that reads its rows.",
    ),
)
"""Tried in this order at each root, so that the larger pattern comes first."""

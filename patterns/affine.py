"""BatchNormalization, and Mul and Add per channel, taken up by the weights and bias beside them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_float, const_array, is_op, rank_of, shape_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import float_typed, where
from qcompiler.patterns.language import Clause, Op, Pattern, Rule, const, maybe, op, rule, var
from qcompiler.patterns.match import Match
from qcompiler.patterns.operators import attribute_value
from qcompiler.patterns.weights import (
    Affine,
    bias_problem,
    channel_vector,
    channels,
    folded_after,
    folded_before,
    input_axis,
    is_unpadded,
    narrowed,
    output_axis,
    real,
    rebuild,
    weight_problem,
)

_X, _W = var("x"), var("w")
_TYPES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NODE = op(_TYPES, _X, _W, maybe(var("bias")), name="op")


def _norm(x: Pattern, name: str) -> Op:
    return op("BatchNormalization", x, var("s"), var("o"), var("mean"), var("var"), name=name)


def _norm_affine(m: Match) -> Affine | str:
    """Return what a BatchNormalization in inference does: (x - mean) / sqrt(var + eps) * s + o."""
    node = m.find("norm") or m.node("pre")
    if attribute_value(node, "training_mode", m.opset) == 1 or any(v.uses() for v in node.outputs[1:]):
        return "training: the BatchNormalization is in training mode"
    s, o, mean, var_ = (real(m.get(name)) for name in ("s", "o", "mean", "var"))
    if s is None or o is None or mean is None or var_ is None:
        return "not-constant: a statistic of the BatchNormalization is computed at run time"
    scale = s / np.sqrt(var_ + attr_float(node, "epsilon", 1e-5))
    return Affine(scale, o - mean * scale)


def _operand_affine(kind: str, operand: ir.Value, axis: tuple[int, int] | None) -> Affine | str:
    """Return what Mul, Div, Add or Sub with a constant second operand does per channel."""
    array = const_array(operand)
    if array is None or axis is None:
        return "unknown-rank: the channel axis is not known"
    vector = channel_vector(array, *axis)
    if vector is None:
        return f"not-per-channel: {operand.name} has shape {array.shape}"
    if kind == "Div" and not vector.all():
        return "division-by-zero: an element of the divisor is zero"
    if kind in ("Mul", "Div"):
        return Affine(vector if kind == "Mul" else 1.0 / vector, np.zeros(1))
    return Affine(np.ones(1), vector if kind == "Add" else -vector)


def _after(m: Match) -> Affine | str:
    node = m.node("op")
    problem = weight_problem(node) or bias_problem(node)
    if problem is not None:
        return problem
    axis = output_axis(node)
    found = (
        _norm_affine(m)
        if is_op(m.root, "BatchNormalization")
        else _operand_affine(m.root.op_type, m.bindings["c"], axis)
    )
    if isinstance(found, str):
        return found
    if is_op(m.root, "BatchNormalization") and (axis is None or axis[0] != 1):
        return "axis: BatchNormalization works on axis 1, the weight's channels are elsewhere"
    if node.op_type == "MatMul" and found.shift.any() and axis != (1, 2):
        return "no-bias: a MatMul of higher rank has no bias"
    if any(vector.size not in (1, channels(node)[1]) for vector in (found.scale, found.shift)):
        return "not-per-channel: the number of channels differs"
    return found


def _before(m: Match) -> Affine | str:
    node, inner = m.node("op"), m.node("pre")
    problem = weight_problem(node) or bias_problem(node)
    if problem is not None:
        return problem
    axis, shape, count = input_axis(node), shape_of(m.x), channels(node)[0]
    is_norm = is_op(inner, "BatchNormalization")
    found = _norm_affine(m) if is_norm else _operand_affine(inner.op_type, m.bindings["c"], axis)
    if isinstance(found, str):
        return found
    if axis is None or (is_norm and axis[0] != 1):
        return "axis: BatchNormalization works on axis 1, the weight's channels are elsewhere"
    if found.shift.any() and not (is_op(node, "Gemm") or (is_op(node, "Conv") and is_unpadded(node))):
        return "padded: an offset in front of a padded convolution or a MatMul cannot be moved behind it"
    if found.scale.size == found.shift.size == 1:
        return found
    if shape is None or len(shape) != axis[1] or shape[axis[0]] != count:
        return "unknown-shape: the channels of x are not known"
    if any(vector.size not in (1, count) for vector in (found.scale, found.shift)):
        return "not-per-channel: the number of channels differs"
    return found


def _fits(m: Match, parts: tuple[np.ndarray, np.ndarray]) -> str | None:
    if any(narrowed(part, m.w) is None for part in parts):
        return f"overflow: the folded weight does not fit {m.w.dtype}"
    return None


def _can_fold_after() -> Clause:
    def check(m: Match) -> str | None:
        found = _after(m)
        return found if isinstance(found, str) else _fits(m, folded_after(m.node("op"), found))

    return where("the weight takes up factor and offset", check)


def _can_fold_before() -> Clause:
    def check(m: Match) -> str | None:
        found = _before(m)
        return found if isinstance(found, str) else _fits(m, folded_before(m.node("op"), found))

    return where("the weight takes up factor and offset", check)


def _fold_after(b: Builder, m: Match) -> ir.Value:
    found, node = _after(m), m.node("op")
    assert isinstance(found, Affine)
    bias = m.get("bias") is not None or bool(found.shift.any())
    return rebuild(b, node, m.x, folded_after(node, found), bias)


def _fold_before(b: Builder, m: Match) -> ir.Value:
    found, node = _before(m), m.node("op")
    assert isinstance(found, Affine)
    bias = m.get("bias") is not None or bool(found.shift.any())
    return rebuild(b, node, m.x, folded_before(node, found), bias)


def _biased_scale(m: Match) -> Affine | str:
    node = m.node("op")
    problem = weight_problem(node)
    if problem is not None:
        return problem
    found = _operand_affine(m.root.op_type, m.bindings["c"], output_axis(node))
    if isinstance(found, str):
        return found
    bias = real(m.get("t"))
    if bias is None or found.scale.size not in (1, channels(node)[1]):
        return "not-per-channel: the number of channels differs"
    if bias.ndim > (rank_of(m.op) or 0):
        return "rank: the offset has more axes than the product"
    return _fits(m, (folded_after(node, found)[0], bias * found.scale)) or found


def _scale_biased(b: Builder, m: Match) -> ir.Value:
    found, node = _biased_scale(m), m.node("op")
    assert isinstance(found, Affine)
    product = rebuild(b, node, m.x, folded_after(node, found), bias=False)
    product.shape = m.op.shape
    bias = real(m.get("t"))
    assert bias is not None
    offset = narrowed(bias * found.scale, m.w)
    assert offset is not None
    return b.op("Add", product, b.constant(offset, f"{m.t.name}:folded"), like=m.root.outputs[0])


def _biased_scale_problem(m: Match) -> str | None:
    found = _biased_scale(m)
    return found if isinstance(found, str) else None


BATCH_NORMS: tuple[Rule, ...] = (
    rule(
        "batch-norm-after",
        match=_norm(_NODE, "norm"),
        where=[float_typed("w"), _can_fold_after()],
        build=_fold_after,
        doc="Take a BatchNormalization into the weight and bias in front of it.",
    ),
    rule(
        "batch-norm-before",
        match=op(
            ("Conv", "Gemm", "MatMul"),
            _norm(_X, "pre"),
            const("w"),
            maybe(var("bias")),
            name="op",
        ),
        where=[float_typed("w"), _can_fold_before()],
        build=_fold_before,
        doc="Take a BatchNormalization into the weight and bias behind it, if nothing is padded.",
    ),
)
"""Rules of ``fuse-batch-norm``."""

FACTORS: tuple[Rule, ...] = (
    rule(
        "factor-after",
        match=op(("Mul", "Div", "Add", "Sub"), _NODE, const("c"), name="post"),
        where=[float_typed("w"), _can_fold_after()],
        build=_fold_after,
        doc="Take a constant per output channel into the weight or bias in front of it.",
    ),
    rule(
        "factor-before",
        match=op(_TYPES, op(("Mul", "Div", "Add", "Sub"), _X, const("c"), name="pre"), const("w"), maybe(var("bias")),
                 name="op"),
        where=[float_typed("w"), _can_fold_before()],
        build=_fold_before,
        doc="Take a constant per input channel into the weight behind it.",
    ),
    rule(
        "factor-after-biased-matmul",
        match=op(("Mul", "Div"), op("Add", op("MatMul", _X, _W, name="op"), const("t")), const("c")),
        where=[float_typed("w"), where("the weight takes up the factor", _biased_scale_problem)],
        build=_scale_biased,
        doc="Take a constant per output channel into the weight and the offset of a MatMul.",
    ),
)  # fmt: skip
"""Rules of ``fold-mul-add-into-weights``."""

"""The normal form of matrix products with a bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_float, attr_int, const_array, is_const, shape_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import float_typed, rank, where
from qcompiler.patterns.language import Rule, const, maybe, op, rule, var
from qcompiler.patterns.match import Match
from qcompiler.patterns.weights import Real, channel_vector, narrowed, real


def _columns(m: Match) -> int | None:
    shape = shape_of(m.w)
    return shape[1] if shape is not None and len(shape) == 2 and isinstance(shape[1], int) else None


def _is_row(m: Match) -> str | None:
    vector, count = channel_vector(m.array("c"), 1, 2), _columns(m)
    if vector is None or count is None:
        return f"not-per-channel: the offset has shape {m.array('c').shape}"
    return None if vector.size in (1, count) else "not-per-channel: the offset widens the product"


def _gemm(b: Builder, m: Match) -> ir.Value:
    array, count = m.array("c"), _columns(m)
    assert count is not None
    bias = m.c if array.shape == (count,) else b.constant(_row(array, count), f"{m.c.name}:row")
    return b.op("Gemm", m.x, m.w, bias, like=m.root.outputs[0])


def _row(array: np.ndarray, count: int) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (count,)))


MATMUL_ADD: tuple[Rule, ...] = (
    rule(
        "matmul-add-to-gemm",
        match=op("Add", op("MatMul", var("x"), var("w")), const("c")),
        where=[float_typed("w", "c"), rank("x", 2), rank("w", 2), where("c is one row", _is_row)],
        build=_gemm,
        doc="Spell a rank-2 MatMul with a bias as Gemm.",
    ),
)
"""Rules of ``fuse-matmul-add``."""


def _constant_first(m: Match) -> str | None:
    first, second = m.root.inputs[0], m.root.inputs[1]
    return None if is_const(first) and not is_const(second) else "canonical: the constant is not the first operand"


def _swap(b: Builder, m: Match) -> ir.Value:
    first, second = m.root.inputs[0], m.root.inputs[1]
    b.set_input(m.root, 0, second)
    b.set_input(m.root, 1, first)
    return m.root.outputs[0]


OPERAND_ORDER: tuple[Rule, ...] = (
    rule(
        "constant-second",
        match=op(("Add", "Mul"), var("x"), var("y")),
        where=[where("only the first operand is constant", _constant_first, structural=True)],
        build=_swap,
        doc="Write the constant operand of Add and Mul second.",
    ),
)
"""Rules of ``order-operands``."""


def _transposes_weight(m: Match) -> bool:
    return attr_int(m.root, "transB", 0) == 1 and is_const(m.w)


def _transposes_data(m: Match) -> bool:
    return attr_int(m.root, "transA", 0) == 1 and is_const(m.x)


def _has_alpha(m: Match) -> bool:
    return attr_float(m.root, "alpha", 1.0) != 1.0 and is_const(m.w)


def _bias_form(m: Match) -> bool:
    """Return whether the constant C is not yet a plain row, though it could be."""
    bias = m.get("c")
    if bias is None:
        return attr_float(m.root, "beta", 1.0) != 1.0
    array, count = const_array(bias), _width(m)
    if array is None:
        return False
    as_row = channel_vector(array, 1, 2) is not None and count is not None
    return attr_float(m.root, "beta", 1.0) != 1.0 or (as_row and array.shape != (count,))


def _width(m: Match) -> int | None:
    shape = shape_of(m.w)
    if shape is None or len(shape) != 2:
        return None
    size = shape[0 if attr_int(m.root, "transB", 0) else 1]
    return size if isinstance(size, int) else None


def _has_work(m: Match) -> str | None:
    work = _transposes_weight(m) or _transposes_data(m) or _has_alpha(m) or _bias_form(m)
    return None if work else "canonical: nothing can be taken into a constant"


def _unshared(m: Match) -> str | None:
    changed = [(m.w, _transposes_weight(m) or _has_alpha(m)), (m.x, _transposes_data(m))]
    for value, changes in changed:
        if changes and (len(value.uses()) > 1 or value.is_graph_output()):
            return f"shared-constant: {value.name} is read {len(value.uses())} times"
    return None


def _new_weight(m: Match) -> Real:
    weight = real(m.w)
    assert weight is not None
    if _transposes_weight(m):
        weight = np.ascontiguousarray(weight.T)
    return weight * attr_float(m.root, "alpha", 1.0)


def _new_bias(m: Match) -> Real:
    bias = real(m.c)
    assert bias is not None
    bias = bias * attr_float(m.root, "beta", 1.0)
    count = _width(m)
    if channel_vector(bias, 1, 2) is not None and count is not None:
        bias = np.broadcast_to(bias.reshape(-1), (count,))
    return np.ascontiguousarray(bias)


def _gemm_fits(m: Match) -> str | None:
    if _has_alpha(m) and narrowed(_new_weight(m), m.w) is None:
        return f"overflow: alpha times the weight does not fit {m.w.dtype}"
    if m.get("c") is not None and _bias_form(m) and narrowed(_new_bias(m), m.c) is None:
        return f"overflow: beta times the bias does not fit {m.c.dtype}"
    return None


def _normal_form(b: Builder, m: Match) -> ir.Value:
    drop: list[str] = []
    inputs: list[ir.Value | None] = [m.x, m.w, m.get("c")]
    if _transposes_data(m):
        drop.append("transA")
        inputs[0] = b.constant(np.ascontiguousarray(m.array("x").T), f"{m.x.name}:transposed")
    if _transposes_weight(m) or _has_alpha(m):
        drop += ["transB", "alpha"]
        weight = narrowed(_new_weight(m), m.w)
        assert weight is not None
        inputs[1] = b.constant(weight, f"{m.w.name}:normal")
    if _bias_form(m):
        drop.append("beta")
        if m.get("c") is not None:
            bias = narrowed(_new_bias(m), m.c)
            assert bias is not None
            inputs[2] = b.constant(bias, f"{m.c.name}:row")
    if inputs[2] is None:
        inputs.pop()
    return b.clone(m.root, *inputs, drop=tuple(drop))


GEMM: tuple[Rule, ...] = (
    rule(
        "gemm-normal-form",
        match=op("Gemm", var("x"), var("w"), maybe(var("c"))),
        where=[
            where("a constant can take up an attribute", _has_work, structural=True),
            float_typed("w"),
            where("constants are read once", _unshared),
            where("fits the type", _gemm_fits),
        ],
        build=_normal_form,
        doc="Take alpha, beta and the transpositions of a Gemm into its constants.",
    ),
)
"""Rules of ``normalize-gemm``."""

"""Rules that recognise softmax(Q K^T / scale) V without a mask and write it as the engine's own operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import const_array, scalar, shape_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.language import Clause, Pattern, Rule, any_of, const, op, rule, var
from qcompiler.patterns.match import Match

_TO_HEADS = {"perm": (0, 2, 1, 3)}


def _heads(name: str) -> Pattern:
    """Match (batch, length, width) laid out as (batch, heads, length, width of a head)."""
    return op("Transpose", op("Reshape", var(name), const(f"{name}_shape"), name=f"{name}_heads"), attrs=_TO_HEADS)


def _turned_heads(name: str) -> Pattern:
    """Match the same with the last two axes exchanged."""
    apart = op("Reshape", var(name), const(f"{name}_shape"), name=f"{name}_heads")
    return any_of(
        op("Transpose", apart, attrs={"perm": (0, 2, 3, 1)}),
        op("Transpose", op("Transpose", apart, attrs=_TO_HEADS), attrs={"perm": (0, 1, 3, 2)}),
    )


def _scaled(inner: Pattern, name: str) -> Pattern:
    """Match a value with or without one factor or divisor."""
    return any_of(
        op("Mul", inner, const(name), name=f"{name}_times"), op("Div", inner, const(name), name=f"{name}_over"), inner
    )


_SCORES = _scaled(
    op("MatMul", _scaled(_heads("q"), "q_scale"), _scaled(_turned_heads("k"), "k_scale"), name="scores"), "scale"
)
_CORE = any_of(
    op("MatMul", op("Softmax", _SCORES, attrs={"axis": -1}), _heads("v"), name="core"),
    op("MatMul", op("Softmax", _SCORES, attrs={"axis": 3}), _heads("v"), name="core"),
)


def _factor(m: Match) -> float | None:
    """Return what the scores are multiplied by altogether; None if it is not one number."""
    product = 1.0
    for name in ("q_scale", "k_scale", "scale"):
        if m.get(name) is None:
            continue
        number = scalar(m.get(name))
        if number is None or not np.isfinite(number) or number == 0:
            return None
        product = product * number if m.find(f"{name}_times") is not None else product / number
    return product


def _one_scale(m: Match) -> str | None:
    found = _factor(m)
    if found is None:
        return "not-scalar: the scores are not scaled by one number"
    return None if found > 0 else "not-positive: the operator takes a scale of zero for the default"


def _float32(m: Match) -> str | None:
    return None if all(v.dtype == ir.DataType.FLOAT for v in (m.q, m.k, m.v)) else "not-float32"


def _head_counts(m: Match) -> str | None:
    """Decline unless queries, keys and values are (batch, length, width), taken into equally many heads."""
    sizes = []
    for name in ("q", "k", "v"):
        value, heads = m.bindings[name], m.bindings[f"{name}_heads"]
        before, after = shape_of(value), shape_of(heads)
        if before is None or after is None:
            return f"unknown-shape: of {value.name} or its heads"
        if len(before) != 3 or len(after) != 4:
            return f"rank: {value.name} has {len(before)} axes and {len(after)} with heads, expected 3 and 4"
        if not isinstance(after[2], int) or not isinstance(after[3], int) or before[2] != after[2] * after[3]:
            return f"heads: the heads of {value.name} are not its last axis"
        if not _keeps_rows(before, after, const_array(m.get(f"{name}_shape"))):
            return f"rows: {value.name} may be laid out anew"
        sizes.append((after[2], after[3]))
    if len({count for count, _ in sizes}) > 1 or sizes[0] != sizes[1]:
        return "heads: queries, keys and values have different heads"
    return None


def _keeps_rows(
    before: tuple[int | str | None, ...], after: tuple[int | str | None, ...], target: np.ndarray | None
) -> bool:
    """Return whether a Reshape of the last axis keeps batch and length: one that is pinned pins the other."""
    same = any(a is not None and a == b for a, b in zip(before[:2], after[:2], strict=True))
    return same or (target is not None and bool((target[:2] == 0).any()))


def _attend(b: Builder, m: Match) -> ir.Value:
    """Return the operator's result as (batch, length, heads, width of a head)."""
    core = m.node("core")
    name = str(core.name)
    core.name = b.rewriter.unique(f"{name}:was")
    heads, width = (n for n in (shape_of(m.v_heads) or ())[2:])
    assert isinstance(heads, int)
    assert isinstance(width, int)
    made = b.node(
        "MultiHeadAttention", m.q, m.k, m.v, domain="com.microsoft", name=f"{name}/MultiHeadAttention",
        num_heads=heads, scale=float(_factor(m) or 1.0),
    )  # fmt: skip
    made.name = name
    q = shape_of(m.q)
    assert q is not None
    b.rewriter.declare(made.outputs[0], m.q.dtype, ir.Shape([*q[:2], heads * width]))
    shape = b.constant(np.asarray([0, 0, heads, width], np.int64), f"{name}:shape")
    return b.op("Reshape", made.outputs[0], shape, name=f"{name}/Reshape")


def _float_result(b: Builder, m: Match) -> ir.Value:
    value = _attend(b, m)
    b.rewriter.declare(value, m.q.dtype, m.root.outputs[0].shape)
    return value


def _stored_result(b: Builder, m: Match) -> ir.Value:
    """Quantize in front of the Transpose, which is gone, instead of behind it: the same numbers become integers."""
    value = _attend(b, m)
    first = m.node("first")
    b.rewriter.declare(value, m.q.dtype, m.root.outputs[0].shape)
    name = str(first.name)
    first.name = b.rewriter.unique(f"{name}:was")
    made = b.node("QuantizeLinear", value, m.s, m.z, name=name, like=m.root.outputs[0])
    made.name = name
    for key, attribute in m.root.attributes.items():
        made.attributes[key] = attribute
    return made.outputs[0]


def _one_number(m: Match) -> str | None:
    array = const_array(m.s)
    return None if array is not None and array.size == 1 else "per-channel: one scale for all is expected"


_WHERE = (
    Clause("float32", _float32),
    Clause("head_counts", _head_counts),
    Clause("one_scale", _one_scale),
)

ATTENTION = rule(
    "attention-operator",
    match=op("Transpose", _CORE, attrs=_TO_HEADS),
    where=_WHERE,
    build=_float_result,
    doc="Write attention without a mask as MultiHeadAttention: block by block, so that no score leaves the cache.",
)
STORED_ATTENTION = rule(
    "stored-attention-operator",
    match=op(
        "QuantizeLinear",
        op(
            "Transpose",
            op("DequantizeLinear", op("QuantizeLinear", _CORE, var("s"), var("z"), name="first"), var("s"), var("z")),
            attrs=_TO_HEADS,
        ),
        var("s"),
        var("z"),
    ),
    where=(*_WHERE, Clause("one_number", _one_number)),
    build=_stored_result,
    doc="The same where the result is stored as integers before its heads are joined.",
)

ATTENTIONS: tuple[Rule, ...] = (ATTENTION, STORED_ATTENTION)
"""Rules of the trap ``attention``."""

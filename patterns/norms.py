"""LayerNormalization in its spelled-out forms."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, attr_ints, const_array, rank_of, scalar, shape_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import float_typed, opset_at_least, per_tensor, same_rank, where
from qcompiler.patterns.language import Clause, Pattern, Rule, any_of, const, maybe, number, op, rule, var
from qcompiler.patterns.match import Match
from qcompiler.patterns.weights import channel_vector

_X = var("x")


def _mean(inner: Pattern, name: str) -> Pattern:
    return op("ReduceMean", inner, maybe(var(f"{name}.axes")), name=name)


_D = op("Sub", _X, _mean(_X, "mean"), name="d")
_VARIANCE = _mean(any_of(op("Pow", _D, number(2.0)), op("Mul", _D, _D)), "variance")
_SUM = op("Add", _VARIANCE, const("eps"))
_DEVIATION = any_of(op("Sqrt", _SUM), op("Pow", _SUM, number(0.5)))
_NORMED = any_of(
    op("Div", _D, _DEVIATION, name="y"),
    op("Mul", _D, op("Reciprocal", _DEVIATION), name="y"),
    op("Mul", _D, op("Div", number(1.0), _DEVIATION), name="y"),
    op("Mul", _D, op("Pow", _SUM, number(-0.5)), name="y"),
)


def reduces_last_axis(node: ir.Node) -> str | None:
    """Return why a reduction is not one over the last axis that keeps it, or None."""
    if attr_int(node, "keepdims", 1) != 1:
        return "keepdims: the reduced axis is dropped"
    axes = attr_ints(node, "axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        array = const_array(node.inputs[1])
        axes = None if array is None else tuple(int(a) for a in array.reshape(-1))
    count = rank_of(node.inputs[0])
    if axes is None or len(axes) != 1:
        return "axes: not a single constant axis"
    if axes[0] == -1 or (count is not None and axes[0] == count - 1):
        return None
    return "not-last-axis: the mean is over another axis than the last"


def _over_last_axis() -> Clause:
    def check(m: Match) -> str | None:
        return reduces_last_axis(m.node("mean")) or reduces_last_axis(m.node("variance"))

    return where("means over the last axis", check)


def _width(value: ir.Value | None) -> int | None:
    shape = shape_of(value)
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def _known_width(m: Match) -> str | None:
    return None if _width(m.x) is not None else "unknown-shape: the length of the last axis is not known"


def _layer_norm(b: Builder, m: Match) -> ir.Value:
    width, epsilon = _width(m.x), scalar(m.eps)
    assert width is not None
    assert epsilon is not None
    assert m.x.dtype is not None
    scale = b.constant(np.ones(width, dtype=m.x.dtype.numpy()), f"{m.root.name}:scale")
    return b.op("LayerNormalization", m.x, scale, like=m.root.outputs[0], axis=-1, epsilon=epsilon)


_LAYER_NORM = op("LayerNormalization", _X, var("s"), maybe(var("o")), name="norm")


def _operand_problem(m: Match) -> str | None:
    node = m.node("norm")
    count = rank_of(m.x)
    axis = attr_int(node, "axis", -1)
    if axis != -1 and (count is None or axis != count - 1):
        return "axis: more than the last axis is normalized"
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "mean-used: the mean or deviation is read"
    scale, offset = const_array(m.s), m.get("o")
    if scale is None or (offset is not None and const_array(offset) is None):
        return "not-constant: scale or offset are computed at run time"
    if count is None:
        return "unknown-rank: the rank of x is not known"
    vector = channel_vector(m.array("c"), count - 1, count)
    if vector is None or vector.size not in (1, scale.size) or scale.ndim != 1:
        return "not-per-channel: the operand does not vary along the last axis only"
    return None


def _fold_operand(b: Builder, m: Match) -> ir.Value:
    scale, operand = m.array("s"), m.array("c").reshape(-1)
    offset = m.array("o") if m.get("o") is not None else np.zeros_like(scale)
    old = (m.s, m.get("o"))
    if m.root.op_type == "Mul":
        parts = [(scale * operand).astype(scale.dtype)]
        if old[1] is not None:
            parts.append((offset * operand).astype(scale.dtype))
        values: list[ir.Value | None] = [
            b.constant(np.ascontiguousarray(part), f"{m.root.name}:{which}")
            for part, which in zip(parts, ("scale", "offset"), strict=False)
        ]
    else:
        added = np.ascontiguousarray((offset + operand).astype(scale.dtype))
        values = [m.s, b.constant(added, f"{m.root.name}:offset")]
    return b.clone(m.node("norm"), m.x, *values, like=m.root.outputs[0])


NORMS: tuple[Rule, ...] = (
    rule(
        "layer-norm",
        match=_NORMED,
        where=[
            float_typed("x"), opset_at_least(17), per_tensor("eps"), same_rank("x", "y"), _over_last_axis(),
            where("last axis has a known length", _known_width),
        ],
        build=_layer_norm,
        doc="Recognise (x - mean) / sqrt(variance + eps) over the last axis (Ba et al., 2016).",
    ),
    rule(
        "layer-norm-affine",
        match=op(("Mul", "Add"), _LAYER_NORM, const("c")),
        where=[float_typed("x"), where("operand per channel", _operand_problem)],
        build=_fold_operand,
        doc="Take a constant factor or offset behind a LayerNormalization into its scale or bias.",
    ),
)  # fmt: skip
"""Rules of ``recognize-layer-norm``."""

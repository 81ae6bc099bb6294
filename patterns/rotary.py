"""Rules that recognise rotary position embeddings (Su et al., arXiv:2104.09864) and write the engine's operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, const_array, consumers, is_op, rank_of, scalar, shape_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.language import Clause, Pattern, Rule, any_of, const, op, rule, var
from qcompiler.patterns.match import Match

_ELEMENTWISE = ("Cos", "Sin", "Cast", "Neg", "Identity")
_JOINING = ("Mul", "Add", "Sub", "Div")


def halves_equal(value: ir.Value | None) -> bool:
    """Return whether the last axis of a value is provably the same half twice."""
    array = const_array(value)
    if array is not None:
        return array.ndim > 0 and _same_halves(array)
    node = value.producer() if value is not None else None
    if node is None or not node.inputs:
        return False
    if is_op(node, *_ELEMENTWISE):
        return halves_equal(node.inputs[0])
    if is_op(node, *_JOINING):
        varying = [v for v in node.inputs if not _one_column(v)]
        return bool(varying) and all(halves_equal(v) for v in varying)
    if is_op(node, "Concat"):
        rank = rank_of(value)
        axis = attr_int(node, "axis", 0)
        last = axis == -1 or (rank is not None and axis == rank - 1)
        return last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    if is_op(node, "Unsqueeze"):
        axes, rank = const_array(node.inputs[1]), rank_of(value)
        return axes is not None and rank is not None and rank - 1 not in axes % rank and halves_equal(node.inputs[0])
    if is_op(node, "Gather"):
        rank = rank_of(node.inputs[0])
        return rank is not None and attr_int(node, "axis", 0) % rank < rank - 1 and halves_equal(node.inputs[0])
    return False


def _one_column(value: ir.Value | None) -> bool:
    shape = shape_of(value)
    return shape is not None and shape[-1:] in ((), (1,))


def _same_halves(array: np.ndarray) -> bool:
    half = array.shape[-1] // 2
    return array.shape[-1] == 2 * half and np.array_equal(array[..., :half], array[..., half:])


def _slice(which: str, *more: Pattern) -> Pattern:
    """Match a Slice of x along one axis."""
    return op("Slice", var("x"), const(f"{which}_start"), const(f"{which}_end"), const("axis"), *more, name=which)


def _half(which: str) -> Pattern:
    index = 0 if which == "low" else 1
    return any_of(
        op("Split", var("x"), name=f"split_{which}", output=index),
        op("Split", var("x"), const("sizes"), name=f"split_{which}", output=index),
        _slice(which),
        _slice(which, const("step")),
    )


def _joined(first: Pattern, second: Pattern, last: int) -> Pattern:
    """Match a Concat along the last axis, by either of its numbers."""
    return any_of(*(op("Concat", first, second, attrs={"axis": axis}) for axis in (-1, last)))


def _turned(low: Pattern, high: Pattern) -> tuple[Pattern, Pattern]:
    """Match both components of pairs that are turned."""
    return (
        op("Sub", op("Mul", low, var("cos")), op("Mul", high, var("sin"))),
        op("Add", op("Mul", low, var("sin")), op("Mul", high, var("cos"))),
    )


_WHOLE = op(
    "Add", op("Mul", var("x"), var("cos")),
    op("Mul", _joined(op("Neg", _half("high")), _half("low"), 3), var("sin")),
)  # fmt: skip
_HALVES = _joined(*_turned(_half("low"), _half("high")), 3)
_EVEN, _ODD = _turned(_slice("low", const("step")), _slice("high", const("step")))
_PAIRS = op(
    "Reshape", _joined(op("Unsqueeze", _EVEN, const("axes")), op("Unsqueeze", _ODD, const("axes_too")), 4),
    const("shape"),
)  # fmt: skip


def _half_width(m: Match) -> int:
    width = (shape_of(m.x) or (None,))[-1]
    return width // 2 if isinstance(width, int) and width % 2 == 0 else 0


def _is_halves(m: Match) -> str | None:
    """Decline unless low and high are the two halves of the last axis of x."""
    half = _half_width(m)
    if half == 0 or rank_of(m.x) != 4:
        return "heads: x is not (batch, heads, length, an even width)"
    split = m.find("split_low")
    if split is not None and split is m.find("split_high"):
        sizes = const_array(m.get("sizes"))
        even = len(split.outputs) == 2 and (sizes is None or sizes.tolist() == [half, half])
        return None if even and attr_int(split, "axis", 0) in (-1, 3) else "halves: x is split otherwise"
    ends = _slice_ends(m, 1)
    wanted = ends is not None and ends[:3] == [0, half, half] and ends[3] >= 2 * half
    return None if wanted else "halves: x is split otherwise"


def _is_pairs(m: Match) -> str | None:
    """Decline unless low and high are the even and the odd elements of the last axis of x, put back as they were."""
    half = _half_width(m)
    if half == 0 or rank_of(m.x) != 4:
        return "heads: x is not (batch, heads, length, an even width)"
    ends = _slice_ends(m, 2)
    if ends is None or ends[0] != 0 or ends[2] != 1 or ends[1] < 2 * half - 1 or ends[3] < 2 * half:
        return "pairs: x is taken apart otherwise"
    x, y, target = shape_of(m.x), shape_of(m.root.outputs[0]), const_array(m.get("shape"))
    axes = [scalar(m.get(name)) for name in ("axes", "axes_too")]
    if x is None or y is None or len(y) != 4 or not all(n in (-1.0, 4.0) for n in axes):
        return "pairs: they are put together otherwise"
    pinned = any(a is not None and a == b for a, b in zip(x[:3:2], y[:3:2], strict=True))
    pinned = pinned or (target is not None and 0 in (target[0], target[2]))
    return None if (x[1], x[3]) == (y[1], y[3]) and pinned else "pairs: they are put together otherwise"


def _slice_ends(m: Match, step: int) -> list[float] | None:
    """Return the starts and ends of two slices along the last of four axes; None if they are others."""
    if scalar(m.get("axis")) not in (-1.0, 3.0):
        return None
    if (1.0 if m.get("step") is None else scalar(m.get("step"))) != step:
        return None
    ends = [scalar(m.get(n)) for n in ("low_start", "low_end", "high_start", "high_end")]
    return None if None in ends else [n for n in ends if n is not None]


def _float32(m: Match) -> str | None:
    return None if all(v.dtype == ir.DataType.FLOAT for v in (m.x, m.cos, m.sin)) else "not-float32"


def _tables(m: Match, width: int) -> str | None:
    """Decline unless cos and sin are (length, width), the same for all of batch and heads."""
    x = shape_of(m.x)
    for value in (m.cos, m.sin):
        shape = shape_of(value)
        if x is None or shape is None or len(shape) < 2 or any(d != 1 for d in shape[:-2]):
            return f"table: {value.name} is not one row per position"
        if shape[-2] is None or shape[-2] != x[2] or shape[-1] != width:
            return f"table: {value.name} has not the length of x"
    return None


def _whole_tables(m: Match) -> str | None:
    if refusal := _tables(m, 2 * _half_width(m)):
        return refusal
    uneven = next((v for v in (m.cos, m.sin) if not halves_equal(v)), None)
    return None if uneven is None else f"table: the halves of {uneven.name} may differ"


def _table(b: Builder, value: ir.Value, half: int) -> ir.Value:
    """Return the first half of a table as (length, half); one is made for all who read the table."""
    shape = shape_of(value)
    assert shape is not None
    if shape[-1] == half and len(shape) == 2:
        return value
    name = f"{value.name}:half"
    array = const_array(value)
    if array is not None:
        stored = b.rewriter.model.graph.initializers.get(name)
        if stored is not None:
            return stored
        return b.constant(np.ascontiguousarray(array.reshape(-1, array.shape[-1])[:, :half]), name)
    made = next((n for n in consumers(value) if str(n.name).startswith(f"{name}/")), None)
    if made is not None:
        last = next((n for n in consumers(made.outputs[0]) if is_op(n, "Reshape")), made)
        return last.outputs[0]
    if shape[-1] != half:
        start, end, axis = (
            b.constant(np.asarray([n], np.int64), f"{name}:{what}")
            for n, what in ((0, "start"), (half, "end"), (-1, "axis"))
        )
        first = ir.Shape([*shape[:-1], half])
        value = b.behind(value, "Slice", value, start, end, axis, name=f"{name}/Slice", shape=first)
    if len(shape) == 2:
        return value
    target = b.constant(np.asarray([-1, half], np.int64), f"{name}:shape")
    return b.behind(value, "Reshape", value, target, name=f"{name}/Reshape", shape=ir.Shape([shape[-2], half]))


def _turn(b: Builder, m: Match, interleaved: int = 0) -> ir.Value:
    half = _half_width(m)
    tables = [_table(b, value, half) for value in (m.cos, m.sin)]
    first = b.rewriter.model.graph.initializers.get("rotary:first")
    if first is None:
        first = b.constant(np.asarray([0], np.int64), "rotary:first")
    name = str(m.root.name)
    m.root.name = b.rewriter.unique(f"{name}:was")
    made = b.node("RotaryEmbedding", m.x, first, *tables, domain="com.microsoft", name=f"{name}/RotaryEmbedding",
                  like=m.x, interleaved=interleaved)  # fmt: skip
    made.name = name
    return made.outputs[0]


_FLOAT32 = Clause("float32", _float32)
_HALF_TABLES = Clause("half_tables", lambda m: _tables(m, _half_width(m)))

ROTARIES: tuple[Rule, ...] = (
    rule(
        "rotary-operator",
        match=_WHOLE,
        where=[_FLOAT32, Clause("is_halves", _is_halves), Clause("whole_tables", _whole_tables)],
        build=_turn,
        doc="Write x * cos + (-x2, x1) * sin, where x1 and x2 are the halves of x, as RotaryEmbedding: one pass.",
    ),
    rule(
        "rotary-operator-of-halves",
        match=_HALVES,
        where=[_FLOAT32, Clause("is_halves", _is_halves), _HALF_TABLES],
        build=_turn,
        doc="The same written as (x1 cos - x2 sin, x1 sin + x2 cos).",
    ),
    rule(
        "rotary-operator-of-pairs",
        match=_PAIRS,
        where=[_FLOAT32, Clause("is_pairs", _is_pairs), _HALF_TABLES],
        build=lambda b, m: _turn(b, m, interleaved=1),
        doc="The same where x1 and x2 are the even and the odd elements of x, and the results alternate.",
    ),
)
"""Rules of the trap ``rotary-embedding``."""

"""Chains of operators that only change the shape."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import const_array, rank_of, shape_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import is_constant, replaceable, where
from qcompiler.patterns.language import Rule, any_of, maybe, op, rule, var
from qcompiler.patterns.match import Match
from qcompiler.patterns.operators import attribute_value

_X = var("x")
_FLATTENING = any_of(
    op("Reshape", _X, var("old"), name="inner"),
    op("Flatten", _X, name="inner"),
    op(("Squeeze", "Unsqueeze"), _X, maybe(var("old")), name="inner"),
)


def _zeros_resolved(m: Match) -> list[int] | None:
    """Return the outer target shape without zeros (axes copied from the inner result), or None if one is unknown."""
    target = [int(v) for v in m.array("shape").reshape(-1)]
    if attribute_value(m.root, "allowzero", m.opset) == 1:
        return target if 0 not in target else None
    middle = shape_of(m.inner)
    for index, size in enumerate(target):
        if size != 0:
            continue
        known = middle[index] if middle is not None and index < len(middle) else None
        source = shape_of(m.x)
        if isinstance(known, int) and known > 0:
            target[index] = known
        elif known is None or source is None or index >= len(source) or source[index] != known:
            return None
    return target


def _target_is_independent(m: Match) -> str | None:
    return None if _zeros_resolved(m) is not None else "copied-axis: a copied axis depends on the inner shape"


def _reshape_once(b: Builder, m: Match) -> ir.Value:
    target = _zeros_resolved(m)
    assert target is not None
    shape = m.shape
    if target != [int(v) for v in m.array("shape").reshape(-1)]:
        shape = b.constant(np.asarray(target, np.int64), f"{m.root.name}:shape")
    return b.clone(m.root, m.x, shape)


def _axes(value: ir.Value | None) -> tuple[int, ...] | None:
    array = const_array(value)
    return None if array is None else tuple(int(v) for v in array.reshape(-1))


def _same_axes(m: Match) -> str | None:
    inner, outer = _axes(m.get("a")), _axes(m.get("b"))
    if inner is None or outer is None:
        return "not-constant: the axes are computed at run time or left out"
    count = rank_of(m.inner if m.root.op_type == "Squeeze" else m.x)
    if count is not None:
        inner, outer = tuple(a % count for a in inner), tuple(a % count for a in outer)
    return None if sorted(inner) == sorted(outer) else "axes: other axes are removed than inserted"


def _insertable(m: Match) -> str | None:
    return None if _merged_axes(m) is not None else "unknown-rank: negative axes of a value of unknown rank"


def _merged_axes(m: Match) -> list[int] | None:
    """Return the axes of one Unsqueeze (or Squeeze) that does the work of two."""
    inner, outer = _axes(m.get("a")), _axes(m.get("b"))
    count = rank_of(m.x)
    if inner is None or outer is None or count is None:
        return None
    if m.root.op_type == "Unsqueeze":
        total = count + len(inner) + len(outer)
        last = {a % total for a in outer}
        free = [axis for axis in range(total) if axis not in last]
        return sorted([*last, *(free[a % len(free)] for a in inner)])
    first = {a % count for a in inner}
    left = [axis for axis in range(count) if axis not in first]
    return sorted([*first, *(left[a % len(left)] for a in outer)])


def _merge(b: Builder, m: Match) -> ir.Value:
    axes = _merged_axes(m)
    assert axes is not None
    return b.clone(m.root, m.x, b.constant(np.asarray(axes, np.int64), f"{m.root.name}:axes"))


RESHAPES: tuple[Rule, ...] = (
    rule(
        "reshape-of-reshape",
        match=op("Reshape", _FLATTENING, var("shape")),
        where=[is_constant("shape"), where("target does not need the inner shape", _target_is_independent)],
        build=_reshape_once,
        keeps=("inner",),
        doc="Reshape once: only the last shape counts.",
    ),
    rule(
        "squeeze-undoes-unsqueeze",
        match=any_of(
            op("Squeeze", op("Unsqueeze", _X, var("a"), name="inner"), var("b")),
            op("Unsqueeze", op("Squeeze", _X, var("a"), name="inner"), var("b")),
        ),
        where=[where("same axes", _same_axes), replaceable("x")],
        build=lambda _, m: m.x,
        keeps=("inner",),
        doc="Drop axes of length one that are inserted and removed again.",
    ),
    rule(
        "merge-unsqueezes",
        match=any_of(
            op("Unsqueeze", op("Unsqueeze", _X, var("a"), name="inner"), var("b")),
            op("Squeeze", op("Squeeze", _X, var("a"), name="inner"), var("b")),
        ),
        where=[is_constant("a", "b"), where("axes can be merged", _insertable)],
        build=_merge,
        keeps=("inner",),
        doc="Insert (or remove) all axes at once.",
    ),
)
"""Rules of ``fold-reshapes``."""

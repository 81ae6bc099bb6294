"""Operators that return their first input as it is: nothing to compute, nothing to keep."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import const_array, rank_of, shape_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import is_constant, replaceable, same_rank, same_shape, same_type, where
from qcompiler.patterns.language import Clause, Pattern, Rule, any_of, maybe, number, op, rule, var
from qcompiler.patterns.match import Match
from qcompiler.patterns.operators import attribute_value

_X = var("x")
_FAR = 2**31 - 1
"""Exporters write an end beyond any axis as INT32_MAX or INT64_MAX."""


def _input(_: Builder, m: Match) -> ir.Value:
    return m.x


def _dropout_off() -> Clause:
    def check(m: Match) -> str | None:
        if len(m.root.outputs) > 1 and (m.root.outputs[1].uses() or m.root.outputs[1].is_graph_output()):
            return "mask-used: the mask of the Dropout is read"
        training = m.get("training")
        if training is None:
            return None
        array = const_array(training)
        if array is None:
            return "not-constant: training_mode is computed at run time"
        return "training: the Dropout is in training mode" if bool(array.any()) else None

    return where("inference(dropout)", check)


def _casts_to_own_type(m: Match) -> str | None:
    if m.x.dtype is None:
        return "unknown-type: the type of x is not known"
    to = attribute_value(m.root, "to", m.opset)
    return None if to == int(m.x.dtype) else "type: the Cast changes the type"


def _shape_is_kept(m: Match) -> str | None:
    """Compare shapes where the number of elements is the same: one unknown axis follows from the others."""
    before, after = shape_of(m.x), shape_of(m.root.outputs[0])
    if before is None or after is None:
        return "unknown-shape: the shapes are not known"
    if len(before) != len(after):
        return "shape: the rank changes"
    equal = [a == b and a is not None for a, b in zip(before, after, strict=True)]
    if all(equal):
        return None
    fixed = all(isinstance(a, int) and a > 0 for a, same in zip(before, equal, strict=True) if same)
    clash = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(before, after, strict=True))
    if equal.count(False) == 1 and fixed and not clash:
        return None
    return "shape: the shape changes" if clash else "unknown-shape: more than one axis is not known to be kept"


def _identity_permutation(m: Match) -> str | None:
    perm = attribute_value(m.root, "perm", m.opset)
    if perm is None:
        count = rank_of(m.x)
        return None if count is not None and count < 2 else "permutation: the axes are reversed"
    return None if list(perm) == sorted(perm) else "permutation: the axes change places"  # type: ignore[arg-type]


def _whole_slice(m: Match) -> str | None:
    starts, ends = m.array("starts"), m.array("ends")
    axes = np.arange(starts.size) if m.get("axes") is None else m.array("axes")
    steps = np.ones_like(starts) if m.get("steps") is None else m.array("steps")
    shape = shape_of(m.x)
    for start, end, axis, step in zip(starts.flat, ends.flat, axes.flat, steps.flat, strict=True):
        size = None if shape is None else shape[int(axis)]
        if step != 1 or not (start == 0 or (isinstance(size, int) and start <= -size)):
            return "slice: it starts behind the first element or has a step"
        if not (end >= _FAR or (isinstance(size, int) and end >= size)):
            return "slice: it ends before the last element"
    return None


def _no_padding(m: Match) -> str | None:
    return None if not m.array("pads").any() else "padding: elements are added"


def _one_axis_flat(m: Match) -> str | None:
    axis = attribute_value(m.root, "axis", m.opset)
    if rank_of(m.x) != 2:
        return "rank: x is not known to have rank 2"
    return None if axis in (1, -1) else "axis: all axes are merged"


def _one_output_split(m: Match) -> str | None:
    return None if len(m.root.outputs) == 1 else "outputs: there is more than one part"


def _remove(name: str, match: Pattern, *conditions: Clause, doc: str) -> Rule:
    return rule(name, match=match, where=(*conditions, replaceable("x")), build=_input, doc=doc)


IDENTITIES: tuple[Rule, ...] = (
    _remove("identity", op("Identity", _X), doc="Read the input of an Identity directly."),
    _remove(
        "dropout-in-inference",
        op("Dropout", _X, maybe(var("ratio")), maybe(var("training"))),
        _dropout_off(),
        doc="A Dropout outside training returns its input.",
    ),
    _remove(
        "cast-to-own-type",
        op("Cast", _X),
        where("to == type of x", _casts_to_own_type, structural=True),
        doc="Drop a void Cast.",
    ),
    _remove("cast-like-own-type", op("CastLike", _X, var("y")), same_type("x", "y"), doc="Drop a void CastLike."),
    _remove(
        "reshape-to-own-shape",
        op("Reshape", _X, var("shape")),
        where("shape of x is kept", _shape_is_kept, structural=True),
        doc="Drop a Reshape to the shape there is.",
    ),
    _remove(
        "flatten-of-matrix",
        op("Flatten", _X),
        where("rank 2, axis 1", _one_axis_flat, structural=True),
        doc="Drop a void Flatten.",
    ),
    _remove(
        "expand-to-own-shape",
        op("Expand", _X, var("shape"), name="y"),
        same_shape("x", "y"),
        doc="Drop an Expand to the shape there is.",
    ),
    _remove(
        "transpose-of-nothing",
        op("Transpose", _X),
        where("identity permutation", _identity_permutation, structural=True),
        doc="Drop a Transpose that leaves all axes in place.",
    ),
    _remove(
        "slice-of-everything",
        op("Slice", _X, var("starts"), var("ends"), maybe(var("axes")), maybe(var("steps"))),
        is_constant("starts", "ends", "axes", "steps"),
        where("whole axes", _whole_slice, structural=True),
        doc="Drop a Slice that takes every element.",
    ),
    _remove(
        "pad-by-nothing",
        op("Pad", _X, var("pads"), maybe(var("value")), maybe(var("axes"))),
        is_constant("pads"),
        where("no padding", _no_padding, structural=True),
        doc="Drop a Pad of width zero.",
    ),
    _remove(
        "join-of-one", op(("Concat", "Sum", "Max", "Min", "Mean"), _X), doc="Drop an operator over a single input."
    ),
    _remove(
        "split-into-one",
        op("Split", _X, maybe(var("split"))),
        where("one output", _one_output_split, structural=True),
        doc="Drop a Split into a single part.",
    ),
    _remove(
        "neutral-operand",
        any_of(
            op(("Mul", "Div"), _X, number(1.0, 0.0), name="y"),
            op("Mul", number(1.0, 0.0), _X, name="y"),
            op(("Add", "Sub"), _X, number(0.0, 0.0), name="y"),
            op("Add", number(0.0, 0.0), _X, name="y"),
            op("Pow", _X, number(1.0, 0.0), name="y"),
        ),
        same_type("x", "y"),
        same_rank("x", "y"),
        doc="Drop a multiplication by one or an addition of zero.",
    ),
)
"""Rules of ``eliminate-identity``."""

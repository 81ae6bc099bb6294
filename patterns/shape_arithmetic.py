"""Shape computations whose result is known, or known well enough for the operator that reads it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, is_const
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import replaceable, where
from qcompiler.patterns.language import Rule, op, rest, rule, var
from qcompiler.patterns.match import Match
from qcompiler.patterns.shape_values import SHAPE_OPERATORS, Element, Symbol, dimensions, shape_value


def _is_known(m: Match) -> str | None:
    value = m.root.outputs[0]
    if value.is_graph_output():
        return "graph-output: the value leaves the graph"
    if value.dtype is None or all(is_const(v) for v in m.root.inputs if v is not None):
        return "constant-inputs: fold-constants evaluates it"
    found = shape_value(value)
    return None if found is not None and found.numbers is not None else "unknown: an element is not known"


def _as_constant(b: Builder, m: Match) -> ir.Value:
    value = m.root.outputs[0]
    found = shape_value(value)
    assert found is not None
    assert found.numbers is not None
    assert value.dtype is not None
    array = np.asarray(found.numbers, dtype=value.dtype.numpy())
    return b.constant(array.reshape(()) if found.scalar else array, value.name or "shape")


def reshape_target(m: Match) -> list[int] | None:
    """Return a constant target for a Reshape whose target is computed, or None.

    Lengths that equal the input's axis at the same place become 0 (copy). At most one other length may be open; it
    becomes -1 only where no copied axis can have length zero, since -1 would be undefined then.
    """
    found, dims = shape_value(m.shape), dimensions(m.x)
    if found is None or found.scalar or (attr_int(m.root, "allowzero", 0) and 0 in found.elements):
        return None
    target: list[int | None] = []
    for index, element in enumerate(found.elements):
        own: Element = dims[index] if dims is not None and index < len(dims) else None
        if isinstance(element, int):
            target.append(element)
        else:
            target.append(0 if element is not None and element == own else None)
    open_axes = [index for index, size in enumerate(target) if size is None]
    if not open_axes:
        return [size for size in target if size is not None]
    element = found.elements[open_axes[0]]
    if len(open_axes) > 1 or not isinstance(element, Symbol) or not element.natural:
        return None
    rest_is_fixed = all(size is not None and size > 0 for i, size in enumerate(target) if i != open_axes[0])
    return [-1 if size is None else size for size in target] if rest_is_fixed else None


def _has_target(m: Match) -> str | None:
    return None if reshape_target(m) is not None else "dynamic-shape: more than one length is known only at run time"


def _static_reshape(b: Builder, m: Match) -> ir.Value:
    target = reshape_target(m)
    assert target is not None
    # Zero means copy in the new target, whatever it meant before.
    return b.clone(m.root, m.x, b.constant(np.asarray(target, np.int64), f"{m.root.name}:shape"), drop=("allowzero",))


def _expands_nothing(m: Match) -> str | None:
    found, dims = shape_value(m.shape), dimensions(m.x)
    if found is None or dims is None:
        return "unknown-shape: the lengths are not known"
    if len(found.elements) > len(dims):
        return "rank: the Expand adds axes"
    own = dims[len(dims) - len(found.elements) :]
    same = all(e == 1 or (e is not None and e == d) for e, d in zip(found.elements, own, strict=True))
    return None if same else "shape: the Expand repeats elements, or may"


SHAPE_ARITHMETIC: tuple[Rule, ...] = (
    rule(
        "known-shape-value",
        match=op(SHAPE_OPERATORS, rest("in")),
        where=[where("every element is known", _is_known, structural=True)],
        build=_as_constant,
        doc="Replace a shape computation whose result is known by a constant.",
    ),
    rule(
        "reshape-target",
        match=op("Reshape", var("x"), var("shape")),
        where=[
            where("computed target", lambda m: "constant" if is_const(m.shape) else None, structural=True),
            where("lengths are copied or fixed", _has_target),
        ],
        build=_static_reshape,
        doc="Give a Reshape a constant target where its open lengths are those of the input.",
    ),
    rule(
        "expand-of-nothing",
        match=op("Expand", var("x"), var("shape")),
        where=[where("no axis grows", _expands_nothing, structural=True), replaceable("x")],
        build=lambda _, m: m.x,
        doc="Drop an Expand to lengths that are there.",
    ),
)
"""Rules of ``fold-shapes``."""

"""Names for axes of unknown length, so that equal lengths are known to be equal.

ONNX's inference hands a named axis on from value to value, and forgets an unnamed one. Naming the unnamed axes where
they first appear lets it say which later axes have the same length. The names are taken away again afterwards: they are
no part of the model's interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, is_op, scalar, shape_of
from qcompiler.ir.shapes import infer_shapes
from qcompiler.patterns.shape_values import Symbol, dimensions, shape_value

PREFIX = "~"
"""What a made-up name starts with."""
_ROUNDS = 8


@contextmanager
def named_axes(model: ir.Model) -> Iterator[None]:
    """Give every axis of unknown length a name for the time of the block, equal ones the same where that is known."""
    try:
        for _ in range(_ROUNDS):
            if not _name_first(model):
                break
            infer_shapes(model)
        yield
    finally:
        _strip(model)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in all_graphs(model):
        yield from graph.inputs
        for node in graph:
            yield from node.outputs


def _is_open(value: ir.Value | None) -> bool:
    shape = shape_of(value)
    return shape is not None and None in shape


def _name_first(model: ir.Model) -> int:
    """Name the axes whose producer reads no unnamed ones, and return how many there were."""
    ready = []
    for value in _values(model):
        node = value.producer()
        if _is_open(value) and (node is None or not any(_is_open(v) for v in node.inputs)):
            ready.append(value)
    for value in ready:
        shape = shape_of(value)
        assert shape is not None
        known = _lengths(value, len(shape))
        value.shape = ir.Shape(
            [d if d is not None else known[axis] or f"{PREFIX}{value.name}.{axis}" for axis, d in enumerate(shape)]
        )
    return len(ready)


def _lengths(value: ir.Value, count: int) -> list[str | None]:
    """Return names that follow from the contents of a shape input, per axis."""
    node = value.producer()
    found = None
    if is_op(node, "Range"):
        assert node is not None
        if scalar(node.inputs[0]) == 0 and scalar(node.inputs[2]) == 1:
            found = shape_value(node.inputs[1])
    elif is_op(node, "Reshape"):
        assert node is not None
        found = shape_value(node.inputs[1])
    elif is_op(node, "ConstantOfShape"):
        assert node is not None
        found = shape_value(node.inputs[0])
    elif is_op(node, "Expand"):
        assert node is not None
        return _expanded(node, count)
    if found is None or len(found.elements) != count:
        return [None] * count
    return [_name(e) if isinstance(e, Symbol) and e.natural else None for e in found.elements]


def _expanded(node: ir.Node, count: int) -> list[str | None]:
    """Return names for the axes of an Expand: the wanted length where the input has length one, or the same length."""
    own, wanted = dimensions(node.inputs[0]), shape_value(node.inputs[1])
    if own is None or wanted is None:
        return [None] * count
    left = (1,) * (count - len(own)) + own
    right = (1,) * (count - len(wanted.elements)) + wanted.elements
    found: list[str | None] = []
    for a, b in zip(left, right, strict=True):
        length = b if a in (1, b) else a if b == 1 else None
        found.append(_name(length) if isinstance(length, Symbol) and length.natural else None)
    return found


def _name(symbol: Symbol) -> str:
    """Return a symbol as the name of an axis; an expression gets the prefix."""
    return symbol.text if symbol.text[0] == PREFIX or symbol.text[0] != "(" else PREFIX + symbol.text


def _strip(model: ir.Model) -> None:
    for value in _values(model):
        shape = shape_of(value)
        if shape is not None and any(isinstance(d, str) and d.startswith(PREFIX) for d in shape):
            value.shape = ir.Shape([None if isinstance(d, str) and d.startswith(PREFIX) else d for d in shape])

"""What is known of the contents of small integer tensors: shapes, axes, and arithmetic on them.

Each element is a number, a symbol (the length of an axis, or an expression over such lengths) or unknown. Equal symbols
are equal numbers in every run, so targets of Reshape and Expand can be compared with shapes that are not static.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, const_array, shape_of

MAX_ELEMENTS = 64
"""Tensors of more elements are no shapes."""
_MAX_DEPTH = 48


@dataclass(frozen=True)
class Symbol:
    """A number that is not known at compile time; ``natural`` says that it is at least zero."""

    text: str
    natural: bool = True

    def __str__(self) -> str:
        return self.text


Element = int | Symbol | None


@dataclass(frozen=True)
class ShapeValue:
    """The contents of a tensor of rank 0 or 1."""

    elements: tuple[Element, ...]
    scalar: bool = False

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """Return the elements if all are known, else None."""
        found = tuple(e for e in self.elements if isinstance(e, int))
        return found if len(found) == len(self.elements) else None


def dimensions(value: ir.Value | None) -> tuple[Element, ...] | None:
    """Return the lengths of a value's axes as elements, or None if the rank is unknown."""
    shape = shape_of(value)
    if shape is None or value is None:
        return None
    return tuple(
        d if isinstance(d, int) else Symbol(d if d is not None else f"{value.name}@{axis}")
        for axis, d in enumerate(shape)
    )


def shape_value(value: ir.Value | None, depth: int = 0) -> ShapeValue | None:
    """Return what is known of a value's contents, or None if it is no integer tensor of rank 0 or 1 (or too large).

    Args:
        value: the value asked about.
        depth: how far the question has come; used by recursion.
    """
    if value is None or depth > _MAX_DEPTH:
        return None
    array = const_array(value)
    if array is not None:
        if array.ndim > 1 or array.size > MAX_ELEMENTS or array.dtype.kind not in "iub":
            return None
        return ShapeValue(tuple(int(e) for e in array.reshape(-1)), array.ndim == 0)
    node = value.producer()
    if node is not None and node.domain == "" and node.op_type in _OPERATORS:
        found = _OPERATORS[node.op_type](node, depth + 1)
        if found is not None and len(found.elements) <= MAX_ELEMENTS:
            return found
    return _opaque(value)


def _opaque(value: ir.Value) -> ShapeValue | None:
    """Return a symbol per element of an integer tensor of known length, so that it is at least equal to itself."""
    shape = shape_of(value)
    if value.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or shape is None or len(shape) > 1:
        return None
    if not shape:
        return ShapeValue((Symbol(f"{value.name}[]", natural=False),), scalar=True)
    size = shape[0]
    if not isinstance(size, int) or size > MAX_ELEMENTS:
        return None
    return ShapeValue(tuple(Symbol(f"{value.name}[{i}]", natural=False) for i in range(size)))


def _input(node: ir.Node, index: int, depth: int) -> ShapeValue | None:
    return shape_value(node.inputs[index], depth) if index < len(node.inputs) else None


def _numbers(node: ir.Node, index: int, depth: int) -> tuple[int, ...] | None:
    found = _input(node, index, depth)
    return None if found is None else found.numbers


def _shape(node: ir.Node, _: int) -> ShapeValue | None:
    dims = dimensions(node.inputs[0])
    if dims is None:
        return None
    end = node.attributes.get("end")
    return ShapeValue(dims[attr_int(node, "start", 0) : None if end is None else end.as_int()])


def _size(node: ir.Node, _: int) -> ShapeValue | None:
    dims = dimensions(node.inputs[0])
    if dims is None:
        return None
    total: Element = 1
    for dim in dims:
        total = _multiply(total, dim)
    return ShapeValue((total,), scalar=True)


def _gather(node: ir.Node, depth: int) -> ShapeValue | None:
    data, indices = _input(node, 0, depth), _input(node, 1, depth)
    if data is None or data.scalar or indices is None or indices.numbers is None or attr_int(node, "axis", 0) != 0:
        return None
    size = len(data.elements)
    if any(not -size <= i < size for i in indices.numbers):
        return None
    return ShapeValue(tuple(data.elements[i] for i in indices.numbers), indices.scalar)


def _slice(node: ir.Node, depth: int) -> ShapeValue | None:
    data = _input(node, 0, depth)
    starts, ends = _numbers(node, 1, depth), _numbers(node, 2, depth)
    steps = (1,) if len(node.inputs) < 5 or node.inputs[4] is None else _numbers(node, 4, depth)
    if data is None or data.scalar or not starts or not ends or not steps or len(starts) != 1 or steps[0] == 0:
        return None
    # ONNX clamps an end before the first element of a backward slice; Python spells that as no end at all.
    size = len(data.elements)
    end = None if steps[0] < 0 and ends[0] < -size else ends[0]
    return ShapeValue(data.elements[starts[0] : end : steps[0]])


def _concat(node: ir.Node, depth: int) -> ShapeValue | None:
    parts = [shape_value(v, depth) for v in node.inputs]
    if any(part is None or part.scalar for part in parts):
        return None
    return ShapeValue(tuple(e for part in parts if part is not None for e in part.elements))


def _unsqueeze(node: ir.Node, depth: int) -> ShapeValue | None:
    data, axes = _input(node, 0, depth), _numbers(node, 1, depth)
    return ShapeValue(data.elements) if data is not None and data.scalar and axes in ((0,), (-1,)) else None


def _squeeze(node: ir.Node, depth: int) -> ShapeValue | None:
    data = _input(node, 0, depth)
    if data is None or data.scalar or len(data.elements) != 1:
        return None
    return ShapeValue(data.elements, scalar=True)


def _reshape(node: ir.Node, depth: int) -> ShapeValue | None:
    data, target = _input(node, 0, depth), _numbers(node, 1, depth)
    if data is None or target is None or len(target) > 1:
        return None
    if not target:
        return ShapeValue(data.elements, scalar=True)
    return ShapeValue(data.elements) if target[0] in (-1, len(data.elements)) else None


def _same(node: ir.Node, depth: int) -> ShapeValue | None:
    return _input(node, 0, depth)


def _cast(node: ir.Node, depth: int) -> ShapeValue | None:
    integers = (ir.DataType.INT64, ir.DataType.INT32)
    source = node.inputs[0]
    if source is None or source.dtype not in integers or attr_int(node, "to", 0) not in map(int, integers):
        return None
    found = _input(node, 0, depth)
    if found is None or any(isinstance(e, int) and abs(e) >= 2**31 for e in found.elements):
        return None
    return found


def _multiply(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if a is None or b is None:
        return None
    if 0 in (a, b):
        return 0
    if 1 in (a, b):
        return b if a == 1 else a
    first, second = sorted((str(a), str(b)))
    return Symbol(f"({first}*{second})", _natural(a) and _natural(b))


def _add(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a is None or b is None:
        return None
    if 0 in (a, b):
        return b if a == 0 else a
    first, second = sorted((str(a), str(b)))
    return Symbol(f"({first}+{second})", _natural(a) and _natural(b))


def _subtract(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    if a is None or b is None:
        return None
    if b == 0:
        return a
    return 0 if a == b else Symbol(f"({a}-{b})", natural=False)


def _divide(a: Element, b: Element) -> Element:
    """Divide as ONNX does: towards zero."""
    if b == 0 or a is None or b is None:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a if b == 1 else Symbol(f"({a}/{b})", _natural(a) and _natural(b))


def _equal(a: Element, b: Element) -> Element:
    if a is None or b is None:
        return None
    if a == b:
        return 1
    if isinstance(a, int) and isinstance(b, int):
        return 0
    # The length of an axis is never negative (exporters compare targets of Expand with -1).
    number, symbol = (a, b) if isinstance(a, int) else (b, a)
    if isinstance(number, int) and isinstance(symbol, Symbol) and symbol.natural and number < 0:
        return 0
    return None


def _natural(a: Element) -> bool:
    return a >= 0 if isinstance(a, int) else a is not None and a.natural


def _binary(combine: Callable[[Element, Element], Element]) -> Callable[[ir.Node, int], ShapeValue | None]:
    def evaluate(node: ir.Node, depth: int) -> ShapeValue | None:
        a, b = _input(node, 0, depth), _input(node, 1, depth)
        if a is None or b is None:
            return None
        size = max(len(a.elements), len(b.elements))
        if 1 not in (len(a.elements), len(b.elements)) and len(a.elements) != len(b.elements):
            return None
        if 0 in (len(a.elements), len(b.elements)):
            return None
        left, right = (v.elements * size if len(v.elements) == 1 else v.elements for v in (a, b))
        elements = tuple(combine(x, y) for x, y in zip(left, right, strict=True))
        return ShapeValue(elements, a.scalar and b.scalar)

    return evaluate


def _where(node: ir.Node, depth: int) -> ShapeValue | None:
    condition, a, b = (_input(node, index, depth) for index in range(3))
    if condition is None or a is None or b is None:
        return None
    size = max(len(v.elements) for v in (condition, a, b))
    if any(len(v.elements) not in (1, size) for v in (condition, a, b)):
        return None
    c, x, y = (v.elements * size if len(v.elements) == 1 else v.elements for v in (condition, a, b))
    chosen = tuple(
        (first if test else second) if isinstance(test, int) else (first if first == second else None)
        for test, first, second in zip(c, x, y, strict=True)
    )
    return ShapeValue(chosen, condition.scalar and a.scalar and b.scalar)


def _constant_of_shape(node: ir.Node, depth: int) -> ShapeValue | None:
    size = _numbers(node, 0, depth)
    fill = node.attributes.get("value")
    array = np.zeros(1, np.float32) if fill is None else fill.as_tensor().numpy()
    if size is None or len(size) > 1 or array.dtype.kind not in "iub" or (size and size[0] > MAX_ELEMENTS):
        return None
    return ShapeValue((int(array.reshape(-1)[0]),) * (size[0] if size else 1), scalar=not size)


_OPERATORS: dict[str, Callable[[ir.Node, int], ShapeValue | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Identity": _same,
    "Cast": _cast,
    "Add": _binary(_add),
    "Sub": _binary(_subtract),
    "Mul": _binary(_multiply),
    "Div": _binary(_divide),
    "Equal": _binary(_equal),
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
}

SHAPE_OPERATORS = tuple(_OPERATORS)
"""Operators whose results `shape_value` follows."""

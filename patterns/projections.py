"""Rules on products that make queries, keys and values at once: one product for each, where that is faster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import attr_int, const_array, is_op, shape_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import only_use
from qcompiler.patterns.language import Clause, any_of, const, op, rest, rule, var
from qcompiler.patterns.match import Match
from qcompiler.patterns.parts import Part, behind_bias, find_parts


def _column_axis(node: ir.Node) -> int:
    """Return the axis of the weight that holds the columns of the product."""
    return 0 if is_op(node, "Gemm") and attr_int(node, "transB", 0) else 1


def _columns(m: Match) -> int:
    weight = const_array(m.w)
    return 0 if weight is None or weight.ndim != 2 else int(weight.shape[_column_axis(m.root)])


def _parts(m: Match) -> tuple[Part, ...]:
    count = _columns(m)
    return find_parts(behind_bias(m.root.outputs[0]), count) if count else ()


def _taken_apart(m: Match) -> str | None:
    return None if len(_parts(m)) > 1 else "not-taken-apart"


def _separable(m: Match) -> str | None:
    """Decline where a constant beside the weight is neither one number nor one number per column."""
    count = _columns(m)
    added = behind_bias(m.root.outputs[0]).producer()
    more = [*m.root.inputs[2:], *(added.inputs if added is not None and added is not m.root else ())]
    for value in more:
        array = const_array(value)
        if array is not None and array.size != 1 and (array.size != count or array.shape[-1] != count):
            return f"bias-shape: {value.name if value is not None else ''} is not one number per column"
    return None


class _Parter:
    """Makes constants and nodes of the parts of one product."""

    def __init__(self, b: Builder, m: Match) -> None:
        self.b, self.m, self.count = b, m, _columns(m)
        bias = behind_bias(m.root.outputs[0])
        self.added = bias.producer() if bias is not m.root.outputs[0] else None
        self.name = str(m.root.name)
        m.root.name = b.rewriter.unique(f"{self.name}:was")

    def part(self, part: Part, index: int) -> ir.Value:
        """Return the value that stands for one part."""
        # The ending is one that engines give to parts, which profiles take off again.
        name = self.name if index == 0 else f"{self.name}_out{index}"
        value = self._product(part, index, name)
        if part.shape is not None:
            shape = self._shape_constant(part.shape)
            value = self.b.op("Reshape", value, shape, name=f"{name}/Reshape")
            self._declare(value, part, part.order is None)
        if part.order is not None:
            value = self.b.op("Transpose", value, name=f"{name}/Transpose", perm=part.order, like=part.value)
        return value

    def _product(self, part: Part, index: int, name: str) -> ir.Value:
        root = self.m.root
        inputs = [self._cut(v, part.columns, index, v is self.m.w) for v in root.inputs]
        attributes = {k: a.value for k, a in root.attributes.items()}
        made = self.b.node(root.op_type, *inputs, domain=root.domain, name=name, origin=(root,), **attributes)
        if index == 0:
            made.name = self.name
        value = made.outputs[0]
        self._declare_product(value, part)
        if self.added is not None:
            both = [value if v is root.outputs[0] else self._cut(v, part.columns, index) for v in self.added.inputs]
            suffix = "" if index == 0 else f"_out{index}"
            name = f"{self.added.name}{suffix}" if index else f"{self.added.name}:node"
            value = self.b.op("Add", *both, name=name, origin=(self.added,))
            self._declare_product(value, part)
        return value

    def _cut(self, value: ir.Value | None, columns: Array, index: int, weight: bool = False) -> ir.Value | None:
        """Return the columns of a constant; what is computed, and single numbers, are read by all parts."""
        array = const_array(value)
        if value is None or array is None or array.size == 1:
            return value
        axis = _column_axis(self.m.root) if weight else array.ndim - 1
        kept = np.ascontiguousarray(np.take(array, columns, axis=axis))
        tensor = ir.Tensor(kept, dtype=value.dtype)
        return self.b.constant(tensor, f"{value.name}:part_{index}")

    def _shape_constant(self, shape: Sequence[int]) -> ir.Value:
        return self.b.constant(np.asarray(shape, np.int64), f"{self.name}:shape")

    def _declare_product(self, value: ir.Value, part: Part) -> None:
        out = self.m.root.outputs[0]
        known = shape_of(out)
        self.b.rewriter.declare(
            value, out.dtype, None if known is None else ir.Shape([*known[:-1], int(part.columns.size)])
        )

    def _declare(self, value: ir.Value, part: Part, final: bool) -> None:
        known = part.value.shape if final else None
        if not final and part.order is not None and part.value.shape is not None:
            dims = list(part.value.shape)
            known = ir.Shape([dims[part.order.index(i)] for i in range(len(dims))])
        self.b.rewriter.declare(value, self.m.root.outputs[0].dtype, known)


def _apart(b: Builder, m: Match) -> ir.Value:
    parts = _parts(m)
    parter = _Parter(b, m)
    old = [part.value for part in parts]
    made = [parter.part(part, index) for index, part in enumerate(parts)]
    gone = []
    for value, new in zip(old, made, strict=True):
        maker = value.producer()
        assert maker is not None
        gone.append(maker)
        b.rewriter.take_over(value, new)
        b.rewriter.replace(value, new)
    b.rewriter.erase_dead(gone)
    return m.root.outputs[0]


SPLIT_PROJECTION = rule(
    "split-projection",
    match=any_of(
        op("MatMul", var("x"), const("w")),
        op("Gemm", var("x"), const("w"), rest("more")),
        op("MatMulIntegerToFloat", var("x"), const("w"), rest("more"), domain="com.microsoft"),
    ),
    where=[
        Clause("taken_apart", _taken_apart, structural=True),
        only_use("w"),
        Clause("separable", _separable),
    ],
    build=_apart,
    doc="Write a product that is taken apart behind it as one product per part: the same columns, without the copies.",
)
"""Its input is quantized once for all parts, since they read the same value."""

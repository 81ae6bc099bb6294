"""Products that an attention splits: one quantized product per part, as TensorRT wants them.

TensorRT slices the weight of a product whose result is split into queries, keys and values, so that the attention
kernel reads each by itself. A weight with one scale per channel it first turns into floats for that, and the product
runs in float16 (seen on TensorRT for RTX 1.7.1). Given one product per part and a Concat behind them, it merges the
products into one of integers and drops the Concat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, attr_ints, const_array, consumers, is_op, rank_of, shape_of
from qcompiler.ir.rewriter import Rewriter
from qcompiler.patterns.parts import MOST, behind_bias, slice_ranges, split_sizes


def split_projection(rewriter: Rewriter, product: ir.Node) -> int:
    """Write a MatMul by a weight quantized per column as one MatMul per part of its result, where that is split.

    The columns are those of before, so no number changes. The first part keeps the node's name.

    Returns:
        the number of parts, 0 if nothing was done.
    """
    weight = product.inputs[1].producer() if product.inputs[1] is not None else None
    data = product.inputs[0].producer() if product.inputs[0] is not None else None
    if not is_op(weight, "DequantizeLinear") or not is_op(data, "DequantizeLinear"):
        return 0
    assert weight is not None
    stored, scale = const_array(weight.inputs[0]), const_array(weight.inputs[1])
    if stored is None or scale is None or stored.ndim != 2 or scale.ndim != 1 or scale.size < 2:
        return 0
    if attr_int(weight, "axis", 1) % 2 != 1 or attr_int(weight, "block_size", 0):
        return 0
    sizes = _parts(behind_bias(product.outputs[0]), stored.shape[1])
    if len(sizes) < 2:
        return 0
    _write_parts(rewriter, product, weight, sizes)
    return len(sizes)


def _write_parts(rewriter: Rewriter, product: ir.Node, weight: ir.Node, sizes: Sequence[int]) -> None:
    name, out = str(product.name), product.outputs[0]
    product.name = rewriter.unique(f"{name}:whole")
    ends = np.cumsum(sizes)[:-1]
    constants = [np.split(array, ends, axis=-1) for v in weight.inputs if (array := const_array(v)) is not None]
    made = []
    for part, arrays in enumerate(zip(*constants, strict=True)):
        group = name if part == 0 else f"{name}/part_{part}"
        inputs = [
            rewriter.constant(np.ascontiguousarray(array), f"{old.name}:part_{part}", product.graph)  # type: ignore[union-attr]
            for array, old in zip(arrays, weight.inputs, strict=True)
        ]
        dq = rewriter.node(
            "DequantizeLinear", inputs, before=product, origin=[product], name=f"{name}/DequantizeLinear_1",
            attributes={"axis": 1},
        ).outputs[0]  # fmt: skip
        rewriter.declare(dq, out.dtype or ir.DataType.FLOAT, ir.Shape(arrays[0].shape))
        node = rewriter.node("MatMul", [product.inputs[0], dq], before=product, origin=[product], name=group)
        if part == 0:
            node.name = name
        known = shape_of(out)
        shape = None if known is None else ir.Shape([*known[:-1], sizes[part]])
        rewriter.declare(node.outputs[0], out.dtype or ir.DataType.FLOAT, shape)
        made.append(node.outputs[0])
    joined = rewriter.node(
        "Concat", made, before=product, origin=[product], name=f"{name}/Concat", attributes={"axis": -1}
    ).outputs[0]
    rewriter.take_over(out, joined)
    rewriter.replace(out, joined)
    rewriter.erase_dead([product])


def _parts(value: ir.Value, columns: int) -> list[int]:
    """Return the sizes of the parts that the last axis of a value is split into, in order; empty if it is not."""
    readers = consumers(value)
    if value.is_graph_output() or not readers:
        return []
    if len(readers) == 1 and is_op(readers[0], "Split"):
        return split_sizes(readers[0], columns, rank_of(value))
    if all(is_op(node, "Slice") for node in readers):
        return [last - first for first, last in sorted(slice_ranges(readers, columns, rank_of(value)))]
    if len(readers) == 1 and is_op(readers[0], "Reshape"):
        return _axis_sizes(readers[0].outputs[0], columns)
    return []


def _axis_sizes(value: ir.Value, columns: int) -> list[int]:
    """Return the equal parts along the outermost of the axes that the columns were reshaped to, if it is split."""
    shape = shape_of(value)
    if shape is None:
        return []
    for axis in range(len(shape) - 1, -1, -1):
        tail = [d for d in shape[axis:] if isinstance(d, int)]
        if len(tail) != len(shape) - axis or math.prod(tail) > columns:
            return []
        if math.prod(tail) == columns:
            count = tail[0]
            taken = 2 <= count <= MOST and _taken_apart(value, axis, count, len(shape))
            return [columns // count] * count if taken else []
    return []


def _taken_apart(value: ir.Value, axis: int, count: int, rank: int) -> bool:
    """Return whether an axis is split into single elements, perhaps behind a Transpose."""
    readers = consumers(value)
    if len(readers) == 1 and is_op(readers[0], "Transpose"):
        order = attr_ints(readers[0], "perm") or tuple(reversed(range(rank)))
        axis, readers = order.index(axis), consumers(readers[0].outputs[0])
    if len(readers) == 1 and is_op(readers[0], "Split"):
        return attr_int(readers[0], "axis", 0) % rank == axis and len(readers[0].outputs) == count
    return len(readers) > 1 and all(is_op(n, "Gather") and attr_int(n, "axis", 0) % rank == axis for n in readers)

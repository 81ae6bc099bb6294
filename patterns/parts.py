"""How the last axis of a value is taken apart: by Split, by Slices, or reshaped and split along an axis of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import attr_int, attr_ints, const_array, consumers, is_op, rank_of, scalar, shape_of

MOST = 8
"""Parts that a product is taken apart into at most; more are no queries, keys and values."""


@dataclass(frozen=True)
class Part:
    """One part of a value's last axis.

    Attributes:
        value: the part as it is now, behind all that takes it apart.
        columns: which elements of the last axis it holds, in order.
        shape: target of the Reshape of the part alone; None where there is none.
        order: permutation of the Transpose behind that; None where there is none.
    """

    value: ir.Value
    columns: Array
    shape: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None


def behind_bias(value: ir.Value) -> ir.Value:
    """Return the value behind the bias of a product, if there is one."""
    readers = consumers(value)
    if len(readers) == 1 and is_op(readers[0], "Add") and any(const_array(v) is not None for v in readers[0].inputs):
        return readers[0].outputs[0]
    return value


def split_sizes(node: ir.Node, columns: int, rank: int | None) -> list[int]:
    """Return the sizes of the parts that a Split makes of the last axis; empty if it splits another."""
    axis = attr_int(node, "axis", 0)
    if axis != -1 and (rank is None or axis != rank - 1):
        return []
    count = len(node.outputs)
    given = const_array(node.inputs[1]) if len(node.inputs) > 1 else None
    sizes = [int(n) for n in given] if given is not None else [columns // count] * count
    return sizes if sum(sizes) == columns and len(sizes) <= MOST and min(sizes) > 0 else []


def slice_ranges(nodes: Sequence[ir.Node], columns: int, rank: int | None) -> list[tuple[int, int]]:
    """Return the first and last column (not included) of Slices that cover the last axis without a gap, each once.

    They are in the order of ``nodes``; empty if the nodes do something else.
    """
    ranges = []
    for node in nodes:
        start, end = (scalar(v) for v in node.inputs[1:3])
        axis = scalar(node.inputs[3]) if len(node.inputs) > 3 else None
        step = scalar(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else 1.0
        if start is None or end is None or axis is None or step != 1.0:
            return []
        if axis != -1 and (rank is None or axis != rank - 1):
            return []
        first, last = (int(n) if n >= 0 else int(n) + columns for n in (start, end))
        ranges.append((first, min(last, columns)))
    ordered = sorted(ranges)
    ends = [0, *(last for _, last in ordered)]
    if [first for first, _ in ordered] != ends[:-1] or ends[-1] != columns or len(ranges) > MOST:
        return []
    return ranges


def find_parts(value: ir.Value, columns: int) -> tuple[Part, ...]:
    """Return the parts that a value's last axis is taken into, if that is all that is done with it.

    Args:
        value: the value.
        columns: length of its last axis.
    """
    found = _of_last_axis(value, columns)
    readers = consumers(value)
    if found or value.is_graph_output() or len(readers) != 1 or not is_op(readers[0], "Reshape"):
        return found
    return _behind_rows(readers[0], columns) or _of_axis(readers[0], columns)


def _of_last_axis(value: ir.Value, columns: int) -> tuple[Part, ...]:
    readers = consumers(value)
    if value.is_graph_output() or not readers:
        return ()
    if len(readers) == 1 and is_op(readers[0], "Split"):
        sizes = split_sizes(readers[0], columns, rank_of(value))
        return _of_ranges(readers[0].outputs, _ranges(sizes)) if len(sizes) > 1 else ()
    if all(is_op(node, "Slice") for node in readers):
        found = slice_ranges(readers, columns, rank_of(value))
        return _of_ranges([n.outputs[0] for n in readers], found) if len(found) > 1 else ()
    return ()


def _behind_rows(reshape: ir.Node, columns: int) -> tuple[Part, ...]:
    """Return the parts of the last axis behind a Reshape that lays out only the rows anew."""
    target, shape, rank = const_array(reshape.inputs[1]), shape_of(reshape.outputs[0]), rank_of(reshape.inputs[0])
    if target is None or not shape or shape[-1] != columns or rank is None:
        return ()
    rows = tuple(int(n) for n in target[:-1])
    if 0 in rows[rank - 1 :]:  # the length of the last axis is copied
        return ()
    found = _of_last_axis(reshape.outputs[0], columns)
    return tuple(replace(part, shape=(*rows, int(part.columns.size))) for part in found)


def _ranges(sizes: Sequence[int]) -> list[tuple[int, int]]:
    ends = [0, *(int(n) for n in np.cumsum(sizes))]
    return list(itertools.pairwise(ends))


def _of_ranges(values: Sequence[ir.Value], ranges: Sequence[tuple[int, int]]) -> tuple[Part, ...]:
    return tuple(Part(v, np.arange(a, b)) for v, (a, b) in zip(values, ranges, strict=True))


def _of_axis(reshape: ir.Node, columns: int) -> tuple[Part, ...]:
    """Return the parts along one of the axes that the columns are reshaped to, perhaps behind a Transpose."""
    target, shape = const_array(reshape.inputs[1]), shape_of(reshape.outputs[0])
    inner = shape_of(reshape.inputs[0])
    if target is None or shape is None or inner is None or reshape.outputs[0].is_graph_output():
        return ()
    lead = len(inner) - 1
    tail = [d for d in shape[lead:] if isinstance(d, int)]
    if len(tail) < len(shape) - lead or len(tail) < 2 or int(np.prod(tail)) != columns or 0 in target[lead:]:
        return ()
    order, value, readers = None, reshape.outputs[0], consumers(reshape.outputs[0])
    if len(readers) == 1 and is_op(readers[0], "Transpose"):
        order = attr_ints(readers[0], "perm") or tuple(reversed(range(len(shape))))
        value = readers[0].outputs[0]
    taken = _taken_apart(value, len(shape))
    if taken is None:
        return ()
    place, values = taken
    axis = order[place] if order is not None else place
    count = shape[axis]
    if axis < lead or not isinstance(count, int) or not 2 <= count <= MOST or any(k >= count for k in values):
        return ()
    cells = np.arange(columns).reshape(tail)
    left = tuple(int(n) for i, n in enumerate(target) if i != axis)
    kept = None if order is None else tuple(d - (d > axis) for d in order if d != axis)
    if kept == tuple(range(len(left))):
        kept = None
    return tuple(
        Part(v, np.take(cells, k, axis=axis - lead).reshape(-1), left, kept) for k, v in sorted(values.items())
    )


def _taken_apart(value: ir.Value, rank: int) -> tuple[int, dict[int, ir.Value]] | None:
    """Return the axis of which single elements are taken, and the values without that axis by element."""
    readers = consumers(value)
    if value.is_graph_output() or not readers:
        return None
    if len(readers) == 1 and is_op(readers[0], "Split"):
        return _squeezed(readers[0], rank)
    axes = {attr_int(n, "axis", 0) % rank for n in readers}
    if len(readers) < 2 or not all(is_op(n, "Gather") and n.inputs[0] is value for n in readers) or len(axes) != 1:
        return None
    found: dict[int, ir.Value] = {}
    axis = axes.pop()
    shape = shape_of(value)
    for node in readers:
        index, place = const_array(node.inputs[1]), shape[axis] if shape is not None else None
        if index is None or index.ndim != 0 or not isinstance(place, int) or int(index) % place in found:
            return None
        found[int(index) % place] = node.outputs[0]
    return axis, found


def _squeezed(split: ir.Node, rank: int) -> tuple[int, dict[int, ir.Value]] | None:
    axis = attr_int(split, "axis", 0) % rank
    found = {}
    for index, value in enumerate(split.outputs):
        readers = consumers(value)
        shape = shape_of(value)
        if value.is_graph_output() or len(readers) != 1 or not is_op(readers[0], "Squeeze"):
            return None
        axes = const_array(readers[0].inputs[1]) if len(readers[0].inputs) > 1 else None
        if axes is None or [int(a) % rank for a in axes] != [axis] or shape is None or shape[axis] != 1:
            return None
        found[index] = readers[0].outputs[0]
    return (axis, found) if len(found) > 1 else None

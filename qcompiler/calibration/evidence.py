"""What a graph tells about the data its inputs expect: table sizes, compared constants, scales, batch statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import attr_float, attr_int, attr_ints, const_array, consumers, is_op, scalar, shape_of
from qcompiler.ir.shapes import static_shape

Double = npt.NDArray[np.float64]

_SAME = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Expand", "Dropout")
"""Operators whose output holds nothing but numbers of their first input."""
_SHAPES = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}
"""Operators one of whose inputs is the shape of the output."""


@dataclass(frozen=True)
class Chain:
    """The way from an input to a weighted operator: ``y = a * x + b`` and an order of axes.

    Attributes:
        axes: the input's axes in the order in which the operator sees them.
        a: factor, broadcast over the input's axes.
        b: term, likewise.
    """

    axes: tuple[int, ...]
    a: Double
    b: Double

    @property
    def plain(self) -> bool:
        """Return whether the numbers arrive as they are."""
        return bool((self.a == 1).all() and (self.b == 0).all())


@dataclass(frozen=True)
class Scale:
    """The operator that an input reaches, and the BatchNormalization behind it.

    Attributes:
        chain: how the input arrives.
        weight: [outputs, channels, *kernel] of the Conv, Gemm or MatMul; None for a BatchNormalization on its own.
        dilations: of the kernel.
        bias: [outputs].
        mean: [outputs] that the BatchNormalization expects, None without one.
        variance: [outputs], likewise.
        name: name of the BatchNormalization, or "".
    """

    chain: Chain
    weight: Double | None
    dilations: tuple[int, ...]
    bias: Double
    mean: Double | None = None
    variance: Double | None = None
    name: str = ""


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield the (node, place among its inputs) that read a value's numbers, also behind operators that move them."""
    seen: set[ir.Value] = set()
    work = [value]
    while work:
        current = work.pop()
        if current in seen:
            continue
        seen.add(current)
        for use in current.uses():
            yield use.node, use.idx
            if use.idx == 0 and is_op(use.node, *_SAME):
                work.append(use.node.outputs[0])


def table_size(value: ir.Value) -> int | None:
    """Return how many rows the smallest table has that the value's numbers look up, or None if they look up none."""
    sizes = []
    for node, place in readers(value):
        if is_op(node, "Gather") and place == 1:
            sizes.append(_dim(node.inputs[0], attr_int(node, "axis", 0)))
        elif is_op(node, "OneHot") and place == 0:
            depth = scalar(node.inputs[1])
            sizes.append(None if depth is None else int(depth))
        elif is_op(node, "EmbedLayerNormalization", domain="com.microsoft") and place < 2:
            sizes.append(_dim(node.inputs[2 if place == 0 else 4], 0))
    known = [size for size in sizes if size is not None and size > 0]
    return min(known, default=None)


def _dim(value: ir.Value | None, axis: int) -> int | None:
    if value is not None and value.const_value is not None:
        return value.const_value.shape.numpy()[axis]
    shape = shape_of(value)
    dim = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
    return dim if isinstance(dim, int) else None


def compared_constants(value: ir.Value) -> tuple[float, ...]:
    """Return the numbers that the graph compares the value with (a mode or a rate), smallest first."""
    found = set()
    for node, place in readers(value):
        if is_op(node, "Equal"):
            number = scalar(node.inputs[1 - place])
            if number is not None:
                found.add(number)
    return tuple(sorted(found))


def wanted_shape(value: ir.Value) -> tuple[int, ...] | None:
    """Return the numbers of an input that is the shape of a value whose shape is known."""
    for node, place in readers(value):
        if is_op(node, *_SHAPES) and _SHAPES[node.op_type] == place:
            shape = static_shape(node.outputs[0])
            if shape is not None:
                return shape
    return None


def is_size(value: ir.Value) -> bool:
    """Return whether an input is a shape, a count or a bound of others, where zero is no sensible number."""
    counts = {"Tile": 1, "TopK": 1, "Resize": 3, "Loop": 0, "Range": 1, **_SHAPES}
    return any(is_op(node, *counts) and counts[node.op_type] == place for node, place in readers(value))


def quantized_range(value: ir.Value) -> tuple[float, float] | None:
    """Return the range of the QuantizeLinear (one scale) that reads a value, or None."""
    for node in consumers(value):
        if not is_op(node, "QuantizeLinear"):
            continue
        scale, zero = scalar(node.inputs[1]), const_array(node.inputs[2]) if len(node.inputs) > 2 else None
        if scale is None or (zero is not None and (zero.size != 1 or zero.dtype.kind not in "iu")):
            continue
        kind = np.dtype(np.uint8) if zero is None else zero.dtype
        point = 0 if zero is None else int(zero.reshape(-1)[0])
        limits = np.iinfo(kind)
        return (limits.min - point) * scale, (limits.max - point) * scale
    return None


def find_scale(value: ir.Value) -> Scale | None:
    """Find the first weighted operator or BatchNormalization on a plain way from an input, those with statistics first.

    Plain: identities, casts, transposes, padding, and constants added or multiplied.
    """
    shape = shape_of(value)
    if shape is None or len(shape) < 2:
        return None
    rank = len(shape)
    one = np.ones((1,) * rank)
    found = list(_scales(value, Chain(tuple(range(rank)), one, one - 1), 8))
    return next((s for s in found if s.mean is not None), found[0] if found else None)


def _scales(value: ir.Value, chain: Chain, steps: int) -> Iterator[Scale]:
    for node in consumers(value):
        if node.graph is not value.graph and not value.is_graph_input():
            continue
        place = list(node.inputs).index(value)
        if place == 0 and is_op(node, "Conv", "Gemm", "MatMul"):
            made = _weighted(node, chain)
            if made is not None:
                yield made
        elif place == 0 and is_op(node, "BatchNormalization") and len(chain.axes) >= 2:
            yield _normalized(Scale(chain, None, (), np.zeros(1)), node)
        elif steps and (further := _further(node, place, chain)) is not None:
            yield from _scales(node.outputs[0], further, steps - 1)


def _further(node: ir.Node, place: int, chain: Chain) -> Chain | None:
    """Return the chain behind one more operator, or None if it is no plain one."""
    if place == 0 and is_op(node, "Identity", "Dropout", "Pad"):
        return chain
    if is_op(node, "Cast"):
        return chain if node.outputs[0].dtype in (None, ir.DataType.FLOAT, ir.DataType.FLOAT16) else None
    if is_op(node, "Transpose"):
        perm = attr_ints(node, "perm") or tuple(reversed(range(len(chain.axes))))
        return replace(chain, axes=tuple(chain.axes[axis] for axis in perm))
    if not is_op(node, "Add", "Sub", "Mul", "Div"):
        return None
    other = const_array(node.inputs[1 - place])
    rank = len(chain.axes)
    if other is None or other.ndim > rank or (place == 1 and is_op(node, "Div")):
        return None
    spread = other.astype(np.float64).reshape((1,) * (rank - other.ndim) + other.shape)
    number: Any = spread.transpose(np.argsort(chain.axes))
    a, b = chain.a, chain.b
    if is_op(node, "Mul"):
        return replace(chain, a=a * number, b=b * number)
    if is_op(node, "Div"):
        return replace(chain, a=a / number, b=b / number)
    if is_op(node, "Add"):
        return replace(chain, b=b + number)
    return replace(chain, b=b - number) if place == 0 else replace(chain, a=-a, b=number - b)


def _weighted(node: ir.Node, chain: Chain) -> Scale | None:
    weight = const_array(node.inputs[1])
    if weight is None:
        return None
    dilations: tuple[int, ...] = ()
    bias = const_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if is_op(node, "Conv"):
        if attr_int(node, "group", 1) != 1 or weight.ndim != len(chain.axes):
            return None
        dilations = attr_ints(node, "dilations") or (1,) * (weight.ndim - 2)
    elif weight.ndim != 2 or len(chain.axes) != 2:
        return None
    elif not attr_int(node, "transB", 0):
        weight = weight.T
    term = np.zeros(len(weight)) if bias is None else bias.astype(np.float64).reshape(-1)
    made = Scale(chain, weight.astype(np.float64), dilations, np.broadcast_to(term, (len(weight),)))
    return _behind(made, node.outputs[0])


def _behind(scale: Scale, value: ir.Value) -> Scale:
    """Add the BatchNormalization behind a weighted operator, and a bias in between."""
    for node in consumers(value):
        if is_op(node, "BatchNormalization") and node.inputs[0] is value:
            return _normalized(scale, node)
        if is_op(node, "Add"):
            term: Array | None = const_array(node.inputs[1 if node.inputs[0] is value else 0])
            if term is not None and term.size == len(scale.bias):
                behind = _behind(replace(scale, bias=scale.bias + term.reshape(-1)), node.outputs[0])
                if behind.mean is not None:
                    return behind
    return scale


def _normalized(scale: Scale, node: ir.Node) -> Scale:
    mean, variance = const_array(node.inputs[3]), const_array(node.inputs[4])
    if mean is None or variance is None or attr_int(node, "training_mode", 0):
        return scale
    # The statistics were taken before epsilon was added, but a variance of zero would fit no scale.
    least = attr_float(node, "epsilon", 1e-5)
    wide = np.maximum(variance.astype(np.float64), least)
    return replace(scale, mean=mean.astype(np.float64), variance=wide, name=node.name or "")

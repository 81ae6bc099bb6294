"""What channels of a graph are: where they lie in a value, and where operators give them, read them or add to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.graph import attr_float, attr_int, attr_ints, const_array, is_op, shape_of

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Lane:
    """The channels of one value.

    Attributes:
        axis: where they lie, counted from the front.
        ids: number of each channel, int64 [channels].
    """

    axis: int
    ids: Ids


@dataclass(frozen=True, eq=False)
class WeightUse:
    """A channel's end: an operator with constant weights on one side of it.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        axis: axis of the weight along which the channels lie.
        ids: number of each channel, int64 [channels]; of what a Conv with groups reads all groups, one after another.
    """

    node: ir.Node
    axis: int
    ids: Ids


@dataclass(frozen=True, eq=False)
class ConstantUse:
    """A constant that is added to channels, or compared with them: it is divided as they are.

    Attributes:
        node: the node that reads it.
        index: at which input.
        axis: its axis along which channels lie, counted from the end (negative); it may have length 1 or not exist.
        ids: number of each channel.
    """

    node: ir.Node
    index: int
    axis: int
    ids: Ids


@dataclass
class Channels:
    """All channels of a graph.

    Attributes:
        lanes: per value whose channels are known; numbers are equal where channels must be scaled alike.
        given: operators that give channels.
        read: operators that read them.
        constants: constants that are divided with them.
    """

    lanes: dict[ir.Value, Lane] = field(default_factory=dict)
    given: list[WeightUse] = field(default_factory=list)
    read: list[WeightUse] = field(default_factory=list)
    constants: list[ConstantUse] = field(default_factory=list)


def weight_axes(node: ir.Node, shape: Sequence[int]) -> tuple[int, int, int] | None:
    """Return (weight axis of what is read, of what is given, axis of the data's channels), None if the form is odd."""
    if node.op_type == "Conv" and len(shape) > 2:
        return 1, 0, 1
    if node.op_type == "ConvTranspose" and len(shape) > 2 and attr_int(node, "group", 1) == 1:
        return 0, 1, 1
    if node.op_type == "MatMul" and len(shape) == 2:
        return 0, 1, -1
    if is_op(node, "Gemm") and attr_int(node, "transA", 0) == 0 and attr_float(node, "alpha", 1.0) == 1.0:
        if attr_float(node, "beta", 1.0) != 1.0:
            return None
        return (1, 0, 1) if attr_int(node, "transB", 0) else (0, 1, 1)
    return None


def read_channels(node: ir.Node, shape: Sequence[int]) -> int:
    """Return how many channels an operator reads whose weight has a shape."""
    if node.op_type == "Conv":
        return shape[1] * attr_int(node, "group", 1)
    axes = weight_axes(node, shape)
    assert axes is not None
    return shape[axes[0]]


def used_behind_first(node: ir.Node) -> bool:
    """Return whether an output besides the first is read: indices of MaxPool, the mask of Dropout."""
    return any(v.uses() or v.is_graph_output() for v in node.outputs[1:])


def keeps_axis(node: ir.Node, axis: int) -> bool:
    """Return whether an axis is known to have the same length in front of a node and behind it."""
    old, new = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    return old is not None and new is not None and isinstance(old[axis], int) and old[axis] == new[axis]


def given_axes(node: ir.Node, index: int) -> tuple[int, ...] | None:
    """Return the axes that a node is given as an attribute or as a constant input, None if they are not known."""
    given = attr_ints(node, "axes")
    if given is not None:
        return given
    value = node.inputs[index] if index < len(node.inputs) else None
    array = const_array(value)
    return None if array is None else tuple(int(a) for a in array.reshape(-1))

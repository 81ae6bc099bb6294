"""Follow channels through a graph: which channels of which values must be scaled alike so that nothing else changes.

A channel is born where an operator with constant weights gives it (its weights can divide it by any number), passes
operators for which f(s x) = s f(x) holds channel by channel for s > 0, and ends where an operator with constant weights
reads it (its weights can multiply it back). Everywhere else it is bound to what it is. Channels that an Add brings
together, as at the end of a residual branch, are one: all that give them and all that read them share one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.ir.analysis import captures
from qcompiler.ir.channel_uses import (
    Channels,
    ConstantUse,
    Ids,
    Lane,
    WeightUse,
    given_axes,
    keeps_axis,
    read_channels,
    used_behind_first,
    weight_axes,
)
from qcompiler.ir.graph import (
    attr_int,
    attr_ints,
    attr_str,
    const_array,
    is_const,
    is_float,
    rank_of,
    scalar,
    shape_of,
)

BOUND = 0
"""Number of all channels that cannot be scaled."""


@dataclass(frozen=True, eq=False)
class ChannelClass:
    """Values whose channels are scaled together.

    Attributes:
        name: name of the first of the values.
        values: in program order, with their channels; numbers count from 0 within the class, -1 is a bound channel.
        given: operators that give channels of the class.
        read: operators that read such.
        constants: constants that are divided with them.
        size: how many numbers there are.
    """

    name: str
    values: tuple[tuple[ir.Value, Lane], ...]
    given: tuple[WeightUse, ...]
    read: tuple[WeightUse, ...]
    constants: tuple[ConstantUse, ...]
    size: int


def channel_classes(model: ir.Model, keep: Iterable[str] = ()) -> tuple[ChannelClass, ...]:
    """Return the classes of the main graph that can be scaled, in program order.

    Args:
        model: FLOAT graph in program order.
        keep: names of nodes whose weights must stay as they are.
    """
    found = _Walker(model, frozenset(keep)).walk()
    return tuple(_split(found))


def _split(found: Channels) -> Iterator[ChannelClass]:
    """Cut all channels into classes that have no channel in common."""
    parent: dict[int, int] = {}

    def root(number: int) -> int:
        while parent.setdefault(number, number) != number:
            number = parent[number]
        return number

    for lane in found.lanes.values():
        free = [int(i) for i in np.unique(lane.ids) if i != BOUND]
        for number in free[1:]:
            a, b = sorted((root(free[0]), root(number)))
            parent[b] = a
    members: dict[int, list[tuple[ir.Value, Lane]]] = {}
    for value, lane in found.lanes.items():
        free = lane.ids[lane.ids != BOUND]
        if free.size:
            members.setdefault(root(int(free[0])), []).append((value, lane))
    for key, values in members.items():
        numbers = np.unique(np.concatenate([lane.ids for _, lane in values]))
        numbers = numbers[numbers != BOUND]

        def local(ids: Ids, numbers: Ids = numbers) -> Ids:
            return np.where(ids == BOUND, -1, np.searchsorted(numbers, ids))

        def mine(ids: Ids, key: int = key) -> bool:
            free = ids[ids != BOUND]
            return bool(free.size) and root(int(free[0])) == key

        yield ChannelClass(
            str(values[0][0].name),
            tuple((value, Lane(lane.axis, local(lane.ids))) for value, lane in values),
            tuple(WeightUse(u.node, u.axis, local(u.ids)) for u in found.given if mine(u.ids)),
            tuple(WeightUse(u.node, u.axis, local(u.ids)) for u in found.read if mine(u.ids)),
            tuple(ConstantUse(u.node, u.index, u.axis, local(u.ids)) for u in found.constants if mine(u.ids)),
            len(numbers),
        )


_SAME = frozenset({"Relu", "LeakyRelu", "Identity", "Abs", "Neg", "Dropout"})
"""f(s x) = s f(x) for each element."""
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_REDUCED = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"})
_SUMS = frozenset({"Add", "Sub", "Sum", "Max", "Min"})
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class _Walker:
    """Walks the main graph once; numbers that must be equal are joined on the way."""

    def __init__(self, model: ir.Model, keep: frozenset[str]) -> None:
        self.model, self.keep = model, keep
        self.found = Channels()
        self.parent = [BOUND]

    def walk(self) -> Channels:
        graph = self.model.graph
        for node in graph:
            for captured in captures(node):
                self.bind(captured)
            follow = self._follower(node)
            if follow is None or not follow(node):
                for value in node.inputs:
                    self.bind(value)
        for value in graph.outputs:
            self.bind(value)
        roots = np.array([self._root(i) for i in range(len(self.parent))], np.int64)
        found = self.found
        return Channels(
            {v: Lane(lane.axis, roots[lane.ids]) for v, lane in found.lanes.items()},
            [WeightUse(u.node, u.axis, roots[u.ids]) for u in found.given],
            [WeightUse(u.node, u.axis, roots[u.ids]) for u in found.read],
            [ConstantUse(u.node, u.index, u.axis, roots[u.ids]) for u in found.constants],
        )

    def _follower(self, node: ir.Node) -> Callable[[ir.Node], bool] | None:
        if node.domain not in ("", "ai.onnx") or any(
            a.type == ir.AttributeType.GRAPH for a in node.attributes.values()
        ):
            return None
        if node.op_type in WEIGHTED:
            return self._weighted
        if node.op_type in _SUMS:
            return self._sum
        return {
            "Mul": self._product, "Div": self._product, "PRelu": self._slope, "Clip": self._clip, "Pad": self._pad,
            "Resize": self._resize, "Reshape": self._reshape, "Flatten": self._reshape, "Transpose": self._transpose,
            "Squeeze": self._squeeze, "Unsqueeze": self._unsqueeze, "Concat": self._concat, "Split": self._split,
            "Slice": self._slice,
            **dict.fromkeys(_SAME, self._same), **dict.fromkeys(_POOLS, self._pool),
            **dict.fromkeys(_REDUCED, self._reduce),
        }.get(node.op_type)  # fmt: skip

    # ---- numbers -----------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Ids:
        ids = np.arange(len(self.parent), len(self.parent) + count, dtype=np.int64)
        self.parent.extend(int(i) for i in ids)
        return ids

    def _root(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def join(self, a: Ids, b: Ids) -> None:
        for left, right in zip(a.tolist(), b.tolist(), strict=True):
            low, high = sorted((self._root(left), self._root(right)))
            self.parent[high] = low

    def bind(self, value: ir.Value | None) -> None:
        """Let a value's channels be what they are."""
        lane = self.lane(value)
        if lane is not None:
            self.join(lane.ids, np.zeros_like(lane.ids))

    def lane(self, value: ir.Value | None) -> Lane | None:
        return None if value is None else self.found.lanes.get(value)

    def give(self, value: ir.Value, axis: int, ids: Ids) -> bool:
        """Note a result's channels; False if the value is not what it should be."""
        shape = shape_of(value)
        if shape is None or not is_float(value) or not 0 <= axis < len(shape):
            return False
        if isinstance(shape[axis], int) and shape[axis] != len(ids):
            return False
        self.found.lanes[value] = Lane(axis, ids)
        return True

    # ---- operators with weights --------------------------------------------------------------------------------

    def _weighted(self, node: ir.Node) -> bool:
        """Let weights read the channels of the data and give new ones."""
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        array = const_array(weight)
        axes = None if array is None else weight_axes(node, array.shape)
        usable = (
            axes is not None and weight is not None and node.name not in self.keep and len(weight.uses()) == 1
            and array is not None and array.dtype == np.float32 and (bias is None or is_const(bias))
        )  # fmt: skip
        if not usable:
            return False
        assert axes is not None
        assert array is not None
        read_axis, given_axis, channel = axes
        data, lane = node.inputs[0], self.lane(node.inputs[0])
        if lane is not None:
            rank = rank_of(data)
            if rank is None or lane.axis != channel % rank or len(lane.ids) != read_channels(node, array.shape):
                self.bind(data)
            else:
                self.found.read.append(WeightUse(node, read_axis, lane.ids))
        rank = rank_of(node.outputs[0])
        width = array.shape[given_axis]
        flat = const_array(bias)
        if rank is not None and (flat is None or flat.size in (1, width)):
            ids = self.fresh(width)
            if self.give(node.outputs[0], channel % rank, ids):
                self.found.given.append(WeightUse(node, given_axis, ids))
        return True

    # ---- operators that let channels pass ----------------------------------------------------------------------

    def _same(self, node: ir.Node) -> bool:
        lane = self.lane(node.inputs[0])
        return lane is not None and not used_behind_first(node) and self.give(node.outputs[0], lane.axis, lane.ids)

    def _pool(self, node: ir.Node) -> bool:
        lane = self.lane(node.inputs[0])
        return lane is not None and lane.axis <= 1 and self._same(node)

    def _clip(self, node: ir.Node) -> bool:
        bounds = [v for v in node.inputs[1:] if v is not None]
        # Bounds of 0 and infinity stay what they are when a channel is scaled.
        return all(scalar(v) in (0.0, np.inf, -np.inf) for v in bounds) and self._same(node)

    def _slope(self, node: ir.Node) -> bool:
        return is_const(node.inputs[1]) and self._same(node)

    def _pad(self, node: ir.Node) -> bool:
        lane = self.lane(node.inputs[0])
        filled = node.inputs[2] if len(node.inputs) > 2 else None
        zeros = attr_str(node, "mode", "constant") != "constant" or filled is None or scalar(filled) == 0.0
        return lane is not None and zeros and keeps_axis(node, lane.axis) and self._same(node)

    def _resize(self, node: ir.Node) -> bool:
        lane = self.lane(node.inputs[0])
        plain = attr_str(node, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        return lane is not None and plain and keeps_axis(node, lane.axis) and self._same(node)

    def _reduce(self, node: ir.Node) -> bool:
        lane, rank = self.lane(node.inputs[0]), rank_of(node.inputs[0])
        axes = given_axes(node, 1)
        if lane is None or rank is None or axes is None:
            return False
        gone = {a % rank for a in axes}
        if lane.axis in gone:
            return False
        kept = attr_int(node, "keepdims", 1)
        return self.give(node.outputs[0], lane.axis - (0 if kept else sum(a < lane.axis for a in gone)), lane.ids)

    def _transpose(self, node: ir.Node) -> bool:
        lane, rank = self.lane(node.inputs[0]), rank_of(node.inputs[0])
        if lane is None or rank is None:
            return False
        order = attr_ints(node, "perm") or tuple(reversed(range(rank)))
        return self.give(node.outputs[0], order.index(lane.axis), lane.ids)

    def _squeeze(self, node: ir.Node) -> bool:
        lane, rank, axes = self.lane(node.inputs[0]), rank_of(node.inputs[0]), given_axes(node, 1)
        if lane is None or rank is None or axes is None:
            return False
        gone = {a % rank for a in axes}
        place = lane.axis - sum(a < lane.axis for a in gone)
        return lane.axis not in gone and self.give(node.outputs[0], place, lane.ids)

    def _unsqueeze(self, node: ir.Node) -> bool:
        lane, rank, axes = self.lane(node.inputs[0]), rank_of(node.outputs[0]), given_axes(node, 1)
        if lane is None or rank is None or axes is None:
            return False
        new = {a % rank for a in axes}
        return self.give(node.outputs[0], [i for i in range(rank) if i not in new][lane.axis], lane.ids)

    def _reshape(self, node: ir.Node) -> bool:
        """Let channels pass where their axis stays whole, or is laid out flat with all behind it."""
        lane, old, new = self.lane(node.inputs[0]), shape_of(node.inputs[0]), shape_of(node.outputs[0])
        if lane is None or old is None or new is None:
            return False
        width = len(lane.ids)
        if lane.axis == len(old) - 1 and new[-1] == width:
            return self.give(node.outputs[0], len(new) - 1, lane.ids)
        if lane.axis != 1 or len(new) < 2:
            return False
        behind = old[2:]
        taps = int(np.prod([d for d in behind if isinstance(d, int)])) if all(isinstance(d, int) for d in behind) else 0
        if len(new) == 2 and taps and new[1] == width * taps:
            return self.give(node.outputs[0], 1, np.repeat(lane.ids, taps))
        same_first = new[0] is not None and new[0] == old[0]
        return same_first and new[1] == width and self.give(node.outputs[0], 1, lane.ids)

    # ---- operators that bring channels together or take them apart ----------------------------------------------

    def _concat(self, node: ir.Node) -> bool:
        rank = rank_of(node.outputs[0])
        lanes = [self.lane(v) for v in node.inputs]
        known = [lane for lane in lanes if lane is not None]
        if rank is None or not known or len({lane.axis for lane in known}) != 1:
            return False
        axis = known[0].axis
        if attr_int(node, "axis", 0) % rank != axis:
            if len(known) != len(lanes) or len({len(lane.ids) for lane in known}) != 1:
                return False
            for lane in known[1:]:
                self.join(known[0].ids, lane.ids)
            return self.give(node.outputs[0], axis, known[0].ids)
        parts: list[Ids] = []
        for value, part in zip(node.inputs, lanes, strict=True):
            shape = shape_of(value)
            width = None if shape is None or len(shape) <= axis else shape[axis]
            if part is not None:
                parts.append(part.ids)
            elif isinstance(width, int):
                parts.append(np.zeros(width, np.int64))
            else:
                return False
        return self.give(node.outputs[0], axis, np.concatenate(parts))

    def _split(self, node: ir.Node) -> bool:
        lane, rank = self.lane(node.inputs[0]), rank_of(node.inputs[0])
        if lane is None or rank is None:
            return False
        if attr_int(node, "axis", 0) % rank != lane.axis:
            return all(self.give(v, lane.axis, lane.ids) for v in node.outputs if v.name)
        start, cuts = 0, []
        for value in node.outputs:
            width = (shape_of(value) or ())[lane.axis : lane.axis + 1]
            if not (width and isinstance(width[0], int)):
                return False
            cuts.append((value, lane.ids[start : start + width[0]]))
            start += width[0]
        return all(self.give(value, lane.axis, ids) for value, ids in cuts)

    def _slice(self, node: ir.Node) -> bool:
        lane, rank = self.lane(node.inputs[0]), rank_of(node.inputs[0])
        given = [const_array(v) if v is not None else None for v in node.inputs[1:]]
        if lane is None or rank is None or len(given) < 2 or any(
            v is not None and a is None for v, a in zip(node.inputs[1:], given, strict=True)
        ):  # fmt: skip
            return False
        starts, ends = given[0], given[1]
        assert starts is not None
        assert ends is not None
        axes = given[2] if len(given) > 2 and given[2] is not None else np.arange(starts.size)
        steps = given[3] if len(given) > 3 and given[3] is not None else np.ones(starts.size, np.int64)
        ids = lane.ids
        for start, end, axis, step in zip(
            starts.tolist(), ends.tolist(), axes.tolist(), steps.tolist(), strict=True
        ):  # fmt: skip
            if axis % rank == lane.axis:
                if step < 0:
                    return False
                ids = ids[start:end:step]
        return self.give(node.outputs[0], lane.axis, ids)

    def _sum(self, node: ir.Node) -> bool:
        """Join the channels of what is added or compared elementwise; constants are divided with them."""
        rank = rank_of(node.outputs[0])
        if rank is None or any(not is_const(v) and self.lane(v) is None for v in node.inputs):
            return False
        tracked = [(v, lane) for v in node.inputs if v is not None and (lane := self.lane(v)) is not None]
        if not tracked:
            return False
        places = {lane.axis - (rank_of(v) or 0) for v, lane in tracked}
        if len(places) != 1 or len({len(lane.ids) for _, lane in tracked}) != 1:
            return False
        (place,), ids = places, tracked[0][1].ids
        for _, lane in tracked[1:]:
            self.join(ids, lane.ids)
        for index, value in enumerate(node.inputs):
            if is_const(value):
                shape = shape_of(value) or ()
                if len(shape) >= -place and shape[place] not in (1, len(ids)):
                    return False
                self.found.constants.append(ConstantUse(node, index, place, ids))
        return self.give(node.outputs[0], rank + place, ids)

    def _product(self, node: ir.Node) -> bool:
        """Let channels pass a factor or divisor that has no channels to scale."""
        first, second = node.inputs
        rank = rank_of(node.outputs[0])
        lanes = (self.lane(first), self.lane(second))
        if rank is None or (lanes[0] is None) == (lanes[1] is None):
            return False
        if lanes[0] is None and node.op_type == "Div":
            return False
        value, lane = (first, lanes[0]) if lanes[0] is not None else (second, lanes[1])
        assert lane is not None
        return self.give(node.outputs[0], rank + lane.axis - (rank_of(value) or 0), lane.ids)

"""Rules on additive masks of attention scores: entries that can be told from zero by no probability go no lower."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, const_array, consumers, is_const, is_op, rank_of, scalar, shape_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import opset_at_least
from qcompiler.patterns.language import Clause, Rule, op, rule, var
from qcompiler.patterns.match import Match

FLOOR = 64.0
"""exp(-64) is 1.6e-28: nothing beside a float32 probability, yet far above the subnormal numbers (1.2e-38)."""
EXP_UNDERFLOW = 87.0
"""exp(-87.3) is the smallest normal float32: a smaller spread of scores cannot underflow."""
LARGEST_SPAN = 40.0
"""A masked score lies above the largest of its row by no more than all scores span. With a mask of -64 it then weighs
exp(40 - 64) = 4e-11 at most, so that a thousand of them stay below the resolution of a float32 probability (6e-8)."""


def float32(m: Match) -> str | None:
    """Decline where the root's result is not float32."""
    return None if m.root.outputs[0].dtype == ir.DataType.FLOAT else "not-float32: subnormal thresholds differ"


def last_axis(m: Match) -> str | None:
    """Decline a Softmax that is not over the last axis."""
    axis, rank = attr_int(m.root, "axis", -1), rank_of(m.root.inputs[0])
    return None if axis == -1 or (rank is not None and axis == rank - 1) else "axis: only the last axis is rewritten"


def _is_mask(m: Match) -> str | None:
    """Decline unless the scores are computed and the mask is one: smaller, so that it says the same of many scores."""
    mask, scores = shape_of(m.mask), shape_of(m.scores)
    if is_const(m.scores) or mask is None or scores is None or (mask and mask[-1] == 1) or not mask:
        return "no-mask"
    padded = (1,) * (len(scores) - len(mask)) + mask
    smaller = any(a == 1 and b != 1 for a, b in zip(padded, scores, strict=False))
    return None if len(mask) <= len(scores) and smaller else "no-mask"


def has_floor(mask: ir.Value | None) -> bool:
    """Return whether no entry of a mask lies more than `FLOOR` below the largest of its row."""
    array = const_array(mask)
    if array is not None:
        return bool((array >= array.max(axis=-1, keepdims=True) - FLOOR).all()) if array.ndim else True
    node = mask.producer() if mask is not None else None
    if not is_op(node, "Max") or len(node.inputs) != 2:
        return False
    floor = node.inputs[1].producer() if node.inputs[1] is not None else None
    if not is_op(floor, "Sub") or scalar(floor.inputs[1]) != FLOOR or floor.inputs[0] is None:
        return False
    top = floor.inputs[0].producer()
    return is_op(top, "ReduceMax") and top.inputs[0] is node.inputs[0]


def _floored(b: Builder, mask: ir.Value) -> ir.Value:
    """Return the mask with a floor; one is made for all who read the mask."""
    name = f"{mask.name}:floor"
    array = const_array(mask)
    if array is not None:
        stored = b.rewriter.model.graph.initializers.get(name)
        if stored is not None:
            return stored
        top = array.max(axis=-1, keepdims=True)
        return b.constant(np.maximum(array, top - np.float32(FLOOR)).astype(array.dtype), name)
    for reader in consumers(mask):
        if is_op(reader, "Max") and has_floor(reader.outputs[0]):
            return reader.outputs[0]
    axes = b.constant(np.asarray([-1], np.int64), f"{name}:axes")
    depth = b.constant(np.asarray(FLOOR, np.float32), f"{name}:depth")
    shape = shape_of(mask)
    row = None if shape is None else ir.Shape([*shape[:-1], 1])
    top = b.behind(mask, "ReduceMax", mask, axes, name=f"{name}/ReduceMax", shape=row, keepdims=1)
    low = b.behind(top, "Sub", top, depth, name=f"{name}/Sub", shape=row)
    return b.behind(low, "Max", mask, low, name=f"{name}/Max", shape=mask.shape)


def _masked_by_floor(b: Builder, m: Match) -> ir.Value:
    total = m.node("sum")
    inputs = [_floored(b, v) if v is m.mask else v for v in total.inputs if v is not None]
    # The name of the sum with an ending that profiles take off again.
    scores = b.op("Add", *inputs, name=f"{total.name}:node", origin=(total,), like=total.outputs[0])
    b.set_input(m.root, 0, scores)
    b.rewriter.erase_dead([total])
    return m.root.outputs[0]


MASK_FLOOR = rule(
    "mask-floor",
    match=op("Softmax", op("Add", var("scores"), var("mask"), name="sum")),
    where=[
        Clause("is_mask", _is_mask, structural=True),
        opset_at_least(18),  # axes as an input of ReduceMax; a Softmax of an older opset flattens, too
        Clause("float32", float32),
        Clause("last_axis", last_axis),
        Clause("no_floor_yet", lambda m: "has-floor: the mask is not deep" if has_floor(m.mask) else None),
    ],
    build=_masked_by_floor,
    doc="Keep an additive mask at most 64 below its row's largest entry: the same probabilities, without subnormal "
    "arithmetic, at the cost of the mask instead of the scores.",
)
"""A row that is masked wholly keeps its numbers: the floor lies below its largest entry, not below zero."""

MASKS: tuple[Rule, ...] = (MASK_FLOOR,)
"""Rules of the trap ``masked-softmax``."""

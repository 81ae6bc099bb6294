"""Space-to-depth made of strided slices, in front of a convolution: one convolution on the original value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, attr_ints, attr_str, const_array, is_op, shape_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.language import Clause, Rule, const, maybe, op, rest, rule, var
from qcompiler.patterns.match import Match


@dataclass(frozen=True)
class _Part:
    """One strided view of the source: which pixels of each s x s block it takes."""

    source: ir.Value
    row: int
    column: int
    step: int


def _view(value: ir.Value) -> _Part | str:
    """Return the strided view that a chain of Slice nodes computes, or why it is none."""
    starts, steps = {2: 0, 3: 0}, {2: 1, 3: 1}
    while is_op(value.producer(), "Slice"):
        node = value.producer()
        assert node is not None
        assert node.inputs[0] is not None
        arrays = [const_array(v) if v is not None else None for v in node.inputs[1:]]
        if len(arrays) < 4 or any(a is None for a in arrays):
            return "slice-form: starts, ends, axes and steps are not all constants"
        first, last, axes, by = ([int(n) for n in a.reshape(-1)] for a in arrays if a is not None)
        value = node.inputs[0]
        shape = shape_of(value)
        if shape is None or len(shape) != 4:
            return "rank: the sliced value is not known to have 4 axes"
        for start, end, axis, step in zip(first, last, axes, by, strict=True):
            axis %= 4  # noqa: PLW2901  # negative axes count from the end
            extent = shape[axis]
            if axis not in starts or not isinstance(extent, int) or step < 1:
                return "slice-form: a slice is not a forward slice of a known height or width"
            if not 0 <= start < step or end < extent or extent % step:
                return f"slice-form: the slice of axis {axis} does not take every {step}-th element of all {extent}"
            # The chain is walked from its end: element k of what is taken so far is element start + step * k here.
            starts[axis] = start + step * starts[axis]
            steps[axis] *= step
    if steps[2] != steps[3] or steps[2] < 2:
        return "slice-form: rows and columns are not taken with the same step above 1"
    return _Part(value, starts[2], starts[3], steps[2])


def _parts(m: Match) -> list[_Part] | str:
    if attr_int(m.node("concat"), "axis", 0) not in (1, -3):
        return "axis: the parts are not joined along the channels"
    parts: list[_Part] = []
    for value in m.rest("part"):
        part = _view(value)
        if isinstance(part, str):
            return part
        if parts and (part.source is not parts[0].source or part.step != parts[0].step):
            return "slice-form: the parts are not views of one value with one step"
        parts.append(part)
    return parts


def _blocks(m: Match) -> list[_Part] | str:
    """Return the views that a SpaceToDepth joins: row by row of each block, all channels of a pixel together."""
    node = m.node("blocks")
    size = attr_int(node, "blocksize", 0)
    if shape_of(m.x) is None or size < 1:
        return "rank: the value is not known to have 4 axes"
    return [_Part(m.x, row, column, size) for row in range(size) for column in range(size)]


def _read_by_conv(m: Match) -> list[_Part] | str:
    return _blocks(m) if m.find("blocks") is not None else _parts(m)


def _is_focus(m: Match) -> str | None:
    parts = _read_by_conv(m)
    if isinstance(parts, str):
        return parts
    shape = shape_of(parts[0].source)
    weight = const_array(m.w)
    if shape is None or not isinstance(shape[1], int) or weight is None or weight.ndim != 4:
        return "shape: the number of channels is not known"
    if len({(p.row, p.column) for p in parts}) != parts[0].step ** 2:
        return "incomplete: pixels are left out, for which the larger kernel would multiply by zero"
    if weight.shape[1] != shape[1] * len(parts) or attr_int(m.root, "group", 1) != 1:
        return "group: the convolution does not read all channels at once"
    if any(d != 1 for d in attr_ints(m.root, "dilations") or ()):
        return "dilation: the convolution is dilated"
    if attr_str(m.root, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "auto-pad: the padding is not explicit"
    return None


def _fold(b: Builder, m: Match) -> ir.Value:
    parts = _read_by_conv(m)
    assert not isinstance(parts, str)
    source, step = parts[0].source, parts[0].step
    weight = m.array("w")
    channels = weight.shape[1] // len(parts)
    wide = np.zeros((weight.shape[0], channels, weight.shape[2] * step, weight.shape[3] * step), weight.dtype)
    for index, part in enumerate(parts):
        taps = weight[:, index * channels : (index + 1) * channels]
        # A pixel may stand in several parts: their weights add up.
        wide[:, :, part.row :: step, part.column :: step] += taps
    inputs = [source, b.constant(wide, f"{m.w.name}:blocks")]
    if (bias := m.get("b")) is not None:
        inputs.append(bias)
    strides = attr_ints(m.root, "strides") or (1, 1)
    explicit = attr_str(m.root, "auto_pad", "NOTSET") == "NOTSET"
    pads = (attr_ints(m.root, "pads") if explicit else None) or (0, 0, 0, 0)
    return b.clone(
        m.root,
        *inputs,
        drop=("auto_pad",),
        kernel_shape=tuple(wide.shape[2:]),
        strides=tuple(s * step for s in strides),
        pads=tuple(p * step for p in pads),
    )


FOCUS: Rule = rule(
    "focus-conv",
    match=op(
        "Conv", op("Concat", rest("part", op("Slice", rest("slice"))), name="concat"), const("w"), maybe(const("b"))
    ),
    where=[Clause("is_focus", _is_focus)],
    build=_fold,
    doc="Fold strided slices and their Concat into the convolution behind them (the Focus stem of YOLO models).",
)

SPACE_TO_DEPTH: Rule = rule(
    "space-to-depth-conv",
    match=op("Conv", op("SpaceToDepth", var("x"), name="blocks"), const("w"), maybe(const("b"))),
    where=[Clause("is_focus", _is_focus)],
    build=_fold,
    doc="Fold a SpaceToDepth into the convolution behind it.",
)

FOCUS_RULES: tuple[Rule, ...] = (FOCUS, SPACE_TO_DEPTH)

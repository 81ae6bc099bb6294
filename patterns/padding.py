"""Explicit padding taken into the operator behind it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, attr_ints, attr_str, const_array, is_op, rank_of
from qcompiler.patterns.activations import clip_bounds
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import is_constant, where
from qcompiler.patterns.language import Rule, maybe, op, rest, rule, var
from qcompiler.patterns.match import Match

_PAD = op("Pad", var("x"), var("pads"), maybe(var("value")), maybe(var("axes")), name="pad")


def pad_widths(node: ir.Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return (begin, end) per axis of a Pad with constant widths and known rank, or None."""
    pads = const_array(node.inputs[1])
    count = rank_of(node.inputs[0]) or rank_of(node.outputs[0])
    if pads is None:
        return None
    half = pads.size // 2
    axes = list(range(half))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = const_array(node.inputs[3])
        if given is None or count is None:
            return None
        axes = [int(a) % count for a in given.reshape(-1)]
    count = half if count is None else count
    begin, end = [0] * count, [0] * count
    for index, axis in enumerate(axes):
        begin[axis], end[axis] = int(pads.flat[index]), int(pads.flat[half + index])
    return tuple(begin), tuple(end)


def _pad_value(node: ir.Node) -> float | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return 0.0
    array = const_array(value)
    return None if array is None or array.size != 1 else float(array.astype(np.float64).reshape(()))


def _spatial_problem(m: Match) -> str | None:
    pad = m.node("pad")
    if attr_str(pad, "mode", "constant") != "constant":
        return f"pad-mode: the mode is {attr_str(pad, 'mode', 'constant')}"
    widths = pad_widths(pad)
    if widths is None:
        return "unknown-rank: the padded axes are not known"
    begin, end = widths
    if any(begin[:2]) or any(end[:2]):
        return "pad-axes: batch or channels are padded"
    if any(width < 0 for width in (*begin, *end)):
        return "pad-crops: a negative width removes elements"
    if attr_str(m.root, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "auto-pad: the operator chooses its own padding"
    return None


def _is_zero(m: Match) -> str | None:
    value = _pad_value(m.node("pad"))
    if value is None:
        return "not-constant: the padding value is computed at run time"
    return None if value == 0.0 else f"pad-value: {value} is not zero"


def _joined(m: Match) -> tuple[int, ...]:
    widths = pad_widths(m.node("pad"))
    assert widths is not None
    begin, end = widths[0][2:], widths[1][2:]
    own = attr_ints(m.root, "pads") or (0,) * (2 * len(begin))
    return tuple(a + b for a, b in zip(own, (*begin, *end), strict=True))


def _too_wide(m: Match) -> str | None:
    """Engines refuse a pooling window that can lie in the padding altogether."""
    kernel = attr_ints(m.root, "kernel_shape") or ()
    if any(d != 1 for d in attr_ints(m.root, "dilations") or ()):
        return "dilations: the window has gaps"
    wide = any(width >= size for width, size in zip(_joined(m), (*kernel, *kernel), strict=True))
    return "pad-width: the padding is as wide as the window" if wide else None


def _average_problem(m: Match) -> str | None:
    if attr_int(m.root, "ceil_mode", 0) == 1:
        return "ceil-mode: the last window counts elements beyond the padding"
    if any(attr_ints(m.root, "pads") or ()) and attr_int(m.root, "count_include_pad", 0) == 0:
        return "count: the operator's own padding is not counted, the explicit one is"
    return _too_wide(m)


def _is_nonnegative(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return False
    if is_op(node, "Relu", "Clip"):
        bounds = clip_bounds(node)
        return bounds is not None and bounds[0] >= 0.0
    return is_op(node, "Sigmoid", "Softmax", "HardSigmoid", "Abs", "Exp", "Softplus")


def _max_problem(m: Match) -> str | None:
    if len(m.root.outputs) > 1 and (m.root.outputs[1].uses() or m.root.outputs[1].is_graph_output()):
        return "indices-used: the indices of the MaxPool are read"
    if attr_int(m.root, "ceil_mode", 0) == 1:
        return "ceil-mode: the last window may lie in the padding"
    value = _pad_value(m.node("pad"))
    if value is None:
        return "not-constant: the padding value is computed at run time"
    if value > -np.finfo(np.float32).max and not (value == 0.0 and _is_nonnegative(m.x)):
        return f"pad-value: {value} can be the largest of a window"
    if value == 0.0 and any(attr_ints(m.root, "pads") or ()):
        return "pad-value: windows of the operator's own padding would lose the zeros"
    return _too_wide(m)


def _into_conv(b: Builder, m: Match) -> ir.Value:
    inputs = [m.x, *m.root.inputs[1:]]
    return b.clone(m.root, *inputs, drop=("auto_pad",), pads=_joined(m))


def _into_average(b: Builder, m: Match) -> ir.Value:
    return b.clone(m.root, m.x, drop=("auto_pad",), pads=_joined(m), count_include_pad=1)


PADDING: tuple[Rule, ...] = (
    rule(
        "pad-into-conv",
        match=op("Conv", _PAD, rest("w")),
        where=[is_constant("pads"), where("spatial padding", _spatial_problem), where("by zero", _is_zero)],
        build=_into_conv,
        keeps=("pad",),
        doc="Let the convolution pad with zeros itself.",
    ),
    rule(
        "pad-into-average-pool",
        match=op("AveragePool", _PAD),
        where=[
            is_constant("pads"), where("spatial padding", _spatial_problem), where("by zero", _is_zero),
            where("counts the same elements", _average_problem),
        ],
        build=_into_average,
        keeps=("pad",),
        doc="Let the average pooling pad with zeros itself.",
    ),
    rule(
        "pad-into-max-pool",
        match=op("MaxPool", _PAD),
        where=[
            is_constant("pads"), where("spatial padding", _spatial_problem),
            where("padding is never the largest", _max_problem),
        ],
        build=_into_conv,
        keeps=("pad",),
        doc="Let the max pooling pad itself where the padding cannot win.",
    ),
)  # fmt: skip
"""Rules of ``fuse-pad``."""

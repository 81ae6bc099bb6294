"""Rules on QuantizeLinear and DequantizeLinear alone: pairs that cancel, factors that belong into a scale."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import attr_int, attr_str, const_array, consumers, is_const, is_op, scalar
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import where
from qcompiler.patterns.language import Op, Rule, const, maybe, op, rest, rule, var
from qcompiler.patterns.match import Match
from qcompiler.quant.formats import format_of

MOVERS = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand", "Tile", "DepthToSpace",
    "MaxPool", "Resize",
)  # fmt: skip
"""Operators whose output elements are input elements (MaxPool and nearest Resize select)."""
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
_LIMITS = np.finfo(np.float32)


def _dq() -> Op:
    return op("DequantizeLinear", var("x"), const("xs"), maybe(const("xz")), name="dq")


def same_params(first: ir.Node, second: ir.Node) -> bool:
    """Return whether two QuantizeLinear or DequantizeLinear nodes have equal constant scales and zero points."""
    return _numbers(first) is not None and _numbers(first) == _numbers(second)


_Numbers = tuple[ir.DataType, str, tuple[float, ...], tuple[int, ...], int | None]
"""Storage type, type of the scale, scales, zero points, axis."""


def _numbers(node: ir.Node) -> _Numbers | None:
    scale = const_array(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero = const_array(given)
    if scale is None or (given is not None and zero is None) or attr_int(node, "block_size", 0):
        return None
    stored = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    kind = given.dtype if given is not None else stored.dtype if stored is not None else None
    # Without a zero point the stored type is the output's, uint8 by the specification.
    kind = ir.DataType.UINT8 if kind is None else kind
    integers = (0,) * scale.size if zero is None else tuple(zero.astype(np.int64).reshape(-1).tolist())
    axis = attr_int(node, "axis", 1) if scale.size > 1 else None
    return kind, scale.dtype.name, tuple(scale.reshape(-1).tolist()), integers, axis


def selects_only(node: ir.Node) -> str | None:
    """Return None if the operator only moves or selects elements, else a reason."""
    indices = node.outputs[1] if node.op_type == "MaxPool" and len(node.outputs) > 1 else None
    if indices is not None and (indices.uses() or indices.is_graph_output()):
        return "indices-used: the indices of MaxPool are read"
    if node.op_type == "Resize":
        mode = attr_str(node, "mode", "nearest")
        if mode != "nearest":
            return f"resize-mode: {mode} interpolation computes"
        if attr_str(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
            return "resize-mode: tf_crop_and_resize may write an extrapolation value"
    return None


# ---- pairs that cancel ------------------------------------------------------------------------------------------


def _pair_cancels(m: Match) -> str | None:
    if m.x.dtype is not None and m.root.outputs[0].dtype is not None and m.x.dtype != m.root.outputs[0].dtype:
        return f"type: {m.x.name} is {m.x.dtype}, the quantized result {m.root.outputs[0].dtype}"
    if not same_params(m.node("dq"), m.root):
        return "parameters-differ: the pair has different parameters"
    return None


def _keeps_output_name(m: Match) -> str | None:
    out = m.root.outputs[0]
    if out.is_graph_output() and (m.x.is_graph_input() or m.x.is_graph_output() or m.x.graph is not m.root.graph):
        return f"graph-output: {out.name} is a graph output and {m.x.name} cannot take its name"
    return None


def _same_grid(m: Match) -> str | None:
    """Require that both pairs store the same real numbers: int8 with zero point z is uint8 with z + 128."""
    inner, outer = _numbers(m.node("dq")), _numbers(m.node("q"))
    if inner is None or outer is None or outer != _numbers(m.root):
        return "parameters-differ: the outer pair has different parameters"
    grids = []
    for kind, precision, scale, zero, axis in (inner, outer):
        storage = format_of(kind)
        if storage is None:
            return "parameters-differ: the integers are of unknown type"
        grids.append((storage.bits, precision, scale, tuple(z - storage.qmin for z in zero), axis))
    return None if grids[0] == grids[1] else "parameters-differ: the pairs have different scales or ranges"


def _leaves_the_graph(m: Match) -> str | None:
    """Require that nothing computes with the result: an integer kernel may want the second pair's storage type."""
    value = m.root.outputs[0]
    return None if value.is_graph_output() and not value.uses() else "read-inside: the second type may be wanted"


def _dequantize_once(b: Builder, m: Match) -> ir.Value:
    node = m.node("dq")
    return b.clone(node, *node.inputs, like=m.root.outputs[0])


# ---- factors ----------------------------------------------------------------------------------------------------


def _factor(m: Match) -> float | None:
    """Return what the matched Mul or Div multiplies by."""
    number = scalar(m.c)
    if number is None or not number > 0 or not np.isfinite(number):
        return None
    return number if m.node("factor").op_type == "Mul" else 1.0 / number


def _positive_scalar(m: Match) -> str | None:
    if m.c.dtype != ir.DataType.FLOAT:
        return f"not-float32: the factor is {m.c.dtype}"
    array = const_array(m.c)
    if array is None or array.size != 1:
        return "not-scalar: the factor has more than one element"
    if _factor(m) is None:
        return "not-positive: a scale cannot take a factor that is not a positive finite number"
    data = m.get("data") or m.x
    if array.ndim and (data.shape is None or len(data.shape) < array.ndim):
        return "rank: the factor may add axes"
    scale = m.get("xs") or m.ys
    return None if scale.dtype == ir.DataType.FLOAT else f"not-float32: the scale is {scale.dtype}"


def _scaled(scale: Array, factor: float) -> Array:
    return np.asarray(scale.astype(np.float64) * factor, np.float32)


def _in_range(scale: Array) -> str | None:
    fits = np.isfinite(scale).all() and (scale >= _LIMITS.tiny).all()
    return None if fits else "range: the new scale is not a normal float32 number"


def _factor_fits_behind(m: Match) -> str | None:
    factor = _factor(m)
    return None if factor is None else _in_range(_scaled(m.array("xs"), factor))


def _factor_fits_before(m: Match) -> str | None:
    factor = _factor(m)
    return None if factor is None else _in_range(_scaled(m.array("ys"), 1.0 / factor))


def _no_integer_bias(m: Match) -> str | None:
    """Refuse where the new scale would enter x_scale * w_scale of an int32 bias: that product must stay as it is."""
    for node in consumers(m.root.outputs[0]):
        bias = node.inputs[2] if is_op(node, *_WEIGHTED) and len(node.inputs) > 2 else None
        producer = bias.producer() if bias is not None else None
        if is_op(producer, "DequantizeLinear"):
            return f"int32-bias: the bias of {node.name} is in units of the present scale"
    return None


def _into_dequantize(b: Builder, m: Match) -> ir.Value:
    factor = _factor(m)
    assert factor is not None
    node = m.node("dq")
    scale = b.constant(_scaled(m.array("xs"), factor), f"{m.xs.name}:scaled")
    return b.clone(node, m.x, scale, *((m.xz,) if m.get("xz") is not None else ()), like=m.root.outputs[0])


def _into_quantize(b: Builder, m: Match) -> ir.Value:
    factor = _factor(m)
    assert factor is not None
    scale = b.constant(_scaled(m.array("ys"), 1.0 / factor), f"{m.ys.name}:scaled")
    return b.clone(m.root, m.data, scale, *((m.yz,) if m.get("yz") is not None else ()))


# ---- movers -----------------------------------------------------------------------------------------------------


def _leads_to_same(value: ir.Value, dq: ir.Node, depth: int = 8) -> bool:
    """Return whether a reader, or one behind further movers, quantizes to the parameters of ``dq``."""
    for node in consumers(value):
        if is_op(node, "QuantizeLinear") and same_params(node, dq):
            return True
        moves = depth > 0 and is_op(node, *MOVERS) and node.inputs[0] is value and selects_only(node) is None
        if moves and _leads_to_same(node.outputs[0], dq, depth - 1):
            return True
    return False


def _makes_pair(m: Match) -> str | None:
    out = m.root.outputs[0]
    readers = consumers(out)
    if not _leads_to_same(out, m.node("dq")):
        return "no-pair: nothing behind it quantizes to the same parameters"
    alone = len(out.uses()) == 1 and not out.is_graph_output()
    if alone and is_op(readers[0], "QuantizeLinear"):
        return "fused-later: dequantize, move, quantize is one fused group already"
    return None


def _per_tensor(m: Match) -> str | None:
    array = const_array(m.xs)
    return None if array is not None and array.size == 1 else "per-channel: the axis of the scales would move"


def _computed(m: Match) -> str | None:
    return "constant: folding takes care of it" if is_const(m.x) else None


def _move_integers(b: Builder, m: Match) -> ir.Value:
    node, out = m.root, m.root.outputs[0]
    moved = b.clone(node, m.x, *node.inputs[1:], like=out)
    # A type of its own: ``like`` shares the object, and the output stays float.
    moved.type = None if m.x.dtype is None else ir.TensorType(m.x.dtype)
    return b.clone(m.node("dq"), moved, *m.node("dq").inputs[1:], like=out)


SCALES: tuple[Rule, ...] = (
    rule(
        "cancel-dq-q",
        match=op("QuantizeLinear", _dq(), const("ys"), maybe(const("yz"))),
        where=[where("same parameters", _pair_cancels), where("the output's name can be kept", _keeps_output_name)],
        build=lambda _, m: m.x,
        keeps=("dq",),
        doc="Drop a DequantizeLinear that is quantized again with the same parameters: the integers are the same.",
    ),
    rule(
        "quantize-once",
        match=op(
            "DequantizeLinear",
            op("QuantizeLinear", _dq(), const("ys"), maybe(const("yz")), name="q"),
            const("zs"),
            maybe(const("zz")),
        ),
        where=[where("same grid", _same_grid), where("result leaves the graph", _leaves_the_graph)],
        build=_dequantize_once,
        keeps=("dq", "q"),
        doc="Drop a second Q/DQ pair at an output that stores the same numbers as the first (int8 behind uint8).",
    ),
    rule(
        "scale-behind-dq",
        match=op(("Mul", "Div"), _dq(), const("c"), name="factor"),
        where=[
            where("factor is one positive number", _positive_scalar),
            where("new scale is normal", _factor_fits_behind),
            where("no int32 bias depends on it", _no_integer_bias),
        ],
        build=_into_dequantize,
        doc="Fold a positive factor behind a DequantizeLinear into its scale.",
    ),
    rule(
        "scale-before-q",
        match=op(
            "QuantizeLinear",
            op(("Mul", "Div"), var("data"), const("c"), name="factor"),
            const("ys"),
            maybe(const("yz")),
        ),
        where=[
            where("factor is one positive number", _positive_scalar),
            where("new scale is normal", _factor_fits_before),
        ],
        build=_into_quantize,
        doc="Fold a positive factor in front of a QuantizeLinear into its scale.",
    ),
    rule(
        "dq-behind-mover",
        match=op(MOVERS, _dq(), rest("other")),
        where=[
            where("not constant", _computed, structural=True),
            where("one scale", _per_tensor),
            where("selects only", lambda m: selects_only(m.root)),
            where("a pair cancels", _makes_pair),
        ],
        build=_move_integers,
        keeps=("dq",),
        doc="Move integers instead of their float values where a quantization to the same parameters follows.",
    ),
)
"""Cancel, fold, move; each leaves the int32 biases of weighted operators in their units."""

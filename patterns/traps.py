"""Rules that steer around slow engine fusions and kernels; each is switched on by a measured decision."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import consumers, is_const, is_op, shape_of, single_consumer
from qcompiler.patterns.attention import ATTENTIONS
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import opset_at_least
from qcompiler.patterns.language import Clause, Rule, const, op, rest, rule, var
from qcompiler.patterns.masks import FLOOR, MASKS, float32, has_floor, last_axis
from qcompiler.patterns.match import Match
from qcompiler.patterns.projections import SPLIT_PROJECTION
from qcompiler.patterns.rotary import ROTARIES


def _no_floor_yet(m: Match) -> str | None:
    maker = m.x.producer()
    floored = is_op(maker, "Max") or (is_op(maker, "Add") and any(has_floor(v) for v in _masks(maker)))
    return "has-floor: the scores already have a floor" if floored else None


def _masks(total: ir.Node) -> list[ir.Value]:
    """Return the operands of an addition that `mask-floor` may have given a floor."""
    return [v for v in total.inputs if v is not None and (is_const(v) or is_op(v.producer(), "Max"))]


def _floored_softmax(b: Builder, m: Match) -> ir.Value:
    axes = b.constant(np.asarray([-1], np.int64), f"{m.root.name}:axes")
    top = b.op("ReduceMax", m.x, axes, keepdims=1)
    depth = b.constant(np.asarray(FLOOR, np.float32), f"{m.root.name}:depth")
    floor = b.op("Sub", top, depth)
    scores = b.op("Max", m.x, floor, like=m.x)
    name = str(m.root.name)
    m.root.name = b.rewriter.unique(f"{name}:was")
    made = b.node("Softmax", scores, like=m.root.outputs[0], axis=-1, name=f"{name}:new")
    made.name = name
    return made.outputs[0]


SOFTMAX_UNDERFLOW = rule(
    "softmax-floor",
    match=op("Softmax", var("x")),
    where=[
        opset_at_least(18),  # axes as an input of ReduceMax; a Softmax of an older opset flattens, too
        Clause("float32", float32),
        Clause("last_axis", last_axis),
        Clause("no_floor_yet", _no_floor_yet),
    ],
    build=_floored_softmax,
    doc="Keep masked scores at most 64 below the row's largest: the same probabilities, without subnormal arithmetic.",
)


def _feeds_layer_norm(m: Match) -> str | None:
    if any(is_op(n, "LayerNormalization") for n in consumers(m.root.outputs[0])):
        return None
    return "no-layer-norm: nothing behind it normalizes"


def _same_shapes(m: Match) -> str | None:
    a, b = shape_of(m.a), shape_of(m.b)
    if is_const(m.a) or is_const(m.b) or a is None or b is None or len(a) != len(b):
        return "shapes: the sum is not of two activations of the same rank"
    return None


def _as_sum(b: Builder, m: Match) -> ir.Value:
    name = str(m.root.name)
    m.root.name = b.rewriter.unique(f"{name}:was")
    made = b.node("Sum", m.a, m.b, like=m.root.outputs[0], name=f"{name}:new")
    made.name = name
    return made.outputs[0]


SKIP_LAYER_NORM = rule(
    "add-as-sum",
    match=op("Add", var("a"), var("b")),
    where=[Clause("feeds_layer_norm", _feeds_layer_norm), Clause("same_shapes", _same_shapes)],
    build=_as_sum,
    doc="Write the addition in front of a LayerNormalization as Sum, which the engine does not fuse.",
)


def _from_dequantize(m: Match) -> str | None:
    return None if is_op(m.x.producer(), "DequantizeLinear") else "not-dequantized: the engine fuses this one itself"


QUICK_GELU = rule(
    "silu-quick-gelu",
    match=op("Mul", var("x"), op("Sigmoid", var("x"))),
    where=[Clause("from_dequantize", _from_dequantize)],
    build=lambda b, m: b.op("QuickGelu", m.x, domain="com.microsoft", like=m.root.outputs[0], alpha=1.0),
    doc="Emit SiLU behind a DequantizeLinear as QuickGelu: otherwise Mul and Sigmoid get copies of their own.",
)

_MOVES = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
"""Operators through which the engine moves a DequantizeLinear forward and a QuantizeLinear backward."""
_ABSORBED = (*_MOVES, "Relu", "Clip", "Mul", "Identity")
"""Operators that the engine looks through, or folds away, between a weighted operator and a QuantizeLinear."""


def _behind_dequantize(m: Match) -> str | None:
    node = m.x.producer()
    while node is not None and is_op(node, *_MOVES) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return None if is_op(node, "DequantizeLinear") else "not-dequantized: the engine leaves its weight alone"


def _before_quantize(m: Match) -> str | None:
    node = single_consumer(m.root.outputs[0])
    while node is not None and is_op(node, *_ABSORBED):
        node = single_consumer(node.outputs[0])
    return None if is_op(node, "QuantizeLinear") else "not-quantized: the engine leaves its weight alone"


def _behind_sum(b: Builder, m: Match) -> ir.Value:
    b.set_input(m.root, 0, b.op("Sum", m.x, like=m.x))
    return m.root.outputs[0]


FLOAT_WEIGHT = rule(
    "keep-weight-float",
    match=op(("Conv", "ConvTranspose", "Gemm"), var("x"), const("w"), rest("more")),
    where=[
        Clause("behind_dequantize", _behind_dequantize, structural=True),
        Clause("before_quantize", _before_quantize, structural=True),
    ],
    build=_behind_sum,
    doc="Hide the DequantizeLinear in front of a float operator behind a Sum of one: the engine quantizes the weight "
    "of any Conv, ConvTranspose or Gemm between DequantizeLinear and QuantizeLinear by itself, with one scale for all "
    "channels, and then often fuses nothing.",
)
"""Seen on ONNX Runtime 1.31 (WeightBiasQuantization); the Sum costs about 1 % of the operator."""

TRAP_RULES: dict[str, tuple[Rule, ...]] = {
    "merged-projection": (SPLIT_PROJECTION,),
    "attention": ATTENTIONS,
    "rotary-embedding": ROTARIES,
    "masked-softmax": MASKS,
    "softmax-underflow": (SOFTMAX_UNDERFLOW,),
    "skip-layer-norm": (SKIP_LAYER_NORM,),
}
"""Rules by the name of the trap in a target's table."""

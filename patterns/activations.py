"""Canonical spellings of activations: Relu, Clip, Sigmoid, SiLU, Gelu."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import is_const, is_op, scalar
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import (
    float_typed,
    is_constant,
    opset_at_least,
    per_tensor,
    same_rank,
    same_type,
    where,
)
from qcompiler.patterns.language import Pattern, Rule, any_of, const, maybe, number, op, rule, var
from qcompiler.patterns.match import Match

_X = var("x")
SILU = op("Mul", _X, op("Sigmoid", _X, name="sigmoid"))
"""SiLU (swish) in its canonical spelling: ``x * Sigmoid(x)``."""


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return the bounds of a Relu or Clip (infinite where absent), or None if one is computed at run time."""
    if is_op(node, "Relu"):
        return 0.0, math.inf
    found = [-math.inf, math.inf]
    for index in (1, 2):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            continue
        bound = scalar(value) if is_const(value) else None
        if bound is None or math.isnan(bound):
            return None
        limit = float(np.finfo(np.float32).max) if value.dtype == ir.DataType.FLOAT else math.inf
        found[index - 1] = math.copysign(math.inf, bound) if abs(bound) >= limit else bound
    return found[0], found[1]


def _bounded(b: Builder, m: Match, low: float, high: float) -> ir.Value:
    """Return ``x`` clipped, in its shortest spelling."""
    if low == 0.0 and high == math.inf:
        return b.op("Relu", m.x, like=m.root.outputs[0])
    if low == -math.inf and high == math.inf:
        return b.op("Identity", m.x, like=m.root.outputs[0])
    bounds = [
        None if math.isinf(value) else b.scalar_like(value, m.x, f"{m.root.name}:{which}")
        for value, which in ((low, "min"), (high, "max"))
    ]
    while bounds[-1] is None:
        bounds.pop()
    return b.op("Clip", m.x, *bounds, like=m.root.outputs[0])


def _is_long(m: Match) -> str | None:
    bounds = clip_bounds(m.root)
    if bounds is None:
        return "not-constant: the bounds are computed at run time"
    inputs = [v for v in m.root.inputs[1:] if v is not None]
    short = bounds != (0.0, math.inf) and len(inputs) == sum(math.isfinite(bound) for bound in bounds)
    return "canonical: the Clip has no shorter spelling" if short and inputs else None


def _shorten(b: Builder, m: Match) -> ir.Value:
    bounds = clip_bounds(m.root)
    assert bounds is not None
    return _bounded(b, m, *bounds)


def _joint(m: Match) -> tuple[float, float] | str:
    inner, outer = clip_bounds(m.node("inner")), clip_bounds(m.root)
    if inner is None or outer is None:
        return "not-constant: the bounds are computed at run time"
    low, high = max(inner[0], outer[0]), min(inner[1], outer[1])
    return (low, high) if low <= high else "disjoint: the ranges do not meet"


def _ranges_meet(m: Match) -> str | None:
    found = _joint(m)
    return found if isinstance(found, str) else None


def _join(b: Builder, m: Match) -> ir.Value:
    found = _joint(m)
    assert not isinstance(found, str)
    return _bounded(b, m, *found)


def _ordered_scalars(m: Match) -> str | None:
    low, high = scalar(m.low), scalar(m.high)
    if low is None or high is None:
        return "not-per-tensor: a bound has several elements"
    return None if low <= high else "disjoint: the lower bound is above the upper one"


def _min_max(b: Builder, m: Match) -> ir.Value:
    low, high = scalar(m.low), scalar(m.high)
    assert low is not None
    assert high is not None
    return _bounded(b, m, low, high)


_UNARY = tuple(maybe(var(name)) for name in ("min", "max"))
_INNER = any_of(op("Relu", _X, name="inner"), op("Clip", _X, maybe(var("min1")), maybe(var("max1")), name="inner"))

ACTIVATIONS: tuple[Rule, ...] = (
    rule(
        "max-zero",
        match=op("Max", _X, number(0.0, 0.0), name="y"),
        where=[float_typed("x"), same_type("x", "y"), same_rank("x", "y")],
        build=lambda b, m: b.op("Relu", m.x, like=m.root.outputs[0]),
        doc="Spell the larger of x and zero as Relu.",
    ),
    rule(
        "clip-short-form",
        match=op("Clip", _X, *_UNARY),
        where=[float_typed("x"), is_constant("min", "max"), where("has a shorter spelling", _is_long, structural=True)],
        build=_shorten,
        doc="Spell a Clip from zero as Relu and leave out infinite bounds.",
    ),
    rule(
        "clip-of-clip",
        match=any_of(op("Relu", _INNER), op("Clip", _INNER, *_UNARY)),
        where=[float_typed("x"), where("ranges meet", _ranges_meet)],
        build=_join,
        doc="Clip once, to the range that both leave.",
    ),
    rule(
        "min-of-max",
        match=any_of(
            op("Min", op("Max", _X, const("low"), name="inner"), const("high"), name="y"),
            op("Max", op("Min", _X, const("high"), name="inner"), const("low"), name="y"),
        ),
        where=[
            float_typed("x"), per_tensor("low"), per_tensor("high"), where("low <= high", _ordered_scalars),
            same_rank("x", "y"),
        ],
        build=_min_max,
        doc="Spell Min and Max with constants as Clip.",
    ),
)  # fmt: skip
"""Rules of ``normalize-activations``."""


def _reversed_silu(m: Match) -> str | None:
    return None if m.root.inputs[0] is m.sigmoid else "canonical: the sigmoid is the second factor"


def _swap(b: Builder, m: Match) -> ir.Value:
    first, second = m.root.inputs[0], m.root.inputs[1]
    b.set_input(m.root, 0, second)
    b.set_input(m.root, 1, first)
    return m.root.outputs[0]


_ONE_PLUS_EXP = op("Add", op("Exp", op("Neg", _X)), number(1.0))

SILU_RULES: tuple[Rule, ...] = (
    rule(
        "sigmoid-by-exp",
        match=any_of(op("Div", number(1.0), _ONE_PLUS_EXP, name="y"), op("Reciprocal", _ONE_PLUS_EXP, name="y")),
        where=[float_typed("x"), same_rank("x", "y")],
        build=lambda b, m: b.op("Sigmoid", m.x, like=m.root.outputs[0]),
        doc="Spell 1 / (1 + exp(-x)) as Sigmoid.",
    ),
    rule(
        "silu-by-exp",
        match=op("Div", _X, _ONE_PLUS_EXP, name="y"),
        where=[float_typed("x"), same_rank("x", "y")],
        build=lambda b, m: b.op("Mul", m.x, b.op("Sigmoid", m.x, like=m.x), like=m.root.outputs[0]),
        doc="Spell x / (1 + exp(-x)) as x * Sigmoid(x).",
    ),
    rule(
        "silu-order",
        match=SILU,
        where=[where("sigmoid comes first", _reversed_silu, structural=True)],
        build=_swap,
        keeps=("sigmoid",),
        doc="Write the sigmoid as the second factor.",
    ),
)
"""Rules of ``recognize-silu``."""


def _product(first: Pattern, second: Pattern, halved: bool) -> tuple[Pattern, ...]:
    """Return the ways to multiply two factors (and one half, if ``halved``)."""
    if not halved:
        return (op("Mul", first, second),)

    def half(p: Pattern) -> Pattern:
        return any_of(op("Mul", p, number(0.5)), op("Div", p, number(2.0)))

    return half(op("Mul", first, second)), op("Mul", half(first), second), op("Mul", first, half(second))


_ERF = op("Erf", any_of(op("Div", _X, number(math.sqrt(2.0), 1e-5)), op("Mul", _X, number(math.sqrt(0.5), 1e-5))))
_GELU_ERF = any_of(*_product(_X, op("Add", _ERF, number(1.0)), halved=True))
_SQUARE = any_of(op("Mul", _X, _X), op("Pow", _X, number(2.0)))
_CUBE = any_of(op("Pow", _X, number(3.0)), op("Mul", _X, _SQUARE))
_INNER_SUM = any_of(
    op("Add", _X, op("Mul", _CUBE, number(0.044715, 1e-4))),
    op("Add", _X, op("Mul", _X, op("Mul", _SQUARE, number(0.044715, 1e-4)))),
    op("Add", _X, op("Mul", op("Mul", _X, number(0.044715, 1e-4)), _SQUARE)),
    op("Add", _X, op("Mul", _X, op("Mul", _X, op("Mul", _X, number(0.044715, 1e-4))))),
    op("Mul", _X, op("Add", op("Mul", _SQUARE, number(0.044715, 1e-4)), number(1.0))),
    op("Mul", _X, op("Add", op("Mul", _X, op("Mul", _X, number(0.044715, 1e-4))), number(1.0))),
)
_FACTOR = number(math.sqrt(2.0 / math.pi), 1e-4)
_TANH = op(
    "Tanh",
    any_of(
        op("Mul", _INNER_SUM, _FACTOR),
        op("Mul", op("Mul", _X, _FACTOR), op("Add", op("Mul", _SQUARE, number(0.044715, 1e-4)), number(1.0))),
    ),
)
_GELU_TANH = any_of(*_product(_X, op("Add", _TANH, number(1.0)), halved=True))

GELU: tuple[Rule, ...] = (
    rule(
        "gelu-by-erf",
        match=_GELU_ERF,
        where=[float_typed("x"), opset_at_least(20)],
        build=lambda b, m: b.op("Gelu", m.x, like=m.root.outputs[0]),
        doc="Recognise 0.5 x (1 + erf(x / sqrt 2)), the exact Gelu.",
    ),
    rule(
        "gelu-by-tanh",
        match=_GELU_TANH,
        where=[float_typed("x"), opset_at_least(20)],
        build=lambda b, m: b.op("Gelu", m.x, like=m.root.outputs[0], approximate="tanh"),
        doc="Recognise the tanh approximation of Gelu (Hendrycks and Gimpel, 2016).",
    ),
)
"""Rules of ``recognize-gelu``."""

"""Which function of one value stands behind a quantized activation, so that errors may be counted behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from qcompiler.ir.graph import attr_float, consumers, is_op, scalar

_SAME = 1e-3
"""Relative difference up to which a constant of a known formula is that constant (float16 rounds to 5e-4)."""
_SIMPLE = {
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Gelu": "gelu",
    "HardSwish": "hard-swish",
    "Softmax": "softmax",
}


def function_behind(value: ir.Value) -> str:
    """Return the name of the function that alone reads a value (as range estimators know it), or an empty text.

    Known are single operators (Relu, Clip, Sigmoid, HardSigmoid with its slope of 1/6, HardSwish, Tanh, Gelu, Softmax,
    Swish) and what is written out: x * Sigmoid(x), x * HardSigmoid(x), and Gelu with Erf. A graph output is read
    outside, so nothing is known of it.
    """
    readers = consumers(value)
    if not readers or value.is_graph_output():
        return ""
    names = {_operator(node) for node in readers}
    if len(names) == 1 and "" not in names:
        return names.pop()
    gates = [n for n in readers if _operator(n) in ("sigmoid", "hard-sigmoid")]
    rest = [n for n in readers if n not in gates]
    kinds = {_operator(n) for n in gates}
    if len(kinds) == 1 and all(is_op(n, "Mul") and _reads(n, gates) for n in rest):
        return "silu" if kinds == {"sigmoid"} else "hard-swish"
    return "gelu" if _erf_gelu(readers) else ""


def activation_bounds(node: ir.Node) -> tuple[float, float]:
    """Return the interval that a Relu or Clip lets through."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    low = scalar(node.inputs[1]) if len(node.inputs) > 1 else None
    high = scalar(node.inputs[2]) if len(node.inputs) > 2 else None
    return (float("-inf") if low is None else low), (float("inf") if high is None else high)


def _operator(node: ir.Node) -> str:
    """Return the function that a single operator is of its first input, or an empty text."""
    if is_op(node, *_SIMPLE):
        return _SIMPLE[node.op_type]
    if is_op(node, "Clip"):
        bounds = [v for v in node.inputs[1:] if v is not None]
        if any(scalar(v) is None for v in bounds):
            return ""
        low, high = activation_bounds(node)
        return f"clip({low!r},{high!r})"
    if is_op(node, "HardSigmoid"):
        slope, middle = attr_float(node, "alpha", 0.2), attr_float(node, "beta", 0.5)
        return "hard-sigmoid" if _close(slope, 1 / 6) and _close(middle, 0.5) else ""
    if is_op(node, "Swish") and attr_float(node, "alpha", 1.0) == 1.0:
        return "silu"
    return ""


def _close(number: float | None, wanted: float) -> bool:
    return number is not None and abs(number - wanted) <= _SAME * wanted


def _reads(node: ir.Node, producers: Sequence[ir.Node]) -> bool:
    return any(v is not None and v.producer() in producers for v in node.inputs)


def _erf_gelu(readers: Iterable[ir.Node]) -> bool:
    """Return whether the readers compute x/2 * (1 + Erf(x / sqrt(2))), in any order of the factors."""
    scaled = [n for n in readers if (is_op(n, "Div") and _close(scalar(n.inputs[1]), 2**0.5)) or _times(n, 0.5**0.5)]
    if len(scaled) != 1:
        return False
    sums = [
        add
        for erf in consumers(scaled[0].outputs[0])
        if is_op(erf, "Erf")
        for add in consumers(erf.outputs[0])
        if is_op(add, "Add") and any(scalar(v) == 1.0 for v in add.inputs)
    ]
    if not sums or len(consumers(scaled[0].outputs[0])) != 1:
        return False
    rest = [n for n in readers if n is not scaled[0]]
    # x times the sum, or half of x times the sum; the sum may be halved on its way.
    halved = [n for add in sums for n in consumers(add.outputs[0]) if _times(n, 0.5)]
    wide = [*sums, *halved]
    return bool(rest) and all(
        is_op(n, "Mul") and (_reads(n, wide) or (_times(n, 0.5) and _all_read(n.outputs[0], sums))) for n in rest
    )


def _times(node: ir.Node, factor: float) -> bool:
    return is_op(node, "Mul") and any(_close(scalar(v), factor) for v in node.inputs)


def _all_read(value: ir.Value, producers: Sequence[ir.Node]) -> bool:
    readers = consumers(value)
    return bool(readers) and all(is_op(n, "Mul") and _reads(n, producers) for n in readers)

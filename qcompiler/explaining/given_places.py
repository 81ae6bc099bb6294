"""The scales and formats around an operator of a model that has Q/DQ already, as they stand in its graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.explaining.causes import Place
from qcompiler.explaining.given import Unit, dequantize_of
from qcompiler.ir.graph import attr_int, const_array, is_const
from qcompiler.quant.formats import format_of

_GIVEN = "as given"
_FLOATS = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


def given_places(unit: Unit) -> tuple[Place, ...]:
    """Return the places around one operator: its data, constants and bias, then what reads its result quantized."""
    return (*_inputs(unit), *_outputs(unit))


def _inputs(unit: Unit) -> Iterator[Place]:
    for value in unit.node.inputs:
        if value is None:
            continue
        node = dequantize_of(value)
        if node is None:
            if not is_const(value) and value.dtype in _FLOATS:
                yield Place("input", str(value.name), _FLOATS[value.dtype])
            continue
        source = node.inputs[0]
        constant = is_const(source)
        role = "bias" if value is unit.bias else "weight" if constant else "input"
        yield _place(role, str((source if constant and source is not None else value).name), node)


def _outputs(unit: Unit) -> Iterator[Place]:
    for node in unit.quantizes:
        yield _place("output", str(unit.end.outputs[0].name), node)


def _place(role: str, name: str, node: ir.Node) -> Place:
    """Return the numbers of a QuantizeLinear or DequantizeLinear."""
    scale, zero = (const_array(v) for v in (*node.inputs[1:3], *[None] * (3 - len(node.inputs))))
    stored = _stored(node)
    kind, text = format_of(stored), stored.name.lower()
    if attr_int(node, "block_size", 0):
        text += f", blocks of {attr_int(node, 'block_size', 0)} along axis {attr_int(node, 'axis', 1)}"
    elif scale is not None and scale.size > 1:
        text += f", per channel of axis {attr_int(node, 'axis', 1)}"
    if zero is None or not np.any(zero):
        text += ", symmetric" if kind is not None and kind.signed else ""
    scales: tuple[float, ...] = () if scale is None else _ends(scale.astype(np.float64))
    zeros = () if zero is None else tuple(int(z) for z in _ends(zero.astype(np.float64)))
    return Place(role, name, text, _GIVEN if scale is not None else "computed at run time", scales, zeros)


def _stored(node: ir.Node) -> ir.DataType:
    """Return the type of the integers: that of the zero point, or what ONNX says without one."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    integers = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    if integers is not None and integers.dtype is not None:
        return integers.dtype
    return ir.DataType.UINT8


def _ends(numbers: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Return one number, or the least and the largest of several."""
    least, most = float(numbers.min()), float(numbers.max())
    return (least,) if least == most else (least, most)

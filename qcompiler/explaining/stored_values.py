"""Values that a quantized graph stores as integers: which, with what numbers, and how they read as floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.exchange import RangeTable
from qcompiler.engine import Array
from qcompiler.explaining.given import is_conversion
from qcompiler.ir.graph import attr_int, const_array, consumers
from qcompiler.quant.formats import format_of
from qcompiler.targets.points import activation_spec
from qcompiler.targets.target import Target

_Triple = tuple[int, int, int]

_READS: Mapping[str, tuple[_Triple, ...]] = {
    **dict.fromkeys(("QLinearMatMul", "QLinearAdd", "QLinearMul", "QGemm"), ((0, 1, 2), (3, 4, 5))),
    "QLinearConv": ((0, 1, 2),),
    **dict.fromkeys(
        ("QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax"),
        ((0, 1, 2),),
    ),
    "MatMulIntegerToFloat": ((0, 2, 4),),
}
"""Of integer operators: (tensor, scale, zero point) among the inputs, per quantized activation."""
_WRITES: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul"), (6, 7)),
    "QGemm": (7, 8),
    **dict.fromkeys(
        ("QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax"),
        (3, 4),
    ),
    "QLinearConcat": (0, 1),
}
"""Of integer operators: (scale, zero point) of the output among the inputs."""


@dataclass(frozen=True)
class Numbers:
    """Scale and zero point of a stored value, [] or one per index of ``axis``, and the limits of its format."""

    scale: Array
    zero_point: Array
    axis: int | None
    qmin: int
    qmax: int

    def floats(self, stored: Array) -> Array:
        """Return what stored integers stand for, float64."""
        scale, zero = self._shaped(stored.ndim)
        return np.asarray((stored.astype(np.float64) - zero) * scale)

    def rounded(self, values: Array) -> Array:
        """Return float values as they read after having been stored, float64."""
        scale, zero = self._shaped(values.ndim)
        integers = np.clip(np.rint(values.astype(np.float64) / scale) + zero, self.qmin, self.qmax)
        return np.asarray((integers - zero) * scale)

    def clips(self, values: Array) -> Array:
        """Return which float values lie outside the range, bool."""
        scale, zero = self._shaped(values.ndim)
        low, high = (self.qmin - zero - 0.5) * scale, (self.qmax - zero + 0.5) * scale
        return np.asarray((values < low) | (values > high))

    @property
    def reach(self) -> tuple[float, float]:
        """Return the ends of the range, the widest of several."""
        scale, zero = self.scale.astype(np.float64), self.zero_point.astype(np.float64)
        return float(((self.qmin - zero) * scale).min()), float(((self.qmax - zero) * scale).max())

    def _shaped(self, rank: int) -> tuple[Array, Array]:
        shape = [1] * rank
        if self.scale.size > 1 and self.axis is not None:
            shape[self.axis % rank] = self.scale.size
        zero = np.broadcast_to(self.zero_point.astype(np.float64).reshape(-1), (self.scale.size,))
        return self.scale.astype(np.float64).reshape(shape), zero.reshape(shape)


def stored_numbers(model: ir.Model) -> dict[str, Numbers]:
    """Return the constant numbers of every stored activation of the main graph, by the stored tensor's name."""
    found: dict[str, Numbers] = {}
    for node in model.graph:
        for value, scale, zero in _triples(node):
            if value is None or value.is_initializer() or value.name in found:
                continue
            made = _numbers(node, value, scale, zero)
            if made is not None:
                found[str(value.name)] = made
    return found


_Triplet = tuple[ir.Value | None, ir.Value | None, ir.Value | None]


def _triples(node: ir.Node) -> Iterator[_Triplet]:
    def given(index: int) -> ir.Value | None:
        return node.inputs[index] if index < len(node.inputs) else None

    if is_conversion(node, "QuantizeLinear"):
        yield node.outputs[0], given(1), given(2)
    elif is_conversion(node, "DequantizeLinear"):
        yield given(0), given(1), given(2)
    for tensor, scale, zero in _READS.get(node.op_type, ()):
        yield given(tensor), given(scale), given(zero)
    if node.op_type == "QLinearConcat":
        for first in range(2, len(node.inputs) - 2, 3):
            yield given(first), given(first + 1), given(first + 2)
    if node.op_type in _WRITES:
        scale, zero = _WRITES[node.op_type]
        yield node.outputs[0], given(scale), given(zero)


def _numbers(node: ir.Node, value: ir.Value, scale: ir.Value | None, zero: ir.Value | None) -> Numbers | None:
    scales, zeros = const_array(scale), const_array(zero)
    if scales is None or (zero is not None and zeros is None) or attr_int(node, "block_size", 0):
        return None
    kind = value.dtype or (None if zero is None else zero.dtype) or ir.DataType.UINT8
    storage = format_of(kind)
    if storage is None or storage.kind != "int" or scales.ndim > 1:
        return None
    integers = np.zeros(scales.shape, np.int64) if zeros is None else zeros.astype(np.int64)
    axis = attr_int(node, "axis", 1) if scales.size > 1 else None
    return Numbers(scales, integers, axis, storage.qmin, storage.qmax)


def stored_name(model: ir.Model, value: ir.Value, numbers: Mapping[str, Numbers]) -> str:
    """Return the name of the integers that a float value of a quantized graph is stored as; empty if it is not."""
    for reader in consumers(value):
        if is_conversion(reader, "QuantizeLinear") and str(reader.outputs[0].name) in numbers:
            return str(reader.outputs[0].name)
    return ""


def ranges_of(model: ir.Model, target: Target) -> RangeTable:
    """Return the ranges behind the scales of a compiled model, by the name of the float value.

    A build from this table has the same scales again.

    Args:
        model: what `qcompiler.compile` wrote; its stored values are named ``NAME:q``.
        target: its target.
    """
    spec = activation_spec(target)
    found: dict[str, tuple[float, float]] = {}
    for name, numbers in stored_numbers(model).items():
        if not name.endswith(":q") or numbers.scale.size != 1:
            continue
        low, high = numbers.reach
        if spec.symmetric and spec.storage.kind == "int":
            storage = spec.storage
            steps = spec.limits[1] if storage.signed else (storage.qmax - storage.qmin) / 2
            high = float(numbers.scale.reshape(-1)[0]) * steps
            low = -high
        found[name.removesuffix(":q")] = (min(low, 0.0), max(high, 0.0))
    return RangeTable(found, "the scales of the compiled model")

"""import-qdq: read a model that is quantized already back into a FLOAT graph and fixed points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.analysis import open_graphs
from qcompiler.ir.graph import attr_int, const_array, consumers, is_const, is_op
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Lossy
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.arithmetic import quantize
from qcompiler.quant.formats import QuantFormat, format_of
from qcompiler.quant.spec import QuantParams, QuantSource, QuantSpec
from qcompiler.targets.points import imported_format


@dataclass(frozen=True)
class ImportQdq(Pass):
    """Take the Q/DQ pairs of an imported QDQ or QAT model out of the graph and keep their numbers as fixed points.

    Weights become the float constants they stand for, exactly; planning puts the same integers back. Signed 8-bit
    activations become unsigned by adding 128 to integers and zero point, which changes no represented number.
    """

    needs = Phase.FLOAT
    gives = Phase.FLOAT
    numerics: ClassVar[Contract] = Lossy()

    def run(self, state: CompileState) -> int:
        """Remove pairs and return how many nodes were taken out."""
        rewriter = Rewriter(state.model)
        for graph in open_graphs(state.model):
            _Floats(state, rewriter).lift(graph)
            for node in list(graph):
                if node.graph is graph and is_op(node, "DequantizeLinear"):
                    self._dequantize(state, rewriter, node)
            for node in list(graph):
                if node.graph is graph and is_op(node, "QuantizeLinear"):
                    self._keep_numbers(state, node)
        return rewriter.changes

    def _dequantize(self, state: CompileState, rewriter: Rewriter, node: ir.Node) -> None:
        numbers = _numbers(node)
        source = node.inputs[0]
        if numbers is None or source is None:
            return
        scale, zero, storage = numbers
        if is_const(source):
            self._fold_constant(state, rewriter, node, const_array(source), scale, zero, storage)
            return
        producer = source.producer()
        weight = producer.inputs[0] if producer is not None and is_op(producer, "QuantizeLinear") else None
        if producer is not None and is_const(weight) and _same_numbers(producer, node):
            # Training exports float weights behind a Q/DQ pair of their own.
            integers = _quantized_constant(weight, scale, zero, storage, attr_int(node, "axis", 1))
            self._fold_constant(state, rewriter, node, integers, scale, zero, storage)
            return
        activation = imported_format(state.target)
        fixed = _as_activation(scale, zero, storage, activation)
        if producer is None or not is_op(producer, "QuantizeLinear") or producer.graph is not node.graph:
            if fixed is not None:
                state.imported[str(node.outputs[0].name)] = fixed
            return
        x = producer.inputs[0]
        if x is None or fixed is None or not _same_numbers(producer, node):
            state.remark(self.name(), node, "pair-differs", "Q and DQ have different parameters; the pair stays")
            return
        known = state.imported.setdefault(str(x.name), fixed)
        if known != fixed:
            state.remark(self.name(), node, "two-scales", f"{x.name} is quantized twice; this pair stays")
            return
        if node.outputs[0].is_graph_output():
            return
        rewriter.replace(node.outputs[0], x)
        rewriter.erase_dead([node])

    def _fold_constant(
        self,
        state: CompileState,
        rewriter: Rewriter,
        node: ir.Node,
        integers: Array | None,
        scale: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
        zero: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
        storage: QuantFormat,
    ) -> None:
        source = node.inputs[0]
        if integers is None or source is None or node.outputs[0].is_graph_output():
            return
        axis = attr_int(node, "axis", 1) if scale.ndim else None
        shape = [1] * integers.ndim
        if axis is not None:
            shape[axis] = scale.size
        wide = integers.astype(np.int64) - zero.reshape(shape if zero.ndim else ())
        value = (wide.astype(np.float32) * scale.reshape(shape if scale.ndim else ())).astype(np.float32)
        made = rewriter.constant(value, f"{source.name}:float")
        shift = 128 if storage.name == "uint8" else 0
        if storage.bits == 8 and not np.any(zero - shift):
            state.imported[str(made.name)] = QuantSource(
                "fixed", scale=tuple(scale.reshape(-1).tolist()), zero_point=(0,) * scale.size
            )
        rewriter.replace(node.outputs[0], made)
        rewriter.erase_dead([node])

    def _keep_numbers(self, state: CompileState, node: ir.Node) -> None:
        """Let a value that is quantized only for the outside keep its numbers inside too."""
        numbers, x = _numbers(node), node.inputs[0]
        if numbers is None or x is None:
            return
        fixed = _as_activation(*numbers, imported_format(state.target))
        if fixed is not None:
            state.imported.setdefault(str(x.name), fixed)


MOVERS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand", "Tile", "MaxPool")
"""Operators that imported models also run on integers between QuantizeLinear and DequantizeLinear."""


class _Floats:
    """Give operators that move integers a twin that moves the floats they stand for."""

    def __init__(self, state: CompileState, rewriter: Rewriter) -> None:
        self.state, self.rewriter = state, rewriter

    def lift(self, graph: ir.Graph) -> None:
        """Turn Quantize-move-Dequantize into Quantize-Dequantize-move, over chains of moves."""
        for node in list(graph):
            source = node.inputs[0] if node.inputs else None
            if source is None or not is_op(node, *MOVERS) or len(node.outputs) != 1:
                continue
            quantize = source.producer()
            readers = consumers(node.outputs[0])
            ends = readers and all(is_op(r, "DequantizeLinear", *MOVERS) for r in readers)
            if not is_op(quantize, "QuantizeLinear") or not ends or node.outputs[0].is_graph_output():
                continue
            assert quantize is not None
            assert quantize.inputs[0] is not None
            moved = self.rewriter.node(
                node.op_type, [quantize.inputs[0], *node.inputs[1:]], before=node, origin=[node],
                name=f"{node.name}:float", outputs=[f"{node.outputs[0].name}:float"],
            )  # fmt: skip
            for attribute in node.attributes.values():
                moved.attributes[attribute.name] = attribute
            moved.outputs[0].dtype = ir.DataType.FLOAT
            moved.outputs[0].shape = node.outputs[0].shape
            again = self.rewriter.node(
                "QuantizeLinear", [moved.outputs[0], *quantize.inputs[1:]], before=node, origin=[node],
                name=f"{node.name}:quantize", outputs=[f"{node.outputs[0].name}:again"],
            )  # fmt: skip
            for attribute in quantize.attributes.values():
                again.attributes[attribute.name] = attribute
            self.rewriter.declare(again.outputs[0], source.dtype, node.outputs[0].shape)
            numbers = _numbers(quantize)
            fixed = None if numbers is None else _as_activation(*numbers, self.state.target.activation)
            if fixed is not None:
                self.state.imported.setdefault(str(quantize.inputs[0].name), fixed)
            self.rewriter.replace(node.outputs[0], again.outputs[0])
            self.rewriter.erase_dead([node])


def _numbers(
    node: ir.Node,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], QuantFormat] | None:
    """Return constant scale, zero point and storage format of a Q or DQ node, or None (blocked, dynamic, float8)."""
    scale = const_array(node.inputs[1])
    zero = const_array(node.inputs[2]) if len(node.inputs) > 2 else None
    quantized = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    dtype = quantized.dtype if quantized is not None else None
    if dtype is None and len(node.inputs) > 2 and node.inputs[2] is not None:
        dtype = node.inputs[2].dtype
    storage = format_of(dtype)
    if scale is None or storage is None or scale.dtype != np.float32 or scale.ndim > 1:
        return None
    if attr_int(node, "block_size", 0):
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None and zero is None:
        return None
    if scale.size == 1:
        scale = scale.reshape(())
    wide = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64).reshape(scale.shape)
    return scale, wide, storage


def _quantized_constant(
    value: ir.Value | None,
    scale: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    zero: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    storage: QuantFormat,
    axis: int,
) -> Array | None:
    """Return the integers that QuantizeLinear makes of a constant."""
    array = const_array(value)
    if array is None:
        return None
    spec = QuantSpec(storage.name, axis % max(array.ndim, 1) if scale.ndim else None)
    return quantize(array, QuantParams(spec, scale, zero))


def _same_numbers(a: ir.Node, b: ir.Node) -> bool:
    first, second = _numbers(a), _numbers(b)
    if first is None or second is None:
        return False
    return np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1]) and first[2] == second[2]


def _as_activation(
    scale: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    zero: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    storage: QuantFormat,
    activation: str,
) -> QuantSource | None:
    """Return the numbers in the target's activation format, or None if they have no exact form there."""
    if scale.ndim or storage.bits != 8:
        return None
    shift = {("int8", "uint8"): 128, ("uint8", "int8"): -128}.get((storage.name, activation), 0)
    return QuantSource("fixed", scale=(float(scale),), zero_point=(int(zero) + shift,))

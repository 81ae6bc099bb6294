"""widen-half-precision: compute in float32 what a model computes in float16 or bfloat16.

Processors without kernels for these types convert around every operator (ONNX Runtime on x86-64 does), or refuse the
model; and every integer kernel here reads and writes float32. What the type saves in the file is kept by
``store-half-precision`` behind the lowering.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, all_nodes, is_op
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.ir.shapes import infer_shapes
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Lossy
from qcompiler.pipeline.state import CompileState

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""The types that are widened."""

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision", "precision")
"""Attributes that hold an element type."""
_BITS = ("BitCast",)
"""Operators that read the bits of a value, not its number."""
_CARRY = (
    "Cast", "CastLike", "Concat", "Constant", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements",
    "GatherND", "Identity", "If", "Loop", "Reshape", "Scan", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators that compute nothing themselves: a model that rounds or stores in a half type does not compute in it."""


@dataclass(frozen=True)
class WidenHalfPrecision(Pass):
    """Compute in float32 what the model computes in float16 or bfloat16; graph inputs and outputs keep their types.

    Constants become the float32 numbers that they stand for. Results are rounded less often than before, and what
    overflowed to infinity does so no more. A model that only stores numbers in a half type, or rounds to one by a pair
    of Casts, is left alone.
    """

    needs = Phase.FLOAT
    gives = Phase.FLOAT
    numerics: ClassVar[Contract] = Lossy()

    def run(self, state: CompileState) -> int:
        """Widen all graphs and return the number of changes."""
        model = state.model
        had = {v.dtype for v in _values(model) if v.dtype in HALVES}
        if not any(_computes(node) for node in all_nodes(model)):
            stored = {v.dtype for g in all_graphs(model) for v in g.initializers.values()} & had
            state.half = state.half or _widest(stored)
            return 0
        for value in _values(model):
            if value.type is not None and not isinstance(value.type, ir.TensorType) and value.dtype in HALVES:
                state.remark(self.name(), "", "not-a-tensor", f"{value.name} is a {value.type}: nothing is widened")
                return 0
        widening = _Widening(model)
        widening.run()
        state.half = _widest(had)
        infer_shapes(model)
        return widening.rewriter.changes


def _widest(types: Collection[ir.DataType | None]) -> ir.DataType | None:
    """Return the half type of the largest range among some."""
    return max((t for t in types if t is not None), key=HALVES.index, default=None)


def _computes(node: ir.Node) -> bool:
    """Return whether a node computes in a half type."""
    if is_op(node, *_CARRY, *_BITS):
        return False
    return any(v is not None and v.dtype in HALVES for v in (*node.inputs, *node.outputs))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every value of a model once: inputs, initializers, results."""
    for graph in all_graphs(model):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


class _Widening:
    """Rewrite one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.rewriter = model, Rewriter(model)
        self.casts: set[ir.Node] = set()

    def run(self) -> None:
        """Take in the inputs, retype everything inside, give the outputs their types back."""
        outputs = {index: v.dtype for index, v in enumerate(self.model.graph.outputs) if v.dtype in HALVES}
        bits = [n for n in all_nodes(self.model) if is_op(n, *_BITS)]
        read = {(n, i): v.dtype for n in bits for i, v in enumerate(n.inputs) if v is not None and v.dtype in HALVES}
        self._inputs()
        for graph in all_graphs(self.model):
            for value in graph.initializers.values():
                self._constant(value)
            for value in graph.inputs:
                if graph is not self.model.graph:
                    self._retype(value)
        for node in list(all_nodes(self.model)):
            if node not in self.casts and node not in bits:
                self._node(node)
        for node in bits:
            self._keep(node, read)
        for value in dict.fromkeys(self.model.graph.outputs[index] for index in outputs):
            self._output(value, [index for index in outputs if self.model.graph.outputs[index] is value], outputs)

    def _inputs(self) -> None:
        """Let everything read a graph input of a half type through a Cast."""
        graph = self.model.graph
        first = next(iter(graph), None)
        for value in graph.inputs:
            if value.dtype not in HALVES or not value.uses() or first is None:
                continue
            readers = tuple(value.uses())
            wide = self._cast(value, ir.DataType.FLOAT, before=first)
            for use in readers:
                self.rewriter.set_input(use.node, use.idx, wide)

    def _node(self, node: ir.Node) -> None:
        for value in node.outputs:
            self._retype(value)
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.INT and attribute.name in _TYPE_ATTRIBUTES:
                if attribute.as_int() in tuple(map(int, HALVES)):
                    node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
                    self.rewriter.changes += 1
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALVES:
                tensor = attribute.as_tensor()
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _widened(tensor))
                self.rewriter.changes += 1

    def _keep(self, node: ir.Node, read: Mapping[tuple[ir.Node, int], ir.DataType]) -> None:
        """Hand an operator that reads bits what it read before, and widen behind it."""
        for index, value in enumerate(node.inputs):
            if value is not None and (node, index) in read:
                self.rewriter.set_input(node, index, self._cast(value, read[node, index], before=node))
        for value in node.outputs:
            if value.dtype in HALVES and value.uses():
                readers = tuple(value.uses())
                wide = self._cast(value, ir.DataType.FLOAT, after=node)
                for use in readers:
                    self.rewriter.set_input(use.node, use.idx, wide)

    def _retype(self, value: ir.Value) -> None:
        if value.dtype in HALVES:
            self.rewriter.declare(value, ir.DataType.FLOAT, value.shape)
            self.rewriter.changes += 1

    def _constant(self, value: ir.Value) -> None:
        tensor = value.const_value
        if tensor is not None and tensor.dtype in HALVES:
            value.const_value = _widened(tensor)
            self._retype(value)

    def _cast(
        self, value: ir.Value, to: ir.DataType, *, before: ir.Node | None = None, after: ir.Node | None = None
    ) -> ir.Value:
        neighbour = before if before is not None else after
        assert neighbour is not None
        node = self.rewriter.node(
            "Cast", [value], before=before, after=after, origin=[neighbour], name=f"{value.name}/Cast",
            attributes={"to": to}, outputs=[f"{value.name}:{to.name.lower()}"],
        )  # fmt: skip
        self.casts.add(node)
        self.rewriter.declare(node.outputs[0], to, value.shape)
        return node.outputs[0]

    def _output(self, value: ir.Value, places: Sequence[int], types: Mapping[int, ir.DataType]) -> None:
        """Give a graph output its type back, under its own name, wherever the graph lists it."""
        graph = self.model.graph
        if value.dtype is not ir.DataType.FLOAT:
            return  # an input that is an output, too
        producer = value.producer()
        narrow = self._cast(value, types[places[0]], after=producer if producer is not None else next(reversed(graph)))
        name = str(value.name)
        value.name = self.rewriter.unique(f"{name}:float")
        if value.is_initializer():
            graph.initializers.pop(name, None)
            graph.register_initializer(value)
        narrow.name = name
        for index in places:
            graph.outputs[index] = narrow


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return the float32 tensor of the same numbers."""
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)

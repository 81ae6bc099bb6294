"""assign-float-type: compute in float16 or bfloat16 what float32 is not needed for, with Casts at the borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompiler.errors import PassError
from qcompiler.ir.constants import remove_unread_constants
from qcompiler.ir.graph import all_graphs, const_array, consumers, is_const, is_op, origins
from qcompiler.ir.opset import least_ir_version, set_opset
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.ir.schemas import onnx_opset
from qcompiler.ir.shapes import infer_shapes
from qcompiler.passes.block_operators import MXFP8_DEQUANTIZE
from qcompiler.passes.float_regions import (
    Regions,
    find_regions,
    follows,
    is_dequantizer,
    narrow_positions,
    narrow_scale,
    narrowed,
)
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Lossy
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import FLOAT_TYPES

_BFLOAT16_OPSET = 22
"""The operator set from which convolutions and pools exist in bfloat16."""


@dataclass(frozen=True)
class AssignFloatType(Pass):
    """Give the float32 regions of a lowered graph a narrower type, for engines that compute in the type they are given.

    Graph inputs and outputs keep their types. Operators that need float32 keep it, as do constants and values beyond
    the narrow type; the others follow where that takes the fewest Casts. A Cast is inserted once per value, whoever
    reads it. The scale of a QuantizeLinear or DequantizeLinear takes the type of its neighbours.

    Options:
        type: float16, bfloat16, float32 (nothing is done), or empty for the type in the target's table.
    """

    needs = Phase.LOWERED
    numerics: ClassVar[Contract] = Lossy()
    type: str = ""

    def run(self, state: CompileState) -> int:
        """Assign the type and return the number of changes.

        Raises:
            PassError: the type is unknown, or older than the graph's operator set allows.
        """
        wanted = self.type or state.target.float_type
        if wanted not in FLOAT_TYPES:
            raise PassError(f"{self.name()}: unknown type {wanted!r}; expected one of {', '.join(FLOAT_TYPES)}")
        if wanted == "float32":
            return 0
        narrow, opset = ir.DataType[wanted.upper()], onnx_opset(state.model)
        if opset < 19:
            raise PassError(f"{self.name()}: {wanted} scales need ONNX opset 19 or later, the model has {opset}")
        if any(v.type is None for g in all_graphs(state.model) for n in g for v in n.outputs if v.name):
            infer_shapes(state.model)
        if narrow is ir.DataType.BFLOAT16 and opset < _BFLOAT16_OPSET <= state.target.max_opset:
            set_opset(state.model, _BFLOAT16_OPSET)
            opset = _BFLOAT16_OPSET
        rewriter = Rewriter(state.model)
        chosen = [(g, find_regions(g, opset, narrow, state.statistics)) for g in all_graphs(state.model)]
        for graph, regions in chosen:
            for node, (code, text) in regions.reasons.items():
                if regions.narrow:
                    state.remark(self.name(), node, code, f"stays float32: {text}")
            _Assigner(rewriter, graph, regions, narrow, opset).run()
        remove_unread_constants(state.model)
        state.model.ir_version = max(state.model.ir_version, least_ir_version(state.model))
        return rewriter.changes


class _Assigner:
    """Write the choice for one graph into it."""

    def __init__(self, rewriter: Rewriter, graph: ir.Graph, regions: Regions, narrow: ir.DataType, opset: int) -> None:
        self.rewriter, self.graph, self.regions, self.narrow, self.opset = rewriter, graph, regions, narrow, opset
        self.constants: dict[ir.Value, ir.Value] = {}
        self.scales: dict[tuple[ir.Value, ir.Value | None], ir.Value] = {}
        self.casts: dict[ir.Value, ir.Value] = {}
        self.dequantized: dict[ir.Value, ir.Value] = {}
        self.made: set[ir.Value] = set()

    def run(self) -> None:
        """Retype results first, then what each node reads."""
        positions = {n: narrow_positions(n, self.opset, self.narrow) for n in self.graph if n in self.regions.narrow}
        for node, found in positions.items():
            assert found is not None
            for index in found[1]:
                self._retype(node.outputs[index])
            # Level 4 asks for activations of 8 bits: right for float32 on a CPU, and not what a narrow type is for.
            node.attributes.pop("accuracy_level", None)
            if is_op(node, "Cast") and node.outputs[0] in self.made:
                node.attributes["to"] = ir.AttrInt64("to", int(self.narrow))
        for node in list(self.graph):
            if node in self.casts_made():
                continue
            given = positions.get(node)
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                if given is not None and index in given[0]:
                    self.rewriter.set_input(node, index, self._as_narrow(value, node))
                elif value in self.made and not (index == 0 and follows(node, self.narrow)):
                    self.rewriter.set_input(node, index, self._as_wide(value, node))
            scaled = is_op(node, "QuantizeLinear") or node.op_type == "TRT_FP4DynamicQuantize"
            if scaled and node.inputs[0] in self.made and follows(node, self.narrow):
                self._narrow_scale(node)
        self._captured()
        for value in list(self.graph.outputs):
            if value in self.made:
                self._output(value)
        self.rewriter.erase_dead([n for v in self.dequantized if (n := v.producer()) is not None])

    def casts_made(self) -> set[ir.Node]:
        """Return the Casts that this pass inserted."""
        return {n for v in self.casts.values() if (n := v.producer()) is not None}

    def _retype(self, value: ir.Value) -> None:
        if value.dtype is ir.DataType.FLOAT:
            self.rewriter.declare(value, self.narrow, value.shape)
            self.made.add(value)
            self.rewriter.changes += 1

    # ---- readers --------------------------------------------------------------------------------------------------

    def _as_narrow(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """Return a value in the narrow type, for a reader in this graph."""
        if value.dtype is self.narrow:
            return value
        if is_const(value):
            return self._constant(value)
        producer = value.producer()
        if producer is not None and is_dequantizer(producer) and producer.graph is self.graph:
            return self._dequantize(value, producer)
        return self._cast(value, self.narrow, reader)

    def _as_wide(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """Return a value that is narrow now in float32."""
        return self._cast(value, ir.DataType.FLOAT, reader)

    def _cast(self, value: ir.Value, to: ir.DataType, reader: ir.Node) -> ir.Value:
        if value not in self.casts:
            producer = value.producer()
            here = producer is not None and producer.graph is self.graph
            first = next(iter(self.graph))
            node = self.rewriter.node(
                "Cast", [value], before=None if here else first, after=producer if here else None,
                origin=[producer] if producer is not None and origins(producer) else [reader],
                name=f"{value.name}/Cast", attributes={"to": to}, outputs=[f"{value.name}:{to.name.lower()}"],
            )  # fmt: skip
            self.rewriter.declare(node.outputs[0], to, value.shape)
            self.casts[value] = node.outputs[0]
        return self.casts[value]

    def _constant(self, value: ir.Value) -> ir.Value:
        if value not in self.constants:
            array = const_array(value)
            assert array is not None
            name = f"{value.name}:{self.narrow.name.lower()}"
            tensor = ir.Tensor(narrowed(array, self.narrow), dtype=self.narrow, name=name)
            self.constants[value] = self.rewriter.constant(tensor, name, self.graph)
        return self.constants[value]

    def _dequantize(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """Return what a DequantizeLinear gives with a scale of the narrow type."""
        if value not in self.dequantized:
            scale = self._scale(node) if is_op(node, "DequantizeLinear") else node.inputs[1]
            made = self.rewriter.node(
                node.op_type, [node.inputs[0], scale, *node.inputs[2:]], after=node, origin=[node],
                name=str(node.name), domain=node.domain, outputs=[str(value.name)],
            )  # fmt: skip
            for attribute in node.attributes.values():
                made.attributes[attribute.name] = attribute
            if node.op_type == MXFP8_DEQUANTIZE:
                made.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(self.narrow))
            self.rewriter.declare(made.outputs[0], self.narrow, value.shape)
            self.dequantized[value] = made.outputs[0]
        return self.dequantized[value]

    def _narrow_scale(self, node: ir.Node) -> None:
        self.rewriter.set_input(node, 1, self._scale(node))

    def _scale(self, node: ir.Node) -> ir.Value:
        """Return the scale of a Q or DQ in the narrow type."""
        scale = node.inputs[1]
        assert scale is not None
        inner = scale.producer()
        if inner is not None and is_op(inner, "DequantizeLinear"):
            return self._dequantize(scale, inner)
        key = (scale, node.inputs[0] if const_array(node.inputs[0]) is not None else None)
        if key not in self.scales:
            made = narrow_scale(node, self.narrow)
            tensor = ir.Tensor(made, dtype=self.narrow, name=str(scale.name))
            name = f"{scale.name}:{self.narrow.name.lower()}"
            self.scales[key] = self.rewriter.constant(tensor, name, self.graph)
        return self.scales[key]

    # ---- borders --------------------------------------------------------------------------------------------------

    def _captured(self) -> None:
        """Let bodies that read a narrow value of this graph read it in float32."""
        for value in list(self.made):
            for node in consumers(value):
                if node.graph is not self.graph:
                    for index, read in enumerate(node.inputs):
                        if read is value:
                            self.rewriter.set_input(node, index, self._as_wide(value, node))

    def _output(self, value: ir.Value) -> None:
        """Give a graph output its float32 back, under its own name."""
        name, wide = str(value.name), self.casts.get(value)
        if wide is None:
            producer = value.producer()
            assert producer is not None
            wide = self._as_wide(value, producer)
        value.name = self.rewriter.unique(f"{name}:{self.narrow.name.lower()}")
        wide.name = name
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = wide

"""insert-qdq: write the plan into the graph as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.errors import PassError
from qcompiler.ir.analysis import holders, open_graphs, repeated_at
from qcompiler.ir.graph import consumers, is_op
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.stored_constants import StoredConstants
from qcompiler.patterns.block_dynamic import BLOCK_DOMAIN, BLOCK_SIZES, block_quantizer, quantizer_of
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Lossy
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.spec import QuantParams, QuantSource, affine_params, fixed_params, outer_scale
from qcompiler.targets.following import activation_bounds
from qcompiler.targets.groups import Group, find_groups
from qcompiler.targets.points import DYNAMIC_SUFFIX, activation_spec, replanned, root_point


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Insert QuantizeLinear and DequantizeLinear where the plan says, and quantize weights and biases.

    A value stored quantized is followed by one QuantizeLinear; every reader gets it through a DequantizeLinear of its
    own if it computes on integers, and through one shared DequantizeLinear otherwise. A Relu or Clip in front of a
    QuantizeLinear that saturates at the same bounds is removed.
    """

    needs = Phase.PLANNED
    gives = Phase.QDQ
    numerics: ClassVar[Contract] = Lossy()

    def run(self, state: CompileState) -> int:
        """Insert all Q/DQ and return the number of changes."""
        inserter = _Inserter(state, self.name())
        inserter.run()
        return inserter.rewriter.changes


class _Inserter:
    def __init__(self, state: CompileState, pass_name: str) -> None:
        self.state, self.plan, self.pass_name = state, state.plan, pass_name
        self.rewriter = Rewriter(state.model)
        self.held_by = holders(state.model)
        groups = find_groups(state.model, state.target)
        self.groups = [g for g in groups if self.plan.form(g.name) != "float"]
        self.stored: dict[str, ir.Value] = {}
        self.numbers: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.outer_scales: dict[str, ir.Value] = {}
        self.constants = StoredConstants(state, self.rewriter, self.params)
        self.shared: dict[tuple[str, ir.Graph], ir.Value] = {}

    def run(self) -> None:
        for group in self.groups:
            if self.plan.form(group.name) == "static":
                for value in group.results:
                    self._store(group, value)
        for group in self.groups:
            form = self.plan.form(group.name)
            for value in group.data if group.row.kind != "recurrent" and form != "weight-only" else ():
                self._read(group, value, dynamic=form == "dynamic")
            self.constants.store(group)
        self._keep_imported()
        self.rewriter.erase_dead([n for v in self.shared.values() if (n := v.producer()) is not None])

    def _keep_imported(self) -> None:
        """Put the Q/DQ pairs of an imported model back where no group stores the value quantized.

        The imported model is the reference: a value that it rounds and clips stays rounded and clipped. To round it to
        a small float format would be another model, so it stays float there.
        """
        if activation_spec(self.state.target).storage.kind == "float":
            return
        for graph in open_graphs(self.state.model):
            for node in list(graph):
                for value in node.outputs:
                    name = str(value.name)
                    source = self.state.imported.get(name)
                    if source is None or name in self.stored or is_op(node, "DequantizeLinear"):
                        continue
                    # A signed QuantizeLinear towards the outside reads the pair too: the engine fuses an operator
                    # between an unsigned DequantizeLinear and a signed QuantizeLinear into a kernel it then refuses.
                    readers = list(consumers(value))
                    if value.dtype == ir.DataType.FLOAT and readers:
                        self._round(node, value, readers, source)

    def _round(self, node: ir.Node, value: ir.Value, readers: list[ir.Node], source: QuantSource) -> None:
        """Let the readers of a value read it through a Q/DQ pair."""
        name = str(value.name)
        if name not in self.numbers:
            params = fixed_params(activation_spec(self.state.target), replanned(source, self.state.target))
            zero = params.zero_point.astype(params.spec.storage.dtype)
            self.numbers[name] = (
                self.rewriter.constant(params.scale, f"{name}:scale"),
                self.rewriter.constant(zero, f"{name}:zero_point"),
            )
        scale, zero_point = self.numbers[name]
        q = self.rewriter.node(
            "QuantizeLinear", [value, scale, zero_point], after=node, origin=[node], name=f"{name}/QuantizeLinear",
            outputs=[f"{name}:q"],
        )  # fmt: skip
        self.rewriter.declare(q.outputs[0], zero_point.dtype, value.shape)
        dq = self.rewriter.node(
            "DequantizeLinear", [q.outputs[0], scale, zero_point], after=q, origin=[node],
            name=f"{node.name}:dequantize", outputs=[f"{name}:dq"],
        )  # fmt: skip
        self.rewriter.declare(dq.outputs[0], value.dtype, value.shape)
        for reader in readers:
            for index, read in enumerate(reader.inputs):
                if read is value:
                    self.rewriter.set_input(reader, index, dq.outputs[0])

    # ---- activations ------------------------------------------------------------------------------------------

    def params(self, name: str) -> QuantParams:
        """Return the numbers of an activation point."""
        name = root_point(self.plan, name)
        point = self.plan.points[name]
        source = point.source
        if source.kind == "fixed":
            return fixed_params(point.spec, point.source)
        if source.kind != "observed" or self.state.statistics is None:
            raise PassError(f"point {name} has no numbers: its source is {source.kind} and there are no statistics")
        low, high = self.state.statistics.range(name, source.estimator or "min-max", point.spec)
        return affine_params(point.spec, low, high)

    def _numbers(self, name: str) -> tuple[ir.Value, ir.Value]:
        root = root_point(self.plan, name)
        if root not in self.numbers:
            params = self.params(root)
            scale = self.rewriter.constant(params.scale, f"{root}:scale")
            zero = params.zero_point.astype(params.spec.storage.dtype)
            self.numbers[root] = (scale, self.rewriter.constant(zero, f"{root}:zero_point"))
        return self.numbers[root]

    def _store(self, group: Group, value: ir.Value) -> None:
        """Follow a group's result by QuantizeLinear and hand every reader a DequantizeLinear of it."""
        name = str(value.name)
        if group.activation is not None:
            self._drop_activation(group, name)
        source = group.nodes[-1].outputs[value.index() or 0] if group.activation is None else value
        produced = self._live_result(group, source)
        node = produced.producer()
        assert node is not None
        scale, zero = self._numbers(name)
        quantized = self.rewriter.node(
            "QuantizeLinear",
            [produced, scale, zero],
            after=node,
            origin=group.nodes,
            name=f"{group.name}/QuantizeLinear",
            outputs=[f"{name}:q"],
        )
        q = quantized.outputs[0]
        self.rewriter.declare(q, zero.dtype, produced.shape)
        dq = self.rewriter.node(
            "DequantizeLinear",
            [q, scale, zero],
            after=quantized,
            origin=group.nodes,
            name=f"{group.name}:dequantize",
            outputs=[f"{name}:dq"],
        )
        self.rewriter.declare(dq.outputs[0], produced.dtype, produced.shape)
        self.rewriter.replace(produced, dq.outputs[0])
        self.rewriter.set_input(quantized, 0, produced)
        self.stored[name] = q
        self.shared[(name, dq.graph)] = dq.outputs[0]  # type: ignore[index]  # a placed node has a graph

    def _live_result(self, group: Group, value: ir.Value) -> ir.Value:
        """Return the value that leaves the group now: its activation may have been removed."""
        if group.activation is not None and group.activation.graph is None:
            return (group.bias or group.root).outputs[0]
        return value

    def _drop_activation(self, group: Group, name: str) -> None:
        assert group.activation is not None
        params = self.params(name)
        storage = params.spec.storage
        low = float((storage.qmin - int(params.zero_point)) * np.float64(params.scale))
        high = float((storage.qmax - int(params.zero_point)) * np.float64(params.scale))
        least, most = activation_bounds(group.activation)
        step = float(params.scale)
        if low < least - 0.01 * step or high > most + 0.5 * step:
            # A symmetric range passes negative numbers by design: there the engine fuses the activation itself.
            if not params.spec.symmetric:
                text = (
                    f"the quantized range [{low:g}, {high:g}] passes values that {group.activation.op_type} would not"
                )
                self.state.remark(self.pass_name, group.activation, "activation-not-redundant", text)
            return
        source = group.activation.inputs[0]
        assert source is not None
        self.rewriter.replace(group.activation.outputs[0], source)
        self.rewriter.erase(group.activation)

    def _read(self, group: Group, value: ir.Value, dynamic: bool) -> None:
        """Let a group read a value through Q/DQ of its own."""
        name = self._original_name(value)
        if dynamic and self.plan.points[name + DYNAMIC_SUFFIX].spec.block:
            self._read_blocks(group, value, name)
            return
        if dynamic:
            q, scale, zero = self._dynamic_quantized(group, value, name)
        else:
            scale, zero = self._numbers(name)
            q = self.stored.get(name) or self._quantized(group, value, name)
        dq = self.rewriter.node(
            "DequantizeLinear",
            [q, scale, zero],
            before=group.root,
            origin=[group.root],
            name=f"{group.name}/DequantizeLinear",
            outputs=[f"{group.name}/{name}:dq"],
        ).outputs[0]
        dq.dtype = ir.DataType.FLOAT
        dq.shape = value.shape
        for index in group.data_indices:
            if group.root.inputs[index] is value:
                self.rewriter.set_input(group.root, index, dq)

    def _read_blocks(self, group: Group, value: ir.Value, name: str) -> None:
        """Let a group read a value through blocks whose scales are found at run time."""
        spec = self.plan.points[name + DYNAMIC_SUFFIX].spec
        quantizer = quantizer_of(spec.format, spec.scale_format)
        if quantizer is None or spec.block != BLOCK_SIZES[quantizer]:
            raise PassError(
                f"{group.name}: no quantizer at run time for {spec.format} in blocks of {spec.block} with scales in "
                f"{spec.scale_format or 'float32'}; mend the target's activation, block and weight_scale"
            )
        model = self.state.model
        function = block_quantizer(quantizer, model.graph.opset_imports.get("", 21))
        model.functions.setdefault(function.identifier(), function)
        model.graph.opset_imports.setdefault(BLOCK_DOMAIN, 1)
        inputs = [value]
        if len(function.inputs) > 1:
            if name not in self.outer_scales:
                outer = np.asarray(outer_scale(spec, self._reach(name)))
                self.outer_scales[name] = self.rewriter.constant(outer, f"{name}:outer_scale")
            inputs.append(self.outer_scales[name])
        made = self.rewriter.node(
            quantizer, inputs, before=group.root, origin=[group.root], domain=BLOCK_DOMAIN,
            name=f"{group.name}/{quantizer}", outputs=[f"{group.name}/{name}:blocks"],
        ).outputs[0]  # fmt: skip
        self.rewriter.declare(made, value.dtype, value.shape)
        for index in group.data_indices:
            if group.root.inputs[index] is value:
                self.rewriter.set_input(group.root, index, made)

    def _reach(self, name: str) -> float:
        """Return the largest magnitude of a value that calibration saw."""
        if self.state.statistics is None:
            raise PassError(f"point {name} has no numbers: there are no statistics")
        return max(map(abs, self.state.statistics.range(name, "min-max")))

    def _original_name(self, value: ir.Value) -> str:
        """Return the plan's name of a value that may by now be read through the shared DequantizeLinear."""
        for (name, _), dq in self.shared.items():
            if dq is value:
                return name
        return str(value.name)

    def _quantized(self, group: Group, value: ir.Value, name: str) -> ir.Value:
        """Return the QuantizeLinear of a float value, one for each graph that needs it."""
        graph = self._where(group, value)
        key = (f"{name}:q", graph)
        if key not in self.shared:
            scale, zero = self._numbers(name)
            place = _place(graph, value)
            node = self.rewriter.node(
                "QuantizeLinear",
                [value, scale, zero],
                before=place[0],
                after=place[1],
                origin=[group.root],
                name=f"{name}/QuantizeLinear",
                outputs=[f"{name}:q"],
            )
            self.rewriter.declare(node.outputs[0], zero.dtype, value.shape)
            self.shared[key] = node.outputs[0]
        return self.shared[key]

    def _dynamic_quantized(self, group: Group, value: ir.Value, name: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        graph = self._where(group, value)
        key = (name + DYNAMIC_SUFFIX, graph)
        if key not in self.shared:
            place = _place(graph, value)
            node = self.rewriter.node(
                "DynamicQuantizeLinear",
                [value],
                before=place[0],
                after=place[1],
                origin=[group.root],
                name=f"{name}/DynamicQuantizeLinear",
                outputs=[f"{name}:dyn_q", f"{name}:dyn_scale", f"{name}:dyn_zp"],
            )
            q, scale, zero = node.outputs
            q.dtype = ir.DataType.UINT8
            q.shape = value.shape
            scale.dtype = ir.DataType.FLOAT
            scale.shape = ir.Shape(())
            zero.dtype = ir.DataType.UINT8
            zero.shape = ir.Shape(())
            self.shared[key] = q
        made = self.shared[key].producer()
        assert made is not None
        return made.outputs[0], made.outputs[1], made.outputs[2]

    def _where(self, group: Group, value: ir.Value) -> ir.Graph:
        """Return the graph in which a value is quantized for a group.

        A Loop that captures a value gets it quantized once in front of it, not once per iteration (ONNX Runtime 1.31
        fuses a DequantizeLinear of a captured tensor as it does any other; measured on 20 iterations over 64x256, that
        is 8 % of the time). An If branch quantizes for itself what it captures: it may not run.
        """
        graph = group.root.graph
        assert isinstance(graph, ir.Graph)
        producer = value.producer()
        outer = producer.graph if producer is not None else value.graph
        assert isinstance(outer, ir.Graph)
        loop = repeated_at(graph, outer, self.held_by)
        if loop is None:
            return graph
        assert isinstance(loop.graph, ir.Graph)
        return loop.graph


def _place(graph: ir.Graph, value: ir.Value) -> tuple[ir.Node | None, ir.Node | None]:
    """Return (before, after): right behind the producer, or in front of the first node of the graph."""
    producer = value.producer()
    if producer is not None and producer.graph is graph:
        return None, producer
    return next(iter(graph)), None

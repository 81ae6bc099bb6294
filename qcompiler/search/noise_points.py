"""The quantized points of one variant as switches in the float graph: off, it computes float; all on, the variant.

The numbers (scales, zero points, integer weights) are read off the variant's Q/DQ graph, so that a switched point does
what the build does. An activation goes through ``Where(switch, DequantizeLinear(QuantizeLinear(x)), x)``; a weight
becomes an input of the model, fed with float numbers or with those its integers stand for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompiler.engine import Array, Engine, EngineOptions
from qcompiler.ir.analysis import bodies, open_graphs
from qcompiler.ir.graph import const_array, is_const, is_op
from qcompiler.ir.rewriter import Rewriter
from qcompiler.patterns.block_dynamic import BLOCK_DOMAIN
from qcompiler.quant.plan import QuantPlan
from qcompiler.search.noise_terms import family
from qcompiler.targets.groups import Group

_COUNTED = re.compile(r"(_\d+)?$")
_AS_WRITTEN = EngineOptions(optimize=False)
Reader = tuple[str, int]
"""Name of a node and the position of one of its inputs."""


@dataclass(frozen=True)
class Activation:
    """One activation point.

    Attributes:
        value: name in the float graph.
        readers: inputs that read it quantized; None is all there are, graph outputs included.
        call: the operator that quantizes and dequantizes at run time; None for a calibrated scale.
        numbers: scale and zero point, or what the call reads besides the value.
    """

    value: str
    readers: tuple[Reader, ...] | None
    call: ir.Node | None = None
    numbers: tuple[ir.TensorProtocol, ...] = ()


@dataclass
class Variant:
    """What one choice of forms quantizes, in the terms of the float graph.

    Attributes:
        base: the FLOAT graph.
        qdq: the same graph in its QDQ phase.
        activations: point to what it quantizes.
        constants: point to the inputs that read integers, and the value of the Q/DQ graph that stands for each.
        places: point to the position in the main graph's program order at which it takes effect.
        joint: points that are several of those above at once: all readers of a value (``reads:NAME``,
            ``dynamic:NAME``), or a stored value that nothing else reads (``value:NAME``).
    """

    base: ir.Model
    qdq: ir.Model
    activations: dict[str, Activation] = field(default_factory=dict)
    constants: dict[str, dict[Reader, ir.Value]] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    joint: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def points(self) -> tuple[str, ...]:
        """Return all points in program order."""
        return tuple(sorted((*self.activations, *self.constants), key=lambda p: (self.places[p], p)))


def read_variant(
    base: ir.Model, qdq: ir.Model, groups: Sequence[Group], plan: QuantPlan, imported: Collection[str] = ()
) -> Variant:
    """Find the points of a variant.

    Args:
        base: the FLOAT graph.
        qdq: a copy of it behind ``insert-qdq``.
        groups: groups of the float graph.
        plan: what was inserted.
        imported: values that are rounded in the reference, too; they are no points.
    """
    variant = Variant(base, qdq)
    integer = [g for g in groups if plan.form(g.name) != "float"]
    held = _held(base)
    _calibrated(variant, integer, plan, frozenset(imported))
    _at_run_time(variant, integer, plan)
    _constants(variant, integer, plan)
    values = _values(base)
    for point, activation in variant.activations.items():
        producer = values[activation.value].producer()
        read = [held[node] for node, _ in activation.readers or ()]
        variant.places[point] = held[str(producer.name)] if producer is not None else min(read, default=0)
    for point, readers in variant.constants.items():
        variant.places[point] = min(held[node] for node, _ in readers)
    return variant


def _calibrated(variant: Variant, groups: Sequence[Group], plan: QuantPlan, imported: frozenset[str]) -> None:
    stored = dict.fromkeys(v for g in groups if plan.form(g.name) == "static" for v in g.results)
    integer = [g for g in groups if family(plan.form(g.name)) == "static"]
    readers = _readers(integer)
    numbers = {
        _COUNTED.sub("", str(node.outputs[0].name)).removesuffix(":q"): node
        for graph in open_graphs(variant.qdq)
        for node in graph
        if is_op(node, "QuantizeLinear")
    }
    outside = {str(v.name) for v in stored if not _only_read(v, readers.get(str(v.name), {}))}
    for name in dict.fromkeys((*(str(v.name) for v in stored), *readers)):
        node = numbers.get(name)
        if name in imported or node is None:
            continue
        made = tuple(t for v in node.inputs[1:] if v is not None and (t := v.const_value) is not None)
        reads = {f"read:{name}@{group}": tuple(found) for group, found in readers.get(name, {}).items()}
        variant.activations.update({point: Activation(name, found, None, made) for point, found in reads.items()})
        if name in outside:
            variant.activations[f"value:{name}"] = Activation(name, None, None, made)
        elif any(str(v.name) == name for v in stored):
            variant.joint[f"value:{name}"] = tuple(reads)
        if len(reads) > 1:
            variant.joint[f"reads:{name}"] = tuple(reads)


def _at_run_time(variant: Variant, groups: Sequence[Group], plan: QuantPlan) -> None:
    nodes = {node.name: node for graph in open_graphs(variant.qdq) for node in graph}
    for name, found in _readers([g for g in groups if plan.form(g.name) == "dynamic"]).items():
        for group, at in found.items():
            reader = nodes[at[0][0]].inputs[at[0][1]]
            made = reader.producer() if reader is not None else None
            call = made if made is not None and made.domain == BLOCK_DOMAIN else None
            more = () if call is None else tuple(t for v in call.inputs[1:] if v is not None and (t := v.const_value))
            variant.activations[f"dynamic:{name}@{group}"] = Activation(name, tuple(at), call, more)
        if len(found) > 1:
            variant.joint[f"dynamic:{name}"] = tuple(f"dynamic:{name}@{group}" for group in found)


def _readers(groups: Sequence[Group]) -> dict[str, dict[str, list[Reader]]]:
    """Return, per value, the groups that read it quantized, and where."""
    found: dict[str, dict[str, list[Reader]]] = {}
    for group in groups:
        for index, name in _read(group) if group.row.kind != "recurrent" else ():
            found.setdefault(name, {}).setdefault(group.name, []).append((group.name, index))
    return found


def _only_read(value: ir.Value, readers: Mapping[str, Sequence[Reader]]) -> bool:
    """Return whether nothing but the given readers reads a value; there is one at least."""
    known = {at for found in readers.values() for at in found}
    return bool(known) and not value.is_graph_output() and all((u.node.name, u.idx) in known for u in value.uses())


def _read(group: Group) -> Iterator[tuple[int, str]]:
    """Yield (input index, value name) of what a group reads quantized."""
    for index in group.data_indices:
        value = group.root.inputs[index]
        if value is not None and not is_const(value):
            yield index, str(value.name)


def _constants(variant: Variant, groups: Sequence[Group], plan: QuantPlan) -> None:
    form = {g.name: plan.form(g.name) for g in groups}
    originals = {g.name: g.root for g in groups}
    for graph in open_graphs(variant.qdq):
        for node in graph:
            if node.name not in form:
                continue
            for index, value in enumerate(node.inputs):
                before = originals[node.name].inputs[index] if index < len(originals[node.name].inputs) else None
                if value is None or not is_op(value.producer(), "DequantizeLinear") or not is_const(before):
                    continue
                own = form[node.name] == "dynamic" or family(form[node.name]) == "static"
                point = f"{'weight' if own else form[node.name]}:{node.name}"
                variant.constants.setdefault(point, {})[node.name, index] = value


def _held(model: ir.Model) -> dict[str, int]:
    """Return, for every node at any depth, the position of the node of the main graph that holds it."""

    def inside(node: ir.Node) -> Iterator[str]:
        yield str(node.name)
        for body in bodies(node):
            for inner in body:
                yield from inside(inner)

    return {name: index for index, node in enumerate(model.graph) for name in inside(node)}


def _values(model: ir.Model) -> dict[str, ir.Value]:
    found: dict[str, ir.Value] = {}
    for graph in open_graphs(model):
        found.update({str(v.name): v for v in graph.inputs})
        found.update({str(v.name): v for node in graph for v in node.outputs if v.name})
    return found


# ---- switches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Switched:
    """A float graph with switches.

    Attributes:
        model: the graph.
        switches: activation point to the boolean input that turns it on.
        weights: constant point to its inputs: name to the arrays for off and for on.
    """

    model: ir.Model
    switches: Mapping[str, str]
    weights: Mapping[str, Mapping[str, tuple[Array, Array]]]


def first_nodes(variant: Variant, points: Collection[str]) -> set[str]:
    """Return the names of the nodes, at any depth, that some points change first.

    That of a graph output is the node that computes it: the part behind it would have the same name at both ends.
    """
    found = {node for p in points for node, _ in variant.constants.get(p, ())}
    values = _values(variant.base)
    for activation in (variant.activations[p] for p in points if p in variant.activations):
        found.update(node for node, _ in activation.readers or ())
        if activation.readers is None:
            value = values[activation.value]
            producer = value.producer() if value.is_graph_output() else None
            found.update(str(u.node.name) for u in value.uses())
            found.update([str(producer.name)] if producer is not None else [])
    return found


def switch_points(variant: Variant, points: Collection[str], engine: Engine, model: ir.Model | None = None) -> Switched:
    """Return the float graph with the given points behind switches.

    Args:
        variant: left as it is.
        points: names out of ``variant.points``; all others are off for good.
        engine: dequantizes the weights.
        model: a part of the float graph that holds all that the points change; it is changed. A copy of the whole by
            default.

    Raises:
        ModelError: the engine refuses a dequantization.
    """
    model = variant.base.clone() if model is None else model
    for identifier, function in variant.qdq.functions.items():
        model.functions.setdefault(identifier, function)
    for domain, version in variant.qdq.graph.opset_imports.items():
        model.graph.opset_imports.setdefault(domain, version)
    nodes = {str(node.name): node for graph in open_graphs(model) for node in graph}
    switcher = _Switcher(model, Rewriter(model), nodes, _values(model))
    # What a group stores first: whoever quantizes it again reads what was stored.
    ordered = sorted((p for p in variant.activations if p in points), key=_order)
    switches = {point: switcher.activation(point, variant.activations[point]) for point in ordered}
    wanted = {p: readers for p, readers in variant.constants.items() if p in points}
    dequantized = _dequantized(variant.qdq, [v for readers in wanted.values() for v in readers.values()], engine)
    weights = {
        point: dict(switcher.constant(f"{point}#{at[1]}", at, dequantized[str(v.name)]) for at, v in readers.items())
        for point, readers in wanted.items()
    }
    return Switched(model, switches, weights)


def _order(point: str) -> int:
    return ("value", "read", "dynamic").index(point.partition(":")[0])


def _dequantized(model: ir.Model, values: Sequence[ir.Value], engine: Engine) -> dict[str, Array]:
    """Run what makes values out of constants; name to array."""
    if not values:
        return {}
    nodes: dict[ir.Node, None] = {}

    def visit(value: ir.Value) -> None:
        node = value.producer()
        if node is not None and node not in nodes:
            for read in node.inputs:
                if read is not None:
                    visit(read)
            nodes[node] = None

    for value in values:
        visit(value)
    constants = {v: None for node in nodes for v in node.inputs if v is not None and v.producer() is None}
    view = ir.GraphView(
        [], list(dict.fromkeys(values)), nodes=list(nodes), initializers=list(constants),
        opset_imports=model.graph.opset_imports, name="weights",
    )  # fmt: skip
    return engine.load(ir.Model(view.clone(), ir_version=model.ir_version), _AS_WRITTEN).run({})


@dataclass(frozen=True)
class _Switcher:
    model: ir.Model
    rewriter: Rewriter
    nodes: Mapping[str, ir.Node]
    values: Mapping[str, ir.Value]

    def _input(self, name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.Value:
        value = ir.Value(name=self.rewriter.unique(name), type=ir.TensorType(dtype), shape=shape)
        self.model.graph.inputs.append(value)
        return value

    def activation(self, point: str, activation: Activation) -> str:
        """Put one point behind a switch and return the name of its input."""
        switch = self._input(f"switch {point}", ir.DataType.BOOL, ir.Shape(()))
        value = self.values[activation.value]
        if activation.readers is None:
            self._put(switch, value, activation, None)
            return str(switch.name)
        # Behind a stored value its readers read another one by now.
        read: dict[ir.Value, list[Reader]] = {}
        for name, index in activation.readers:
            current = self.nodes[name].inputs[index]
            assert current is not None
            read.setdefault(current, []).append((name, index))
        for current, readers in read.items():
            self._put(switch, current, activation, [(self.nodes[name], index) for name, index in readers])
        return str(switch.name)

    def _put(
        self, switch: ir.Value, value: ir.Value, activation: Activation, readers: list[tuple[ir.Node, int]] | None
    ) -> None:
        name, producer = str(value.name), value.producer()
        graph = value.graph if producer is None else producer.graph
        assert isinstance(graph, ir.Graph)
        switched = self._branch(value, self._quantized(value, activation), "on")
        kept = self._branch(value, [ir.Node("", "Identity", [value])], "off")
        branches = {"then_branch": switched, "else_branch": kept}
        # An If computes one branch alone: what is off costs a copy, and does not round anything.
        made = self.rewriter.node(
            "If", [switch], before=next(iter(graph)) if producer is None else None, after=producer,
            attributes=branches, name=f"{name}/If",
        )  # fmt: skip
        self.rewriter.declare(made.outputs[0], value.dtype, value.shape)
        if readers is None:
            self.rewriter.replace(value, made.outputs[0])
            for branch in (switched, kept):
                branch[0].replace_input_with(0, value)
        for reader, index in readers or ():
            self.rewriter.set_input(reader, index, made.outputs[0])

    def _quantized(self, value: ir.Value, activation: Activation) -> list[ir.Node]:
        """Return the operators that round a value, in order."""
        numbers = [self.rewriter.constant(t, f"{value.name}:number") for t in activation.numbers]
        if activation.call is not None:
            return [ir.Node(BLOCK_DOMAIN, activation.call.op_type, [value, *numbers])]
        if numbers:
            first = ir.Node("", "QuantizeLinear", [value, *numbers])
            return [first, ir.Node("", "DequantizeLinear", [first.outputs[0], *numbers])]
        first = ir.Node("", "DynamicQuantizeLinear", [value], num_outputs=3)
        return [first, ir.Node("", "DequantizeLinear", list(first.outputs))]

    def _branch(self, value: ir.Value, nodes: list[ir.Node], name: str) -> ir.Graph:
        """Return the branch of an If that computes a value anew."""
        for node in nodes:
            node.name = self.rewriter.unique(f"{value.name}/{name}/{node.op_type}")
            for output in node.outputs:
                output.name = self.rewriter.unique(f"{node.name}:{output.index()}")
        made = nodes[-1].outputs[0]
        self.rewriter.declare(made, value.dtype, value.shape)
        opsets = self.model.graph.opset_imports
        return ir.Graph(
            [], [made], nodes=nodes, opset_imports=opsets, name=self.rewriter.unique(f"{value.name}/{name}")
        )

    def constant(self, name: str, at: Reader, on: Array) -> tuple[str, tuple[Array, Array]]:
        """Let a node read a constant from a new input; return its name and the arrays for off and for on."""
        node = self.nodes[at[0]]
        value = node.inputs[at[1]]
        off = const_array(value)
        assert value is not None
        assert off is not None
        made = self._input(name, value.dtype or ir.DataType.from_numpy(off.dtype), ir.Shape(off.shape))
        self.rewriter.set_input(node, at[1], made)
        return str(made.name), (off, on.reshape(off.shape))

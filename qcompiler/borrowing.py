"""Let passes work on a model of somebody else in place, and leave alone what they do not change.

Passes rely on what import gives them: operators mean what they mean in the internal operator set, names are unique over
the whole model, types and shapes are known, every node has an origin. `Loan` brings a model into that form while a pass
runs, and takes back afterwards whatever still is as it was lent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from qcompiler.ir.constants import constant_tensor
from qcompiler.ir.convert import convert_opset
from qcompiler.ir.graph import ORIGIN, all_graphs, all_nodes, is_op, shape_of
from qcompiler.ir.importer import OWN_DOMAIN
from qcompiler.ir.naming import make_names_unique
from qcompiler.ir.opset import least_ir_version, min_opset, set_opset
from qcompiler.ir.schemas import INTERNAL_OPSET, NOTE, onnx_opset
from qcompiler.ir.shapes import hollow_weights, infer_shapes
from qcompiler.ir.softmax import undo_softmax_expansion

Kind = tuple[ir.TypeProtocol | None, tuple[int | str | None, ...] | None]


def tag_origins(model: ir.Model) -> None:
    """Give every node its origin: the one that an earlier pass noted (in ``node.meta``), or its own name."""
    for node in all_nodes(model):
        if ORIGIN not in node.metadata_props:
            node.metadata_props[ORIGIN] = node.meta.get(ORIGIN) or (node.name or "").replace(";", ",")


def put_origins_aside(model: ir.Model) -> None:
    """Move every node's origin from what is written to files to ``node.meta``, which is not."""
    for node in all_nodes(model):
        if (origin := node.metadata_props.pop(ORIGIN, None)) is not None:
            node.meta[ORIGIN] = origin


@dataclass
class Loan:
    """A model of somebody else while a pass works on it.

    Attributes:
        model: changed in place.
        shapes: infer types and shapes first (not for a pass that does that itself).
    """

    model: ir.Model
    shapes: bool = True
    opset: int = 0
    ir_version: int = 0
    note: str | None = None
    has_origins: bool = False
    nodes: dict[ir.Node, tuple[str | None, str, ir.Graph]] = field(default_factory=dict)
    values: dict[ir.Value, tuple[str | None, str, ir.Graph]] = field(default_factory=dict)
    kinds: dict[ir.Value, tuple[Kind, Kind]] = field(default_factory=dict)
    constants: list[ir.Value] = field(default_factory=list)

    def begin(self) -> None:
        """Bring the model into the form that passes work on.

        Raises:
            ModelError: the model is older than the oldest operator set that can be raised.
        """
        model = self.model
        self.opset, self.ir_version = onnx_opset(model), model.ir_version or 0
        self.note = model.metadata_props.get(NOTE)
        if self.ir_version < 4:
            # Below IR version 4 every initializer had to be an input: it was not meant to be overridden.
            RemoveInitializersFromInputsPass()(model)
        self.has_origins = any(ORIGIN in node.metadata_props for node in all_nodes(model))
        before = {value: _kind(value) for _, value in _values(model)}
        self._lend_names()
        if self.shapes:
            infer_shapes(model, trust=False)
            self._raise_opset()
        for node in all_nodes(model):
            if is_op(node, "Constant") and node.outputs[0].const_value is None:
                node.outputs[0].const_value = constant_tensor(node)
                self.constants.append(node.outputs[0])
        tag_origins(model)
        self.kinds = {v: (old, now) for v, old in before.items() if (now := _kind(v)) != old}

    def _raise_opset(self) -> None:
        model = self.model
        if not 0 < self.opset < INTERNAL_OPSET:
            return
        convert_opset(model, lift=False)
        undo_softmax_expansion(model)
        make_names_unique(model)
        infer_shapes(model, trust=False)

    def end(self) -> None:
        """Take back what the pass left as it was: operator set, shapes, constants, names, notes."""
        model = self.model
        self._lower_opset()
        for value, (old, lent) in self.kinds.items():
            # A value that has become an output needs its type (ONNX specification, IR, Graphs).
            if _kind(value) == lent and not value.is_graph_output():
                value.type, value.shape = old[0], None if old[1] is None else ir.Shape(old[1])
        for value in self.constants:
            value.const_value = None
        if not self.has_origins:
            put_origins_aside(model)
        if self.note is None:
            model.metadata_props.pop(NOTE, None)
        self._restore_names()
        _sort(model)
        model.ir_version = max(self.ir_version, least_ir_version(model))

    def _lend_names(self) -> None:
        """Make names unique, and note those that this changes."""
        nodes = {node: (node.name, graph) for graph in all_graphs(self.model) for node in graph}
        values = {value: (value.name, graph) for graph, value in _values(self.model)}
        make_names_unique(self.model)
        self.nodes = {n: (name, str(n.name), graph) for n, (name, graph) in nodes.items() if n.name != name}
        self.values = {v: (name, str(v.name), graph) for v, (name, graph) in values.items() if v.name != name}

    def _lower_opset(self) -> None:
        """Go back to the model's operator set, or as near to it as the nodes allow."""
        model, now = self.model, onnx_opset(self.model)
        if not now and any(node.domain == "" for node in all_nodes(model)):
            model.opset_imports[""] = INTERNAL_OPSET
        if not self.opset or now <= self.opset:
            return
        functions = dict(model.functions)
        model.functions.clear()  # passes do not enter them
        set_opset(model, max(self.opset, min_opset(model)))
        model.functions.update(functions)
        now = onnx_opset(model)
        for function in functions.values():
            # Engines run a function's body with the model's operator set.
            if function.domain != OWN_DOMAIN and self.opset < now > function.opset_imports.get("", now):
                convert_opset(ir.Model(function.graph, ir_version=model.ir_version), now, lift=False)

    def _restore_names(self) -> None:
        """Give back the names that were changed for the time of the loan, unless the pass chose another since."""
        for graph in all_graphs(self.model):
            taken = {node.name for node in graph}
            for node in (n for n in graph if n in self.nodes):
                name, lent, home = self.nodes[node]
                # A node that came out of a body may not take a name that one of the graph has.
                if node.name == lent and (not name or (home is graph and name not in taken)):
                    node.name = name
                    taken.add(name)
        around = dict(_enclosing(self.model.graph, frozenset()))
        for graph, value in list(_values(self.model)):
            name, lent, home = self.values.get(value, (None, "", graph))
            # Names of other bodies may repeat; those of the graphs around may not (ONNX specification, IR, Names).
            if name and value.name == lent and home is graph and name not in around[graph]:
                value.name = name


def _kind(value: ir.Value) -> Kind:
    return value.type, shape_of(value)


def _values(model: ir.Model) -> Iterator[tuple[ir.Graph, ir.Value]]:
    for graph in all_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            yield graph, value


def _enclosing(graph: ir.Graph, outer: frozenset[str]) -> Iterator[tuple[ir.Graph, frozenset[str]]]:
    """Yield every graph with the names that are in use in it and around it."""
    own = {v.name for v in (*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs))}
    known = outer | {name for name in own if name}
    yield graph, known
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _enclosing(attribute.as_graph(), known)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    yield from _enclosing(body, known)


def _sort(model: ir.Model) -> None:
    """Put nodes behind what they read, if they are not: a Constant node has a place, an initializer has none."""
    seen: set[ir.Node] = set()
    for graph in all_graphs(model):
        for node in graph:
            producers = (v.producer() for v in node.inputs if v is not None)
            if any(p is not None and p.graph is graph and p not in seen for p in producers):
                model.graph.sort()
                return
            seen.add(node)


@dataclass(frozen=True)
class Fingerprint:
    """What tells whether a model was changed: its graph without weights, and the tensors it holds.

    Tensors are compared as objects: passes put a new one in place, and do not write into one.
    """

    graph: bytes
    tensors: tuple[ir.TensorProtocol | None, ...]

    @staticmethod
    def of(model: ir.Model, *, annotations: bool = True) -> Fingerprint:
        """Take the fingerprint of a model; without ``annotations`` shapes of inner values do not count."""
        tensors = tuple(v.const_value for graph in all_graphs(model) for v in graph.initializers.values())
        with hollow_weights(model):
            proto = ir.serde.serialize_model(model)
        if not annotations:
            _drop_annotations(proto.graph)
        return Fingerprint(proto.SerializeToString(deterministic=True), tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        same = len(self.tensors) == len(other.tensors)
        same = same and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
        return same and self.graph == other.graph

    __hash__ = None  # type: ignore[assignment]  # compared, never looked up


def _drop_annotations(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for output in graph.output:
        output.ClearField("type")
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                _drop_annotations(body)

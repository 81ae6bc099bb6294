"""Reading an ``onnx_graphsurgeon.Graph``: its own rules of scope, every element type, no weights copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs

from qcompiler.errors import ModelError
from qcompiler.ir.surgeon_tensors import dtype_of, is_a, shape_of, tensor_of, type_of

LEAST_IR_VERSION = 10
"""File format version of a graph that names none: the one of the oldest operator set with all our types."""


def is_surgeon_graph(source: object) -> bool:
    """Return whether an object is an ``onnx_graphsurgeon.Graph``; the library is not imported."""
    return is_a(source, "Graph")


def model_of_surgeon_graph(graph: Any) -> ir.Model:
    """Return the model that an ``onnx_graphsurgeon.Graph`` describes; arrays are shared, nothing of it is changed.

    Where the library's own export would fail, or write something else than the graph holds, this does not: int4
    constants are packed, float8_e4m3fnuz stays what it is, text constants are text, an empty list attribute has a type,
    a whole number where the operator wants a float becomes one, a length of -1 is an open axis, a constant of an outer
    graph is captured rather than repeated, and nodes may come in any order. Tensors are told apart as objects: those
    that share a name, or have none, get names of their own.

    Raises:
        ModelError: the graph has a cycle, inputs or outputs without names of their own, a tensor that is made twice, a
            type that the library does not keep whole (maps, opaque types), sparse constants, or bytes that are no text;
            names the tensor.
    """
    opsets = _opsets(graph)
    functions = [_function(f) for f in graph.functions]
    made = _Scope(opsets, None).build(graph)
    model = ir.Model(
        made,
        ir_version=graph.ir_version or LEAST_IR_VERSION,
        producer_name=graph.producer_name or None,
        producer_version=graph.producer_version or None,
        functions=functions,
    )
    _import_used_domains(model)
    return model


def _opsets(graph: Any) -> dict[str, int]:
    if graph.import_domains is None:
        return {"": int(graph.opset)}
    found = {("" if d.domain == "ai.onnx" else d.domain): int(d.version) for d in graph.import_domains}
    return found or {"": int(graph.opset)}


def _import_used_domains(model: ir.Model) -> None:
    """Import each domain that a node is of, in version 1 where the graph names none, as the library does."""
    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for owner in owners:
        for node in ir.traversal.RecursiveGraphIterator(owner):
            owner.opset_imports.setdefault(node.domain, 1)


def _function(function: Any) -> ir.Function:
    opsets = _opsets(function)
    graph = _Scope(opsets, None, lift=False).build(function)
    nowhere = _Scope(opsets, None)
    attributes = [
        ir.Attr(name, ir.AttributeType.UNDEFINED, None) if value is None else _attribute(name, value, None, nowhere)
        for name, value in function.attrs.items()
    ]
    return ir.Function(function.domain or "", function.name, graph=graph, attributes=attributes)


@dataclass
class _Scope:
    """Values of one graph by the tensor object that each stands for, and the graph around it.

    The library ties nodes together by tensor objects; names may be missing, or stand on several of them.

    Attributes:
        opsets: operator set versions.
        outer: scope of the graph around; a tensor that nothing here makes is looked up there.
        lift: constants become initializers; else, in functions, which have none, Constant nodes.
        values: what was made so far, by identity of the tensor.
        named: the same by the name that the tensors have, for one that stands for another of its name.
        stored: the constants among them.
        taken: names that values have, here and in the graphs around.
        kept: names that belong to one tensor each, by its identity: those of the graph's inputs and outputs.
        given: all names that tensors of the graph have.
        places: how often each tensor is the output of a node, by identity.
    """

    opsets: Mapping[str, int]
    outer: _Scope | None
    lift: bool = True
    values: dict[int, ir.Value] = field(default_factory=dict)
    named: dict[str, list[ir.Value]] = field(default_factory=dict)
    stored: list[ir.Value] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    kept: dict[str, int] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    places: Counter[int] = field(default_factory=Counter)

    def build(self, graph: Any) -> ir.Graph:
        self._survey(graph)
        inputs = [self._own(tensor) for tensor in graph.inputs]
        for tensor in (t for node in graph.nodes for t in node.outputs):
            if not self._is_left_out(tensor):
                self._own(tensor)
        for tensor in (t for node in graph.nodes for t in node.inputs):
            self._local_constant(tensor)
        for tensor in graph.outputs:
            self._local_constant(tensor)
        outputs = [self._operand(tensor) for tensor in graph.outputs]
        nodes = [self._node(node) for node in graph.nodes]
        if not self.lift:
            nodes = [*map(_constant_node, self.stored), *nodes]
        made = ir.Graph(
            inputs,
            [o for o in outputs if o is not None],
            nodes=nodes,
            initializers=self.stored if self.lift else (),
            doc_string=graph.doc_string or None,
            opset_imports=dict(self.opsets),
            name=graph.name,
        )
        if not _in_order(made):
            try:
                made.sort()
            except ValueError as error:
                raise ModelError(f"the graph {graph.name!r} has a cycle: {error}") from error
        return made

    def _survey(self, graph: Any) -> None:
        """Note whose the names are, and refuse inputs, outputs and results that are not one tensor each."""
        self.taken = set() if self.outer is None else set(self.outer.taken)
        self.places = Counter(id(tensor) for node in graph.nodes for tensor in node.outputs)
        for kind, border in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            for tensor in border:
                if not tensor.name:
                    raise ModelError(f"one of the {kind} of the graph {graph.name!r} has no name: name it")
            for name, times in Counter(tensor.name for tensor in border).items():
                if times > 1:
                    raise ModelError(f"{times} {kind} of the graph {graph.name!r} are named {name!r}: rename them")
        inputs = {id(tensor) for tensor in graph.inputs}
        for node in graph.nodes:
            for tensor in node.outputs:
                if tensor.name and self.places[id(tensor)] + (id(tensor) in inputs) > 1:
                    raise ModelError(
                        f"tensor {tensor.name!r} is made by node {node.name!r} ({node.op}), and elsewhere: expected one"
                    )
        self.kept = {tensor.name: id(tensor) for tensor in graph.inputs}
        for tensor in graph.outputs:
            # Where nothing makes the very object, it stands for the tensor of its name.
            own = id(tensor) in self.places or is_a(tensor, "Constant")
            if own and self.kept.setdefault(tensor.name, id(tensor)) != id(tensor):
                raise ModelError(
                    f"an input and another output of the graph {graph.name!r} are named {tensor.name!r}: rename one"
                )
        users = [graph.inputs, graph.outputs, *(tensors for n in graph.nodes for tensors in (n.inputs, n.outputs))]
        self.given = {tensor.name for tensors in users for tensor in tensors}

    def _own(self, tensor: Any) -> ir.Value:
        """Return the value of a tensor that this graph makes."""
        found = self.values.get(id(tensor))
        if found is None:
            found = ir.Value(name=self._new_name(tensor))
            if is_a(tensor, "Constant"):
                _fill(found, tensor)
                self.stored.append(found)
            else:
                found.type, found.shape = type_of(tensor), shape_of(tensor)
            self.values[id(tensor)] = found
            self.named.setdefault(tensor.name, []).append(found)
        return found

    def _new_name(self, tensor: Any) -> str:
        """Return a tensor's name, or one made of it where it has none or another has it."""
        name = tensor.name
        if not name or name in self.taken or self.kept.get(name, id(tensor)) != id(tensor):
            made = (f"{name or 'tensor'}_{i}" for i in count(1))
            name = next(n for n in made if n not in self.taken and n not in self.given)
        self.taken.add(name)
        return str(name)

    def _is_left_out(self, tensor: Any) -> bool:
        """Return whether a tensor is an operand or result that is left out, rather than one nobody has named."""
        if tensor.name or is_a(tensor, "Constant") or id(tensor) in self.values:
            return False
        # Several places cannot make one tensor: there the object only stands for "nothing".
        makers = list(tensor.inputs)
        return self.places[id(tensor)] != 1 or not any(n is not m for n in tensor.outputs for m in makers)

    def _local_constant(self, tensor: Any) -> None:
        if is_a(tensor, "Constant") and self._found(tensor) is None:
            self._own(tensor)

    def _found(self, tensor: Any) -> ir.Value | None:
        """Return the value of this very tensor, here or in a graph around."""
        scope: _Scope | None = self
        while scope is not None:
            if id(tensor) in scope.values:
                return scope.values[id(tensor)]
            scope = scope.outer
        return None

    def _operand(self, tensor: Any) -> ir.Value | None:
        """Return the value that a tensor stands for; None for an operand that is left out."""
        if (found := self._found(tensor)) is not None:
            return found
        if self._is_left_out(tensor):
            return None
        scope: _Scope | None = self
        while scope is not None:
            if same := scope.named.get(tensor.name):
                if len(same) > 1:
                    raise ModelError(f"{len(same)} tensors are named {tensor.name!r}, and nothing tells which is read")
                return same[0]
            scope = scope.outer
        return self._own(tensor)  # nothing makes it: import says so

    def _node(self, node: Any) -> ir.Node:
        domain = node.domain or ""
        domain = "" if domain == "ai.onnx" else domain
        schema = _schema(node.op, domain, self.opsets)
        return ir.Node(
            domain,
            node.op,
            [self._operand(t) for t in node.inputs],
            [_attribute(name, value, schema, self) for name, value in node.attrs.items()],
            outputs=[ir.Value(name="") if self._is_left_out(t) else self.values[id(t)] for t in node.outputs],
            name=node.name or "",  # an empty name stays one, as in a file
        )


def _in_order(graph: ir.Graph) -> bool:
    """Return whether each node comes behind those whose results it or a graph in it reads."""
    seen: set[ir.Node] = set()
    for node in graph:
        if any((p := v.producer()) is not None and p.graph is graph and p not in seen for v in _reads(node)):
            return False
        seen.add(node)
    return True


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            yield from body.outputs
            for inner in body:
                yield from _reads(inner)


def _schema(op: str, domain: str, opsets: Mapping[str, int]) -> defs.OpSchema | None:
    try:
        return defs.get_schema(op, opsets.get(domain, 1), domain)
    except defs.SchemaError:
        return None


def _fill(value: ir.Value, constant: Any) -> None:
    value.const_value = tensor_of(constant)
    value.type = ir.TensorType(value.const_value.dtype)
    value.shape = ir.Shape(value.const_value.shape.numpy())


def _constant_node(value: ir.Value) -> ir.Node:
    tensor = value.const_value
    value.const_value = None
    return ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[value])  # type: ignore[arg-type]  # callers saw one


# ---- attributes -----------------------------------------------------------------------------------------------------

_LISTS = {
    ir.AttributeType.INT: ir.AttributeType.INTS,
    ir.AttributeType.FLOAT: ir.AttributeType.FLOATS,
    ir.AttributeType.STRING: ir.AttributeType.STRINGS,
    ir.AttributeType.TENSOR: ir.AttributeType.TENSORS,
    ir.AttributeType.GRAPH: ir.AttributeType.GRAPHS,
    ir.AttributeType.TYPE_PROTO: ir.AttributeType.TYPE_PROTOS,
}
_FLOATS = {ir.AttributeType.INT: ir.AttributeType.FLOAT, ir.AttributeType.INTS: ir.AttributeType.FLOATS}


def _attribute(name: str, value: Any, schema: defs.OpSchema | None, scope: _Scope) -> ir.Attr:
    wanted = _wanted(name, schema)
    if is_a(value, "AttributeRef"):
        return ir.RefAttr(name, value.name, wanted or _reference_type(value.type))
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        kind, content = _list(name, value, wanted, scope)
    else:
        kind, content = _single(name, value, scope)
    if wanted is not None and _FLOATS.get(kind) == wanted:
        kind, content = wanted, ([float(v) for v in content] if isinstance(content, list) else float(content))
    return ir.Attr(name, kind, content)


def _wanted(name: str, schema: defs.OpSchema | None) -> ir.AttributeType | None:
    if schema is None or name not in schema.attributes:
        return None
    return ir.AttributeType(int(schema.attributes[name].type.value))  # type: ignore[attr-defined]  # an enum of the binding


def _list(
    name: str, values: Iterable[Any], wanted: ir.AttributeType | None, scope: _Scope
) -> tuple[ir.AttributeType, list[Any]]:
    parts = [_single(name, v, scope) for v in values]
    kinds = {kind for kind, _ in parts}
    if not kinds:
        return wanted or ir.AttributeType.INTS, []
    if kinds == {ir.AttributeType.INT, ir.AttributeType.FLOAT}:
        return ir.AttributeType.FLOATS, [float(v) for _, v in parts]
    if len(kinds) > 1 or (kind := kinds.pop()) not in _LISTS:
        raise ModelError(f"attribute {name!r} is a list of several kinds of things; expected one kind")
    return _LISTS[kind], [v for _, v in parts]


def _single(name: str, value: Any, scope: _Scope) -> tuple[ir.AttributeType, Any]:
    kinds = ir.AttributeType
    if isinstance(value, str):
        return kinds.STRING, value
    if isinstance(value, bytes):
        return kinds.STRING, _text(name, value)
    if isinstance(value, bool | int | np.integer | np.bool_):
        return kinds.INT, int(value)
    if isinstance(value, float | np.floating):
        return kinds.FLOAT, float(value)
    if is_a(value, "Constant"):
        return kinds.TENSOR, tensor_of(value)
    if isinstance(value, onnx.TensorProto):
        return kinds.TENSOR, ir.serde.deserialize_tensor(value)
    if is_a(value, "Graph"):
        return kinds.GRAPH, _Scope(scope.opsets, scope).build(value)
    if isinstance(value, onnx.TypeProto):
        made = onnx.helper.make_attribute(name, value)
        return kinds.TYPE_PROTO, ir.serde.deserialize_attribute(made).value
    if isinstance(value, type | np.dtype):
        return kinds.INT, int(dtype_of(value, name))
    raise ModelError(f"attribute {name!r} is a {type(value).__name__}, which no ONNX attribute is")


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"attribute {name!r} is {value[:16]!r}, which is no UTF-8 text; keep such bytes in a uint8 constant"
        ) from error


def _reference_type(kind: Any) -> ir.AttributeType:
    """Return the type of a reference to a function's attribute, which the library keeps as a Python type."""
    simple = {float: ir.AttributeType.FLOAT, int: ir.AttributeType.INT, str: ir.AttributeType.STRING}
    if kind in simple:
        return simple[kind]
    text = str(kind)
    for word in ("float", "int", "str", "Tensor", "Graph"):
        if word in text:
            name = "STRING" if word == "str" else word.upper()
            return ir.AttributeType[name + ("S" if "List" in text else "")]
    return ir.AttributeType.UNDEFINED

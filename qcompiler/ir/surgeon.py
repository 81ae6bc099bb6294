"""Reading an ``onnx_graphsurgeon.Graph``: its own rules of scope, every element type, no weights copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs

from qcompiler.errors import ModelError

LEAST_IR_VERSION = 10
"""File format version of a graph that names none: the one of the oldest operator set with all our types."""


def is_surgeon_graph(source: object) -> bool:
    """Return whether an object is an ``onnx_graphsurgeon.Graph``; the library is not imported."""
    return _is_a(source, "Graph")


def model_of_surgeon_graph(graph: Any) -> ir.Model:
    """Return the model that an ``onnx_graphsurgeon.Graph`` describes; arrays are shared, nothing of it is changed.

    Where the library's own export would fail, or write something else than the graph holds, this does not: int4
    constants are packed, float8_e4m3fnuz stays what it is, text constants are text, an empty list attribute has a type,
    a whole number where the operator wants a float becomes one, a length of -1 is an open axis, a constant of an outer
    graph is captured rather than repeated, and nodes may come in any order.

    Raises:
        ModelError: the graph has a cycle, a type that the library does not keep whole (maps, opaque types), or sparse
            constants; names the tensor.
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


def _is_a(source: object, name: str) -> bool:
    return any(t.__name__ == name and t.__module__.startswith("onnx_graphsurgeon") for t in type(source).__mro__)


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
    """Values of one graph by name, and the graph around it.

    Attributes:
        opsets: operator set versions.
        outer: scope of the graph around; a name that nothing here makes is looked up there.
        lift: constants become initializers; else, in functions, which have none, Constant nodes.
        values: what was made so far.
    """

    opsets: Mapping[str, int]
    outer: _Scope | None
    lift: bool = True
    values: dict[str, ir.Value] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    def build(self, graph: Any) -> ir.Graph:
        inputs = [self._own(tensor) for tensor in graph.inputs]
        for node in graph.nodes:
            for tensor in node.outputs:
                self._own(tensor)
        for tensor in (t for node in graph.nodes for t in node.inputs):
            self._local_constant(tensor)
        for tensor in graph.outputs:
            self._local_constant(tensor)
        outputs = [self._operand(tensor) for tensor in graph.outputs]
        nodes = [self._node(node) for node in graph.nodes]
        stored = [self.values[name] for name in self.constants]
        if not self.lift:
            nodes = [*map(_constant_node, stored), *nodes]
        made = ir.Graph(
            inputs,
            [o for o in outputs if o is not None],
            nodes=nodes,
            initializers=stored if self.lift else (),
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

    def _own(self, tensor: Any) -> ir.Value:
        """Return the value of a tensor that this graph makes."""
        found = self.values.get(tensor.name) if tensor.name else None
        if found is None:
            found = ir.Value(name=tensor.name)
            if _is_a(tensor, "Constant"):
                _fill(found, tensor)
                self.constants[tensor.name] = tensor
            else:
                found.type, found.shape = _type_of(tensor), _shape_of(tensor)
            self.values[tensor.name] = found
        return found

    def _local_constant(self, tensor: Any) -> None:
        if _is_a(tensor, "Constant") and tensor.name not in self.values and not self._is_outer_constant(tensor):
            self._own(tensor)

    def _is_outer_constant(self, tensor: Any) -> bool:
        scope = self.outer
        while scope is not None:
            if tensor.name in scope.values:
                return scope.constants.get(tensor.name) is tensor
            scope = scope.outer
        return False

    def _operand(self, tensor: Any) -> ir.Value | None:
        """Return the value that a tensor stands for; None for an operand that is left out."""
        if not tensor.name:
            return None
        scope: _Scope | None = self
        while scope is not None:
            if tensor.name in scope.values:
                return scope.values[tensor.name]
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
            outputs=[self.values[t.name] if t.name else ir.Value(name="") for t in node.outputs],
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


# ---- tensors --------------------------------------------------------------------------------------------------------


def _fill(value: ir.Value, constant: Any) -> None:
    value.const_value = _tensor(constant)
    value.type = ir.TensorType(value.const_value.dtype)
    value.shape = ir.Shape(value.const_value.shape.numpy())


def _constant_node(value: ir.Value) -> ir.Node:
    tensor = value.const_value
    value.const_value = None
    return ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[value])  # type: ignore[arg-type]


def _tensor(constant: Any) -> ir.TensorProtocol:
    """Return a constant's contents: as they lie in the graph, in their own type, loaded or not."""
    name, values = constant.name, constant._values
    if _is_a(values, "SparseValues"):
        raise ModelError(f"constant {name!r} is sparse: store it dense first")
    if isinstance(kept := getattr(values, "ir_tensor", None), ir.TensorProtocol):
        return kept
    if _is_a(values, "LazyValues"):
        return ir.serde.deserialize_tensor(values.tensor)
    array = np.asarray(values)
    if array.dtype.kind in "OSU":
        flat = [t if isinstance(t, bytes) else str(t).encode() for t in array.reshape(-1).tolist()]
        return ir.StringTensor(flat, shape=ir.Shape(array.shape), name=name)
    if constant._export_dtype is not None:
        array = _converted(array, _dtype(constant._export_dtype, name))
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    return ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)


def _converted(array: np.ndarray[Any, Any], dtype: ir.DataType) -> np.ndarray[Any, Any]:
    """Return float values in another type; those beyond its range saturate where it has no infinity."""
    wanted = dtype.numpy()
    if array.dtype == wanted:
        return array
    if dtype.bitwidth <= 8 and dtype.is_floating_point():
        largest = float(ml_dtypes.finfo(wanted).max)  # type: ignore[no-untyped-call]
        array = np.clip(array, -largest, largest)
    return array.astype(wanted)


def _dtype(dtype: Any, name: str) -> ir.DataType:
    """Return an element type: the library keeps NumPy's, or the number of ONNX's where NumPy has none."""
    try:
        return ir.DataType(dtype) if isinstance(dtype, int) else ir.DataType.from_numpy(np.dtype(dtype))
    except (TypeError, ValueError) as error:
        raise ModelError(f"tensor {name!r} has the type {dtype!r}, which no ONNX type is: {error}") from error


def _type_of(tensor: Any) -> ir.TypeProtocol | None:
    if tensor.dtype is None:
        return None
    if isinstance(tensor.dtype, onnx.TypeProto):
        if tensor.type != "optional_type":
            raise _partly_kept(tensor)
        inner = ir.serde.deserialize_type_proto_for_type(tensor.dtype)
        return None if inner is None else ir.OptionalType(inner)
    dtype = _dtype(tensor.dtype, tensor.name)
    kinds: dict[str | None, ir.TypeProtocol] = {
        None: ir.TensorType(dtype),
        "tensor_type": ir.TensorType(dtype),
        "sequence_type": ir.SequenceType(ir.TensorType(dtype)),
        "sparse_tensor_type": ir.SparseTensorType(dtype),
    }
    if tensor.type not in kinds:
        raise _partly_kept(tensor)
    return kinds[tensor.type]


def _partly_kept(tensor: Any) -> ModelError:
    return ModelError(f"tensor {tensor.name!r} is a {tensor.type}, of which onnx-graphsurgeon keeps a part only")


def _shape_of(tensor: Any) -> ir.Shape | None:
    if tensor.shape is None:
        return None
    axes = [None if d is None or (not isinstance(d, str) and d < 0) else d for d in tensor.shape]
    return ir.Shape([d if d is None or isinstance(d, str) else int(d) for d in axes])


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
    if _is_a(value, "AttributeRef"):
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
    return ir.AttributeType(int(schema.attributes[name].type.value))  # type: ignore[attr-defined]


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
        return kinds.STRING, value.decode("utf-8", "surrogateescape")
    if isinstance(value, bool | int | np.integer | np.bool_):
        return kinds.INT, int(value)
    if isinstance(value, float | np.floating):
        return kinds.FLOAT, float(value)
    if _is_a(value, "Constant"):
        return kinds.TENSOR, _tensor(value)
    if isinstance(value, onnx.TensorProto):
        return kinds.TENSOR, ir.serde.deserialize_tensor(value)
    if _is_a(value, "Graph"):
        return kinds.GRAPH, _Scope(scope.opsets, scope).build(value)
    if isinstance(value, onnx.TypeProto):
        made = onnx.helper.make_attribute(name, value)
        return kinds.TYPE_PROTO, ir.serde.deserialize_attribute(made).value
    if isinstance(value, type | np.dtype):
        return kinds.INT, int(_dtype(value, name))
    raise ModelError(f"attribute {name!r} is a {type(value).__name__}, which no ONNX attribute is")


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

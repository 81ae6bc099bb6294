"""What differs between two graphs, and the graphs that measure each difference by itself.

A value is *cut* when both graphs have it (a name identifies a value) but compute it by different nodes. In the later
graph every reader of a cut value is fed the earlier graph's array, and what the later graph computes for it is handed
out. So one run measures every changed region on the same inputs as before, and no error is carried into the next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import serde

from qcompiler.engine import Array
from qcompiler.ir.graph import is_op

FED = ":fed"
"""Suffix of the graph input that stands for a cut value."""

_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")


@dataclass(frozen=True)
class Cuts:
    """Where to compare two graphs.

    Attributes:
        compared: names of cut values, in the later graph's program order.
        fed_only: values that differ from run to run (random operators): fed, but not compared.
    """

    compared: tuple[str, ...]
    fed_only: tuple[str, ...] = ()

    @property
    def fed(self) -> tuple[str, ...]:
        """Return all values that the later graph is fed."""
        return self.compared + self.fed_only


def find_cuts(before: ir.Model, after: ir.Model) -> Cuts:
    """Return the values of the main graph that both models have but compute differently."""
    suspects = _changed_constants(before.graph, after.graph)
    old = _node_keys(before, frozenset())
    new = _node_keys(after, suspects)
    compared: list[str] = []
    random: list[str] = []
    for node in after.graph:
        for value in node.outputs:
            name = value.name or ""
            if not name or name not in old or not _is_plain_tensor(value):
                continue
            if is_op(node, *_RANDOM):
                random.append(name)
            elif old[name] != new[name]:
                compared.append(name)
    return Cuts(tuple(compared), tuple(random))


def _is_plain_tensor(value: ir.Value) -> bool:
    """Return whether the value is (as far as known) a tensor that NumPy can carry."""
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return False
    return value.dtype is None or value.dtype.bitwidth >= 8


def _changed_constants(before: ir.Graph, after: ir.Graph) -> frozenset[str]:
    """Return the names of initializers whose contents, or whose being one, differ."""
    old, new = before.initializers, after.initializers
    changed = set(old) ^ set(new)
    for name in set(old) & set(new):
        first, second = old[name].const_value, new[name].const_value
        if first is second:
            continue
        if first is None or second is None or not _equal(first, second):
            changed.add(name)
    return frozenset(changed)


def _equal(first: ir.TensorProtocol, second: ir.TensorProtocol) -> bool:
    if first.dtype != second.dtype or tuple(first.shape) != tuple(second.shape):
        return False
    if first.dtype == ir.DataType.STRING:
        return bool((first.numpy() == second.numpy()).all())
    return first.tobytes() == second.tobytes()


def _node_keys(model: ir.Model, suspects: Collection[str]) -> dict[str, tuple[object, ...]]:
    """Return, for each value the main graph computes, what computes it; equal keys compute equal values.

    A node that reads one of ``suspects`` gets a key that no node of another graph has.
    """
    bodies = {name: _function_key(function) for name, function in model.functions.items()}
    made: dict[str, tuple[object, ...]] = {}
    for node in model.graph:
        reads = tuple(v.name if v is not None else None for v in node.inputs)
        tainted = any(name in suspects for name in (*reads, *_captured(node)) if name is not None)
        domain = "" if node.domain == "ai.onnx" else node.domain
        key = (
            domain,
            node.op_type,
            model.opset_imports.get(domain),
            bodies.get(node.op_identifier()),
            reads,
            tuple(v.name for v in node.outputs),
            tuple(_attribute_key(node.attributes[name]) for name in sorted(node.attributes)),
            tainted,
        )
        for value in node.outputs:
            if value.name:
                made[value.name] = key
    return made


def _attribute_key(attribute: ir.Attr) -> bytes:
    return bytes(serde.serialize_attribute(attribute).SerializeToString(deterministic=True))


def _function_key(function: ir.Function) -> bytes:
    return bytes(serde.serialize_function(function).SerializeToString(deterministic=True))


def _captured(node: ir.Node) -> Iterator[str]:
    """Yield the names that the bodies of a node read (their own as well, which does no harm)."""
    for attribute in node.attributes.values():
        bodies: tuple[ir.Graph, ...] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = tuple(attribute.as_graphs())
        for body in bodies:
            yield from (v.name for v in body.outputs if v.name)
            for inner in body:
                yield from (v.name for v in inner.inputs if v is not None and v.name)
                yield from _captured(inner)


def exposed(model: ir.Model, names: Collection[str]) -> ir.Model:
    """Return a copy that hands out the named values of the main graph besides its outputs."""
    copy = model.clone()
    _expose(copy.graph, names)
    return copy


def fed(model: ir.Model, names: Collection[str], arrays: Mapping[str, Array]) -> ir.Model:
    """Return a copy in which the named values are handed out, while their readers read new inputs ``NAME:fed``.

    Args:
        model: left as it is.
        names: values of the main graph.
        arrays: an example array per name, for type and rank.
    """
    copy = model.clone()
    graph = copy.graph
    _expose(graph, names)
    for name, value in _values(graph, names).items():
        array = arrays[name]
        shape = value.shape.copy() if value.shape is not None else ir.Shape([None] * array.ndim)
        inlet = ir.Value(
            name=name + FED, type=ir.TensorType(value.dtype or ir.DataType.from_numpy(array.dtype)), shape=shape
        )
        graph.inputs.append(inlet)
        for user, index in tuple(value.uses()):
            user.replace_input_with(index, inlet)
    return copy


def _values(graph: ir.Graph, names: Collection[str]) -> dict[str, ir.Value]:
    wanted = set(names)
    return {v.name: v for node in graph for v in node.outputs if v.name in wanted}


def _expose(graph: ir.Graph, names: Collection[str]) -> None:
    present = {v.name for v in graph.outputs}
    graph.outputs.extend(v for name, v in _values(graph, names).items() if name not in present)

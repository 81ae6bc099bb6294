"""Read-only views of a graph for analyses: networkx dataflow, convex regions, multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, attr_int, shape_of
from qcompiler.ir.networks import nx
from qcompiler.ir.shapes import element_count


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the subgraphs that a node holds, in the order of its attributes."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


CLOSED_BODIES = frozenset({"SequenceMap"})
"""Operators whose bodies no pass enters.

SequenceMap is itself a function: an engine unfolds it into a Loop over sequences under names of its own, so that
neither the proof nor the profile could say what became of a node inside.
"""
REPEATING = frozenset({"Loop", "Scan"})
"""Operators that may run their body several times in one inference."""


def open_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the main graph and the bodies of If, Loop and Scan at any depth, depth first in program order."""
    yield from _open(model.graph)


def _open(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        if node.op_type not in CLOSED_BODIES:
            for body in bodies(node):
                yield from _open(body)


def holders(model: ir.Model) -> dict[ir.Graph, ir.Node]:
    """Return, for each body in the model, the node that holds it."""
    return {body: node for graph in all_graphs(model) for node in graph for body in bodies(node)}


def repeated_at(graph: ir.Graph, outer: ir.Graph, held_by: Mapping[ir.Graph, ir.Node]) -> ir.Node | None:
    """Return the outermost Loop or Scan that runs ``graph`` over and over while a value of ``outer`` stays the same.

    Args:
        graph: where the value is read.
        outer: where it is made: ``graph`` itself or one around it.
        held_by: from `holders`.

    Returns:
        None if there is no such node: what is computed from the value belongs into ``graph``.
    """
    found = None
    while graph is not outer:
        node = held_by[graph]
        if node.op_type in REPEATING:
            found = node
        assert isinstance(node.graph, ir.Graph)
        graph = node.graph
    return found


def captures(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the outer values that the bodies of a node read, in program order, possibly more than once."""
    for body in bodies(node):
        yield from _captured(body, frozenset())


def _captured(graph: ir.Graph, inside: frozenset[ir.Graph]) -> Iterator[ir.Value]:
    scope = inside | {graph}
    for node in graph:
        for value in (*node.inputs, *captures(node)):
            if value is not None and value.graph not in scope:
                yield value
    for value in graph.outputs:
        producer = value.producer()
        owner = producer.graph if producer is not None else value.graph
        if owner not in scope:
            yield value


def dataflow(graph: ir.Graph) -> nx.DiGraph:
    """Return the graph's nodes by name, in program order, with an edge from each producer to each reader.

    A node with bodies reads what its bodies capture. Nodes carry ``op_type``, edges ``values`` (a tuple of names).
    """
    view = nx.DiGraph()
    for node in graph:
        view.add_node(node.name, op_type=node.op_type)
    for node in graph:
        for value in (*node.inputs, *captures(node)):
            producer = value.producer() if value is not None else None
            if value is None or producer is None or producer.graph is not graph:
                continue
            known = view.get_edge_data(producer.name, node.name, {}).get("values", ())
            if value.name not in known:
                view.add_edge(producer.name, node.name, values=(*known, value.name))
    return view


def is_convex(view: nx.DiGraph, members: Collection[str]) -> bool:
    """Return whether no path leaves the set of nodes and comes back to it."""
    inside = set(members)
    seen: set[str] = set()
    work = [s for name in inside for s in view.successors(name) if s not in inside]
    while work:
        name = work.pop()
        if name in seen:
            continue
        seen.add(name)
        for successor in view.successors(name):
            if successor in inside:
                return False
            work.append(successor)
    return True


def convex_regions(view: nx.DiGraph, members: Collection[str]) -> list[list[str]]:
    """Split a set of nodes into connected convex regions, as large as growing along the edges makes them.

    A convex region can be replaced by one node without closing a cycle. Nodes are in topological order inside a region
    and regions by their first node; ties follow program order, so the result is the same on every run.
    """
    place = {name: index for index, name in enumerate(view.nodes)}
    order = list(nx.lexicographical_topological_sort(view, key=place.__getitem__))
    rank = {name: index for index, name in enumerate(order)}
    inside = set(members)
    region: dict[str, set[str]] = {name: {name} for name in order if name in inside}
    for name in order:
        if name not in inside:
            continue
        for producer in sorted(view.predecessors(name), key=rank.__getitem__):
            if producer not in inside or region[producer] is region[name]:
                continue
            union = region[producer] | region[name]
            if _convex_between(view, union, rank):
                for member in union:
                    region[member] = union
    unique = {id(r): r for r in region.values()}
    found = [sorted(r, key=rank.__getitem__) for r in unique.values()]
    return sorted(found, key=lambda r: rank[r[0]])


def _convex_between(view: nx.DiGraph, members: set[str], rank: dict[str, int]) -> bool:
    """Answer `is_convex` looking only at nodes between the first and the last member."""
    end = max(rank[name] for name in members)
    work = [s for name in members for s in view.successors(name) if s not in members and rank[s] < end]
    seen: set[str] = set()
    while work:
        name = work.pop()
        if name in seen:
            continue
        seen.add(name)
        for successor in view.successors(name):
            if successor in members:
                return False
            if rank[successor] < end:
                work.append(successor)
    return True


_CONV_WEIGHT = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_MATMUL_WEIGHT = {
    "MatMul": 1,
    "FusedMatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "QLinearMatMul": 3,
    "Gemm": 1,
    "QGemm": 3,
}
_RECURRENT = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})


def macs(node: ir.Node, symbol: int = 1) -> int | None:
    """Return the multiply-adds of one run of a convolution, matrix product or recurrent node.

    Args:
        node: the node; ONNX's operators and ONNX Runtime's integer forms of them are known.
        symbol: length taken for symbolic and unknown axes (the batch).

    Returns:
        None for other operators, and where a needed rank is unknown.
    """
    if node.op_type in _CONV_WEIGHT:
        outputs = element_count(node.outputs[0], symbol)
        return _times(outputs, _tail(_input(node, _CONV_WEIGHT[node.op_type]), symbol))
    if node.op_type == "ConvTranspose":
        return _times(element_count(_input(node, 0), symbol), _tail(_input(node, 1), symbol))
    if node.op_type in _MATMUL_WEIGHT:
        return _matmul_macs(node, symbol)
    if node.op_type == "MatMulNBits":
        count = element_count(_input(node, 0), symbol)
        return _times(count, attr_int(node, "N", 0))
    if node.op_type in _RECURRENT:
        return _recurrent_macs(node, symbol)
    return None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _times(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first * second


def _dims(value: ir.Value | None, symbol: int) -> list[int] | None:
    shape = shape_of(value)
    return None if shape is None else [d if isinstance(d, int) else symbol for d in shape]


def _tail(value: ir.Value | None, symbol: int) -> int | None:
    dims = _dims(value, symbol)
    return None if dims is None else math.prod(dims[1:])


def _matmul_macs(node: ir.Node, symbol: int) -> int | None:
    left = _dims(_input(node, 0), symbol)
    right = _dims(_input(node, _MATMUL_WEIGHT[node.op_type]), symbol)
    if not left or not right:
        return None
    if attr_int(node, "transA", 0) and len(left) > 1:
        left[-1], left[-2] = left[-2], left[-1]
    if attr_int(node, "transB", 0) and len(right) > 1:
        right[-1], right[-2] = right[-2], right[-1]
    rows = left[-2] if len(left) > 1 else 1
    columns = right[-1] if len(right) > 1 else 1
    batch_left, batch_right = left[:-2], right[:-2]
    width = max(len(batch_left), len(batch_right))
    batch = 1
    for axis in range(1, width + 1):
        a = batch_left[-axis] if axis <= len(batch_left) else 1
        b = batch_right[-axis] if axis <= len(batch_right) else 1
        batch *= b if a == 1 else a
    return batch * rows * columns * left[-1]


def _recurrent_macs(node: ir.Node, symbol: int) -> int | None:
    steps = _dims(_input(node, 0), symbol)
    weights = element_count(_input(node, 1), symbol)
    recurrent = element_count(_input(node, 2), symbol)
    if steps is None or len(steps) != 3 or weights is None or recurrent is None:
        return None
    return steps[0] * steps[1] * (weights + recurrent)

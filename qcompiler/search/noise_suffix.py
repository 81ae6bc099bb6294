"""Cut a graph down to what some points can change, to be run on what the float graph computes in front."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.engine import Feeds
from qcompiler.ir.analysis import bodies, captures, macs
from qcompiler.ir.graph import all_graphs, is_const
from qcompiler.ir.shapes import element_count


@dataclass(frozen=True)
class Suffix:
    """The part of a float graph behind some points.

    Attributes:
        model: the part as a model; its outputs are those that a point can change.
        feeds: its inputs, values of the float graph.
    """

    model: ir.Model
    feeds: tuple[str, ...]


def cut_suffix(base: ir.Model, starts: Collection[str], opaque: Collection[str] = ()) -> Suffix:
    """Return what a change at some nodes can change.

    Args:
        base: the float graph.
        starts: names of nodes at any depth that read something else than before.
        opaque: values that cannot be fed (they are no tensors), so that they are computed anew.
    """
    changed = _changed(base, frozenset(starts), frozenset(opaque))
    made = {v for node in changed for v in node.outputs}
    read = dict.fromkeys(v for node in changed for v in _reads(node) if v not in made)
    constants = [v for v in read if is_const(v)]
    outside = [v for v in read if not is_const(v)]
    outputs = [v for v in base.graph.outputs if v in made]
    view = ir.GraphView(
        outside, outputs, nodes=changed, initializers=constants, opset_imports=base.graph.opset_imports, name="suffix"
    )
    part = ir.Model(view.clone(), ir_version=base.ir_version)
    part.functions.update(base.functions)
    return Suffix(part, tuple(str(v.name) for v in outside))


def share_of_work(model: ir.Model, works: Mapping[str, float]) -> float:
    """Return the work of a part, switches included, as a share of the float graph's.

    Args:
        model: the part.
        works: work per node of the float graph's main graph (`node_works`).
    """
    return sum(works.get(str(node.name)) or _work(node) for node in model.graph) / max(sum(works.values()), 1.0)


def node_works(model: ir.Model, feed: Feeds) -> dict[str, float]:
    """Return the work of each node of the main graph on a feed: its multiply-adds, or the elements it writes.

    Bodies count once. Named axes have the lengths that the feed gives them, other open axes length 1.
    """
    clone, lengths = model.clone(), _lengths(model, feed)
    for graph in all_graphs(clone):
        for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
            if value.shape is not None:
                dims = [d if isinstance(d, int) else lengths.get(str(d.value), 1) for d in value.shape]
                value.shape = ir.Shape(dims)
    return {str(node.name): _work(node) for node in clone.graph}


def _lengths(model: ir.Model, feed: Feeds) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.shape is not None and str(value.name) in feed:
            axes = zip(value.shape, feed[str(value.name)].shape, strict=False)
            found.update({str(d.value): int(n) for d, n in axes if isinstance(d, ir.SymbolicDim) and d.value})
    return found


def _work(node: ir.Node) -> float:
    written = sum(element_count(v, 1) or 1 for v in node.outputs)
    return float(max(macs(node) or 0, written)) + sum(_work(inner) for body in bodies(node) for inner in body)


def _changed(base: ir.Model, starts: frozenset[str], opaque: frozenset[str]) -> list[ir.Node]:
    """Return, in program order, the nodes of the main graph that change, and what makes opaque values."""
    reached: set[ir.Value] = set()
    found: dict[ir.Node, None] = {}
    for node in base.graph:
        if _holds(node, starts) or any(v in reached for v in _reads(node)):
            found[node] = None
            reached.update(node.outputs)
    work = list(found)
    while work:
        for value in _reads(work.pop()):
            producer = value.producer()
            if producer is not None and producer not in found and _is_opaque(value, opaque):
                found[producer] = None
                work.append(producer)
    return [node for node in base.graph if node in found]


def _holds(node: ir.Node, names: frozenset[str]) -> bool:
    """Return whether a node has one of some names, or a node in its bodies does."""
    return node.name in names or any(_holds(inner, names) for body in bodies(node) for inner in body)


def _is_opaque(value: ir.Value, opaque: frozenset[str]) -> bool:
    return value.name in opaque or isinstance(value.type, ir.SequenceType | ir.OptionalType)


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    yield from (v for v in node.inputs if v is not None)
    yield from captures(node)

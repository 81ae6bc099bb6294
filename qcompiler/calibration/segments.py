"""Cut a graph into segments whose looked-at values fit a few megabytes, each to be a session of its own."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Feeds
from qcompiler.ir.graph import is_const

_STEPPED = ("If", "Loop", "Scan")
SCAN_WITHOUT_BATCH = 9
"""Operator set before which a Scan has a batch axis and lengths per sequence; those run as a whole."""
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, eq=False)
class Segment:
    """Neighbouring nodes that run as one model.

    Attributes:
        nodes: in program order.
        inputs: values from in front of the segment.
        outputs: values that are looked at or read behind it.
        constants: initializers that the nodes read.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    constants: tuple[ir.Value, ...]


@dataclass(frozen=True, eq=False)
class Control:
    """An If, Loop or Scan whose bodies are stepped through.

    Attributes:
        node: the node.
        bodies: attribute name to its graph, cut up.
        whole: the node as a segment, for a Loop or Scan without iterations.
    """

    node: ir.Node
    bodies: Mapping[str, Block]
    whole: Segment


@dataclass(frozen=True, eq=False)
class Block:
    """One graph, cut up.

    Attributes:
        graph: the main graph or a body.
        steps: in program order.
        dying: values that no later step reads, for each step.
    """

    graph: ir.Graph
    steps: tuple[Segment | Control, ...]
    dying: tuple[tuple[ir.Value, ...], ...]


@dataclass(frozen=True)
class Cutter:
    """What decides where graphs are cut.

    Attributes:
        names: values to look at, in any graph.
        sizes: expected bytes of those.
        limit: bytes of looked-at values that one segment may hold.
        opset: version of the model's standard operator set.
    """

    names: frozenset[str]
    sizes: Mapping[str, int]
    limit: int
    opset: int

    def block(self, graph: ir.Graph, needed: Sequence[ir.Value]) -> Block:
        """Cut a graph up; ``needed`` are its outputs where someone reads them."""
        pieces = list(self._pieces(graph))
        reads = [set(_reads(piece)) for piece in pieces]
        last: dict[ir.Value, int] = {v: len(pieces) for v in needed}
        for index, values in enumerate(reads):
            for value in values:
                last[value] = max(last.get(value, 0), index)
        steps: list[Segment | Control] = []
        dying: list[list[ir.Value]] = [[] for _ in pieces]
        for index, piece in enumerate(pieces):
            made = [v for node in piece for v in node.outputs if v.name]
            kept = [v for v in made if self.looked_at(v) or last.get(v, -1) > index]
            steps.append(self._step(piece, kept, index, reads[index]))
            for value in kept:
                place = last.get(value, index)
                if place < len(pieces):
                    dying[max(place, index)].append(value)
        return Block(graph, tuple(steps), tuple(map(tuple, dying)))

    def _step(
        self, nodes: Sequence[ir.Node], kept: Sequence[ir.Value], index: int, reads: set[ir.Value]
    ) -> Segment | Control:
        inside = {v for node in nodes for v in node.outputs}
        outside = sorted((v for v in reads if v not in inside), key=lambda v: str(v.name))
        segment = Segment(
            tuple(nodes),
            tuple(v for v in outside if not is_const(v)),
            tuple(kept),
            tuple(v for v in outside if is_const(v)),
        )
        if len(nodes) > 1 or not self._stepped(nodes[0]):
            return segment
        node = nodes[0]
        graphs = {a.name: a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH}
        bodies = {name: self.block(body, body.outputs) for name, body in graphs.items()}
        return Control(node, bodies, segment)

    def _pieces(self, graph: ir.Graph) -> Iterator[list[ir.Node]]:
        """Yield runs of nodes: control flow to step through alone, others up to the limit."""
        piece: list[ir.Node] = []
        used = 0
        for node in graph:
            size = sum(self.sizes.get(str(v.name), 0) for v in node.outputs if self.looked_at(v))
            if piece and (self._stepped(node) or used + size > self.limit):
                yield piece
                piece, used = [], 0
            piece.append(node)
            used += size
            if self._stepped(node) or _is_half(node):
                yield piece
                piece, used = [], 0
        if piece:
            yield piece

    def looked_at(self, value: ir.Value) -> bool:
        """Return whether a value is to be looked at, if it is a float tensor."""
        return value.name in self.names

    def _stepped(self, node: ir.Node) -> bool:
        """Return whether the bodies of a control flow node hold a looked-at value, at any depth."""
        if node.op_type not in _STEPPED or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type == "Scan" and self.opset < SCAN_WITHOUT_BATCH:
            return False
        return any(
            self.looked_at(v) or self._stepped(inner)
            for body in bodies_of(node)
            for inner in body
            for v in (*body.inputs, *inner.outputs)
        )


def _is_half(node: ir.Node) -> bool:
    """Return whether a node gives numbers of half precision: those end a piece.

    Engines without kernels for them compute in float32 and leave out the rounding between two nodes of one session, so
    that numbers would depend on where the cuts are.
    """
    return any(v.dtype in HALVES for v in node.outputs)


def bodies_of(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs in a node's attributes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _reads(nodes: Sequence[ir.Node]) -> Iterator[ir.Value]:
    """Yield what nodes read, their bodies' captures included, less what bodies define themselves."""
    for node in nodes:
        yield from (v for v in node.inputs if v is not None)
        for body in bodies_of(node):
            own = set(body.inputs) | {v for inner in body for v in inner.outputs} | set(body.initializers.values())
            yield from (v for v in _reads(list(body)) if v not in own)
            yield from (v for v in body.outputs if v not in own)


def segment_model(segment: Segment, model: ir.Model, types: Mapping[str, ir.TypeProtocol]) -> ir.Model:
    """Return a segment as a model whose inputs have the given types and open shapes."""
    view = ir.GraphView(
        segment.inputs, segment.outputs, nodes=segment.nodes, initializers=segment.constants,
        opset_imports=model.graph.opset_imports, name="segment",
    )  # fmt: skip
    graph = view.clone()
    for value in graph.inputs:
        value.type, value.shape = types[str(value.name)], None
    made = ir.Model(graph, ir_version=model.ir_version)
    made.functions.update(model.functions)
    return made


def estimated_sizes(model: ir.Model, names: Collection[str], feed: Feeds) -> dict[str, int]:
    """Estimate the bytes of the named values when the model runs on a feed.

    The lengths of named axes are read off the inputs; other open axes take the longest of those, and a value of unknown
    rank counts as large as the largest one known.
    """
    lengths: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.shape is not None and value.name is not None and value.name in feed:
            axes = zip(value.shape, np.asarray(feed[value.name]).shape, strict=False)
            lengths.update({str(d.value): n for d, n in axes if isinstance(d, ir.SymbolicDim) and d.value is not None})
    longest = max(lengths.values(), default=1)
    found = [v for node in model.graph.all_nodes() for v in node.outputs if v.name in names]
    sizes: dict[str, int] = {}
    for value in found:
        if value.shape is not None:
            dims = [d if isinstance(d, int) else lengths.get(str(d.value), longest) for d in value.shape]
            sizes[str(value.name)] = math.prod(dims) * 4
    largest = max(sizes.values(), default=0)
    return {str(v.name): sizes.get(str(v.name), largest) for v in found}

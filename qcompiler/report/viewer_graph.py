"""Read the graph of a dumped stage: what the viewer shows of each node, and where it draws it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.ir.analysis import bodies
from qcompiler.ir.graph import consumers, is_op, origins
from qcompiler.ir.text import tensor_text, type_text
from qcompiler.quant.plan import QuantPlan
from qcompiler.report.viewer_layout import lay_out

PRECISIONS = ("float", "half", "int16", "fp8", "int8", "fp4", "int4", "other")
"""Classes that nodes are coloured by; ``other`` is what carries no float and no quantized number."""

_CLASSES = {
    "FLOAT": "float", "DOUBLE": "float", "FLOAT16": "half", "BFLOAT16": "half", "INT16": "int16", "UINT16": "int16",
    "INT8": "int8", "UINT8": "int8", "INT4": "int4", "UINT4": "int4", "INT2": "int4", "UINT2": "int4",
    "FLOAT8E4M3FN": "fp8", "FLOAT8E4M3FNUZ": "fp8", "FLOAT8E5M2": "fp8", "FLOAT8E5M2FNUZ": "fp8", "FLOAT4E2M1": "fp4",
}  # fmt: skip
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_PAD = 14.0
_HEAD = 34.0
_MOST_NUMBERS = 65536


@dataclass(frozen=True)
class ViewNode:
    """One box of the drawing: a node, or an input or output of the main graph.

    Attributes:
        name: node name; for inputs and outputs the value's.
        op: operator with its domain; ``input`` or ``output``.
        text: its line in the stage's text, without indentation.
        inputs: names of the values it reads, empty for an absent one and for a constant.
        outputs: names of the values it computes.
        types: type and shape of each.
        origins: the imported nodes it comes from.
        precision: one of `PRECISIONS`.
        conversion: whether it only quantizes or dequantizes.
        numbers: what its scales, zero points and other small constants hold, by input position.
        parent: index of the node whose body it is in, -1 for the main graph.
    """

    name: str
    op: str
    text: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    precision: str = "other"
    conversion: bool = False
    numbers: Mapping[int, str] = field(default_factory=dict)
    parent: int = -1

    @property
    def size(self) -> tuple[float, float]:
        """Return (width, height) of the box without a body, in pixels at zoom 1."""
        if self.op in ("input", "output"):
            return max(44.0, 6.0 * min(len(self.name), 26) + 18), 22.0
        label = self.op.rpartition("::")[2]
        return max(58.0, 6.9 * min(len(label), 28) + 18, 5.6 * min(len(self.name), 22) + 16), 34.0


@dataclass(frozen=True)
class ViewGraph:
    """A laid-out stage.

    Attributes:
        nodes: boxes in program order.
        frames: (left, top, width, height) of each box.
        edges: (from, to, name of the value).
        routes: points between the ends of each edge.
        unrouted: indices of edges that are too long to be routed.
    """

    nodes: tuple[ViewNode, ...]
    frames: tuple[tuple[float, float, float, float], ...]
    edges: tuple[tuple[int, int, str], ...]
    routes: tuple[tuple[tuple[float, float], ...], ...]
    unrouted: frozenset[int]


def read_graph(model: ir.Model, text: str, plan: QuantPlan | None = None, before: ViewGraph | None = None) -> ViewGraph:
    """Return the laid-out graph of a stage.

    Args:
        model: the stage's model.
        text: the same graph as `qcompiler.ir.text.print_model` prints it; lines of nodes are taken from it.
        plan: what was planned by then, if anything; decides what counts as computed on quantized data.
        before: another graph, whose layout is taken over if the boxes and edges are the same.
    """
    reader = _Reader(model, text, plan)
    reader.graph(model.graph, -1)
    nodes, edges = tuple(reader.nodes), tuple(reader.edges())
    if before is not None and edges == before.edges and _boxes(nodes) == _boxes(before.nodes):
        return ViewGraph(nodes, before.frames, edges, before.routes, before.unrouted)
    frames, routes, unrouted = _arranged(nodes, edges)
    return ViewGraph(nodes, frames, edges, routes, unrouted)


def _boxes(nodes: Sequence[ViewNode]) -> list[tuple[tuple[float, float], int]]:
    return [(node.size, node.parent) for node in nodes]


# ---- nodes --------------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, model: ir.Model, text: str, plan: QuantPlan | None) -> None:
        self.plan = plan
        self.nodes: list[ViewNode] = []
        self.reads: list[tuple[str, ...]] = []
        self.makers: dict[str, int] = {}
        names = {str(n.name) for n in model.graph.all_nodes()}
        self.lines = _lines_by_name(text, names)

    def graph(self, graph: ir.Graph, parent: int) -> None:
        for value in graph.inputs:
            if parent < 0:
                self._terminal(value, "input", (), (str(value.name),))
        for node in graph:
            self._node(node, parent)
        for value in graph.outputs:
            if parent < 0:
                self._terminal(value, "output", (str(value.name),), ())

    def _terminal(self, value: ir.Value, kind: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        name = str(value.name)
        text = f"{kind} %{name}: {type_text(value)}"
        types = (type_text(value),)
        self._add(ViewNode(name, kind, text, inputs, outputs, types, precision=_value_class(value)), inputs)

    def _node(self, node: ir.Node, parent: int) -> None:
        index = len(self.nodes)
        name = str(node.name)
        op = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        inputs = tuple("" if v is None or v.is_initializer() else str(v.name) for v in node.inputs)
        named = [v for v in node.outputs if v.name]
        outputs, types = tuple(str(v.name) for v in named), tuple(type_text(v) for v in named)
        held = list(bodies(node))
        made = ViewNode(
            name, op, self.lines.get(name, f"{name}: {op}"), inputs, outputs, types, origins(node),
            "other" if held else self._precision(node), is_op(node, *_CONVERSIONS), _numbers(node), parent,
        )  # fmt: skip
        captured = tuple(n for body in held for n in _captured(body))
        self._add(made, (*inputs, *captured))
        for body in held:
            self.graph(body, index)

    def _add(self, node: ViewNode, reads: tuple[str, ...]) -> None:
        for name in node.outputs:
            self.makers.setdefault(name, len(self.nodes))
        self.nodes.append(node)
        self.reads.append(reads)

    def edges(self) -> Iterator[tuple[int, int, str]]:
        """Yield the edges between boxes of the same graph; a capture is an edge to the node that holds the body."""
        for target, reads in enumerate(self.reads):
            for name in dict.fromkeys(reads):
                source = self.makers.get(name)
                if source is not None and source != target and self._parent(source) == self._parent(target):
                    yield source, target, name

    def _parent(self, index: int) -> int:
        return self.nodes[index].parent

    # ---- precision ------------------------------------------------------------------------------------------------

    def _precision(self, node: ir.Node) -> str:
        """Return what a node computes on: the narrowest type it touches, seen through Q/DQ where the plan says so."""
        around = [v for v in (*node.inputs, *node.outputs) if v is not None]
        own = _narrowest([_value_class(v) for v in around])
        if own == "other" and any(v.dtype is None for v in around):
            own = "float"  # what inlining leaves without types came out of a float operator
        form = self._form(node)
        if own not in ("float", "half") or is_op(node, *_CONVERSIONS) or form == "float":
            return own
        dequantized = [_dequantized(v) for v in node.inputs]
        if form is not None:
            return _narrowest([d for d in dequantized if d] or self._planned(node) or [own])
        # No group of the plan: quantized only if everything it reads comes out of storage.
        moving = [d for v, d in zip(node.inputs, dequantized, strict=True) if v is not None and _is_data(v)]
        if moving and all(moving):
            return _narrowest(moving)
        return self._inside(node) or own

    def _inside(self, node: ir.Node) -> str:
        """Return the class of the operator in front if a node stands alone between it and a QuantizeLinear."""
        readers = [reader for value in node.outputs for reader in consumers(value)]
        makers = [self.makers.get(str(v.name)) for v in node.inputs if v is not None and not v.is_initializer()]
        if not readers or not all(is_op(r, "QuantizeLinear") for r in readers) or len(makers) != 1 or makers[0] is None:
            return ""
        before = self.nodes[makers[0]]
        return before.precision if before.precision not in ("other", "float", "half") and not before.conversion else ""

    def _form(self, node: ir.Node) -> str | None:
        if self.plan is None:
            return None
        choice = self.plan.choices.get(str(node.name))
        return None if choice is None else choice.form

    def _planned(self, node: ir.Node) -> list[str]:
        """Return the formats of the points around a node that Q/DQ do not show yet."""
        assert self.plan is not None
        points = self.plan.points
        uses = [points[key] for i in range(len(node.inputs)) if (key := f"{node.name}#{i}") in points]
        values = [points[str(v.name)] for v in (*node.inputs, *node.outputs) if v is not None and v.name in points]
        return [_CLASSES.get(p.spec.format.upper(), "other") for p in (*uses, *values)]


def _lines_by_name(text: str, names: set[str]) -> dict[str, str]:
    """Return the line of each named node; names may hold anything, so every ``: `` is tried as their end."""
    found: dict[str, str] = {}
    for line in text.split("\n"):  # not splitlines: a name may hold other line ends
        if line.startswith("function "):  # local functions come last and have names of their own
            break
        bare = line.strip()
        end = bare.find(": ")
        while end >= 0:
            if (name := bare[:end]) in names and name not in found:
                found[name] = bare.removesuffix(" [")
                break
            end = bare.find(": ", end + 1)
    return found


def _captured(body: ir.Graph) -> Iterator[str]:
    """Yield the names that a body reads, its own among them (those have their maker inside)."""
    yield from (str(v.name) for v in body.outputs)
    for node in body:
        yield from (str(v.name) for v in node.inputs if v is not None and not v.is_initializer())
        for inner in bodies(node):
            yield from _captured(inner)


def _value_class(value: ir.Value) -> str:
    return "other" if value.dtype is None else _CLASSES.get(value.dtype.name, "other")


def _narrowest(classes: Sequence[str]) -> str:
    return max(classes, key=lambda c: -1 if c == "other" else PRECISIONS.index(c), default="other")


def _is_data(value: ir.Value) -> bool:
    return not value.is_initializer() and (value.dtype is None or _value_class(value) in ("float", "half"))


def _dequantized(value: ir.Value | None) -> str:
    """Return the class that a value was stored in, if a DequantizeLinear computes it; else nothing."""
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "DequantizeLinear") or node.inputs[0] is None:
        return ""
    return _value_class(node.inputs[0])


def _numbers(node: ir.Node) -> dict[int, str]:
    """Return what the small constants of a node that quantizes, or computes on integers, hold."""
    quantizes = node.op_type in _CONVERSIONS or "Integer" in node.op_type or node.op_type.startswith("QLinear")
    if node.domain in ("", "ai.onnx") and not quantizes:
        return {}
    found = {}
    for index, value in enumerate(node.inputs):
        tensor = None if value is None or not value.is_initializer() else value.const_value
        if tensor is None or tensor.size > _MOST_NUMBERS or len(tensor.shape) > 1:
            continue
        array = np.asarray(tensor.numpy()).reshape(-1)
        if 1 <= array.size <= 4:
            found[index] = ", ".join(f"{float(x):.6g}" for x in array)
        elif array.size and array.dtype.kind != "S":
            wide = array.astype(np.float64)
            found[index] = f"{array.size} numbers, {wide.min():.6g} to {wide.max():.6g}"
        else:
            found[index] = tensor_text(tensor)
    return found


# ---- places -------------------------------------------------------------------------------------------------------


def _arranged(
    nodes: Sequence[ViewNode], edges: Sequence[tuple[int, int, str]]
) -> tuple[
    tuple[tuple[float, float, float, float], ...],
    tuple[tuple[tuple[float, float], ...], ...],
    frozenset[int],
]:
    """Return frames, routes and unrouted edges; a node with a body is drawn around the body's own layout."""
    inside: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        inside.setdefault(node.parent, []).append(index)
    sizes = [node.size for node in nodes]
    local: dict[int, tuple[float, float]] = {}
    routes: list[tuple[tuple[float, float], ...]] = [()] * len(edges)
    unrouted: set[int] = set()
    parts: dict[int, list[int]] = {}
    for number, (_, target, _) in enumerate(edges):
        parts.setdefault(nodes[target].parent, []).append(number)
    for parent in sorted(inside, reverse=True):  # a body stands behind the node that holds it
        members = inside[parent]
        place = {index: number for number, index in enumerate(members)}
        numbers = parts.get(parent, [])
        made = lay_out([sizes[i] for i in members], [(place[edges[n][0]], place[edges[n][1]]) for n in numbers])
        for index, x, y in zip(members, made.x, made.y, strict=True):
            local[index] = (x - sizes[index][0] / 2, y)
        for position, number in enumerate(numbers):
            routes[number] = made.routes[position]
        unrouted |= {numbers[i] for i in made.unrouted}
        if parent >= 0:
            width, height = sizes[parent]
            sizes[parent] = (max(width, made.width + 2 * _PAD), height + made.height + _PAD)
    corner: dict[int, tuple[float, float]] = {-1: (0.0, 0.0)}
    frames = []
    for index, node in enumerate(nodes):
        left, top = corner[node.parent]
        x, y = left + local[index][0], top + local[index][1]
        corner[index] = (x + _PAD, y + _HEAD)
        frames.append((x, y, *sizes[index]))
    moved = [
        tuple((x + corner[nodes[e[1]].parent][0], y + corner[nodes[e[1]].parent][1]) for x, y in route)
        for e, route in zip(edges, routes, strict=True)
    ]
    return tuple(frames), tuple(moved), frozenset(unrouted)

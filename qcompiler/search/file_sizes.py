"""Whose bytes are these: split the file of a build among fusion groups, conversions at their borders, and the rest.

Weights are most of a file, but not all of it: a node of Q/DQ has a name and the names of what it reads and writes, and
in a small model these weigh more than what eight bits save. So the tables are filled from files that were built.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from qcompiler.ir.graph import all_graphs
from qcompiler.search.attribution import Owners
from qcompiler.search.borders import Border, Kind, form_of, reads, stores

Crossing = tuple[str, Kind]
"""(value, conversion)."""
_DEQUANTIZE, _QUANTIZE, _DYNAMIC = "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"
_MARKS = (":dyn_q", ":dq", ":q", ":scale", ":zero_point")
_REACH = 4


@dataclass(frozen=True)
class FileSizes:
    """Bytes of one file.

    Attributes:
        forms: form of every group that was in force.
        groups: by group: its nodes, with the constants that they alone read.
        conversions: by value and kind, all that the forms call for.
        shared: bytes of weights that several groups read, in whatever format they are stored.
        total: bytes of the whole file.
        bits: stored bits of the weights of all groups, with their scales and zero points.
    """

    forms: Mapping[str, str]
    groups: Mapping[str, int]
    conversions: Mapping[Crossing, int] = field(default_factory=dict)
    shared: int = 0
    total: int = 0
    bits: int = 0

    @property
    def rest(self) -> int:
        """Return the bytes that belong to no group, conversion or shared weight."""
        return self.total - sum(self.groups.values()) - sum(self.conversions.values()) - self.shared


@dataclass(frozen=True)
class FileSplitter:
    """Split files of builds of one graph.

    Attributes:
        owners: index of the canonical graph.
        borders: the values between its groups, by name.
        shared: names of weights that several groups read.
    """

    owners: Owners
    borders: Mapping[str, Border]
    shared: frozenset[str] = frozenset()

    def split(self, data: bytes, forms: Mapping[str, str], bits: int = 0) -> FileSizes:
        """Return whose bytes a file is made of.

        Args:
            data: a serialized build.
            forms: form per group that was in force; unnamed groups are float.
            bits: stored bits of the weights of all groups.
        """
        proto = onnx.load_from_string(data)
        view = _View(proto.graph, self.shared)
        charged: set[Crossing] = {
            (name, kind) for name, border in self.borders.items() for kind in border.charges(forms)
        }
        groups: dict[str, int] = defaultdict(int)
        conversions: dict[Crossing, int] = dict.fromkeys(sorted(charged), 0)
        for node, size in view.sizes():
            found = self._owner(view, node, forms, charged)
            if isinstance(found, tuple):
                conversions[found] += size
            elif found:
                groups[found] += size
        shared = sum(_element(t.ByteSize()) for name, t in view.constants.items() if weight_of(name, self.shared))
        return FileSizes(dict(forms), dict(groups), conversions, shared, len(data), bits)

    def _owner(
        self, view: _View, node: onnx.NodeProto, forms: Mapping[str, str], charged: set[Crossing]
    ) -> str | Crossing | None:
        """Return the group or conversion that a node serves; None if it is neither's."""
        if node.op_type in (_QUANTIZE, _DEQUANTIZE) and node.input[0] in view.constants:
            return next((o for r in view.readers(node) if (o := self._owner(view, r, forms, charged))), None)
        kind = {_DYNAMIC: "dynamic", _QUANTIZE: "quantize", _DEQUANTIZE: "dequantize"}.get(node.op_type)
        if kind == "dequantize":
            for reader in view.readers(node):
                group = self._group(reader)
                if group and reads(forms.get(group, "float")) == "quantize":
                    return group
        value = self._value(node) if kind is not None else None
        if value is not None:
            producer = self.borders[value].producer
            if (value, kind) in charged:
                return value, kind  # type: ignore[return-value]  # one of the three kinds
            if producer and stores(forms.get(producer, "float")):
                return producer
            return next((r for r in self.borders[value].readers if form_of(forms.get(r, "float")) != "float"), None)
        return self._group(node) or self._near(view, node)

    def _group(self, node: onnx.NodeProto) -> str | None:
        found = self.owners.find(node.name)
        return found[1] if found is not None and found[0] == "group" else None

    def _near(self, view: _View, node: onnx.NodeProto) -> str | None:
        """Return the group of what a node that no name tells about writes, or of its first reader that has one."""
        if self.owners.find(node.name) is not None:
            return None
        edge = [node]
        for _ in range(_REACH):
            for each in edge:
                for name in each.output:
                    found = self.owners.find(name) if name else None
                    if found is not None:
                        return found[1] if found[0] == "group" else None
            edge = [reader for each in edge for reader in view.readers(each)]
            for each in edge:
                if (found := self.owners.find(each.name)) is not None:
                    return found[1] if found[0] == "group" else None
        return None

    def _value(self, node: onnx.NodeProto) -> str | None:
        """Return the border's value that a conversion reads or writes."""
        for name in (node.input[0], *node.output[:1]):
            base = str(name)
            for mark in _MARKS:
                base = base.removesuffix(mark)
            if base in self.borders:
                return base
        found = self.owners.find(node.name)
        if found is None:
            return None
        if found[1] in self.borders:
            return found[1]
        written = [name for name, border in self.borders.items() if border.producer == found[1]]
        return written[0] if len(written) == 1 and node.op_type == _QUANTIZE else None


class _View:
    """Nodes, constants and readers of a graph and of the bodies in it."""

    def __init__(self, graph: onnx.GraphProto, shared: frozenset[str]) -> None:
        self.graphs = list(_graphs(graph))
        self.constants = {t.name: t for g in self.graphs for t in g.initializer}
        self.infos = {v.name: v for g in self.graphs for v in g.value_info}
        self.claimed = {name for name in self.constants if weight_of(name, shared)}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for each in self.graphs:
            for node in each.node:
                for name in node.input:
                    self._readers[name].append(node)

    def readers(self, node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
        """Return the nodes that read what a node writes."""
        return [reader for name in node.output if name for reader in self._readers.get(name, ())]

    def sizes(self) -> Iterator[tuple[onnx.NodeProto, int]]:
        """Yield every node with the bytes of it, of what is said of its results, and of constants not seen yet."""
        for graph in self.graphs:
            for node in graph.node:
                size = _element(node.ByteSize() - sum(g.ByteSize() for g in _bodies(node)))
                size += sum(self._info(name) for name in node.output)
                yield node, size + sum(self._claim(name) for name in node.input)

    def _claim(self, name: str) -> int:
        tensor = self.constants.get(name)
        if tensor is None or name in self.claimed:
            return 0
        self.claimed.add(name)
        return _element(tensor.ByteSize()) + self._info(name)

    def _info(self, name: str) -> int:
        """Return the bytes of what is said of a value's type."""
        return _element(self.infos[name].ByteSize()) if name in self.infos else 0


def weight_of(name: str, weights: frozenset[str]) -> str | None:
    """Return the weight that a stored constant is, or holds scales or zero points of; None if it is of none."""
    base = name
    while base not in weights:
        base, mark, _ = base.rpartition(":")
        if not mark:
            return None
    return base


def stored_bits(model: ir.Model, weights: Iterable[str]) -> int:
    """Return the bits that weights take in a build, with their scales and zero points.

    Args:
        model: a build.
        weights: names of the weights in the canonical graph.
    """
    known = frozenset(weights)
    stored = (v for graph in all_graphs(model) for v in graph.initializers.values())
    return 8 * sum(v.const_value.nbytes for v in stored if v.const_value is not None and weight_of(str(v.name), known))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from _graphs(body)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    found = []
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            found.append(attribute.g)
        found += attribute.graphs
    return found


def _element(size: int) -> int:
    """Return the bytes of an element of a list in a protobuf: its own, its tag, and its length."""
    length = size
    count = 1
    while length >= 128:
        length >>= 7
        count += 1
    return size + 1 + count

"""Whose time is it: map what an engine executed back to fusion groups.

Engines rename, split and merge nodes. A node is attributed by its name if it still carries one of ours, else by the
tensors it writes, else by its neighbours in the executed graph.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompiler.engine import Profile
from qcompiler.ir.graph import all_nodes
from qcompiler.targets.groups import Group

_SUFFIX = re.compile(r"(_token_\d+|_nchwc|_nhwc|/duplicated|/\w+Fusion/?|:node|:out\d*|_out\d*)$|^fused ")
_COMPUTING: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("Conv", "FusedConv"), frozenset({"Conv"})),
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "FusedGemm"), frozenset({"MatMul", "Gemm"})),
}
"""Float operators that engines fuse with what follows, and what they were before."""
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@dataclass
class Costs:
    """Microseconds per run of one build.

    Attributes:
        groups: by group name: the operator itself and layout changes around it.
        others: by node name, for nodes that belong to no group.
        conversions: by value name: Q, DQ and dynamic quantization at the borders.
    """

    groups: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    others: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    conversions: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total(self) -> float:
        """Return the sum over everything."""
        return sum(self.groups.values()) + sum(self.others.values()) + sum(self.conversions.values())


@dataclass(frozen=True)
class Owners:
    """Which group (or lone node) each node and value name of the canonical graph belongs to."""

    groups: Mapping[str, str]
    lone: Mapping[str, str]
    nodes: Mapping[str, ir.Node]

    @staticmethod
    def of(model: ir.Model, groups: Sequence[Group]) -> Owners:
        """Index a canonical FLOAT graph."""
        inside: dict[str, str] = {}
        lone: dict[str, str] = {}
        nodes = {group.name: group.root for group in groups}
        for group in groups:
            for node in group.nodes:
                inside[str(node.name)] = group.name
                for value in node.outputs:
                    inside[str(value.name)] = group.name
        for node in all_nodes(model):
            if str(node.name) not in inside:
                lone[str(node.name)] = str(node.name)
                nodes[str(node.name)] = node
                for value in node.outputs:
                    lone[str(value.name)] = str(node.name)
        return Owners(inside, lone, nodes)

    def computing(self, found: tuple[str, str], op_type: str, reads: Collection[str]) -> tuple[str, str]:
        """Return who computes a fused operator that may carry the name of what was fused behind it.

        Args:
            found: what the operator's name says.
            op_type: the engine's operator.
            reads: names of the tensors that it reads.
        """
        kinds = _COMPUTING.get(op_type)
        start = self.nodes.get(found[1])
        if kinds is None or start is None or start.op_type in kinds:
            return found
        edge = [start]
        for _ in range(3):  # an engine fuses an addition and an activation at most
            edge = [p for n in edge for v in n.inputs if v is not None and (p := v.producer()) is not None]
            if fitting := [n for n in edge if n.op_type in kinds]:
                best = max(fitting, key=lambda n: sum(v is not None and v.name in reads for v in n.inputs))
                return self.find(str(best.name)) or found
        return found

    def find(self, name: str) -> tuple[str, str] | None:
        """Return ("group" | "other" | "conversion", key) for an engine's name, or None."""
        base = name
        for base in _stems(name):  # one suffix at a time: a model's own names may end like an engine's
            if base in self.groups:
                return "group", self.groups[base]
            if base in self.lone:
                return "other", self.lone[base]
        if base.endswith(":dequantize"):
            return "conversion", base.removesuffix(":dequantize")
        head, _, tail = base.rpartition("/")
        if re.split("[_:]", tail)[0] in _CONVERSIONS:
            if head in self.groups:
                return "group", self.groups[head]
            return "conversion", head
        for mark in (":q", ":dq", ":dyn_q"):
            if base.endswith(mark) and (stem := base.removesuffix(mark)) in self.groups:
                return "group", self.groups[stem]
        return None


def attribute(profile: Profile, executed: ir.Model, owners: Owners) -> Costs:
    """Split a profile among groups, lone nodes and conversions.

    Args:
        profile: node times by the engine's names.
        executed: the graph that the engine executed, with the same names.
        owners: index of the canonical graph.
    """
    nodes = {str(n.name): n for n in all_nodes(executed)}
    costs = Costs()
    for cost in profile.nodes:
        found = owners.find(cost.name) or _by_dataflow(nodes.get(cost.name), owners) or ("other", cost.name)
        node = nodes.get(cost.name)
        reads = {str(v.name) for v in node.inputs if v is not None} if node is not None else set()
        kind, key = owners.computing(found, cost.op_type, reads)
        book = {"group": costs.groups, "other": costs.others, "conversion": costs.conversions}[kind]
        book[key] += cost.microseconds
    return costs


def _stems(name: str) -> Iterator[str]:
    """Yield a name, and what is left of it as the suffixes that engines append come off one by one."""
    yield name
    while (stem := _SUFFIX.sub("", name)) != name:
        yield stem
        name = stem


def _by_dataflow(node: ir.Node | None, owners: Owners) -> tuple[str, str] | None:
    if node is None:
        return None
    if (found := _first(node.outputs, owners)) is not None:
        return found
    seen, edge = {node}, [node]
    for _ in range(4):  # layout changes sit next to what they serve; farther away a guess is worth nothing
        following = [use.node for n in edge for v in n.outputs for use in v.uses()]
        for reader in following:
            if (found := owners.find(str(reader.name)) or _first(reader.outputs, owners)) is not None:
                return found
        edge = [n for n in following if n not in seen]
        seen.update(edge)
    return _first([v for v in node.inputs if v is not None], owners)


def _first(values: Iterable[ir.Value], owners: Owners) -> tuple[str, str] | None:
    for value in values:
        if value.name and (found := owners.find(value.name)) is not None:
            return found
    return None

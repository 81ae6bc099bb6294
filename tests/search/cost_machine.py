"""A machine whose costs are known: builds only remember their forms, profiles and timings follow from hidden tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompiler.engine import ModelLike, NodeCost, Profile
from qcompiler.quant.plan import Form
from qcompiler.search.borders import Border, Kind, find_borders
from qcompiler.search.cost_cache import CostCache
from qcompiler.search.measure_costs import CostMeter
from qcompiler.search.timing import Timing
from qcompiler.targets.groups import Group
from tests.search.nets import TARGET, chain, net

OPERATORS: Mapping[Kind, str] = {
    "quantize": "QuantizeLinear",
    "dequantize": "DequantizeLinear",
    "dynamic": "DynamicQuantizeLinear",
}
ELEMENTS = {"x": 256, "v0": 1000, "v1": 2000, "v2": 3000, "y": 4000}


@dataclass(frozen=True)
class Built:
    model: ir.Model
    forms: dict[str, Form]


@dataclass
class CostMachine:
    """Builds and a stopwatch.

    Attributes:
        model: the graph.
        groups: its groups.
        elements: elements per value.
        group_us: microseconds of a group in a form, beside neighbours in theirs.
        conversion_us: microseconds of a conversion.
        lone_us: microseconds of each lone node.
        hidden: microseconds per node that no profile shows.
        slower: factor on whole models, of a machine that is busy.
        pace: factor on everything, of a machine whose clock changed.
        unsteady: median / minimum of whole models.
        profiled: forms of every profile that was taken.
    """

    model: ir.Model
    groups: Sequence[Group]
    elements: Mapping[str, int]
    group_us: Callable[[str, str, Mapping[str, Form]], float]
    conversion_us: Callable[[Border, Kind], float] = lambda border, kind: 2.0 + 0.01 * border.elements
    lone_us: Callable[[str, Mapping[str, Form]], float] = lambda name, forms: 7.0
    hidden: float = 0.0
    slower: float = 1.0
    pace: float = 1.0
    unsteady: float = 1.0
    made: list[tuple[ir.Model, dict[str, Form]]] = field(default_factory=list)
    profiled: list[dict[str, Form]] = field(default_factory=list)
    timed: int = 0

    def build(self, forms: Mapping[str, Form], engine_forms: Mapping[str, str]) -> Built:
        model = self.model.clone()
        self.made.append((model, dict(forms)))
        return Built(model, dict(forms))

    def nodes(self, forms: Mapping[str, Form]) -> list[NodeCost]:
        found = []
        inside = {node.name for g in self.groups for node in g.nodes}
        for group in self.groups:
            us = self.group_us(group.name, forms.get(group.name, "float"), forms)
            found.append(NodeCost(group.name, group.root.op_type, us))
        found += [NodeCost(str(n.name), n.op_type, self.lone_us(str(n.name), forms)) for n in self.lone(inside)]
        for name, border in find_borders(self.groups, self.elements).items():
            for kind in border.charges(forms):
                found.append(NodeCost(f"{name}/{OPERATORS[kind]}", OPERATORS[kind], self.conversion_us(border, kind)))
        return found

    def lone(self, inside: set[str | None]) -> list[ir.Node]:
        return [n for n in self.model.graph if n.name not in inside]

    def whole_us(self, forms: Mapping[str, Form]) -> float:
        nodes = self.nodes(forms)
        return self.slower * self.pace * (sum(n.microseconds for n in nodes) + self.hidden * len(nodes))

    def _forms(self, model: ModelLike) -> dict[str, Form]:
        return next(forms for made, forms in self.made if made is model)

    def profile(self, model: ModelLike) -> tuple[Profile, ir.Model]:
        forms = self._forms(model)
        self.profiled.append(forms)
        nodes = (replace(node, microseconds=self.pace * node.microseconds) for node in self.nodes(forms))
        return Profile(tuple(nodes)), self.model

    def compare(self, models: Mapping[str, ModelLike]) -> dict[str, Timing]:
        self.timed += 1
        seconds = {name: self.whole_us(self._forms(model)) * 1e-6 for name, model in models.items()}
        return {name: Timing(s, s * self.unsteady, 3) for name, s in seconds.items()}


def alone(table: Mapping[str, Mapping[str, float]]) -> Callable[[str, str, Mapping[str, Form]], float]:
    """Return costs that no neighbour changes."""
    return lambda name, form, forms: table[name][form]


THREE = {
    "c0": {"float": 100.0, "static": 30.0},
    "c1": {"float": 200.0, "static": 60.0},
    "c2": {"float": 50.0, "static": 70.0},
}


def machine_of(*ops: str, us: Mapping[str, Mapping[str, float]] = THREE) -> CostMachine:
    """Return a machine for a chain of operators, three Conv and a Tanh by default."""
    model, groups = net(chain(*(ops or ("Conv", "Conv", "Conv", "Tanh"))))
    return CostMachine(model, list(groups.values()), ELEMENTS, alone(us))


def meter_of(
    machine: CostMachine, cache: CostCache | None = None, engine_forms: Mapping[str, str] | None = None
) -> CostMeter:
    return CostMeter(
        machine.model, machine.groups, TARGET, machine.build, machine, machine.elements, engine_forms or {}, cache
    )


def all_static(machine: CostMachine) -> dict[str, Form]:
    return {g.name: "static" for g in machine.groups}

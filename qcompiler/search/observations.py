"""What one build cost on the engine: its profile, split among groups, conversions and the rest, at the real scale.

A profiler sees operators, not what lies between them: its clock ticks in microseconds, and dispatch and Python are not
in it. The whole model is therefore timed without the profiler as well, and the profile is brought to that time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompiler.engine import NodeCost, Profile
from qcompiler.ir.graph import all_nodes
from qcompiler.search.attribution import Owners, attribute
from qcompiler.search.borders import Border, Kind, form_of, stores

_CONVERTING: Mapping[str, Kind] = {
    "QuantizeLinear": "quantize",
    "DequantizeLinear": "dequantize",
    "DynamicQuantizeLinear": "dynamic",
}
_MARKS = (":dyn_q", ":dq", ":q")
_LAYOUT = frozenset({"ReorderInput", "ReorderOutput", "Transpose", "Sum", "Identity", "Cast", "Reorder", "Reformat"})
"""Operators that engines and lowerings put where regions of different layouts or types meet (Sum of one: a barrier)."""
_REACH = 3
_MOST_OVERHEAD = 1.5
"""Microseconds that one node may cost beside its kernel: what the profiler adds, or what it does not see."""
_RUN_NODES = 4
"""What a run costs beside its nodes (feeds, results, the call itself), counted in nodes."""
_LEAST_US = 0.05

RUN = "(run)"
"""Key of the part of a run that belongs to no node."""


@dataclass(frozen=True)
class Observation:
    """Microseconds of one build, at the scale of the whole model's run.

    Attributes:
        forms: the option of every group that was in force.
        groups: by group.
        conversions: by value and kind, those that the forms call for.
        others: by lone node.
        whole_us: minimum of the whole model's runs, timed without profiler.
        steady: whether minimum and median agree as on an idle machine.
        overhead: sum of the raw profile / ``whole_us``.
    """

    forms: Mapping[str, str]
    groups: Mapping[str, float]
    conversions: Mapping[tuple[str, Kind], float] = field(default_factory=dict)
    others: Mapping[str, float] = field(default_factory=dict)
    whole_us: float = 0.0
    steady: bool = True
    overhead: float = 1.0


def at_scale(profile: Profile, whole_us: float) -> Profile:
    """Return a profile whose nodes, and one for the run itself, add up to the measured time of the whole model.

    What is missing or too much is taken to lie between nodes, alike for each, up to `_MOST_OVERHEAD`; the rest was a
    slower or faster spell of the machine, in proportion to each node's time.

    Args:
        profile: node times as the engine's profiler gave them.
        whole_us: microseconds of a run without profiler; 0 leaves the profile as it is.
    """
    if whole_us <= 0 or profile.total <= 0:
        return profile
    nodes = _with_gaps(profile, whole_us)
    scale = whole_us / sum(n.microseconds for n in nodes)
    return replace(profile, nodes=tuple(replace(n, microseconds=n.microseconds * scale) for n in nodes))


def real_share(profile: Profile, whole_us: float) -> float:
    """Return the measured time of a model / the sum of its profile and of what lies between nodes; about 1."""
    if whole_us <= 0 or profile.total <= 0:
        return 1.0
    return whole_us / sum(n.microseconds for n in _with_gaps(profile, whole_us))


def _with_gaps(profile: Profile, whole_us: float) -> list[NodeCost]:
    gap = (whole_us - profile.total) / (len(profile.nodes) + _RUN_NODES)
    each = min(max(gap, -_MOST_OVERHEAD), _MOST_OVERHEAD)
    nodes = [replace(n, microseconds=max(n.microseconds + each, _LEAST_US)) for n in profile.nodes]
    nodes.append(NodeCost(RUN, RUN, max(each, 0.0) * _RUN_NODES))
    return nodes


@dataclass(frozen=True)
class Observer:
    """Turn profiles of builds of one graph into observations.

    Attributes:
        owners: index of the canonical graph.
        borders: its borders by value.
    """

    owners: Owners
    borders: Mapping[str, Border]

    def observe(
        self, forms: Mapping[str, str], profile: Profile, executed: ir.Model, whole_us: float, steady: bool = True
    ) -> Observation:
        """Split a profile of a build in the given forms, at the scale of its real time.

        Args:
            forms: options in force, of every group.
            profile: node times by the engine's names.
            executed: the graph that the engine executed.
            whole_us: microseconds of a run without profiler; 0 if it was not timed.
            steady: whether that timing was steady.
        """
        scaled = at_scale(profile, whole_us)
        nodes = {str(n.name): n for n in all_nodes(executed)}
        charged = {(name, kind) for name, border in self.borders.items() for kind in border.charges(forms)}
        conversions: dict[tuple[str, Kind], float] = defaultdict(float)
        groups: dict[str, float] = defaultdict(float)
        rest = []
        for cost in scaled.nodes:
            found = self._conversion(cost, nodes.get(cost.name))
            if found is None and cost.op_type in _LAYOUT:
                found = self._crossing(cost, nodes.get(cost.name), charged)
            if found in charged:
                assert found is not None
                conversions[found] += cost.microseconds
            elif found is not None and (owner := self._payer(found, forms)):
                groups[owner] += cost.microseconds
            else:
                rest.append(cost)
        costs = attribute(replace(scaled, nodes=tuple(rest)), executed, self.owners)
        for name, spent in costs.groups.items():
            groups[name] += spent
        others = dict(costs.others)
        for name, spent in costs.conversions.items():  # of a value that no choice of forms converts
            others[name] = others.get(name, 0.0) + spent
        overhead = profile.total / whole_us if whole_us > 0 else 1.0
        return Observation(dict(forms), dict(groups), dict(conversions), others, scaled.total, steady, overhead)

    def _conversion(self, cost: NodeCost, node: ir.Node | None) -> tuple[str, Kind] | None:
        """Return (value, kind) of a conversion of a border's value."""
        kind = _CONVERTING.get(cost.op_type)
        if kind is None:
            return None
        read = node.inputs[0] if node is not None and node.inputs else None
        names = [str(v.name) for v in (read, *(node.outputs[:1] if node is not None else ())) if v is not None]
        for name in names:
            if (value := self._value(name)) is not None:
                return value, kind
        found = self.owners.find(cost.name)
        if found is None:
            return None
        if (value := self._value(found[1])) is not None:
            return value, kind
        written = [name for name, border in self.borders.items() if border.producer == found[1]]
        return (written[0], kind) if len(written) == 1 else None

    def _crossing(
        self, cost: NodeCost, node: ir.Node | None, charged: Collection[tuple[str, Kind]]
    ) -> tuple[str, Kind] | None:
        """Return the conversion for whose sake an engine changes a layout beside it, if that is why."""
        if node is None or cost.name in self.owners.groups or cost.name in self.owners.lone:
            return None
        kinds = {name: kind for name, kind in charged if kind != "dynamic"}
        edge, seen = [node], {node}
        for _ in range(_REACH):
            values = [v for n in edge for v in (*n.inputs, *n.outputs) if v is not None and v.name]
            for value in values:
                if (name := self._value(str(value.name))) in kinds:
                    assert name is not None
                    return name, kinds[name]
            near = [n for v in values for n in (v.producer(), *(use.node for use in v.uses())) if n is not None]
            edge = [n for n in dict.fromkeys(near) if n not in seen and n.op_type in (*_LAYOUT, *_CONVERTING)]
            seen.update(edge)
        return None

    def _value(self, name: str) -> str | None:
        """Return the border's value behind the name of a tensor that was derived from it."""
        base = next((name.removesuffix(mark) for mark in _MARKS if name.endswith(mark)), name)
        while base not in self.borders:
            _, slash, base = base.partition("/")  # a reader's own copy is called READER/VALUE:dq
            if not slash:
                return None
        return base

    def _payer(self, found: tuple[str, Kind], forms: Mapping[str, str]) -> str:
        """Return the group that a conversion serves which the rules do not foresee: an engine that did not fuse it."""
        border = self.borders[found[0]]
        if border.producer and stores(forms.get(border.producer, "float")):
            return border.producer
        return next((r for r in border.readers if form_of(forms.get(r, "float")) != "float"), "")


def lone_excess(
    observed: Observation, reference: Observation, neighbours: Mapping[str, Collection[str]]
) -> dict[str, float]:
    """Return what lone nodes cost more than in the reference, by the group that has to answer for it.

    An engine fuses lone nodes with each other (Sigmoid and Mul, Add and LayerNormalization), which a conversion between
    them prevents. What no neighbouring group answers for is shared by all groups that are not in float.

    Args:
        observed: a build.
        reference: the build in which lone nodes count as the fixed part.
        neighbours: groups around each lone node.
    """
    changed = [name for name, form in observed.forms.items() if form_of(form) != "float"]
    more: dict[str, float] = defaultdict(float)
    for name in {*observed.others, *reference.others}:
        excess = observed.others.get(name, 0.0) - reference.others.get(name, 0.0)
        around = [g for g in neighbours.get(name, ()) if g in changed] or changed
        for group in around:
            more[group] += excess / len(around)
    return dict(more)

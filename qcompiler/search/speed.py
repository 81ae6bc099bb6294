"""The speed guard's tools: return to float every region that loses, avoid engine traps, compare whole models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_ir as ir

from qcompiler.engine import ModelLike
from qcompiler.ir.networks import nx
from qcompiler.quant.plan import Form
from qcompiler.search.attribution import Costs, Owners, attribute
from qcompiler.search.timing import Stopwatch
from qcompiler.targets.groups import Group


class Lowered(Protocol):
    """What a build offers the searches."""

    @property
    def model(self) -> ir.Model:
        """Return the LOWERED graph."""
        ...

    @property
    def forms(self) -> dict[str, Form]:
        """Return the forms in force."""
        ...


BuildForms = Callable[[Mapping[str, Form], Mapping[str, str]], Lowered]


@dataclass
class SpeedSearch:
    """Find the fastest forms on the engine itself.

    Attributes:
        model: the canonical FLOAT graph.
        groups: its fusion groups.
        build: makes a build of forms and engine-specific rewrites.
        stopwatch: measures.
        elements: elements per value in the measured feed.
        frozen: forms that a user pinned.
        figures: what was measured, for the decisions record.
        why: reason per group whose form measurement decided.
    """

    model: ir.Model
    groups: Sequence[Group]
    build: BuildForms
    stopwatch: Stopwatch
    elements: Mapping[str, int]
    frozen: Mapping[str, Form] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.owners = Owners.of(self.model, self.groups)
        self.float_costs: Costs | None = None

    def costs(self, forms: Mapping[str, Form], engine_forms: Mapping[str, str]) -> Costs:
        """Profile one choice of forms."""
        profile, executed = self.stopwatch.profile(self.build(forms, engine_forms).model)
        return attribute(profile, executed, self.owners)

    def return_losers(
        self, forms: Mapping[str, Form], engine_forms: Mapping[str, str], rounds: int = 3
    ) -> dict[str, Form]:
        """Return regions to float that cost more than they did in float, borders included, until none is left."""
        assert self.float_costs is not None
        current = dict(forms)
        returned: list[dict[str, Any]] = []
        for _ in range(rounds):
            if all(form == "float" for form in current.values()):
                break
            costs = self.costs(current, engine_forms)
            free = {g.name for g in self.groups if self.frozen.get(g.name, "float") == "float"}
            losers = [r for r in self.regions(current) if r & free and self._loss(r, costs, current) > 0]
            if not losers:
                break
            for region in losers:
                loss = self._loss(region, costs, current)
                returned.append({"groups": sorted(region & free), "loss_us": round(loss, 1)})
                for name in region & free:
                    current[name] = "float"
                    self.why[name] = f"float: its region was measured {loss:.0f} us slower on integers"
        if returned:
            self.figures["regions_returned"] = returned
        return current

    def _loss(self, region: frozenset[str], costs: Costs, forms: Mapping[str, Form]) -> float:
        """Return by how many microseconds a region is slower than in float; differences in noise count as none."""
        assert self.float_costs is not None
        border = {str(v.name) for g in self.groups if g.name in region for v in (*g.data, *g.results)} | region
        spent = sum(costs.groups.get(n, 0.0) for n in region)
        spent += sum(t for name, t in costs.conversions.items() if name in border)
        before = sum(self.float_costs.groups.get(n, 0.0) for n in region)
        return spent - before if spent > 1.02 * before + 1.0 else 0.0

    def regions(self, forms: Mapping[str, Form]) -> list[frozenset[str]]:
        """Return the connected sets of groups that hand each other integers."""
        view: nx.Graph = nx.Graph()
        stored = {str(v.name): g.name for g in self.groups if forms.get(g.name) == "static" for v in g.results}
        first: dict[str, str] = {}
        for group in self.groups:
            if forms.get(group.name, "float") == "float":
                continue
            view.add_node(group.name)
            for value in group.data:
                name = str(value.name)
                other = stored.get(name) or first.setdefault(name, group.name)
                if other != group.name:
                    view.add_edge(other, group.name)
        return [frozenset(part) for part in nx.connected_components(view)]

    def avoid_traps(
        self, forms: Mapping[str, Form], traps: Mapping[str, str], base: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the engine-specific rewrites that were measured to win at least 1 %."""
        chosen = dict(base)
        best = self.build(forms, chosen).model
        for trap in traps:
            trial = {**chosen, trap: "avoid"}
            model = self.build(forms, trial).model
            if same_nodes(best, model):
                continue
            times = self.stopwatch.compare({"with": best, "without": model})
            gain = times["with"].minimum / times["without"].minimum
            self.figures.setdefault("traps", {})[trap] = round(gain, 3)
            if gain >= 1.01:
                chosen, best = trial, model
        return chosen

    def ratio(self, reference: ModelLike, model: ModelLike) -> tuple[float, float]:
        """Return reference / model latency by minimum and by median, timed interleaved."""
        pair = {"reference": reference, "model": model}
        times = self.stopwatch.compare(pair)
        if 0.93 < times["reference"].minimum / times["model"].minimum < 1.07:
            # Too close to call on a shared machine: the minimum over two comparisons decides.
            again = self.stopwatch.compare(pair)
            times = {name: min(times[name], again[name], key=lambda t: t.minimum) for name in pair}
        a, b = times["reference"], times["model"]
        return a.minimum / b.minimum, a.median / b.median


def same_nodes(a: ir.Model, b: ir.Model) -> bool:
    """Return whether two builds have the same nodes by operator and name."""
    return [(n.op_type, n.name) for n in a.graph.all_nodes()] == [(n.op_type, n.name) for n in b.graph.all_nodes()]

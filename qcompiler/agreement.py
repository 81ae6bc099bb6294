"""Make graphs agree on the weights that they share: one quantized form, scale and zero point, where all can bear it.

Each graph decides by itself first. Where one left a shared weight in float that another has on integers, it is offered
the other's form, and takes it unless it then misses its accuracy bound, is slower than its float model, or clearly
slower than with the forms that it chose alone: all three are measured.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from qcompiler.compilation import Compilation
from qcompiler.ir.graph import is_const
from qcompiler.ir.serialize import EXTERNAL_THRESHOLD
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.precision import in_precision_of
from qcompiler.quant.plan import Form, QuantPlan, use_point
from qcompiler.quant.spec import QuantSpec
from qcompiler.search.speed import SpeedSearch
from qcompiler.search.timing import EngineStopwatch
from qcompiler.targets.groups import Group
from qcompiler.workshop import AS_GIVEN

MOST_TRIALS = 32
"""Builds that are measured for one graph."""
KEPT_SPEED = 0.95
"""Least share of the speed with its own choice of forms that a graph keeps."""
Spec = QuantSpec | None
"""How a weight is stored: None is float."""


@dataclass(frozen=True)
class WeightUse:
    """One constant that a group computes with.

    Attributes:
        group: its name.
        index: input position at the group's root.
        name: the initializer's name in the canonical graph.
    """

    group: str
    index: int
    name: str


@dataclass(frozen=True)
class SharedWeight:
    """One weight of several canonical graphs.

    Attributes:
        digest: of type, shape and contents.
        nbytes: its size as given.
        elements: numbers in it.
        uses: who computes with it, by graph.
    """

    digest: str
    nbytes: int
    elements: int
    uses: Mapping[str, tuple[WeightUse, ...]]

    def stored(self, spec: Spec) -> int:
        """Return about how many bytes a form of it takes."""
        return self.nbytes if spec is None else -(-self.elements * spec.storage.bits // 8)


@dataclass
class Decided:
    """What one graph has decided so far.

    Attributes:
        compilation: prepared and decided.
        forms: form per group.
        engine_forms: rewrites.
        figures: what agreeing did to it.
        refused: why a group did not take another graph's form, by group.
    """

    compilation: Compilation
    forms: dict[str, Form]
    engine_forms: dict[str, str]
    figures: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    trials: int = 0

    def plan(self, forms: Mapping[str, Form] | None = None) -> QuantPlan:
        """Return the plan of a choice of forms, its own by default."""
        workshop = self.compilation.workshop
        if self.engine_forms.get(AS_GIVEN) == "keep":
            return QuantPlan()
        state = workshop.base.clone()
        chosen = self.forms if forms is None else forms
        state.forms = {
            g.name: "float" if g.name in workshop.refused else chosen.get(g.name, "float") for g in workshop.groups
        }
        PlanQuantization(estimator=workshop.estimator).run(state)
        return state.plan


def find_shared(compilations: Mapping[str, Compilation]) -> tuple[SharedWeight, ...]:
    """Return the weights that groups of more than one canonical graph compute with, the largest first."""
    uses: dict[str, dict[str, list[WeightUse]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for graph, compilation in compilations.items():
        seen: dict[ir.Value, str] = {}
        for use, value, tensor in _weights(compilation.workshop.groups):
            if value not in seen:
                made = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
                made.update(tensor.tobytes())
                seen[value] = made.hexdigest()
            sizes[seen[value]] = (tensor.nbytes, tensor.size)
            uses.setdefault(seen[value], {}).setdefault(graph, []).append(use)
    found = [
        SharedWeight(digest, *sizes[digest], {graph: tuple(u) for graph, u in graphs.items()})
        for digest, graphs in uses.items()
        if len(graphs) > 1
    ]
    return tuple(sorted(found, key=lambda w: -w.nbytes))


def _weights(groups: Sequence[Group]) -> Iterator[tuple[WeightUse, ir.Value, ir.TensorProtocol]]:
    for group in groups:
        indices = {"weighted": (group.row.weight,), "recurrent": (1, 2)}.get(group.row.kind, ())
        for index in indices if group.legal else ():
            value = group.root.inputs[index]
            if value is None or not is_const(value) or value.const_value is None:
                continue
            if value.const_value.nbytes >= EXTERNAL_THRESHOLD:
                yield WeightUse(group.name, index, str(value.name)), value, value.const_value


def spec_of(plan: QuantPlan, use: WeightUse) -> Spec:
    """Return how a plan stores a weight; None is float."""
    point = plan.points.get(use_point(use.group, use.index))
    return None if point is None else point.spec


def specs_of(weight: SharedWeight, plans: Mapping[str, QuantPlan]) -> dict[str, Spec]:
    """Return how each graph stores a weight; of several uses in one graph the first that is on integers counts."""
    found: dict[str, Spec] = {}
    for graph, uses in weight.uses.items():
        specs = [spec_of(plans[graph], use) for use in uses]
        found[graph] = next((s for s in specs if s is not None), None)
    return found


def agree(decided: Mapping[str, Decided], shared: Sequence[SharedWeight]) -> None:
    """Offer each graph, in place, the forms of the weights that others have on integers and it has in another way."""
    plans = {name: d.plan() for name, d in decided.items()}
    offers: dict[str, list[tuple[SharedWeight, QuantSpec, Form]]] = {}
    for weight in shared:
        specs = specs_of(weight, plans)
        counts = Counter(s for s in specs.values() if s is not None)
        if not counts or len(set(specs.values())) == 1:
            continue
        wanted = max(counts, key=lambda s: (counts[s], s == next(x for x in specs.values() if x is not None)))
        giver = next(graph for graph, spec in specs.items() if spec == wanted)
        form = decided[giver].forms[weight.uses[giver][0].group]
        for graph, spec in specs.items():
            if spec != wanted:
                offers.setdefault(graph, []).append((weight, wanted, form))
    for graph, rows in offers.items():
        _Offer(graph, decided[graph]).make(rows)


@dataclass
class _Offer:
    """Offers to one graph."""

    graph: str
    decided: Decided
    alone: dict[str, Form] = field(init=False)

    def __post_init__(self) -> None:
        self.alone = dict(self.decided.forms)

    def make(self, rows: Sequence[tuple[SharedWeight, QuantSpec, Form]]) -> None:
        """Let the graph take all that it can bear."""
        wanted: list[dict[str, Form]] = []
        for weight, spec, form in rows:
            if (forms := self._possible(weight, spec, form)) is not None:
                wanted.append(forms)
        if not wanted:
            return
        self.decided.compilation.say("agree on shared weights")
        self._take(wanted)
        taken = [name for forms in wanted for name in forms if self.decided.forms[name] == forms[name]]
        self.decided.compilation.decider.figures["agreement"] = {
            "offered": sum(len(forms) for forms in wanted), "taken": len(taken), **self.decided.figures,
        }  # fmt: skip
        why = self.decided.compilation.decider.why
        for name in taken:
            form = self.decided.forms[name]
            why[name] = f"{form}: as another graph of the build has this weight (alone it was {self.alone[name]})"
        for name, reason in self.decided.refused.items():
            why[name] = f"{self.decided.forms[name]}: the weight is shared, but {reason}"

    def _refuse(self, weight: SharedWeight, reason: str) -> None:
        for use in weight.uses[self.graph]:
            self.decided.refused.setdefault(use.group, reason)

    def _possible(self, weight: SharedWeight, spec: QuantSpec, form: Form) -> dict[str, Form] | None:
        """Return forms under which this graph stores a weight in the wanted way, or None if there are none."""
        compilation = self.decided.compilation
        if self.decided.engine_forms.get(AS_GIVEN) == "keep":
            return None  # nothing at all was measured to be faster; the groups say so
        groups = {g.name: g for g in compilation.workshop.groups}
        found: dict[str, Form] = {}
        for use in weight.uses[self.graph]:
            group = groups[use.group]
            if use.group in compilation.workshop.refused or use.group in compilation.pinned:
                return None  # the report says why of these
            for candidate in self._order(group, form):
                trial = {**self.decided.forms, use.group: candidate}
                if spec_of(self.decided.plan(trial), use) == spec:
                    found[use.group] = candidate
                    break
            else:
                self._refuse(weight, "no form that this graph can have stores it in the other graph's way")
                return None
        return found

    def _order(self, group: Group, form: Form) -> list[Form]:
        """Return a group's forms: first what this graph has for such groups, then the other graph's."""
        peers = (g for g in self.decided.compilation.workshop.groups if g.root.op_type == group.root.op_type)
        usual = Counter(f for g in peers if (f := self.decided.forms.get(g.name, "float")) != "float")
        order = [f for f, _ in usual.most_common()]
        return [f for f in dict.fromkeys((*order, form, *group.legal)) if f in group.legal]

    def _take(self, wanted: Sequence[dict[str, Form]]) -> None:
        """Take all of some forms if the bounds hold with them, else those of their halves for which they do."""
        trial = dict(self.decided.forms)
        for forms in wanted:
            trial |= forms
        reason = "it was not tried: too many weights differ"
        if self.decided.trials < MOST_TRIALS:
            self.decided.trials += 1
            reason = self._measure(trial)
        if not reason:
            self.decided.forms = trial
        elif len(wanted) == 1:
            for name in wanted[0]:
                self.decided.refused[name] = reason
        else:
            half = len(wanted) // 2
            self._take(wanted[:half])
            self._take(wanted[half:])

    def _measure(self, forms: Mapping[str, Form]) -> str:
        """Return why a choice of forms is not borne, or nothing if it is; only then its figures are kept."""
        compilation, engine_forms = self.decided.compilation, self.decided.engine_forms
        build = compilation.workshop.build(forms, engine_forms)
        figures: dict[str, float] = {}
        if compilation.judge is not None:
            quality = compilation.judge(compilation.workshop.computable(build))
            if not compilation.decider.holds(quality):
                return f"on integers this graph misses its accuracy bound: {quality.worst:.1f} dB"
            figures["sqnr_db"] = round(quality.worst, 2)
        feed = compilation.decider.timing_feed
        if feed is None:
            self.decided.figures |= figures
            return ""
        stopwatch = compilation.options.stopwatch or EngineStopwatch(
            compilation.engine, feed, compilation.engine_options
        )
        search = SpeedSearch(
            compilation.workshop.base.model, compilation.workshop.groups, compilation.workshop.build, stopwatch, {}
        )
        given = in_precision_of(compilation.workshop, compilation.reference)
        ratio = search.ratio(given, build.model)
        if ratio[0] < 1.0:
            return f"on integers this graph is slower than float: {ratio[0]:.2f}x"
        kept = search.ratio(compilation.workshop.build(self.alone, engine_forms).model, build.model)[0]
        if kept < KEPT_SPEED:
            return f"on integers this graph runs at {kept:.2f}x of the speed that it has with its own choice"
        compilation.decider.speedup = ratio
        self.decided.figures |= {**figures, "speedup": round(ratio[0], 3)}
        return ""

"""Fill a cost table: from the cache what is known there, from profiles of whole-model variants what is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompiler.engine import ModelLike
from qcompiler.ir.graph import all_nodes, consumers
from qcompiler.quant.plan import Form
from qcompiler.search.attribution import Owners
from qcompiler.search.borders import Border, find_borders
from qcompiler.search.cost_book import FLOAT, Book
from qcompiler.search.cost_cache import CostCache
from qcompiler.search.costs import CostTable
from qcompiler.search.observations import Observation, Observer, lone_excess, real_share
from qcompiler.search.signatures import Signer
from qcompiler.search.speed import BuildForms
from qcompiler.search.timing import Stopwatch, Timing
from qcompiler.targets.groups import Group
from qcompiler.targets.target import Target

_STEADY = 1.25
"""By how much the median of a model's runs may exceed their minimum on a machine that does nothing else."""
_NEAR, _LEAST_RATIO = 1.08, 0.85
"""How far builds may differ in measured time / sum of their profile before the difference is laid to the machine."""
Say = Callable[[str], None]


@dataclass
class CostMeter:
    """Measure the costs of one graph's groups.

    Attributes:
        model: the canonical FLOAT graph.
        groups: its fusion groups.
        target: its formats.
        build: makes a build of forms and engine-specific rewrites.
        stopwatch: measures.
        elements: elements per value in the measured feed.
        engine_forms: rewrites in force for all builds.
        cache: costs of earlier compilations; None to measure everything and keep nothing.
        shapes: shapes per value in the measured feed, where the graph leaves axes open.
        say: takes one line per step.
        steady: whether every timing so far was steady; what was not is not kept in the cache.
        profiled: names of the variants that were profiled.
        least_ratio: least of measured time / sum of the profile over all builds.
        float_us: microseconds of the all-float build at the scale of the table; 0 as long as it was not timed. It is
            timed beside every later build, whose time is told at this scale however fast the machine is by then.
    """

    model: ir.Model
    groups: Sequence[Group]
    target: Target
    build: BuildForms
    stopwatch: Stopwatch
    elements: Mapping[str, int]
    engine_forms: Mapping[str, str] = field(default_factory=dict)
    cache: CostCache | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    say: Say = lambda text: None
    steady: bool = True
    profiled: list[str] = field(default_factory=list)
    least_ratio: float = math.inf
    float_us: float = 0.0
    _plain: ModelLike | None = None

    def __post_init__(self) -> None:
        self.borders = find_borders(self.groups, self.elements)
        self.owners = Owners.of(self.model, self.groups)
        self.observer = Observer(self.owners, self.borders)
        self.signer = Signer(self.groups, self.target, self.elements, self.engine_forms, self.shapes)
        self.lone = [n for n in all_nodes(self.model) if str(n.name) in self.owners.lone]
        self.neighbours = lone_neighbours(self.lone, self.groups)

    def observe(self, forms: Mapping[str, Form], name: str = "a choice") -> Observation:
        """Build, profile and time one choice of forms."""
        return self._observe({name: forms})[name]

    def table(self, variants: Mapping[str, Mapping[str, Form]]) -> CostTable:
        """Return the costs of all forms that occur in the variants, and of float.

        Besides the variants, two that alternate float and integer groups are measured, for what it costs to cross from
        one to the other: engines change layouts there, and lose fusions.

        Args:
            variants: forms by the name of the variant, such as ``static`` and ``dynamic``: as they are built, without
                forms that the engine refuses. All in float is always one of them.
        """
        plans: dict[str, Mapping[str, Form]] = {FLOAT: {}}
        plans |= {name: forms for name, forms in variants.items() if any(form != FLOAT for form in forms.values())}
        full = {name: {g.name: forms.get(g.name, FLOAT) for g in self.groups} for name, forms in plans.items()}
        book = Book(self.groups, self.borders, self.signer, self.lone, full, self.cache)
        observed = self._observe({name: plans[name] for name in book.missing()})
        for name, seen in observed.items():
            book.enter(name, self._answered_for(seen, observed[FLOAT]))
        if book.lacks_crossings():
            mixed = alternating(self.groups, self.borders, book.integer_options())
            reference = observed.get(FLOAT)
            observed = self._observe(mixed if reference is not None else {FLOAT: {}, **mixed})
            for name in mixed:
                book.enter_crossings(self._answered_for(observed[name], reference or observed[FLOAT]))
        return self._at_present(book.close(keep=self.steady))

    def _at_present(self, table: CostTable) -> CostTable:
        """Return a table whose all-float total is the time that the all-float build takes now."""
        if self.float_us <= 0:
            self.float_us = self.stopwatch.compare({FLOAT: self._float_model()})[FLOAT].minimum * 1e6
        told = table.total({})
        return table.scaled(self.float_us / told) if told > 0 and self.float_us > 0 else table

    def _pace(self, plain: Timing) -> float:
        """Return the all-float build's time at the table's scale / the one it took this time."""
        return self.float_us / (plain.minimum * 1e6) if self.float_us > 0 and plain.minimum > 0 else 1.0

    def _float_model(self) -> ModelLike:
        if self._plain is None:
            self._plain = self.build({}, self.engine_forms).model
        return self._plain

    def _answered_for(self, seen: Observation, reference: Observation) -> Observation:
        """Return an observation in which groups, not lone nodes, carry what lone nodes cost more than in float."""
        if seen is reference:
            return seen
        groups = dict(seen.groups)
        for name, excess in lone_excess(seen, reference, self.neighbours).items():
            groups[name] = max(groups.get(name, 0.0) + excess, 0.0)
        return replace(seen, groups=groups, others=reference.others)

    def _observe(self, plans: Mapping[str, Mapping[str, Form]]) -> dict[str, Observation]:
        if not plans:
            return {}
        made = {name: self.build(forms, self.engine_forms) for name, forms in plans.items()}
        self.say(f"profile {', '.join(plans)}")
        profiles = {name: self.stopwatch.profile(build.model) for name, build in made.items()}
        models = {name: build.model for name, build in made.items()}
        times = self.stopwatch.compare(models if FLOAT in models else {**models, FLOAT: self._float_model()})
        self.profiled += made
        wholes = {name: times[name].minimum * 1e6 * self._pace(times[FLOAT]) for name in made}
        ratios = {name: real_share(profiles[name][0], wholes[name]) for name in made}
        self.least_ratio = min(self.least_ratio, *ratios.values())
        most = _NEAR * max(self.least_ratio, _LEAST_RATIO)
        found = {}
        for name, build in made.items():
            profile, executed = profiles[name]
            timing = times[name]
            steady = timing.median <= _STEADY * timing.minimum and ratios[name] <= _STEADY * min(most, _NEAR)
            self.steady = self.steady and steady
            forms = {g.name: build.forms.get(g.name, FLOAT) for g in self.groups}
            # The least times of single nodes survive a busy machine, the least time of a long run does not.
            whole = wholes[name] * min(1.0, most / ratios[name])
            found[name] = self.observer.observe(forms, profile, executed, whole, steady)
        if self.float_us <= 0:
            self.float_us = found[FLOAT].whole_us if FLOAT in found else times[FLOAT].minimum * 1e6
        return found


def measure_costs(
    model: ir.Model,
    groups: Sequence[Group],
    target: Target,
    build: BuildForms,
    stopwatch: Stopwatch,
    variants: Mapping[str, Mapping[str, Form]],
    elements: Mapping[str, int],
    engine_forms: Mapping[str, str] | None = None,
    cache: CostCache | None = None,
) -> CostTable:
    """Return the measured costs of all forms in the variants; see `CostMeter`, which can also observe a choice later.

    Args:
        model: the canonical FLOAT graph.
        groups: its fusion groups.
        target: its formats.
        build: makes a build of forms and engine-specific rewrites.
        stopwatch: measures.
        variants: forms by the name of the variant; float is added.
        elements: elements per value in the measured feed.
        engine_forms: rewrites in force for all builds.
        cache: costs of earlier compilations.
    """
    meter = CostMeter(model, groups, target, build, stopwatch, elements, engine_forms or {}, cache)
    return meter.table(variants)


def lone_neighbours(lone: Iterable[ir.Node], groups: Sequence[Group], reach: int = 2) -> dict[str, tuple[str, ...]]:
    """Return, for each lone node, the groups within so many steps along the dataflow."""
    owner = {node: g.name for g in groups for node in g.nodes}
    found = {}
    for node in lone:
        near: dict[str, None] = {}
        edge, seen = [node], {node}
        for _ in range(reach):
            behind = [n for at in edge for v in at.outputs for n in consumers(v)]
            before = [p for at in edge for v in at.inputs if v is not None and (p := v.producer()) is not None]
            edge = [n for n in (*before, *behind) if n not in seen]
            seen.update(edge)
            near |= dict.fromkeys(owner[n] for n in edge if n in owner)
            edge = [n for n in edge if n not in owner]
        found[str(node.name)] = tuple(near)
    return found


def alternating(
    groups: Sequence[Group], borders: Mapping[str, Border], integer: Mapping[str, Form]
) -> dict[str, dict[str, Form]]:
    """Return two choices of forms in which integer groups alternate with float ones along the dataflow.

    What is on integers in the one is in float in the other: nearly every value between groups crosses both ways.

    Args:
        groups: all groups, in program order.
        borders: the values between them.
        integer: option by group; a group without one is float in both.
    """
    colour: dict[str, int] = {}
    made_by = {name: border.producer for name, border in borders.items()}
    for group in groups:
        before = [colour[p] for v in group.data if (p := made_by.get(str(v.name), "")) in colour]
        colour[group.name] = 1 - before[0] if before else 0
    return {
        name: {g: form for g, form in integer.items() if colour[g] == wanted}
        for wanted, name in enumerate(("even groups on integers", "odd groups on integers"))
    }

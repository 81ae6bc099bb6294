"""Measure what every quantized point adds to the error of the outputs.

`measure_noise` is what the planner calls; `sensitivity` does the same for a model file and given data::

    from qcompiler.sensitivity import sensitivity
    found = sensitivity("model.onnx", Options(calibration="feeds.npz"))
    found.table.of({"/conv1": "static"})
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qcompiler.engine import Array, Engine, EngineOptions, Feeds
from qcompiler.errors import CalibrationError, QCompilerError, first_line
from qcompiler.options import ModelSource, Options
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.pipeline.changed import exposed
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.quant.plan import Form, QuantPlan
from qcompiler.search.noise import NoiseTable, asked_points, family
from qcompiler.search.noise_outputs import Power, Wanted, float_outputs
from qcompiler.search.noise_points import Variant, first_nodes, read_variant, switch_points
from qcompiler.search.noise_sample import draw_sample
from qcompiler.search.noise_suffix import Suffix, cut_suffix, node_works, share_of_work
from qcompiler.search.noise_terms import needed_readers, stored_by
from qcompiler.search.quality import Judge
from qcompiler.search.sections import Sections, cut, places
from qcompiler.targets.placement import Policy, propose
from qcompiler.targets.points import root_point
from qcompiler.workshop import Workshop

BUDGET = 20.0
"""Full evaluations of the calibration set that measuring may cost."""
MOST_WORK = 3e10
"""Multiply-adds that single points may cost in all, where one row each does not cost more already."""
FEW_ROWS = 32
"""Rows below which the noise in front of a final Softmax tells more about the outputs than the outputs' own."""
_POINTS_PER_SET = 14
_UNSEEN = "neither variant quantizes it: calibration never saw it, or its group has another form there"
_JOINT_RUNS = 3.0
Progress = Callable[[str], None]
Forms = Mapping[str, Form]


def measure_noise(
    workshop: Workshop,
    static_forms: Forms,
    dynamic_forms: Forms,
    feeds: Iterable[Feeds],
    truth: Engine,
    options: EngineOptions = EngineOptions(),
    *,
    budget: float = BUDGET,
    whole: int | None = None,
    judge: Judge | None = None,
    progress: Progress | None = None,
    everything: bool = False,
) -> NoiseTable:
    """Measure the noise of every point alone, and of the whole static and dynamic variants.

    Points that a group's form in a variant asks for, but that the variant has not, are measured in a variant that
    quantizes all that can be.

    Args:
        workshop: builds; its estimators are in force.
        static_forms: forms of the static variant.
        dynamic_forms: forms of the dynamic variant.
        feeds: what to measure on.
        truth: runs float and single points.
        options: threads.
        budget: most work, in full evaluations of the calibration set; one row per point is the least there is.
        whole: feeds in the calibration set, of which ``feeds`` is a part; as many as ``feeds`` by default.
        judge: measures whole variants; one on ``feeds`` is made where there is none.
        progress: told of every step.
        everything: also measure the forms that no group has in either variant; they are infinite otherwise.

    Raises:
        CalibrationError: there is no feed, one does not fit the model, or the model computes no floats.
        ModelError: the engine refuses the float model.
    """
    given = list(feeds)
    if not given:
        raise CalibrationError("sensitivity is measured on feeds, and there are none; give --calibration data")
    share = max(whole or 0, len(given)) / len(given)
    return _Measurement(
        workshop,
        given,
        truth,
        replace(options, optimize=True),
        budget,
        share,
        progress,
        everything,
        {} if judge is None else judge.sections,
    ).run({"static": static_forms, "dynamic": dynamic_forms}, judge)


@dataclass
class _Set:
    """Points that one session measures.

    Attributes:
        runs: points that are on at once, to the names that the result is told under.
        variant: what they are points of.
        suffix: the part of the graph behind them, with switches.
        work: its share of the float graph's work.
        switches: activation point to the input that turns it on.
        weights: constant point to its inputs: name to the arrays for off and for on.
    """

    runs: Mapping[tuple[str, ...], tuple[str, ...]]
    variant: Variant
    suffix: Suffix
    work: float
    switches: Mapping[str, str]
    weights: Mapping[str, Mapping[str, tuple[Array, Array]]]

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(itertools.chain(*self.runs)))


def _forms_in(
    asks: Mapping[str, Mapping[str, tuple[str, ...]]], wholes: Iterable[Forms]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the forms that groups have in some variants, and their points."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for forms in wholes:
        for group, form in forms.items():
            if form in asks.get(group, {}):
                found.setdefault(group, {})[form] = asks[group][form]
    return found


def _runs(variant: Variant, points: Sequence[str]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return what is on at once, each point alone and all readers of a value, and its names."""
    runs: dict[tuple[str, ...], tuple[str, ...]] = {(p,): (p,) for p in points}
    for joint, members in variant.joint.items():
        if members and set(members) <= set(points):
            runs[members] = (*runs.get(members, ()), joint)
    return runs


@dataclass
class _Measurement:
    workshop: Workshop
    feeds: list[Feeds]
    truth: Engine
    options: EngineOptions
    budget: float
    whole: float
    progress: Progress | None
    everything: bool = False
    sections: Sections = field(default_factory=dict)
    work: float = 0.0
    covered: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    shared: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def run(self, wholes: Mapping[str, Forms], judge: Judge | None) -> NoiseTable:
        self.base, self.outputs, self.scores = float_outputs(self.workshop.base.model)
        # What the table tells noise at: the outputs, or their sections.
        self.places = places(self.outputs, self.sections)
        if not self.outputs:
            raise CalibrationError(
                "the model computes no floats on the way to its outputs: there is no noise to measure"
            )
        self.works = node_works(self.base, self.feeds[0])
        groups = self.workshop.groups
        self.covered.update(stored_by(groups))
        sets: list[_Set] = []
        asks = asked_points(groups)
        forms_of = asks if self.everything else _forms_in(asks, wholes.values())
        wanted = {p for forms in forms_of.values() for points in forms.values() for p in points}
        seen = {p for forms in asks.values() for points in forms.values() for p in points} - wanted
        for forms in (*wholes.values(), *self._fullest()):
            if not wanted - seen:
                break
            variant, plan = self._variant(forms)
            self._cover(plan)
            # A mover's result has the scale of its input: that point counts under no choice.
            seen.update(p for p in variant.points if p.startswith("value:") and p in self.covered)
            units = self._new(variant, seen)
            seen.update(itertools.chain(*units))
            seen.update(joint for joint, members in variant.joint.items() if set(members) <= seen)
            sets += self._sets(variant, units)
        points = self._measure(sets)
        table = NoiseTable(
            self.places, points, asks, self.covered,
            needed_readers(groups, self.workshop.base.imported), self.shared, reasons=self.reasons,
            feeds=len(self.sample.feeds),
        )  # fmt: skip
        table = self._joint(self._complete(table), wholes, judge)
        return replace(table, evaluations=round(self.work / self.whole, 3))

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text)

    # ---- points -----------------------------------------------------------------------------------------------

    def _fullest(self) -> Iterable[Forms]:
        """Yield, per family of forms, the choice that gives it to every group that can have it."""
        groups = self.workshop.groups
        kinds: tuple[tuple[Form, ...], ...] = (("static", "static-float"), ("static-float",), ("dynamic",))
        for wanted in (*kinds, ("weight-only",)):
            found: dict[str, Form] = {
                g.name: next((f for f in wanted if f in g.legal), "float") for g in groups if set(wanted) & set(g.legal)
            }
            if found:
                yield found

    def _variant(self, forms: Forms) -> tuple[Variant, QuantPlan]:
        state = self.workshop.base.clone()
        state.forms = {g.name: forms.get(g.name, "float") for g in self.workshop.groups}
        Pipeline((PlanQuantization(estimator=self.workshop.estimator), InsertQdq())).run(state)
        found = read_variant(self.base, state.model, self.workshop.groups, state.plan, state.imported)
        return found, state.plan

    def _cover(self, plan: QuantPlan) -> None:
        """Note where a group's result has the scale of all that it reads: rounding again changes nothing."""
        for group in self.workshop.groups:
            if plan.form(group.name) != "static" or not (group.row.kind == "mover" or group.root.op_type == "Concat"):
                continue
            constants = any(group.root.inputs[i] not in group.data for i in group.data_indices)
            read = {root_point(plan, str(v.name)) for v in group.data}
            for value in group.results:
                if not constants and read == {root_point(plan, str(value.name))}:
                    self.covered.setdefault(f"value:{value.name}", ((group.name, "static"),))

    def _new(self, variant: Variant, seen: set[str]) -> list[tuple[str, ...]]:
        """Return the points of a variant that nobody measured yet; those that are measured at once together."""
        units: dict[str, dict[str, None]] = {p: {p: None} for p in variant.points}
        for joint, members in variant.joint.items():
            if joint.startswith("value:") or set(members) <= seen:
                continue
            unit = {p: None for member in members for p in units[member]}
            self.shared[joint] = members
            units.update(dict.fromkeys(unit, unit))
        done = {id(unit): unit for unit in units.values() if not set(unit) <= seen}
        return [tuple(unit) for unit in done.values()]

    def _sets(self, variant: Variant, units: Sequence[tuple[str, ...]]) -> list[_Set]:
        """Cut points into runs of neighbours, each with the part of the graph behind it."""
        made = []
        count = max(1, min(len(units), round(sum(map(len, units)) / _POINTS_PER_SET)))
        for index in range(count if units else 0):
            chunk = units[len(units) * index // count : len(units) * (index + 1) // count]
            points = tuple(itertools.chain(*chunk))
            suffix = cut_suffix(self.base, first_nodes(variant, points))
            try:
                switched = switch_points(variant, points, self.truth, suffix.model)
            except QCompilerError as error:
                self.reasons.update(dict.fromkeys(points, first_line(error)))
                continue
            work = share_of_work(suffix.model, self.works)
            made.append(_Set(_runs(variant, points), variant, suffix, work, switched.switches, switched.weights))
        return made

    def _measure(self, sets: Sequence[_Set]) -> dict[str, dict[str, float]]:
        names = {name for s in sets for name in s.suffix.feeds}
        inputs = {str(v.name) for v in self.base.graph.inputs}
        base = self.truth.load(exposed(self.base, names - inputs), self.options)
        per_pass = 1.0 + sum(s.work * (len(s.runs) + 1) for s in sets)
        allowed = (self.budget * self.whole - _JOINT_RUNS) / per_pass
        work = sum(self.works.values()) * len(self.feeds)
        allowed = min(allowed, MOST_WORK / max(work, 1.0) / per_pass)
        self.sample = draw_sample(self.base, base, self.outputs, self.feeds, allowed)
        truths = [(feed, base.run(feed)) for feed in self.sample.feeds]
        self.work += (2.0 + 1.0 / len(self.feeds)) * self.sample.share
        power: dict[str, dict[str, Power]] = {}
        del base
        for index, each in enumerate(sets):
            self._say(f"sensitivity {index + 1}/{len(sets)}")
            try:
                power.update(self._measure_set(each, truths))
            except QCompilerError:
                power.update(self._one_by_one(each, truths))
        return self._relative(power)

    def _one_by_one(self, each: _Set, truths: Sequence[tuple[Feeds, dict[str, Array]]]) -> dict[str, dict[str, Power]]:
        """Measure the points of a set that an engine refused in a session each: not all of them may be to blame."""
        found: dict[str, dict[str, Power]] = {}
        for point in each.points if len(each.points) > 1 else ():
            for single in self._sets(each.variant, [(point,)]):
                if not set(single.suffix.feeds) <= set(truths[0][1]) | set(truths[0][0]):
                    continue  # cut elsewhere than the set, at values nobody kept
                try:
                    found.update(self._measure_set(single, truths))
                except QCompilerError as error:
                    self.reasons[point] = first_line(error)
        for point in each.points:
            if point not in found:
                self.reasons.setdefault(point, "the engine refuses the graph with this point behind a switch")
        return found

    @property
    def _few(self) -> bool:
        return self.sample.rows < FEW_ROWS

    def _relative(self, power: Mapping[str, Mapping[str, Power]]) -> dict[str, dict[str, float]]:
        """Return relative noise per point and output; on few rows that of the scores, in units of the output's."""
        found = {p: {name: each.relative for name, each in powers.items()} for p, powers in power.items()}
        for name, score in self.scores.items() if self._few else ():
            pairs = [(n[name], n[score]) for n in found.values() if math.isfinite(n[name] + n[score])]
            outside, inside = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
            if inside > 0 and outside > 0:
                for noise in found.values():
                    noise[name] = noise[score] * outside / inside
        return {p: {name: noise[name] for name in self.places} for p, noise in found.items()}

    def _measure_set(self, each: _Set, truths: Sequence[tuple[Feeds, dict[str, Array]]]) -> dict[str, dict[str, Power]]:
        runner = self.truth.load(each.suffix.model, self.options)
        looked_at = tuple(dict.fromkeys((*self.outputs, *(self.scores.values() if self._few else ()))))
        wanted = [o.name for o in runner.outputs if o.name in looked_at]
        told = tuple(dict.fromkeys((*self.places, *(self.scores.values() if self._few else ()))))
        power = {on: {name: Power() for name in told} for on in each.runs}
        off: dict[str, Array] = {name: np.zeros((), np.bool_) for name in each.switches.values()}
        off |= {name: arrays[0] for inputs in each.weights.values() for name, arrays in inputs.items()}
        for feed, results in truths:
            known = {**feed, **results}
            common = {**{name: known[name] for name in each.suffix.feeds}, **off}
            # All off is float as this session computes it: rounding in another order is no noise of a point.
            plain = {**results, **(runner.run(common, wanted) if wanted else {})}
            floats = cut({name: plain[name] for name in looked_at}, self.sections)
            expected = {name: Wanted(floats[name]) for name in told}
            self.work += each.work * self.sample.share / len(truths)
            for points in each.runs:
                on: dict[str, Array] = {each.switches[p]: np.ones((), np.bool_) for p in points if p in each.switches}
                on |= {n: arrays[1] for p in points for n, arrays in each.weights.get(p, {}).items()}
                made = cut(runner.run({**common, **on}, wanted), self.sections) if wanted else {}
                self.work += each.work * self.sample.share / len(truths)
                for name in told:
                    power[points][name].add(expected[name], made.get(name, expected[name].array))
        return {name: power[points] for points, names in each.runs.items() for name in names}

    # ---- whole variants ---------------------------------------------------------------------------------------

    def _complete(self, table: NoiseTable) -> NoiseTable:
        """Give what could not be measured infinite noise, and what no variant holds a zero."""
        points = dict(table.points)
        for point in self.reasons:
            points[point] = dict.fromkeys(self.places, math.inf)
        for forms in table.asks.values():
            for point in itertools.chain(*forms.values()):
                if point not in points:
                    points[point] = dict.fromkeys(self.places, self._unseen(point))
        return replace(table, points=points)

    def _unseen(self, point: str) -> float:
        """Return the noise of a point that no graph shows: none where the reference rounds it too."""
        kind, _, name = point.partition(":")
        if (kind == "value" and point in self.covered) or self._name(name) in self.workshop.base.imported:
            return 0.0
        self.reasons.setdefault(point, _UNSEEN)
        return math.inf

    def _name(self, text: str) -> str:
        """Return the value of a point without the group that reads it; both names may hold an ``@``."""
        return next(
            (text.removesuffix(f"@{g.name}") for g in self.workshop.groups if text.endswith(f"@{g.name}")), text
        )

    def _joint(self, table: NoiseTable, wholes: Mapping[str, Forms], judge: Judge | None) -> NoiseTable:
        for name, forms in wholes.items():
            if all(form == "float" for form in forms.values()):
                continue
            self._say(f"sensitivity: the whole {name} variant")
            judge = judge or self._judge()
            build = self.workshop.build(forms)
            quality = judge(self.workshop.computable(build))
            self.work += 1.0
            noise = {o: 10 ** (-quality.sqnr_db[o] / 10) for o in self.places if o in quality.sqnr_db}
            table = table.corrected(family(name), noise, build.forms, name)
        return table

    def _judge(self) -> Judge:
        self.work += 1.0
        engine = self.workshop.engine
        return Judge(engine, self.workshop.base.model, self.feeds, (), self.workshop.options, truth=self.truth)


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` measured.

    Attributes:
        table: noise per point.
        variants: forms per group of the whole variants, by name: ``static`` and ``dynamic``.
        groups: (name, operator) of every fusion group, in program order.
        warnings: what a user should know.
    """

    table: NoiseTable
    variants: Mapping[str, Mapping[str, str]]
    groups: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()


def sensitivity(model: ModelSource, options: Options, *, budget: float = BUDGET) -> Sensitivity:
    """Measure how sensitive the outputs of a model are to every group in every form; nothing is timed.

    Args:
        model: the float model.
        options: target, recipe, calibration data and the like, as for `qcompiler.compile`.
        budget: most work, in full evaluations of the calibration set.

    Raises:
        CalibrationError: there are no feeds to measure on.
        QCompilerError: bad input.
    """
    from qcompiler.compilation import Compilation  # which itself plans by these measurements

    compilation = Compilation(model, options)
    compilation.prepare()
    workshop, recipe, data = compilation.workshop, compilation.settings.recipe, compilation.data
    if not data.held_out:
        raise CalibrationError(
            "sensitivity is measured on feeds, and there are none; give them by --calibration (statistics hold none), "
            "or by --evaluation"
        )
    observed = data.statistics is not None
    policy = Policy(recipe.convolution if observed else "float", "static-float" if observed else "float", "float")
    static = propose(workshop.groups, policy, compilation.pinned)
    dynamic: dict[str, Form] = {
        g.name: "dynamic" if compilation.pinned.get(g.name, "dynamic") == "dynamic" in g.legal else "float"
        for g in workshop.groups
    }
    whole = len(data.held_out) + int(getattr(data.statistics, "feeds", 0))
    table = measure_noise(
        workshop, static, dynamic, data.held_out, workshop.truth, workshop.options, budget=budget, whole=whole,
        judge=compilation.judge, progress=options.progress,
    )  # fmt: skip
    made = {name: workshop.build(forms).forms for name, forms in (("static", static), ("dynamic", dynamic))}
    groups = tuple((g.name, g.root.op_type) for g in workshop.groups)
    return Sensitivity(table, made, groups, (*data.warnings, *compilation.warnings))

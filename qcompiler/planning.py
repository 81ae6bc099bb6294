"""Choose the forms of a model by measured time and noise: fill the tables, plan, prove, and keep the best plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qcompiler.backends.catalog import ENGINE
from qcompiler.engine import Feeds
from qcompiler.errors import BudgetError, CalibrationError, ModelError
from qcompiler.plan_sizes import SizeMeter
from qcompiler.planner import Planner, Proof, Tables, best_proof
from qcompiler.quant.plan import Form
from qcompiler.search.accuracy import AccuracyResult, Bound, Returned, Terms
from qcompiler.search.analytic import analytic_costs, rates_for, rates_named
from qcompiler.search.cost_cache import CostCache
from qcompiler.search.costs import CostTable
from qcompiler.search.measure_costs import CostMeter
from qcompiler.search.noise import NoiseTable
from qcompiler.search.observations import Observation
from qcompiler.search.problem import Limits
from qcompiler.search.quality import Judge, Quality, decibels
from qcompiler.search.timing import Stopwatch
from qcompiler.sensitivity import measure_noise
from qcompiler.targets.groups import Group
from qcompiler.targets.host import Processor
from qcompiler.workshop import Workshop

STATIC_MUST_WIN = 0.85
"""Share of the dynamic form's time below which fixed activation scales, which fit no unusual input, are worth it."""
_HOPELESS = 1.25
"""A whole variant that is predicted to take this much longer than the fastest plan is not timed."""
_CLEARLY = 0.97
"""Share of a plan's time that a whole variant must stay below to be taken in its place."""

PROVEN_ON = "onnxruntime"
"""Name of the engine that a file without metadata is for."""

_TERMS = Terms()
Forms = Mapping[str, Form]
Observe = Callable[[Forms], Observation]
"""Builds, profiles and times a choice of forms."""


@dataclass(frozen=True)
class Planning:
    """What a plan depends on.

    Attributes:
        workshop: builds; its estimators are in force.
        engine_forms: rewrites in force for every build.
        stopwatch: measures; None to take costs from the table that ships.
        elements: elements per value in the measured feed.
        cache: costs of earlier compilations; None to measure everything and keep nothing.
        quality: measures the accuracy of a choice; None without data.
        bound: accuracy that is demanded.
        limits: bytes, bits and latency that are demanded.
        pinned: forms that the user chose.
        feeds: feeds that noise is measured on.
        judge: compares builds with float, on those feeds.
        calibrated: feeds in the calibration set, by which the work of measuring noise is bounded.
        processor: this machine's, if the target is for it.
        objective: ``latency`` or ``bytes``.
        terms: how accuracy beyond the bound is traded for time.
        say: takes one line per step.
        noise: noise that was measured before; None to measure it when it is asked for.
    """

    workshop: Workshop
    engine_forms: Mapping[str, str]
    stopwatch: Stopwatch | None
    elements: Mapping[str, int]
    cache: CostCache | None
    quality: Callable[[Forms], Quality] | None
    bound: Bound
    limits: Limits
    pinned: Mapping[str, Form]
    feeds: Sequence[Feeds]
    judge: Judge | None = None
    calibrated: int = 0
    processor: Processor | None = None
    objective: str = "latency"
    terms: Terms = _TERMS
    say: Callable[[str], None] = lambda text: None
    noise: NoiseTable | None = None

    @property
    def sized(self) -> bool:
        """Return whether anything bounds or minimises sizes."""
        return self.objective == "bytes" or self.limits.bytes is not None or self.limits.bits is not None


@dataclass
class Chosen:
    """The plan to go on with.

    Attributes:
        forms: form per group.
        costs: time per group and form, as it is known at the end.
        accuracy: how the forms came to be, for the report; None without data.
        why: reason per group.
        figures: for the decisions record.
        tried: measured whole-model variants.
    """

    forms: dict[str, Form]
    costs: CostTable
    accuracy: AccuracyResult | None
    why: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    tried: dict[str, dict[str, float]] = field(default_factory=dict)


def plan_forms(planning: Planning, variants: Mapping[str, Forms]) -> Chosen:
    """Measure what is not known yet, plan, and return the best plan that was proven.

    Args:
        planning: what the plan depends on.
        variants: ``static`` and ``dynamic``: the form of each group in the variant where all that can has such a form.
            A group may take its form in either, or float.

    Raises:
        BudgetError: limits that cannot hold.
    """
    tables, observe = fill_tables(planning, variants)
    planning = replace(planning, limits=planning.limits.beside(tables.costs.total({})))
    meter = fill_sizes(planning, variants, tables) if planning.sized else None
    totals = {name: round(tables.costs.total(forms), 1) for name, forms in {"float": {}, **variants}.items()}
    origins = tables.costs.counts()
    planner = Planner(
        tables, planning.quality, observe, lambda: measure_table(planning, variants), planning.bound, planning.limits,
        planning.terms, planning.pinned, planning.say, planning.objective, None if meter is None else meter.stored,
        None if planning.judge is None else planning.judge.reference_metric,
    )  # fmt: skip
    proofs = {f"plan {number}": proof for number, proof in enumerate(planner.run(), 1)}
    bounded = planning.sized or planning.limits.latency_us is not None
    rivals = {} if bounded else _rivals(planning, variants, tables.costs, proofs)
    best, times = _best(planning, proofs, rivals)
    proven = {**proofs, **rivals}
    limited = planning.limits != Limits()
    if limited and (proven[best].excess > 0 or proven[best].shortfall > 0):
        raise BudgetError(_exceeded(planning.limits, planning.bound, proven[best]))
    made = Chosen(proven[best].forms, tables.costs, _outcome(proofs["plan 1"], proven[best], len(proven)))
    made.why = _reasons(planning, tables.costs, tables.noise, proofs["plan 1"].forms, made.forms)
    made.figures = {
        "profile_us": totals,
        "cost_origins": origins,
        "plans": {name: proof.figures() for name, proof in proofs.items()},
        "chosen": best,
        "plan": _plan_figures(planner, proven[best], best, len(proofs)),
        "whole_us": {name: round(us, 1) for name, us in times.items()},
    }
    made.tried = {name: _variant_figures(totals, name, proof.quality) for name, proof in rivals.items()}
    return made


def fill_tables(planning: Planning, variants: Mapping[str, Forms]) -> tuple[Tables, Observe | None]:
    """Return what a plan is made from, noise and sizes left out, and what observes the build of a choice.

    Costs are measured where there is a stopwatch, else taken from the table that ships.
    """
    workshop, groups = planning.workshop, planning.workshop.groups
    observe: Observe | None = None
    if planning.stopwatch is None:
        elsewhere = planning.processor is None
        rates = rates_named("work") if elsewhere else rates_for(workshop.base.target, planning.processor)
        costs = analytic_costs(groups, planning.elements, rates)
    else:
        meter = CostMeter(
            workshop.base.model, groups, workshop.base.target, workshop.build, planning.stopwatch, planning.elements,
            {**workshop.engine_forms, **planning.engine_forms}, planning.cache, say=planning.say,
        )  # fmt: skip
        costs, observe = meter.table(variants), meter.observe
    return Tables(groups, allowed_forms(groups, variants, costs, planning.pinned), costs), observe


def fill_sizes(planning: Planning, variants: Mapping[str, Forms], tables: Tables) -> SizeMeter:
    """Count what every form stores, by building each once, and return what tells the size of a choice's file."""
    planning.say("count the bytes of every form")
    engine = planning.workshop.base.target.engine
    told = {} if engine == PROVEN_ON else {ENGINE: engine}  # as the finished file says
    meter = SizeMeter(planning.workshop, planning.engine_forms, told)
    tables.sizes = meter.table(variants, tables.allowed)
    return meter


def measure_table(planning: Planning, variants: Mapping[str, Forms]) -> NoiseTable | None:
    """Measure the noise of every point, or return None where the model does not bear it."""
    if planning.noise is not None:
        return planning.noise
    try:
        return measure_noise(
            planning.workshop, variants["static"], variants["dynamic"], planning.feeds, planning.workshop.truth,
            planning.workshop.options, whole=planning.calibrated, judge=planning.judge,
        )  # fmt: skip
    except (CalibrationError, ModelError) as error:
        planning.say(f"noise cannot be measured: {error}")
        return None


def allowed_forms(
    groups: Sequence[Group], variants: Mapping[str, Forms], costs: CostTable, pinned: Mapping[str, Form]
) -> dict[str, list[Form]]:
    """Return the forms besides float that each group may take.

    Scales found at run time fit every input. Calibrated ones, where a group has both, must buy their risk with time.
    """
    allowed: dict[str, list[Form]] = {}
    for group in groups:
        forms = dict.fromkeys(f for v in variants.values() if (f := v.get(group.name, "float")) != "float")
        if {"static-float", "dynamic"} <= set(forms):
            shared = costs.conversions.get(str(group.data[0].name))
            dynamic = costs.cost(group.name, "dynamic") + (shared.dynamic if shared is not None else 0.0)
            static = costs.cost(group.name, "static-float") + (shared.quantize if shared is not None else 0.0)
            if static > STATIC_MUST_WIN * dynamic:
                forms.pop("static-float")
        pin = pinned.get(group.name)
        allowed[group.name] = [f for f in forms if pin is None or f == pin]
    return allowed


def _plan_figures(planner: Planner, chosen: Proof, name: str, rounds: int) -> dict[str, Any]:
    """Return what the report tells of the plan: what was promised and what was measured, the gap, and the prices."""
    found = planner.prices() if planner.tables.noise is not None or planner.tables.sizes is not None else None
    prices = {} if found is None else {n: str(p) for n, p in found.prices.items() if p.per_unit > 0}
    made = {"chosen": name, "objective": planner.objective, "rounds": rounds, "gap": chosen.gap, **chosen.figures()}
    return made | {"prices": prices or dict(chosen.prices)}


def _exceeded(limits: Limits, bound: Bound, nearest: Proof) -> str:
    asked = [f"bytes<={limits.bytes}"] if limits.bytes is not None else []
    asked += [f"bits<={limits.bits:g}"] if limits.bits is not None else []
    asked += [f"latency<={limits.latency_us:g}us"] if limits.latency_us is not None else []
    if nearest.shortfall > 0:
        asked += [f"sqnr>={max(bound.sqnr_db.values(), default=0.0):g} and the other bounds on accuracy"]
    found = [f"{nearest.bytes} bytes"] if nearest.bytes else []
    found += [f"{nearest.bits:.3f} bits per weight"] if limits.bits is not None else []
    found += [f"{nearest.measured_us:.0f} us"] if nearest.measured_us > 0 else []
    found += [f"{nearest.worst_db:.1f} dB"] if nearest.quality is not None else []
    over = f", {100 * nearest.excess:.1f} % over" if nearest.excess > 0 else ""
    return (
        f"no plan that was built holds {' and '.join(asked)}: the nearest feasible point has "
        f"{', '.join(found)}{over}; relax the budgets to it"
    )


def _rivals(
    planning: Planning, variants: Mapping[str, Forms], costs: CostTable, proofs: Mapping[str, Proof]
) -> dict[str, Proof]:
    """Return the whole variants, proven: what the tables do not know may make one of them better than any plan."""
    found = {}
    for name, forms in variants.items():
        if all(form == "float" for form in forms.values()):
            continue
        quality = next((p.quality for p in proofs.values() if p.forms == dict(forms)), None)
        if quality is None and planning.quality is not None:
            quality = planning.quality(forms)
        short = 0.0 if quality is None else planning.bound.shortfall(quality)
        found[name] = Proof(dict(forms), quality, {}, costs.total(forms), 0.0, short)
    return found


def _best(planning: Planning, proofs: Mapping[str, Proof], rivals: Mapping[str, Proof]) -> tuple[str, dict[str, float]]:
    """Return the name of the best plan, and the times of all that could be it, taken in turn.

    A busy machine can favour one profile, so whole models decide; a rival must be clearly faster than the best plan.
    """
    least = min((p.excess, p.shortfall) for p in proofs.values())
    hopeless = _HOPELESS * min(p.predicted_us for p in proofs.values())
    distinct: dict[str, Proof] = {}
    for name, proof in {**proofs, **rivals}.items():
        if name in rivals and proof.predicted_us > hopeless:
            continue
        if (proof.excess, proof.shortfall) <= least and all(proof.forms != other.forms for other in distinct.values()):
            distinct[name] = proof
    own = {name: proof for name, proof in distinct.items() if name in proofs}
    if len(distinct) < 2 or planning.stopwatch is None:
        return best_proof(own, {}, planning.terms, planning.objective), {}
    build = planning.workshop.build
    models = {name: build(proof.forms, planning.engine_forms).model for name, proof in distinct.items()}
    times = {name: t.minimum * 1e6 for name, t in planning.stopwatch.compare(models).items()}
    best = best_proof(own, times, planning.terms, planning.objective)
    for name, proof in distinct.items():
        pair = {best: distinct[best], name: proof}
        if times[name] < _CLEARLY * times[best] and best_proof(pair, times, planning.terms) == name:
            best = name
    return best, times


def _variant_figures(totals: Mapping[str, float], name: str, quality: Quality | None) -> dict[str, float]:
    figures = {"profile_us": totals[name]}
    if totals[name] > 0:
        figures["profile_speedup"] = round(totals["float"] / totals[name], 3)
    if quality is not None:
        figures["sqnr_db"] = round(quality.worst, 2)
    return figures


def _outcome(fastest: Proof, chosen: Proof, tried: int) -> AccuracyResult | None:
    """Return what the report tells of accuracy: what the fastest plan gave up to become the chosen one."""
    if chosen.quality is None:
        return None
    made = AccuracyResult(chosen.forms, chosen.quality, met=chosen.shortfall <= 0, tried=tried)
    returned = tuple(n for n, f in chosen.forms.items() if f == "float" and fastest.forms.get(n, "float") != "float")
    if returned:
        percent = 100.0 * (chosen.predicted_us / fastest.predicted_us - 1.0) if fastest.predicted_us > 0 else 0.0
        step = Returned(returned, fastest.worst_db, chosen.worst_db, round(percent, 2), fastest.shortfall > 0)
        made.steps.append(step)
    return made


def _reasons(
    planning: Planning, costs: CostTable, noise: NoiseTable | None, fastest: Forms, chosen: Forms
) -> dict[str, str]:
    """Return why each group that has a choice takes its form."""
    why: dict[str, str] = {}
    for group in planning.workshop.groups:
        name, form = group.name, chosen.get(group.name, "float")
        known = costs.groups.get(name, {})
        if not group.legal or (len(known) < 2 and form == "float"):
            continue
        if form == "float" and not _ran(planning, group, max(known.values(), default=0.0)):
            why[name] = "float: never-observed: neither calibration nor the measured feed executed it"
            continue
        figures = ", ".join(f"{option} {us:.0f} us" for option, us in known.items())
        before = fastest.get(name, "float")
        if form == "float" and before != "float" and noise is not None:
            alone = min((decibels(p) for p in noise.of({name: before}).values()), default=200.0)
            why[name] = (
                f"float: for accuracy: as {before} it alone limits the SQNR to {alone:.1f} dB "
                f"(measured {figures}, without the conversions at its borders)"
            )
        else:
            why[name] = f"{form}: measured {figures} (without the conversions at its borders)"
    return why


def _ran(planning: Planning, group: Group, us: float) -> bool:
    """Return whether a group was executed, as far as calibration or a profile can tell.

    What an engine fuses into another node takes no time of its own; calibration saw its values all the same.
    """
    told = any(str(v.name) in planning.elements for g in planning.workshop.groups for v in g.results)
    seen = any(str(v.name) in planning.elements for v in (*group.results, group.float_result))
    return not told or seen or us > 0

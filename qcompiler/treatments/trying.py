"""Try treatments one after the other, each on top of those kept, and keep those that were measured to pay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from qcompiler.calibration.statistics import Statistics
from qcompiler.engine import Feeds
from qcompiler.errors import CalibrationError, PassError
from qcompiler.quant.plan import Form
from qcompiler.search.ranges import Errors, decibels, surely_less
from qcompiler.search.scores import ScoreErrors
from qcompiler.search.timing import Stopwatch
from qcompiler.smoother import DB_PER_PERCENT
from qcompiler.targets.groups import Group
from qcompiler.targets.placement import Policy, propose
from qcompiler.treatments.bias import CorrectBiases
from qcompiler.treatments.channels import SplitOutliers
from qcompiler.treatments.concats import SeparateConcats
from qcompiler.treatments.equalization import Equalize
from qcompiler.treatments.rounding import RoundWeights
from qcompiler.treatments.smoothing import Smooth
from qcompiler.treatments.treatment import Case, Parameters, Treatment
from qcompiler.workshop import AS_GIVEN, Workshop

TREATMENTS: tuple[Treatment, ...] = (
    Equalize(), Smooth(), SplitOutliers(), SeparateConcats(), RoundWeights(),
)  # fmt: skip
"""The shipped treatments of a model whose forms and ranges are not chosen yet, in the order in which they are tried:
what changes the float graph first, and what depends on how the rest is rounded last. The correction of biases depends
on forms and ranges, too: see `correct_final`."""
LAST = CorrectBiases(appends=False)
"""What is tried once forms and ranges are chosen. It must cost no time: nothing is chosen anew behind it."""
LEAST_OTHER_SHARE = 0.1
"""Share of the products in which a variant differs from the first one at least; less tells nothing that the first does
not."""


NO_ENGINE_FORMS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Terms:
    """When a treatment is kept.

    Attributes:
        certainty: by how many standard errors a gain over the rows must exceed chance, as of estimators for the whole
            model (`qcompiler.search.ranges.RangeTerms.doubt`).
        db_per_percent: what one percent of latency must gain.
        most_loss_db: what a variant other than the one that gains most may lose.
        enough_db: SQNR of all variants from which on nothing more is tried.
    """

    certainty: float = 1.0
    db_per_percent: float = DB_PER_PERCENT
    most_loss_db: float = 0.25
    enough_db: float = 200.0


@dataclass(frozen=True)
class Treated:
    """What to go on with.

    Attributes:
        workshop: over the treated graph.
        statistics: of it.
        parameters: of each treatment that was kept, in the order of application, for the decisions record.
        figures: what was measured of each treatment that was tried: ``NAME_db`` and ``treated_NAME_db`` per variant,
            ``latency_percent`` where it was timed, ``kept`` (1 or 0), and how much it touches (`Treatment.scope`).
    """

    workshop: Workshop
    statistics: Statistics
    parameters: dict[str, Parameters] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


def likely_variants(groups: Sequence[Group]) -> dict[str, dict[str, Form]]:
    """Return the variants that a model will likely take: scales known ahead, and found at run time for products."""
    static = propose(groups, Policy("static", "static-float", "float", True))
    found = {"static": static}
    dynamic: dict[str, Form] = {g.name: "dynamic" for g in groups if "dynamic" in g.legal and g.root.op_type != "Conv"}
    products = sum(g.row.kind == "weighted" and static.get(g.name, "float") != "float" for g in groups)
    if dynamic and len(dynamic) >= LEAST_OTHER_SHARE * products:
        found["dynamic"] = {name: dynamic.get(name, form) for name, form in static.items()}
    return {name: forms for name, forms in found.items() if any(form != "float" for form in forms.values())}


def try_treatments(
    workshop: Workshop,
    statistics: Statistics,
    feeds: Iterable[Feeds],
    held_out: Sequence[Feeds],
    *,
    stopwatch: Stopwatch | None = None,
    candidates: Sequence[Treatment] = TREATMENTS,
    variants: Mapping[str, Mapping[str, Form]] | None = None,
    shared: frozenset[str] = frozenset(),
    terms: Terms = Terms(),
    say: Callable[[str], None] = lambda line: None,
) -> Treated:
    """Try each treatment on top of those kept so far, and keep it where it is measured to pay.

    It pays if in some variant the error over the rows of the scores falls beyond chance and by at least what the
    treatment asks for, if no variant loses more than the terms allow, and if the gain is worth the time that it costs.

    Args:
        workshop: builds the model.
        statistics: observed ranges.
        feeds: that ranges were found on.
        held_out: feeds that ranges have not seen.
        stopwatch: None where nothing can be timed: treatments then count as free.
        candidates: in the order in which they are tried.
        variants: forms per group, by name; by default `likely_variants`.
        shared: groups whose weights other graphs of the build have, too.
        terms: when a treatment is kept.
        say: takes one line per treatment, with its outcome.
    """
    found = likely_variants(workshop.groups) if variants is None else dict(variants)
    case = Case(workshop, statistics, feeds, found, shared)
    made = Treated(workshop, statistics)
    if not found:
        return made
    measure = _Measure(workshop, held_out, feeds)
    level: dict[str, Errors] | None = None
    for treatment in candidates:
        level = level or measure(case)
        if min(map(decibels, level.values())) >= terms.enough_db:
            break
        parts = treatment.parts(treatment.choose(case))
        if not parts:
            say(f"{treatment.name}: nothing to do")
        for parameters in parts:
            scope = treatment.scope(case, parameters)
            trial = treatment.apply(case, parameters)
            errors = measure(trial)
            percent = _slower(case, trial, stopwatch) if treatment.costs_time and stopwatch is not None else None
            reason = _why_not(level, errors, percent or 0.0, treatment.least_gain_db, terms)
            key = treatment.name if treatment.name not in made.figures else f"{treatment.name} {', '.join(parameters)}"
            made.figures[key] = {**_figures(level, errors, percent, not reason), **scope}
            say(f"{treatment.name}: {_change(level, errors)}, {f'refused: {reason}' if reason else 'kept'}")
            if not reason:
                case, level = trial, errors
                made.parameters.setdefault(treatment.name, {}).update(parameters)
    return replace(made, workshop=case.workshop, statistics=case.statistics)


def correct_final(
    workshop: Workshop,
    statistics: Statistics,
    forms: Mapping[str, Form],
    feeds: Iterable[Feeds],
    held_out: Sequence[Feeds],
    *,
    engine_forms: Mapping[str, str] = NO_ENGINE_FORMS,
    terms: Terms = Terms(),
    say: Callable[[str], None] = lambda line: None,
) -> Treated:
    """Correct biases for the forms and ranges that a model ends with, and keep that where it is measured to pay.

    Args:
        workshop: builds the model; its estimators are those in force.
        statistics: observed ranges.
        forms: form per group, chosen.
        feeds: that ranges were found on.
        held_out: feeds that ranges have not seen.
        engine_forms: rewrites besides those in force.
        terms: when it is kept.
        say: takes one line.
    """
    made = Treated(workshop, statistics)
    if engine_forms.get(AS_GIVEN) == "keep" or all(form == "float" for form in forms.values()):
        return made
    lowered = replace(workshop, engine_forms={**workshop.engine_forms, **engine_forms})
    found = try_treatments(
        lowered, statistics, feeds, held_out, candidates=(LAST,), variants={"final": forms}, terms=terms, say=say
    )
    if not found.parameters:
        return replace(made, figures=found.figures)
    return replace(found, workshop=replace(workshop, base=found.workshop.base))


def replay_treatments(
    workshop: Workshop,
    statistics: Statistics | None,
    feeds: Iterable[Feeds] | None,
    parameters: Mapping[str, Parameters],
    *,
    candidates: Sequence[Treatment] = (*TREATMENTS, LAST),
    shared: frozenset[str] = frozenset(),
) -> Treated:
    """Apply what an earlier build kept; nothing is measured.

    Args:
        workshop: builds the model.
        statistics: of the same data.
        feeds: the same data.
        parameters: by name of the treatment.
        candidates: the treatments there are.
        shared: as in the earlier build.

    Raises:
        CalibrationError: there is no data.
        PassError: a treatment is unknown.
    """
    known = {t.name: t for t in candidates}
    if not parameters:
        return Treated(workshop, statistics if statistics is not None else Statistics())
    if statistics is None or feeds is None:
        raise CalibrationError(
            f"the decisions record holds treatments ({', '.join(parameters)}); give the calibration data of that build"
        )
    if unknown := sorted(set(parameters) - set(known)):
        raise PassError(f"the decisions record holds the unknown treatment {unknown[0]!r}; known: {', '.join(known)}")
    case = Case(workshop, statistics, feeds, shared=shared)
    for name, treatment in known.items():
        if name in parameters:
            case = treatment.apply(case, parameters[name])
    return Treated(case.workshop, case.statistics, dict(parameters))


class _Measure:
    """Tells the errors of each variant of a case, row by row."""

    def __init__(self, workshop: Workshop, held_out: Sequence[Feeds], more: Iterable[Feeds]) -> None:
        engine = workshop.truth if workshop.backend.draft() else workshop.engine
        # An engine that only stands in may rewrite the graph: builds are compared with each other, not with a bound.
        options = replace(workshop.options, optimize=True)
        self.errors = ScoreErrors(engine, workshop.base.model, held_out, more, options, workshop.truth)

    def __call__(self, case: Case) -> dict[str, Errors]:
        return {name: self.errors(case.workshop.draft(forms, {})) for name, forms in case.variants.items()}


def _why_not(
    before: Mapping[str, Errors], after: Mapping[str, Errors], percent: float, least_gain_db: float, terms: Terms
) -> str:
    """Return why a treatment is not kept, or an empty text if it gains enough somewhere and loses little elsewhere."""
    gains = {name: decibels(after[name]) - decibels(before[name]) for name in before}
    best, worst = max(gains, key=lambda name: gains[name]), min(gains, key=lambda name: gains[name])
    needed = max(least_gain_db, terms.db_per_percent * percent)
    if gains[best] <= 0:
        return "it gains nothing"
    if not surely_less(after[best], before[best], terms.certainty):
        return "the gain may be chance"
    if gains[best] < needed:
        return f"less than the {needed:.1f} dB that it must gain" + (f", {percent:.1f} % slower" if percent else "")
    if gains[worst] < -terms.most_loss_db:
        return f"{worst} forms lose {-gains[worst]:.1f} dB"
    return ""


def _change(before: Mapping[str, Errors], after: Mapping[str, Errors]) -> str:
    """Return the SQNR before and after in the variant that gains most."""
    name = max(before, key=lambda n: decibels(after[n]) - decibels(before[n]))
    return f"{decibels(before[name]):.1f} -> {decibels(after[name]):.1f} dB"


def _slower(case: Case, trial: Case, stopwatch: Stopwatch) -> float:
    """Return by how many percent the treated model is slower, in the first variant."""
    name = next(iter(case.variants))
    plain = case.workshop.build(case.variants[name]).model
    treated = trial.workshop.build(trial.variants[name]).model
    times = stopwatch.compare({"plain": plain, "treated": treated})
    return 100.0 * (times["treated"].minimum / times["plain"].minimum - 1.0)


def _figures(
    before: Mapping[str, Errors], after: Mapping[str, Errors], percent: float | None, kept: bool
) -> dict[str, float]:
    figures = {f"{name}_db": round(decibels(errors), 2) for name, errors in before.items()}
    figures |= {f"treated_{name}_db": round(decibels(errors), 2) for name, errors in after.items()}
    if percent is not None:
        figures["latency_percent"] = round(percent, 2)
    return {**figures, "kept": float(kept)}

"""Decide forms by measurement: accuracy treatments, the plan, and the guards behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qcompiler.calibration.readers import random_feeds
from qcompiler.calibration.statistics import Statistics
from qcompiler.decisions import Decisions
from qcompiler.engine import Feeds
from qcompiler.errors import BudgetError, CalibrationError
from qcompiler.estimating import choose_estimators
from qcompiler.measuring import Measure, count_elements, demanded, measure_quality, quick_quality
from qcompiler.planning import Planning, plan_forms
from qcompiler.precision import in_precision_of, settle_precision
from qcompiler.quant.plan import Form
from qcompiler.quant.spec import RangeSource
from qcompiler.recipe_forms import recipe_policy
from qcompiler.search.accuracy import AccuracyGuard, AccuracyResult, Bound
from qcompiler.search.accuracy import Terms as GuardTerms
from qcompiler.search.analytic import analytic_cost
from qcompiler.search.candidates import candidate_sets
from qcompiler.search.costs import CostTable
from qcompiler.search.problem import Limits
from qcompiler.search.quality import Quality
from qcompiler.search.speed import SpeedSearch
from qcompiler.search.timing import EngineStopwatch, Stopwatch
from qcompiler.setting import Setting
from qcompiler.targets.placement import Policy, propose
from qcompiler.treatments.treatment import Parameters
from qcompiler.treatments.trying import correct_final, replay_treatments, try_treatments
from qcompiler.workshop import AS_GIVEN, Workshop

_UNSTEADY = 1.25
"""By how much the ratios of minima and of medians may differ before a user is warned."""


@dataclass
class Decider:
    """Choose forms; what it chose, and why, is in its attributes afterwards.

    Attributes:
        setting: what does not change.
        workshop: builds; replaced if a treatment pays.
        statistics: observed ranges.
        warnings: what a user should know.
        figures: measurements for the decisions record.
        why: reason per group.
        tried: measured whole-model variants.
        treatments: accuracy treatments that were kept, and what they were applied with.
        accuracy: outcome of the accuracy guard.
        costs: measured time per group and form, once they were measured.
        speedup: float / compiled latency by minimum and by median.
        timing_feed: the feed that was timed with.
    """

    setting: Setting
    workshop: Workshop
    statistics: RangeSource | None
    warnings: list[str]
    figures: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    tried: dict[str, dict[str, float]] = field(default_factory=dict)
    treatments: dict[str, Parameters] = field(default_factory=dict)
    accuracy: AccuracyResult | None = None
    speedup: tuple[float, float] | None = None
    search: SpeedSearch | None = None
    costs: CostTable | None = None
    timing_feed: Feeds | None = None

    def replay(self, decisions: Decisions) -> tuple[dict[str, Form], dict[str, str]]:
        """Return the (forms, engine forms) of an earlier build; nothing is measured."""
        self.workshop.base.estimators.update(decisions.estimators)
        self._replay_treatments(decisions.treatments)
        self.workshop.estimator = decisions.estimator
        self.figures = {k: v for k, v in decisions.figures.items() if k != "variants"}
        self.tried = dict(decisions.figures.get("variants", {}))
        self.why = dict(decisions.why)
        forms = {g.name: decisions.forms.get(g.name, "float") for g in self.workshop.groups}
        return forms, dict(decisions.engine_forms)

    def decide(self) -> tuple[dict[str, Form], dict[str, str]]:
        """Return (form per group, engine-specific rewrites)."""
        setting, recipe, pinned = self.setting, self.setting.recipe, self.setting.pinned
        data = self.statistics is not None
        convolution: Form = recipe.convolution if data else "float"
        static = Policy(convolution, "static-float" if data else "dynamic", "float", recipe.arithmetic)
        default = recipe_policy(recipe, self.workshop.groups, observed=data)
        if setting.limits != Limits():
            self._check_choice(setting.guard)
        if not setting.guard:
            self.why |= {name: f"{form}: by override" for name, form in pinned.items()}
            return propose(self.workshop.groups, default, pinned), {}
        feed = self.timing_feed = self._sample_feed() if setting.timed and setting.measure else None
        engine_forms: dict[str, str] = {}
        self._settle_precision()
        imported = bool(self.workshop.base.imported)
        if recipe.choose and (feed is not None or not (setting.timed and setting.measure)) and not imported:
            self._treat(static, feed)
        if recipe.choose and not imported and (feed is not None or not (setting.timed and setting.measure)):
            forms, engine_forms = self._plan_forms(static if setting.timed else default, pinned, feed)
            self._correct_biases(forms, engine_forms)
        else:
            # A model that was quantized already keeps on integers what ran there, with its own numbers.
            own = self._own_forms() if imported else {}
            forms = propose(self.workshop.groups, static if imported else default, {**own, **pinned})
            self.workshop.learn_emission(forms)
            if not imported:
                self._choose_estimator(forms, engine_forms)
        if setting.judge is not None and (self.accuracy is None or not self.accuracy.met):
            forms = self._guard_accuracy(forms, engine_forms)
        if feed is not None:
            forms, engine_forms = self._guard_speed(forms, engine_forms, feed)
        self.why |= {name: f"{form}: by override" for name, form in pinned.items()}
        return forms, engine_forms

    def _own_forms(self) -> dict[str, Form]:
        """Return the groups of an imported model that write the integers they wrote there, whoever reads them."""
        numbers = self.workshop.base.imported
        written = (g for g in self.workshop.groups if g.row.kind == "weighted" and "static" in g.legal)
        return {g.name: "static" for g in written if all(str(v.name) in numbers for v in (*g.data, *g.results))}

    def _settle_precision(self) -> None:
        """Keep float operators in float32 where what the engine prefers misses the bounds all by itself."""
        if self.setting.judge is None:
            return
        short = settle_precision(self.workshop, lambda: self._bound().shortfall(self._quality({})))
        if short > 0:
            self.figures["float32_for"] = round(short, 2)
            self.warnings.append(
                f"float operators stay in float32: what {self.setting.engine.name} prefers here misses the accuracy "
                f"bound by {short:.1f} dB"
            )

    def _treat(self, policy: Policy, feed: Feeds | None) -> None:
        """Go on with what accuracy treatments make of the model, where they were measured to pay.

        A model that is close enough with all on integers is left alone: trying takes its time.
        """
        if self.setting.judge is None or not isinstance(self.statistics, Statistics) or self.setting.ranges is None:
            return
        static = self._learn(self._static(policy, self.setting.pinned))
        if all(form == "float" for form in static.values()) or self._quality(static).worst >= self._enough:
            return
        found = try_treatments(
            self.workshop, self.statistics, self.setting.ranges, self.setting.held_out,
            stopwatch=None if feed is None else self._stopwatch(feed), shared=self.setting.shared,
            say=self.setting.say,
        )  # fmt: skip
        self.workshop, self.statistics, self.treatments = found.workshop, found.statistics, found.parameters
        if found.figures:
            self.figures["treatments"] = found.figures

    def _correct_biases(self, forms: Mapping[str, Form], engine_forms: Mapping[str, str]) -> None:
        """Correct biases for the planned forms and the ranges in force, where that is measured to gain."""
        if self.accuracy is None or self.accuracy.quality.worst >= self._enough:
            return
        if not isinstance(self.statistics, Statistics) or self.setting.ranges is None:
            return
        found = correct_final(
            self.workshop, self.statistics, forms, self.setting.ranges, self.setting.held_out,
            engine_forms=engine_forms, say=self.setting.say,
        )  # fmt: skip
        self.figures.setdefault("treatments", {}).update(found.figures)
        if not found.parameters:
            return
        self.workshop, self.statistics = found.workshop, found.statistics
        self.treatments = {**self.treatments, **found.parameters}
        quality = self._quality(forms, engine_forms)
        self.accuracy = replace(self.accuracy, quality=quality, met=self._bound().shortfall(quality) <= 0)

    @property
    def _enough(self) -> float:
        """Return the SQNR in dB above which nothing is done for accuracy alone."""
        return max(GuardTerms().comfort_db, self.setting.budget.sqnr_db or 0.0)

    def _replay_treatments(self, parameters: Mapping[str, Parameters]) -> None:
        """Treat the model as an earlier build did."""
        if not parameters:
            return
        statistics = self.statistics if isinstance(self.statistics, Statistics) else None
        found = replay_treatments(
            self.workshop, statistics, self.setting.ranges, parameters, shared=self.setting.shared
        )  # fmt: skip
        self.workshop, self.statistics, self.treatments = found.workshop, found.statistics, found.parameters

    def _sample_feed(self) -> Feeds | None:
        """Return a representative feed for timing, or None if there is no way to make one."""
        if self.setting.held_out:
            return self.setting.held_out[0]
        try:
            return next(iter(random_feeds(self.setting.inputs, 1)))
        except CalibrationError as error:
            self.warnings.append(f"nothing was timed: {error}")
            return None

    def _stopwatch(self, feed: Feeds) -> Stopwatch:
        return self.setting.stopwatch or EngineStopwatch(self.setting.engine, feed, self.setting.engine_options)

    def _plan_forms(
        self, policy: Policy, pinned: Mapping[str, Form], feed: Feeds | None
    ) -> tuple[dict[str, Form], dict[str, str]]:
        """Choose all forms together by time and noise; see `qcompiler.planner`."""
        planning, variants = self._prepare_plan(policy, pinned, feed)
        chosen = plan_forms(planning, variants)
        self.costs, self.accuracy = chosen.costs, chosen.accuracy
        self.why = {**chosen.why, **self.why}
        self.figures |= chosen.figures
        self.tried |= chosen.tried
        forms = chosen.forms
        if self.accuracy is not None and self.workshop.backend.draft():
            # Plans were proven on drafts; the bounds hold for the model itself.
            quality = self._quality(forms, planning.engine_forms)
            held = planning.bound.shortfall(quality) <= 0
            self.accuracy = replace(self.accuracy, quality=quality, met=held)
        if self.search is None or planning.sized:  # a rewrite more changes the bytes that were counted
            return forms, dict(planning.engine_forms)
        avoided = self.search.avoid_traps(forms, self.workshop.base.target.traps, {})
        self.figures |= self.search.figures
        return forms, avoided

    def prepare_plan(self) -> tuple[Planning, dict[str, dict[str, Form]]]:
        """Return what `decide` would plan with: precision settled, treatments tried, variants learnt.

        Raises:
            BudgetError: the recipe, or a model that was quantized already, leaves nothing to plan.
        """
        setting, recipe, data = self.setting, self.setting.recipe, self.statistics is not None
        self._check_choice()
        convolution: Form = recipe.convolution if data else "float"
        static = Policy(convolution, "static-float" if data else "dynamic", "float", recipe.arithmetic)
        feed = self.timing_feed = self._sample_feed() if setting.timed and setting.measure else None
        self._settle_precision()
        self._treat(static, feed)
        default = recipe_policy(recipe, self.workshop.groups, observed=data)
        return self._prepare_plan(static if setting.timed else default, setting.pinned, feed)

    def _check_choice(self, guard: bool = True) -> None:
        """Raise BudgetError where no forms are chosen, so that nothing could hold a budget."""
        causes = (
            (not guard, "--no-guard"),
            (bool(self.workshop.base.imported), "the model is quantized already, which"),
            (not self.setting.recipe.choose, f"recipe {self.setting.recipe.name}"),
        )
        if found := [text for holds, text in causes if holds]:
            raise BudgetError(
                f"there is nothing to plan: {found[0]} leaves no choice of forms; take a float model, recipe int8 and "
                "the guard"
            )

    def _prepare_plan(
        self, policy: Policy, pinned: Mapping[str, Form], feed: Feeds | None
    ) -> tuple[Planning, dict[str, dict[str, Form]]]:
        """Return what a plan depends on, and the variants whose forms it chooses from."""
        self.setting.say("measure float, static and dynamic forms" if feed is not None else "plan by the shipped costs")
        # Of an engine that is elsewhere no form can be timed against another: the recipe's own, or float.
        dynamic = self._dynamic(pinned) if self.setting.timed else self._floats()
        variants = {"static": self._learn(self._static(policy, pinned)), "dynamic": self._learn(dynamic)}
        engine_forms: dict[str, str] = {}
        if feed is not None:
            self.search = self._speed_search(feed)
            engine_forms = self.search.avoid_traps({}, self.workshop.base.target.traps, {})
        self._choose_estimator(variants["static"], engine_forms)
        return self._planning(feed, engine_forms), variants

    def _floats(self) -> dict[str, Form]:
        return {g.name: "float" for g in self.workshop.groups}

    def _static(self, policy: Policy, pinned: Mapping[str, Form]) -> dict[str, Form]:
        """Return the forms of the variant in which all that can runs on calibrated integers."""
        static = propose(self.workshop.groups, policy, pinned)
        return static if self.statistics is not None else dict.fromkeys(static, "float")

    def _dynamic(self, pinned: Mapping[str, Form]) -> dict[str, Form]:
        """Return the forms of the variant in which all that can finds its scales at run time."""
        return {
            g.name: "dynamic" if "dynamic" in g.legal and pinned.get(g.name, "dynamic") == "dynamic" else "float"
            for g in self.workshop.groups
        }

    def _planning(self, feed: Feeds | None, engine_forms: Mapping[str, str]) -> Planning:
        setting = self.setting
        sample = feed if feed is not None else self._sample_feed()
        measure = None if setting.judge is None else quick_quality(self.setting, self.workshop)
        return Planning(
            workshop=self.workshop,
            engine_forms=engine_forms,
            stopwatch=None if feed is None else self._stopwatch(feed),
            elements={} if sample is None else count_elements(self.workshop, self.statistics, sample),
            cache=None if setting.stopwatch is not None else setting.cost_cache,
            quality=None if measure is None else (lambda forms: measure(forms, engine_forms)),
            bound=Bound() if setting.judge is None else self._bound(),
            limits=setting.limits,
            pinned=setting.pinned,
            feeds=setting.held_out,
            judge=setting.judge,
            calibrated=self.statistics.feeds if isinstance(self.statistics, Statistics) else 0,
            processor=setting.processor,
            objective=setting.objective,
            say=setting.say,
        )

    def _learn(self, forms: dict[str, Form]) -> dict[str, Form]:
        if all(f == "float" for f in forms.values()):
            return forms
        self.workshop.learn_emission(forms)
        made = self.workshop.build(forms)
        return {name: made.forms.get(name, "float") for name in forms}

    def _choose_estimator(self, static: Mapping[str, Form], engine_forms: Mapping[str, str]) -> None:
        """Keep the range estimators, per region, under which the static variant comes closest to float."""
        if (
            self.setting.judge is None
            or self.setting.recipe.estimator != "auto"
            or all(f == "float" for f in static.values())
        ):
            return
        self.setting.say("choose the range estimators")
        found = choose_estimators(self.workshop, static, engine_forms, self.setting.held_out, self.setting.ranges or ())
        self.figures["estimators_db"] = {**found.whole_db, "chosen": found.sqnr_db}
        self.figures["estimators_tried"] = found.tried

    def _quality(self, forms: Mapping[str, Form], engine_forms: Mapping[str, str] | None = None) -> Quality:
        """Build and measure a choice of forms."""
        return measure_quality(self.setting, self.workshop, forms, engine_forms)

    def _bound(self) -> Bound:
        return demanded(self.setting)

    def _note_whole(
        self, name: str, forms: Mapping[str, Form], engine_forms: Mapping[str, str], ratio: tuple[float, float]
    ) -> None:
        """Keep the measured speed and error of a whole model that was tried."""
        self.tried[name] = {"speedup": round(ratio[0], 3)}
        if self.setting.judge is not None:
            worst = self._quality(forms, engine_forms).worst
            self.tried[name]["sqnr_db"] = round(worst, 2)

    def _speed_search(self, feed: Feeds) -> SpeedSearch:
        elements = count_elements(self.workshop, self.statistics, feed)
        return SpeedSearch(
            self.workshop.base.model, self.workshop.groups, self.workshop.build, self._stopwatch(feed), elements,
            self.setting.pinned,
        )  # fmt: skip

    def _attainable(self, bound: Bound) -> Bound:
        """Return the bound, lowered to what a model that was quantized already reaches with every group in float.

        Such a model is the reference with the rounding that it was made with. Float does not round so, and misses the
        bound by that noise alone: returning groups then costs speed and moves the outputs no closer.
        """
        if not self.workshop.base.imported:
            return bound
        best = self._quality({})
        if bound.shortfall(best) <= 0:
            return bound
        self.figures["float_db"] = round(best.worst, 2)
        return replace(
            bound,
            sqnr_db={name: min(db, best.sqnr_db.get(name, db)) for name, db in bound.sqnr_db.items()},
            agreement=min(bound.agreement, best.least_agreement),
        )

    def holds(self, quality: Quality) -> bool:
        """Return whether a quality meets all bounds on accuracy."""
        return self._bound().shortfall(quality) <= 0

    def _guard_accuracy(self, forms: dict[str, Form], engine_forms: Mapping[str, str]) -> dict[str, Form]:
        self.setting.say("accuracy guard")
        predict = self.costs.total if self.costs is not None else analytic_cost(self.workshop.groups)
        frozen = frozenset(n for n, f in self.setting.pinned.items() if f != "float")
        # Of a model that was quantized already nothing was profiled: what has no price is not bought beyond the bound.
        terms = GuardTerms(comfort_db=0.0) if self.workshop.base.imported and self.search is None else GuardTerms()
        bound = self._attainable(self._bound())

        def run(start: Mapping[str, Form], measure: Measure) -> AccuracyResult:
            sets = candidate_sets(self.workshop.groups, start, self.statistics)
            return AccuracyGuard(
                sets, lambda trial: measure(trial, engine_forms), bound, predict, frozen=frozen, terms=terms,
                progress=self.setting.say,
            ).run(start)  # fmt: skip

        result = run(forms, quick_quality(self.setting, self.workshop))
        if self.workshop.backend.draft():
            # Drafts say where to look; the bounds hold for the model itself.
            checked = run(result.forms, self._quality)
            result = replace(checked, steps=[*result.steps, *checked.steps], tried=result.tried + checked.tried)
        for step in result.steps:
            for name in step.groups:
                self.why[name] = (
                    f"float: the accuracy guard measured {step.before_db:.1f} -> {step.after_db:.1f} dB by its return"
                )
        if not result.met:
            wanted = ", ".join(f"{name} {db:g} dB" for name, db in self._bound().sqnr_db.items())
            got = ", ".join(f"{name} {db:.1f} dB" for name, db in result.quality.sqnr_db.items())
            self.warnings.append(f"the accuracy bound ({wanted}) is not met: {got}")
        self.accuracy = result
        return result.forms

    def _guard_speed(
        self, forms: dict[str, Form], engine_forms: dict[str, str], feed: Feeds
    ) -> tuple[dict[str, Form], dict[str, str]]:
        """Keep the compiled form only if it is measured faster than the model as given."""
        self.setting.say("speed guard")
        search, given = self._speed_search(feed), in_precision_of(self.workshop, self.setting.given)
        ratio = search.ratio(given, self.workshop.build(forms, engine_forms).model)
        self._note_whole("chosen", forms, engine_forms, ratio)
        if ratio[0] < 1.0 and (self.setting.limits.bytes is not None or self.setting.limits.bits is not None):
            self.warnings.append(f"the plan that holds the budgets is slower than float: {ratio[0]:.2f}x")
            self.speedup = ratio
            return forms, engine_forms
        if ratio[0] < 1.0 and any(f != "float" for f in forms.values()):
            search.float_costs = search.costs({}, engine_forms)
            forms = search.return_losers(forms, engine_forms)
            self.why |= search.why
            self.figures |= search.figures
            ratio = search.ratio(given, self.workshop.build(forms, engine_forms).model)
            self._note_whole("without losing regions", forms, engine_forms, ratio)
        if ratio[0] < 1.0:
            forms = {g.name: self.setting.pinned.get(g.name, "float") for g in self.workshop.groups}
            engine_forms = search.avoid_traps(forms, self.workshop.base.target.traps, {})
            ratio = search.ratio(given, self.workshop.build(forms, engine_forms).model)
            self._note_whole("float", forms, engine_forms, ratio)
            for group in self.workshop.groups:
                possible = group.legal if self.statistics is not None else "dynamic" in group.legal
                if forms[group.name] == "float" and possible:
                    self.why[group.name] = "float: no integer form of the model was measured faster than float"
            if ratio[0] < 1.0 and not any(f != "float" for f in self.setting.pinned.values()):
                # Not even the cleaned float graph is measured faster: hand the model back as it came.
                engine_forms, ratio = {AS_GIVEN: "keep"}, (1.0, 1.0)
        self.speedup = ratio
        if max(ratio) > _UNSTEADY * min(ratio):
            self.warnings.append(
                f"timing was unsteady: {ratio[0]:.2f}x by minimum, {ratio[1]:.2f}x by median; something else kept the "
                "machine busy, so forms may be ill chosen: compile again when it is idle"
            )
        return forms, engine_forms

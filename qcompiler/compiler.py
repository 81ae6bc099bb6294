"""Drive a compilation: import, canonicalize, calibrate, search, guard, lower, prove, report."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import Proof
from qcompiler.calibration.observe import observe
from qcompiler.calibration.readers import FeedSource, as_feed_source, random_feeds
from qcompiler.calibration.statistics import Statistics
from qcompiler.decisions import Decisions
from qcompiler.engine import Array, EngineOptions, Feeds, TensorInfo
from qcompiler.errors import BudgetError, CalibrationError, PassError, TargetError
from qcompiler.ir.analysis import macs
from qcompiler.ir.graph import is_float
from qcompiler.ir.importer import import_model
from qcompiler.ir.opset import set_opset
from qcompiler.ir.schemas import LEAST_LOWERED
from qcompiler.ir.serialize import save_model, to_bytes
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.import_qdq import ImportQdq
from qcompiler.pipeline.instruments.dump import DumpInstrument
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Instrument, Pipeline, Step
from qcompiler.pipeline.state import CompileState, Remark
from qcompiler.quant.plan import Form
from qcompiler.recipes.recipe import Recipe, load_recipe, parse_recipe
from qcompiler.report.report import GroupReport, Report
from qcompiler.search.accuracy import AccuracyGuard, AccuracyResult, Bound
from qcompiler.search.budget import Budget, parse_budget
from qcompiler.search.candidates import candidate_sets
from qcompiler.search.quality import Judge, Metric, Quality, class_like_outputs
from qcompiler.search.speed import SpeedSearch
from qcompiler.search.timing import EngineStopwatch, Stopwatch
from qcompiler.targets.groups import Group
from qcompiler.smoother import apply_smoothing, measure_channels, try_smoothing
from qcompiler.targets.host import Processor, detect, host_target_name
from qcompiler.targets.placement import Policy, propose
from qcompiler.targets.target import Target, load_target
from qcompiler.workshop import Build, Workshop

ESTIMATOR_CHOICES = ("min-max", "percentile:99.999", "percentile:99.99", "auto")
"""Range estimators that the recipe's ``auto`` compares on set-aside feeds."""

ModelSource = str | Path | bytes | onnx.ModelProto | ir.Model
Calibration = str | Path | Iterable[Feeds] | Callable[[], Iterable[Feeds]]
Progress = Callable[[str], None]

_MOST_HELD_OUT = 16
"""Evaluation feeds that serve the accuracy guard where there is no calibration data."""


@dataclass(frozen=True)
class Options:
    """Everything about a compilation but the model; see `compile`."""

    target: str = "host"
    recipe: str | Recipe = "int8"
    calibration: Calibration | None = None
    overrides: str | Path | None = None
    budget: str | Sequence[str] | None = None
    metric: Metric | None = None
    evaluation: Calibration | None = None
    shapes: Mapping[str, Sequence[int]] | None = None
    decisions: Decisions | str | Path | None = None
    dump: str | Path | None = None
    threads: int | None = None
    guard: bool = True
    emit: str = "auto"
    min_sqnr: float | None = None
    random_calibration: int = 0
    progress: Progress | None = None
    opset: int | None = None
    stopwatch: Stopwatch | None = None


@dataclass(frozen=True)
class CompiledModel:
    """The result of a compilation.

    Attributes:
        model: the LOWERED graph.
        decisions: what measurement chose; replay it with ``compile(..., decisions=...)``.
        remarks: why things were or were not done.
        report: proof, accuracy, size, speed.
    """

    model: ir.Model
    decisions: Decisions
    remarks: tuple[Remark, ...]
    report: Report

    def to_bytes(self) -> bytes:
        """Return the serialized model; the same inputs and decisions give the same bytes."""
        return to_bytes(self.model, strip=True)

    def save(self, path: str | Path) -> None:
        """Write the model, and the decisions record beside it (``model.decisions.json``); nothing half-written.

        Raises:
            ModelError: the path cannot be written.
        """
        target = Path(path)
        with staged_text(decisions_path(target), self.decisions.to_json()):
            save_model(self.model, target, strip=True)

    def session(self, threads: int = 0) -> Any:
        """Return an ``onnxruntime.InferenceSession`` of the compiled model.

        Args:
            threads: threads inside one operator; 0 leaves it to the engine.
        """
        return OrtEngine().load(self.model, EngineOptions(threads=threads)).session


def decisions_path(path: str | Path) -> Path:
    """Return where `CompiledModel.save` puts the decisions record of a model."""
    return Path(path).with_suffix(".decisions.json")


@contextmanager
def staged_text(path: Path, text: str) -> Iterator[None]:
    """Write a text file under a temporary name, and rename it once the block has succeeded.

    Raises:
        PassError: the path cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.is_dir():
            raise PassError(f"cannot write {path}: it is a folder")
        try:
            temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise PassError(f"cannot write {path}: {error.strerror or error}") from error
        yield
        try:
            temporary.replace(path)
        except OSError as error:
            raise PassError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def compile_model(source: ModelSource, options: Options) -> CompiledModel:
    """Compile one model; `qcompiler.compile` is the public face."""
    return _Compilation(source, options).run()


@dataclass
class _Compilation:
    source: ModelSource
    options: Options
    engine: OrtEngine = field(default_factory=OrtEngine)
    warnings: list[str] = field(default_factory=list)
    passes: list[tuple[str, int]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def run(self) -> CompiledModel:
        self._settle()
        self._say("import")
        given = import_model(self.source, shapes=self.options.shapes)
        self.given = given
        self.bytes_before = _size_of(self.source, given)
        self.runner = self.engine.load(given, replace(self.engine_options, optimize=False))
        self._read_data(self.runner.inputs)
        self.instruments: list[Instrument] = [VerifyInstrument(), _Log(self)]
        if self.options.dump is not None:
            self.instruments.append(DumpInstrument(self.options.dump))
        self._say("canonicalize")
        state = CompileState(given.clone(), self.target)
        Pipeline((ImportQdq(), Canonicalize())).run(state, self.instruments)
        self.workshop = Workshop(state, self.engine, self.engine_options, self.options.emit, self.recipe.estimator)
        if self.refused_before:
            self.workshop.refused.update(self.refused_before)
        self._calibrate(state)
        pinned, estimators = self.recipe.pinned({g.name: g.legal for g in self.workshop.groups})
        state.estimators = estimators
        self.pinned = pinned
        forms, engine_forms = self._decide(pinned)
        return self._finish(forms, engine_forms)

    # ---- settings ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        options = self.options
        self.refused_before: dict[str, str] = {}
        self.processor: Processor = detect()
        name, note = (options.target, "") if options.target != "host" else host_target_name(self.processor)
        self.target: Target = load_target(name)
        if note:
            self.warnings.append(note)
        self.here = runs_here(self.target, self.processor)
        if not self.here:
            self.warnings.append(
                f"target {self.target.name} is not this machine ({self.processor.model}); nothing was timed, forms "
                "follow the recipe"
            )
        recipe = options.recipe if isinstance(options.recipe, Recipe) else load_recipe(options.recipe)
        if options.overrides is not None:
            path = Path(options.overrides)
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise PassError(f"cannot read the overrides {path}: {error.strerror or error}") from error
            extra = parse_recipe(text, path.stem)
            recipe = replace(recipe, overrides=(*recipe.overrides, *extra.overrides))
        self.recipe = recipe
        self.engine_options = EngineOptions(threads=options.threads if options.threads is not None else 1)
        self.budget: Budget = parse_budget(options.budget)
        if (self.budget.drop_points is not None or self.budget.drop_relative is not None) and options.metric is None:
            raise BudgetError("a drop budget needs a metric: give --metric file.py:function and --evaluation SRC")
        if options.metric is not None and options.evaluation is None:
            raise BudgetError("a metric needs evaluation data: give --evaluation SRC")
        self.decisions = _read_decisions(options.decisions)
        if options.emit not in ("auto", "qdq", "qoperator"):
            raise PassError(f"emit is {options.emit!r}; expected auto, qdq or qoperator")
        if options.opset is not None and not LEAST_LOWERED <= options.opset <= self.target.max_opset:
            raise TargetError(
                f"opset is {options.opset}; expected {LEAST_LOWERED} to {self.target.max_opset} for {self.target.name}"
            )

    def _say(self, text: str) -> None:
        if self.options.progress is not None:
            self.options.progress(text)

    def _read_data(self, inputs: Sequence[TensorInfo]) -> None:
        options = self.options
        self.evaluation = as_feed_source(options.evaluation, inputs) if options.evaluation is not None else None
        self.feeds: FeedSource | None = None
        if options.calibration is not None:
            self.feeds = as_feed_source(options.calibration, inputs)
        elif options.random_calibration:
            self.feeds = as_feed_source(random_feeds(inputs, options.random_calibration), inputs)
            self.warnings.append(
                "calibrated with random data, as asked: ranges and accuracy figures say nothing about real data"
            )
        elif self.evaluation is not None:
            self.warnings.append(
                "no calibration data: only dynamic forms were considered, and evaluation feeds serve the accuracy "
                "guard; give --calibration SRC for static forms"
            )
        else:
            self.warnings.append(
                "no calibration data: only dynamic forms were considered and accuracy was not measured; "
                "give --calibration SRC for static forms and the accuracy guard"
            )

    # ---- data -------------------------------------------------------------------------------------------------

    def _calibrate(self, state: CompileState) -> None:
        self.statistics: Statistics | None = None
        self.ranges: FeedSource | None = None
        self.held_out: list[Feeds] = []
        if self.feeds is None:
            # Without this a budget on the metric would go unchecked.
            if self.evaluation is not None:
                self.held_out = list(itertools.islice(self.evaluation, _MOST_HELD_OUT))
            return
        split = self.feeds.split()
        if split.shared:
            self.warnings.append("a single calibration feed serves for ranges and for checking alike; give more feeds")
        names = list(dict.fromkeys(wanted_values(state.model, self.workshop.groups)))

        def report(done: int, total: int | None) -> None:
            self._say(f"calibrate {done}" + (f"/{total}" if total else ""))

        self.statistics = observe(state.model, names, split.ranges, self.engine, threads=1, progress=report)
        state.statistics = self.statistics
        self.held_out = list(split.held_out)
        self.ranges = split.ranges

    # ---- decisions --------------------------------------------------------------------------------------------

    def _decide(self, pinned: Mapping[str, Form]) -> tuple[dict[str, Form], dict[str, str]]:
        groups = self.workshop.groups
        self.quality: Quality | None = None
        self.accuracy: AccuracyResult | None = None
        self.why: dict[str, str] = {}
        self.tried: dict[str, dict[str, float]] = {}
        self.search: SpeedSearch | None = None
        self.predict: Callable[[Mapping[str, Form]], float] = lambda forms: 0.0
        self.speedup: tuple[float, float] | None = None
        self.judge = self._judge()
        self.smoothing: dict[str, float] = {}
        if self.decisions is not None:
            self._check_decisions(self.decisions)
            self._replay_smoothing(self.decisions.smoothing)
            self.workshop.estimator = self.decisions.estimator
            self.figures = {k: v for k, v in self.decisions.figures.items() if k != "variants"}
            self.tried = dict(self.decisions.figures.get("variants", {}))
            forms = {g.name: self.decisions.forms.get(g.name, "float") for g in groups}
            self.why = dict(self.decisions.why)
            return forms, dict(self.decisions.engine_forms)
        data = self.statistics is not None
        recipe = self.recipe
        convolution: Form = recipe.convolution if data else "float"
        static = Policy(convolution, "static-float" if data else "dynamic", "float", recipe.arithmetic)
        default = Policy(
            convolution, recipe.matmul if data else "dynamic", recipe.recurrent, recipe.arithmetic and data
        )
        forms = propose(groups, default, pinned)
        if not (self.options.guard and self.here):
            return forms, {}
        feed = self._sample_feed()
        engine_forms: dict[str, str] = {}
        if recipe.choose and feed is not None and not self.workshop.base.imported:
            self._try_smoothing(feed)
        if self.workshop.base.imported:
            # The model was quantized already: what it runs on integers stays there, with its own numbers.
            forms = propose(groups, static, pinned)
            self.workshop.learn_emission(forms)
        elif recipe.choose and feed is not None:
            forms, engine_forms = self._search(static, pinned, feed)
        else:
            self.workshop.learn_emission(forms)
        if self.judge is not None:
            guarded = self._guard_accuracy(forms, engine_forms)
            if guarded != forms and self.search is not None:
                guarded = self.search.return_losers(guarded, engine_forms)
            forms = guarded
        if feed is not None:
            forms, engine_forms = self._guard_speed(forms, engine_forms, feed)
        return forms, engine_forms

    def _check_decisions(self, decisions: Decisions) -> None:
        """Refuse a record whose groups the model does not have; tell if it was made for other weights."""
        known = {g.name for g in self.workshop.groups}
        if unknown := sorted(set(decisions.forms) - known):
            raise PassError(
                f"the decisions record is of another model: it names {unknown[0]!r}"
                + (f" and {len(unknown) - 1} more groups" if len(unknown) > 1 else "")
                + ", which this one does not have; compile anew"
            )
        made_for, now = decisions.context.get("model"), _digest(self.given)
        if made_for is not None and made_for != now:
            self.warnings.append(
                f"the decisions record was made for a model of digest {made_for}, this one has {now}: "
                "its forms are repeated, its figures may not hold"
            )

    def _try_smoothing(self, feed: Feeds) -> None:
        """Go on with the smoothed graph if smoothing was measured to pay."""
        if self.judge is None or self.statistics is None or self.ranges is None:
            return
        if not any("dynamic" in g.legal and g.root.op_type != "LSTM" for g in self.workshop.groups):
            return
        self._say("try smoothing")
        found = try_smoothing(self.workshop, self.statistics, self.ranges, self.judge, self._stopwatch(feed))
        if found is not None:
            self.workshop, self.statistics, self.smoothing = found.workshop, found.statistics, found.alphas
            self.figures["smoothing"] = found.figures

    def _replay_smoothing(self, alphas: Mapping[str, float]) -> None:
        """Smooth as an earlier build did."""
        if not alphas:
            return
        if self.statistics is None or self.ranges is None:
            raise CalibrationError("the decisions record smooths activations; give the calibration data of that build")
        channels = measure_channels(self.workshop, self.ranges)
        self.workshop, self.statistics = apply_smoothing(
            self.workshop, self.statistics, channels, alphas, self.ranges
        )
        self.smoothing = dict(alphas)

    def _sample_feed(self) -> Feeds | None:
        """Return a representative feed for timing, or None if there is no way to make one."""
        if self.held_out:
            return self.held_out[0]
        try:
            return next(iter(random_feeds(self.runner.inputs, 1)))
        except CalibrationError as error:
            self.warnings.append(f"nothing was timed: {error}")
            return None

    def _judge(self) -> Judge | None:
        if not self.held_out:
            return None
        evaluation = list(self.evaluation) if self.evaluation is not None else []
        return Judge(
            self.engine, self.given, self.held_out, class_like_outputs(self.workshop.base.model),
            self.engine_options, self.options.metric, evaluation,
        )  # fmt: skip

    def _stopwatch(self, feed: Feeds) -> Stopwatch:
        return self.options.stopwatch or EngineStopwatch(self.engine, feed, self.engine_options)

    def _search(
        self, policy: Policy, pinned: Mapping[str, Form], feed: Feeds
    ) -> tuple[dict[str, Form], dict[str, str]]:
        self._say("measure float, static and dynamic forms")
        groups = self.workshop.groups
        search = self._speed_search(feed)
        static = propose(groups, policy, pinned)
        if self.statistics is None:
            static = dict.fromkeys(static, "float")
        dynamic: dict[str, Form] = {
            g.name: "dynamic" if "dynamic" in g.legal and pinned.get(g.name, "dynamic") == "dynamic" else "float"
            for g in groups
        }
        static = self._learn(static)
        dynamic = self._learn(dynamic)
        engine_forms = search.avoid_traps({}, self.target.traps, {})
        forms = search.choose(static, dynamic, engine_forms)
        self.figures |= search.figures
        self._choose_estimator(static, engine_forms)
        self._note_variant("static", static, engine_forms)
        self._note_variant("dynamic", dynamic, engine_forms)
        engine_forms = search.avoid_traps(forms, self.target.traps, {})
        forms = search.return_losers(forms, engine_forms)
        self.predict, self.search = search.predict, search
        self.why |= search.why
        self.figures |= search.figures
        return forms, engine_forms

    def _learn(self, forms: dict[str, Form]) -> dict[str, Form]:
        if all(f == "float" for f in forms.values()):
            return forms
        self.workshop.learn_emission(forms)
        made = self.workshop.build(forms)
        return {name: made.forms.get(name, "float") for name in forms}

    def _choose_estimator(self, static: Mapping[str, Form], engine_forms: Mapping[str, str]) -> None:
        """Keep the range estimator under which the static variant comes closest to float on set-aside feeds."""
        if self.judge is None or self.recipe.estimator != "auto" or all(f == "float" for f in static.values()):
            return
        self._say("choose the range estimator")
        measured: dict[str, float] = {}
        for name in ESTIMATOR_CHOICES:
            self.workshop.estimator = name
            measured[name] = round(self.judge(self.workshop.build(static, engine_forms).model).worst, 2)
        self.workshop.estimator = max(measured, key=lambda name: measured[name])
        self.figures["estimators_db"] = measured

    def _note_variant(self, name: str, forms: Mapping[str, Form], engine_forms: Mapping[str, str]) -> None:
        if all(f == "float" for f in forms.values()):
            return
        figures = {"profile_us": float(self.figures.get("profile_us", {}).get(name, 0.0))}
        if self.judge is not None:
            figures["sqnr_db"] = round(self.judge(self.workshop.build(forms, engine_forms).model).worst, 2)
        self.tried[name] = figures

    def _speed_search(self, feed: Feeds) -> SpeedSearch:
        elements = self._elements(feed)
        search = SpeedSearch(
            self.workshop.base.model, self.workshop.groups, self.workshop.build, self._stopwatch(feed), elements,
            self.pinned,
        )  # fmt: skip
        return search

    def _elements(self, feed: Feeds) -> dict[str, int]:
        """Return elements per value in one feed, as calibration counted them."""
        found = {name: int(array.size) for name, array in feed.items()}
        if self.statistics is not None:
            for name in wanted_values(self.workshop.base.model, self.workshop.groups):
                if self.statistics.observed(name):
                    found[name] = self.statistics.elements_per_feed(name)
        return found

    def _bound(self) -> Bound:
        judge = self.judge
        assert judge is not None
        recipe, floor = self.recipe, self.options.min_sqnr
        demanded = {}
        for name in judge.outputs:
            usual = recipe.min_sqnr_classes if name in judge.class_like else recipe.min_sqnr
            usual = recipe.min_sqnr_state if name in judge.carried else usual
            demanded[name] = max(usual if floor is None else floor, self.budget.sqnr_db or 0.0)
        least = None
        if judge.reference_metric is not None:
            least = self.budget.least_metric(judge.reference_metric)
        return Bound(demanded, recipe.min_agreement, least)

    def _guard_accuracy(self, forms: dict[str, Form], engine_forms: Mapping[str, str]) -> dict[str, Form]:
        self._say("accuracy guard")
        judge = self.judge
        assert judge is not None

        def evaluate(trial: Mapping[str, Form]) -> Quality:
            return judge(self.workshop.build(trial, engine_forms).model)

        sets = candidate_sets(self.workshop.groups, forms, self.statistics)
        frozen = frozenset(n for n, f in self.pinned.items() if f != "float")
        guard = AccuracyGuard(
            sets, evaluate, self._bound(), self.predict, frozen=frozen, progress=self.options.progress
        )
        result = guard.run(forms)
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
        self._say("speed guard")
        search = self._speed_search(feed)
        ratio = search.ratio(self.given, self.workshop.build(forms, engine_forms).model)
        self.tried["chosen"] = {"speedup": round(ratio[0], 3)}
        if ratio[0] < 1.0 and any(f != "float" for f in forms.values()):
            search.float_costs = search.costs({}, engine_forms)
            forms = search.return_losers(forms, engine_forms)
            self.why |= search.why
            self.figures |= search.figures
            ratio = search.ratio(self.given, self.workshop.build(forms, engine_forms).model)
            self.tried["without losing regions"] = {"speedup": round(ratio[0], 3)}
        if ratio[0] < 1.0:
            fallback = {g.name: self.pinned.get(g.name, "float") for g in self.workshop.groups}
            forms = dict(fallback)
            engine_forms = search.avoid_traps(forms, self.target.traps, {})
            ratio = search.ratio(self.given, self.workshop.build(forms, engine_forms).model)
            self.tried["float"] = {"speedup": round(ratio[0], 3)}
            for group in self.workshop.groups:
                if forms[group.name] == "float" and group.legal:
                    self.why[group.name] = "float: no integer form of the model was measured faster than float"
        self.speedup = ratio
        return forms, engine_forms

    # ---- result -----------------------------------------------------------------------------------------------

    def _finish(self, forms: dict[str, Form], engine_forms: dict[str, str]) -> CompiledModel:
        self._say("lower and prove")
        build = self.workshop.build(forms, engine_forms, self.instruments)
        if self.options.opset is not None:
            set_opset(build.model, self.options.opset)
        proof = self.workshop.prove(build)
        if self.judge is not None:
            self.quality = self.judge(build.model)
        decisions = Decisions(
            forms={n: f for n, f in sorted(build.forms.items()) if f != "float"},
            engine_forms={**self.workshop.engine_forms, **engine_forms},
            estimator=self.workshop.estimator,
            smoothing=dict(sorted(self.smoothing.items())),
            why=dict(sorted(self.why.items())),
            figures={**self.figures, "variants": self.tried},
            context=self._context(),
        )
        report = self._report(build, proof)
        return CompiledModel(build.model, decisions, tuple(build.state.remarks), report)

    def _context(self) -> dict[str, str]:
        return {
            "engine": f"{self.engine.name} {self.engine.version}",
            "target": self.target.name,
            "processor": self.processor.model,
            "recipe": self.recipe.name,
            "threads": str(self.engine_options.threads),
            "model": _digest(self.given),
        }

    def _report(self, build: Build, proof: Proof) -> Report:
        return Report(
            proof=proof,
            quality=self.quality,
            bytes_before=self.bytes_before,
            bytes_after=len(to_bytes(build.model, strip=True)),
            speedup=None if self.speedup is None else round(self.speedup[0], 4),
            speedup_median=None if self.speedup is None else round(self.speedup[1], 4),
            integer_share=self._integer_share(proof),
            passes=tuple(self.passes),
            groups=tuple(self._group_reports(build)),
            forms_tried=self.tried,
            warnings=tuple(self.warnings),
            context=self._context(),
            returned=tuple(
                {
                    "groups": list(s.groups),
                    "before_db": round(s.before_db, 2),
                    "after_db": round(s.after_db, 2),
                    "percent": s.percent,
                    "demanded": s.demanded,
                }
                for s in (self.accuracy.steps if self.accuracy is not None else ())
            ),
        )

    def _group_reports(self, build: Build) -> Iterable[GroupReport]:
        said = {r.node: r for r in build.state.remarks if r.pass_name == "plan-quantization"}
        for group in self.workshop.groups:
            form = build.forms.get(group.name, "float")
            why = self.why.get(group.name, "")
            if form == "float" and not why:
                if group.name in self.workshop.refused:
                    why = f"float: {self.workshop.refused[group.name]}"
                elif group.name in said:
                    why = f"float: {said[group.name].reason}: {said[group.name].text}"
                else:
                    why = "float: nothing around it runs on integers"
            yield GroupReport(group.name, group.root.op_type, form, why or f"{form}: by recipe", macs(group.root) or 0)

    def _integer_share(self, proof: Proof) -> float:
        """Return the share of multiply-adds whose group the engine was seen to run on integers."""
        total = integer = 0
        for node in self.workshop.base.model.graph.all_nodes():
            count = macs(node) or 0
            total += count
            if str(node.name) in proof.fused:
                integer += count
        return round(integer / total, 4) if total else 0.0


@dataclass
class _Log:
    """An instrument that notes the passes and their changes for the report."""

    owner: _Compilation

    def before_pass(self, state: CompileState, step: Step) -> None:
        """Do nothing."""

    def after_pass(self, state: CompileState, step: Step, changes: int) -> None:
        """Note one pass."""
        self.owner.passes.append((step.text, changes))

    def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
        """Do nothing."""


def wanted_values(model: ir.Model, groups: Sequence[Group]) -> Iterator[str]:
    """Yield the float values whose ranges any form may need, and the scores of every Softmax."""
    for group in groups:
        for value in (*group.data, *group.results, group.float_result):
            if is_float(value):
                yield str(value.name)
    for node in model.graph.all_nodes():
        if node.op_type == "Softmax" and node.inputs[0] is not None:
            yield str(node.inputs[0].name)


def runs_here(target: Target, processor: Processor) -> bool:
    """Return whether timing on this machine says anything about the target."""
    if target.processor and target.processor != processor.machine:
        return False
    return all(feature in processor.features for feature in target.requires)


def _read_decisions(source: Decisions | str | Path | None) -> Decisions | None:
    if source is None or isinstance(source, Decisions):
        return source
    path = Path(source)
    try:
        return Decisions.from_json(path.read_text(encoding="utf-8", errors="replace"))
    except PassError as error:
        raise PassError(f"{path}: {error}") from error
    except OSError as error:
        raise PassError(f"cannot read the decisions record {path}: {error.strerror or error}") from error


def _size_of(source: ModelSource, given: ir.Model) -> int:
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, str | Path):
        weights = sum(
            v.const_value.nbytes
            for v in given.graph.initializers.values()
            if isinstance(v.const_value, ir.ExternalTensor)
        )
        return Path(source).stat().st_size + weights
    return len(to_bytes(given, strip=True))


def _digest(model: ir.Model) -> str:
    return hashlib.sha256(to_bytes(model, strip=True)).hexdigest()[:16]


def stack_outputs(outputs: Sequence[Mapping[str, Array]], name: str) -> list[Array]:
    """Return one output over all feeds, for metrics."""
    return [o[name] for o in outputs]

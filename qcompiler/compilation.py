"""One compilation for one target: import, canonicalize, calibrate, decide, lower, prove, report."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from qcompiler.backends.catalog import ENGINE, open_backend
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import Proof
from qcompiler.compiled import CompiledModel
from qcompiler.dataset import Dataset, open_dataset
from qcompiler.decider import Decider
from qcompiler.decisions import Decisions
from qcompiler.dropin.settings import default_cache
from qcompiler.engine import Engine
from qcompiler.errors import BudgetError, ModelError, PassError
from qcompiler.ir.analysis import macs
from qcompiler.ir.importer import import_model
from qcompiler.ir.opset import set_opset
from qcompiler.ir.reader import read_model
from qcompiler.ir.schemas import onnx_opset
from qcompiler.ir.serialize import to_bytes
from qcompiler.options import ModelSource, Options, Settings, settle
from qcompiler.passes.front import front_passes
from qcompiler.pipeline.instruments.dump import DumpInstrument
from qcompiler.pipeline.instruments.numerics import NumericsInstrument
from qcompiler.pipeline.instruments.timing import TimeInstrument
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Instrument, Pipeline, Step
from qcompiler.pipeline.state import CompileState
from qcompiler.planning import Planning
from qcompiler.plugins import plugins_text
from qcompiler.quant.plan import Form
from qcompiler.recipe_passes import recipe_passes
from qcompiler.report.report import GroupReport, Report
from qcompiler.runnable import load_runnable
from qcompiler.search.cost_cache import CostCache, EngineKey, cost_folder
from qcompiler.search.quality import Judge, class_like_outputs
from qcompiler.setting import Setting
from qcompiler.targets.legality import legality_names, load_legality
from qcompiler.workshop import AS_GIVEN, Build, Workshop

PROVEN_ON = "onnxruntime"
"""Name of the engine that a file without metadata is for."""


@dataclass
class Compilation:
    """One compilation for one target; `run` does it."""

    source: ModelSource
    options: Options
    truth: OrtEngine = field(default_factory=OrtEngine)
    warnings: list[str] = field(default_factory=list)
    passes: list[tuple[str, int]] = field(default_factory=list)
    shared: Dataset | None = None
    data: Dataset = field(init=False)

    def run(self) -> CompiledModel:
        """Compile, measure and prove.

        Raises:
            QCompilerError: bad input.
        """
        self.prepare()
        return self.finish(*self.decide())

    def prepare(self) -> None:
        """Import, canonicalize and calibrate: everything that decisions are made on.

        Raises:
            QCompilerError: bad input.
        """
        self.settings: Settings = settle(self.options)
        self.warnings += self.settings.notes
        target, recipe = self.settings.target, self.settings.recipe
        self.backend = open_backend(target, self.options.profiles)
        self.engine_options = self.settings.engine
        if not self.here:
            self.warnings.append(self._elsewhere(target.name))
            # Where the target's engine does not run, no rewriting of another engine's may come between.
            self.engine_options = replace(self.settings.engine, optimize=False)
        if self.here and self.options.guard and not self.options.measure:
            self.warnings.append("nothing was timed: costs are those of the table that ships, not of this machine")
        self.say("import")
        given = import_model(self.source, shapes=self.options.fixed_shapes)
        self.given = given
        self.bytes_before = _size_of(self.source, given)
        plain = replace(self.engine_options, optimize=False)
        runs, self.runner, widened = load_runnable(given, self.truth, plain, target)
        self.warnings += [widened] if widened else []
        self.data = self.shared or open_dataset(self.options.data, given, self.runner.inputs)
        self.instruments: list[Instrument] = [VerifyInstrument(), _Log(self)]
        if self.options.dump is not None:
            times = TimeInstrument()
            self.instruments = [DumpInstrument(self.options.dump, times), *self.instruments, times]
        self.reference = self._reference(runs)
        self.say("canonicalize")
        state = CompileState(given.clone(), target)
        Pipeline((*front_passes(), *recipe_passes(recipe))).run(state, self.instruments)
        self.workshop = Workshop(
            state, self.backend, self.engine_options, self.options.emit, recipe.estimator, truth=self.truth,
            given=self.reference,
        )  # fmt: skip
        self.data.observe(state.model, self.workshop.groups, self.truth, self.options.data, self.say)
        state.statistics = self.data.statistics
        sample = self.data.held_out[0] if self.data.held_out else {}
        self.samples = {name: array.shape for name, array in sample.items()}
        self.workshop.backend = self.backend = open_backend(target, self.options.profiles, self.samples)
        pinned, estimators = recipe.pinned({g.name: g.legal for g in self.workshop.groups})
        state.estimators = estimators
        self.pinned = pinned
        self.judge = self._judge()

    def decide(self, shared: frozenset[str] = frozenset()) -> tuple[dict[str, Form], dict[str, str]]:
        """Return, after `prepare`, the (forms, engine forms) that measurement chooses, or those of the given record.

        Args:
            shared: groups whose weights other graphs have, too: no activation's scales are folded into them.

        Raises:
            PassError: the record is of another model.
        """
        setting = self._setting(self.pinned, shared)
        self.decider = Decider(setting, self.workshop, self.data.statistics, self.warnings)
        if (record := self.settings.decisions) is not None:
            self._check_decisions(record)
            forms, engine_forms = self.decider.replay(record)
        else:
            forms, engine_forms = self.decider.decide()
        self.workshop = self.decider.workshop
        return forms, engine_forms

    def prepare_plan(self) -> tuple[Planning, dict[str, dict[str, Form]]]:
        """Return, after `prepare`, what `decide` would plan with; `finish` then builds any choice of forms.

        Raises:
            BudgetError: there is nothing to plan.
        """
        setting = self._setting(self.pinned, frozenset())
        self.decider = Decider(setting, self.workshop, self.data.statistics, self.warnings)
        found = self.decider.prepare_plan()
        self.workshop = self.decider.workshop
        return found

    def as_given(self) -> CompiledModel | None:
        """Return, after `run`, the model as it came for this engine; None if it misses the accuracy bounds there."""
        if self.judge is not None and not self.decider.holds(self.judge(self.reference)):
            return None
        return self.finish({g.name: "float" for g in self.workshop.groups}, {AS_GIVEN: "keep"})

    def _elsewhere(self, target: str) -> str:
        processor = self.settings.processor
        what = f"this machine ({processor.model or processor.machine})"
        lacks = f"is not {what}" if not self.settings.here else f"has no engine on {what}"
        accuracy = "; accuracy is measured on ONNX Runtime" if self.options.guard else ""
        return f"target {target} {lacks}: nothing was timed, forms follow the recipe{accuracy}"

    @property
    def engine(self) -> Engine:
        """Return the engine that runs builds here: the target's own, or one that computes the same numbers."""
        return self.backend.engine

    @property
    def here(self) -> bool:
        """Return whether timing on this machine says anything about the target."""
        return self.settings.here and self.backend.measures

    @property
    def met(self) -> bool:
        """Return whether the accuracy bounds hold, as far as they were measured."""
        return self.decider.accuracy is None or self.decider.accuracy.met

    def _reference(self, given: ir.Model) -> ir.Model:
        """Return the model as the user would run it today, which every comparison is against.

        Import infers shapes, which lets the engine fuse more, not always to its advantage: timing against the imported
        graph would flatter us. A model that the engine does not take as it is (too old) is compared as imported.
        """
        raw = read_model(self.source)
        try:
            self.engine.load(raw, self.engine_options)
        except ModelError:
            return given
        return raw

    def say(self, text: str) -> None:
        """Tell the user of a step, if anybody listens."""
        if self.options.progress is not None:
            self.options.progress(text)

    # ---- decisions --------------------------------------------------------------------------------------------

    def _setting(self, pinned: Mapping[str, Form], shared: frozenset[str]) -> Setting:
        options, budget = self.options, self.settings.budget
        return Setting(
            given=self.reference,
            inputs=self.runner.inputs,
            engine=self.engine,
            engine_options=self.engine_options,
            recipe=self.settings.recipe,
            budget=budget,
            min_sqnr=options.min_sqnr,
            pinned=pinned,
            guard=options.guard,
            timed=options.guard and self.here,
            ranges=self.data.ranges,
            held_out=self.data.held_out,
            judge=self.judge,
            stopwatch=options.stopwatch,
            say=self.say,
            shared=shared,
            cost_cache=self._cost_cache(),
            objective=options.objective,
            measure=options.measure,
            processor=self.settings.processor if self.here else None,
            limits=budget.limits(),
        )

    def _cost_cache(self) -> CostCache | None:
        """Return what earlier compilations measured on this machine; None where the user brings a stopwatch."""
        if self.options.stopwatch is not None:
            return None
        processor = self.settings.processor
        key = EngineKey(
            self.settings.target.engine, self.backend.version, f"{processor.machine} {processor.model}".strip(),
            self.engine_options.threads,
        )  # fmt: skip
        return CostCache(cost_folder(default_cache(os.environ)), key)

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
        if (with_plugins := decisions.context.get("plugins", "")) != plugins_text():
            self.warnings.append(
                f"the decisions record was made with the plugins {with_plugins or 'none'}, there are "
                f"{plugins_text() or 'none'} now: the result may be another"
            )

    def _judge(self) -> Judge | None:
        if not self.data.held_out:
            return None
        evaluation = list(self.data.evaluation) if self.data.evaluation is not None else []
        return Judge(
            self.engine, self.reference, self.data.held_out, class_like_outputs(self.workshop.base.model),
            self.engine_options, self.options.metric, evaluation, self.truth, self.workshop.base.model,
        )  # fmt: skip

    # ---- result -----------------------------------------------------------------------------------------------

    def finish(self, forms: Mapping[str, Form], engine_forms: Mapping[str, str]) -> CompiledModel:
        """Return, after `decide`, the lowered and proven model with its report."""
        self.say("lower and prove")
        self.passes += [(name, len(parameters)) for name, parameters in self.decider.treatments.items()]
        self._measure_dump()
        build = self.built = self.workshop.build(forms, engine_forms, self.instruments)
        if self.options.opset is not None:
            set_opset(build.model, self.options.opset)
        self._check_legality(build.model)
        proof = self.workshop.prove(build)
        self.quality = self.judge(self.workshop.computable(build)) if self.judge is not None else None
        decisions = Decisions(
            forms={n: f for n, f in sorted(build.forms.items()) if f != "float"},
            engine_forms={**self.workshop.engine_forms, **engine_forms},
            estimator=self.workshop.estimator,
            estimators=dict(sorted(self.workshop.base.estimators.items())),
            treatments=self.decider.treatments,
            why=dict(sorted(self.decider.why.items())),
            figures={**self.decider.figures, "variants": self.decider.tried},
            context=self._context(),
        )
        report = self._report(build, proof)
        self._check_size(report.bytes_after)
        engine = self.settings.target.engine
        if engine != PROVEN_ON:
            build.model.metadata_props[ENGINE] = engine
        return CompiledModel(
            build.model, decisions, tuple(build.state.remarks), report, self.settings.target, self.options.profiles,
            self.samples,
        )  # fmt: skip

    def _check_size(self, found: int) -> None:
        """Refuse a build that became larger behind the plan than the user allows: by ``--opset``, or a return to float.

        Raises:
            BudgetError: it has too many bytes.
        """
        most = self.settings.budget.bytes
        if most is not None and self.settings.decisions is None and found > most:
            raise BudgetError(
                f"the build has {found} bytes, the budget is bytes<={most}: what was done behind the plan (--opset, a "
                "return to float) made it larger; allow more bytes, or leave that out"
            )

    def _check_legality(self, model: ir.Model) -> None:
        """Warn of what the target's engine would refuse or compute otherwise in the lowered model."""
        target = self.settings.target
        if target.engine not in legality_names():
            return
        found = [d for d in load_legality(target.engine).check(model, sm=target.sm) if d.severity == "error"]
        for code in dict.fromkeys(d.code for d in found):
            first, *others = (d for d in found if d.code == code)
            more = f", and at {len(others)} more" if others else ""
            self.warnings.append(f"{target.name} refuses the model: {code} at {first.node}{more}: {first.text}")

    def _measure_dump(self) -> None:
        """Let the dump show the error of every pass of the final build, where there are feeds to measure it on."""
        dump = self.instruments[0]
        if isinstance(dump, DumpInstrument) and self.data.held_out:
            dump.numerics = NumericsInstrument(self.truth, self.data.held_out[:2], strict=False)
            self.instruments.insert(1, dump.numerics)

    def _context(self) -> dict[str, str]:
        return {
            "engine": f"{self.settings.target.engine} {self.backend.version}".strip(),
            "target": self.settings.target.name,
            "processor": self.settings.processor.model,
            "recipe": self.settings.recipe.name,
            "threads": str(self.engine_options.threads),
            "opset": str(self.options.opset or onnx_opset(self.workshop.base.model)),
            "model": _digest(self.given),
            **({"plugins": plugins} if (plugins := plugins_text()) else {}),
        }

    def _timed(self) -> dict[str, str]:
        """Return the shapes that were timed: what another batch or length gains may differ."""
        feed = self.decider.timing_feed
        if feed is None or self.decider.speedup is None:
            return {}
        shapes = [f"{name} {'x'.join(map(str, array.shape)) or 'scalar'}" for name, array in list(feed.items())[:3]]
        return {"timed": ", ".join(shapes) + (", ..." if len(feed) > 3 else "")}

    def _report(self, build: Build, proof: Proof) -> Report:
        return Report(
            proof=proof,
            quality=self.quality,
            bytes_before=self.bytes_before,
            bytes_after=len(to_bytes(build.model, strip=True)),
            speedup=None if self.decider.speedup is None else round(self.decider.speedup[0], 4),
            speedup_median=None if self.decider.speedup is None else round(self.decider.speedup[1], 4),
            integer_share=self._integer_share(proof),
            passes=tuple(self.passes),
            groups=tuple(self._group_reports(build)),
            forms_tried=self.decider.tried,
            warnings=(*self.data.warnings, *self.warnings),
            context={**self._context(), **self._timed()},
            plan=self.decider.figures.get("plan", {}),
            returned=tuple(
                {
                    "groups": list(s.groups),
                    "before_db": round(s.before_db, 2),
                    "after_db": round(s.after_db, 2),
                    "percent": s.percent,
                    "demanded": s.demanded,
                }
                for s in (self.decider.accuracy.steps if self.decider.accuracy is not None else ())
            ),
        )

    def _group_reports(self, build: Build) -> Iterable[GroupReport]:
        said = {r.node: r for r in build.state.remarks if r.pass_name == "plan-quantization"}
        for group in self.workshop.groups:
            form = build.forms.get(group.name, "float")
            why = self.decider.why.get(group.name, "")
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

    owner: Compilation

    def before_pass(self, state: CompileState, step: Step) -> None:
        """Do nothing."""

    def after_pass(self, state: CompileState, step: Step, changes: int) -> None:
        """Note one pass."""
        self.owner.passes.append((step.text, changes))

    def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
        """Do nothing."""


def _size_of(source: ModelSource, given: ir.Model) -> int:
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, str | Path):
        size = Path(source).stat().st_size
        if any(isinstance(v.const_value, ir.ExternalTensor) for v in given.graph.initializers.values()):
            # The import took small tensors in: the file itself says which of them lie outside.
            stored = ir.load(source).graph.initializers.values()
            size += sum(v.const_value.nbytes for v in stored if isinstance(v.const_value, ir.ExternalTensor))
        return size
    return len(to_bytes(given, strip=True))


def _digest(model: ir.Model) -> str:
    return hashlib.sha256(to_bytes(model, strip=True)).hexdigest()[:16]

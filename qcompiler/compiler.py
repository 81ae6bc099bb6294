"""Drive a compilation: import, canonicalize, calibrate, search, guard, lower, prove, report."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qcompiler.backends.catalog import ENGINE, open_backend
from qcompiler.backends.onnxruntime import OrtEngine, OrtRunner
from qcompiler.backends.openvino import save_openvino
from qcompiler.backends.readback import Proof
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.calibration.statistics import Statistics
from qcompiler.dataset import DataOptions, Dataset, open_dataset
from qcompiler.decider import Decider, Setting
from qcompiler.decisions import Decisions
from qcompiler.engine import EngineOptions, Feeds
from qcompiler.errors import BudgetError, ModelError, PassError, TargetError
from qcompiler.ir.analysis import macs
from qcompiler.ir.importer import import_model
from qcompiler.ir.opset import set_opset
from qcompiler.ir.reader import read_model
from qcompiler.ir.schemas import LEAST_LOWERED, onnx_opset
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
from qcompiler.search.budget import Budget, parse_budget
from qcompiler.search.quality import Judge, Metric, class_like_outputs
from qcompiler.search.timing import Stopwatch
from qcompiler.targets.host import Processor, detect, host_target_name
from qcompiler.targets.target import Target, load_target
from qcompiler.workshop import Build, Workshop

ModelSource = str | Path | bytes | onnx.ModelProto | ir.Model
Calibration = str | Path | Iterable[Feeds] | Callable[[], Iterable[Feeds]] | Statistics
Progress = Callable[[str], None]


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
    synthetic_calibration: int = 0
    sources: SourceOptions = field(default_factory=SourceOptions)
    calibration_memory: int | None = None
    executor: Executor | str | None = None
    scheduler: str | None = None

    @property
    def data(self) -> DataOptions:
        """Return what is said about data."""
        return DataOptions(
            self.calibration, self.evaluation, self.random_calibration, self.synthetic_calibration, self.sources,
            self.calibration_memory, self.executor, self.scheduler,
        )  # fmt: skip


@dataclass(frozen=True)
class CompiledModel:
    """The result of a compilation.

    Attributes:
        model: the LOWERED graph.
        decisions: what measurement chose; replay it with ``compile(..., decisions=...)``.
        remarks: why things were or were not done.
        report: proof, accuracy, size, speed.
        engine: name of the engine that it was compiled for.
    """

    model: ir.Model
    decisions: Decisions
    remarks: tuple[Remark, ...]
    report: Report
    engine: str = "onnxruntime"

    def to_bytes(self) -> bytes:
        """Return the serialized model; the same inputs and decisions give the same bytes."""
        return to_bytes(self.model, strip=True)

    def save(self, path: str | Path) -> None:
        """Write the model, and the decisions record beside it (``model.decisions.json``); nothing half-written.

        Args:
            path: an .onnx, or an .xml for OpenVINO's own form (with the weights beside it as .bin).

        Raises:
            ModelError: the path cannot be written.
            TargetError: an .xml is asked for, but the model was compiled for another engine than OpenVINO.
        """
        target = Path(path)
        with staged_text(decisions_path(target), self.decisions.to_json()):
            if target.suffix == ".xml":
                save_openvino(self.model, target, self.engine)
            else:
                save_model(self.model, target, strip=True)

    def session(self, threads: int = 0) -> Any:
        """Return the engine's own object: an ``onnxruntime.InferenceSession``, or an ``openvino.CompiledModel``.

        Args:
            threads: threads inside one operator; 0 leaves it to the engine.
        """
        runner = open_backend(self.engine).engine.load(self.model, EngineOptions(threads=threads))
        return runner.session if isinstance(runner, OrtRunner) else runner.compiled  # type: ignore[attr-defined]


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
    if options.target == "cpu":
        from qcompiler.best_engine import compile_for_cpu

        return compile_for_cpu(source, options)
    return Compilation(source, options).run()


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
        self._settle()
        self._say("import")
        given = import_model(self.source, shapes=self.options.shapes)
        self.given = given
        self.bytes_before = _size_of(self.source, given)
        self.runner = self.truth.load(given, replace(self.engine_options, optimize=False))
        self.data = self.shared or open_dataset(self.options.data, given, self.runner.inputs)
        self.instruments: list[Instrument] = [VerifyInstrument(), _Log(self)]
        if self.options.dump is not None:
            self.instruments.append(DumpInstrument(self.options.dump))
        self.reference = self._reference(given)
        self._say("canonicalize")
        state = CompileState(given.clone(), self.target)
        Pipeline((ImportQdq(), Canonicalize())).run(state, self.instruments)
        self.workshop = Workshop(
            state, self.backend, self.engine_options, self.options.emit, self.recipe.estimator, truth=self.truth,
            given=self.reference,
        )  # fmt: skip
        self.data.observe(state.model, self.workshop.groups, self.truth, self.options.data, self._say)
        state.statistics = self.data.statistics
        pinned, estimators = self.recipe.pinned({g.name: g.legal for g in self.workshop.groups})
        state.estimators = estimators
        self.judge = self._judge()
        self.decider = Decider(self._setting(pinned), self.workshop, self.data.statistics, self.warnings)
        if self.decisions is not None:
            self._check_decisions(self.decisions)
            forms, engine_forms = self.decider.replay(self.decisions)
        else:
            forms, engine_forms = self.decider.decide()
        self.workshop = self.decider.workshop
        return self._finish(forms, engine_forms)

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

    # ---- settings ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        options = self.options
        self.processor: Processor = detect()
        name, note = (options.target, "") if options.target != "host" else host_target_name(self.processor)
        self.target: Target = load_target(name)
        if note:
            self.warnings.append(note)
        self.backend = open_backend(self.target.engine)
        self.engine = self.backend.engine
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
        self.decisions = read_decisions(options.decisions)
        if options.emit not in ("auto", "qdq", "qoperator"):
            raise PassError(f"emit is {options.emit!r}; expected auto, qdq or qoperator")
        if options.opset is not None and not LEAST_LOWERED <= options.opset <= self.target.max_opset:
            raise TargetError(
                f"opset is {options.opset}; expected {LEAST_LOWERED} to {self.target.max_opset} for {self.target.name}"
            )

    def _say(self, text: str) -> None:
        if self.options.progress is not None:
            self.options.progress(text)

    # ---- decisions --------------------------------------------------------------------------------------------

    def _setting(self, pinned: Mapping[str, Form]) -> Setting:
        options = self.options
        return Setting(
            given=self.reference,
            inputs=self.runner.inputs,
            engine=self.engine,
            engine_options=self.engine_options,
            recipe=self.recipe,
            budget=self.budget,
            min_sqnr=options.min_sqnr,
            pinned=pinned,
            guard=options.guard and self.here,
            ranges=self.data.ranges,
            held_out=self.data.held_out,
            judge=self.judge,
            stopwatch=options.stopwatch,
            say=self._say,
        )

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

    def _judge(self) -> Judge | None:
        if not self.data.held_out:
            return None
        evaluation = list(self.data.evaluation) if self.data.evaluation is not None else []
        return Judge(
            self.engine, self.reference, self.data.held_out, class_like_outputs(self.workshop.base.model),
            self.engine_options, self.options.metric, evaluation, self.truth,
        )  # fmt: skip

    # ---- result -----------------------------------------------------------------------------------------------

    def _finish(self, forms: dict[str, Form], engine_forms: dict[str, str]) -> CompiledModel:
        self._say("lower and prove")
        if self.decider.smoothing:
            self.passes.append(("smooth-activations", len(self.decider.smoothing)))
        build = self.workshop.build(forms, engine_forms, self.instruments)
        if self.options.opset is not None:
            set_opset(build.model, self.options.opset)
        proof = self.workshop.prove(build)
        self.quality = self.judge(build.model) if self.judge is not None else None
        decisions = Decisions(
            forms={n: f for n, f in sorted(build.forms.items()) if f != "float"},
            engine_forms={**self.workshop.engine_forms, **engine_forms},
            estimator=self.workshop.estimator,
            estimators=dict(sorted(self.workshop.base.estimators.items())),
            smoothing=dict(sorted(self.decider.smoothing.items())),
            why=dict(sorted(self.decider.why.items())),
            figures={**self.decider.figures, "variants": self.decider.tried},
            context=self._context(),
        )
        report = self._report(build, proof)
        if self.engine.name != self.truth.name:
            build.model.metadata_props[ENGINE] = self.engine.name
        return CompiledModel(build.model, decisions, tuple(build.state.remarks), report, self.engine.name)

    def _context(self) -> dict[str, str]:
        return {
            "engine": f"{self.engine.name} {self.engine.version}",
            "target": self.target.name,
            "processor": self.processor.model,
            "recipe": self.recipe.name,
            "threads": str(self.engine_options.threads),
            "opset": str(self.options.opset or onnx_opset(self.workshop.base.model)),
            "model": _digest(self.given),
        }

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
            context=self._context(),
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


def runs_here(target: Target, processor: Processor) -> bool:
    """Return whether timing on this machine says anything about the target."""
    if target.processor and target.processor != processor.machine:
        return False
    return all(feature in processor.features for feature in target.requires)


def read_decisions(source: Decisions | str | Path | None) -> Decisions | None:
    """Return a decisions record, read from its file where a path is given.

    Raises:
        PassError: the file cannot be read or is no record.
    """
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
        size = Path(source).stat().st_size
        if any(isinstance(v.const_value, ir.ExternalTensor) for v in given.graph.initializers.values()):
            # The import took small tensors in: the file itself says which of them lie outside.
            stored = ir.load(source).graph.initializers.values()
            size += sum(v.const_value.nbytes for v in stored if isinstance(v.const_value, ir.ExternalTensor))
        return size
    return len(to_bytes(given, strip=True))


def _digest(model: ir.Model) -> str:
    return hashlib.sha256(to_bytes(model, strip=True)).hexdigest()[:16]

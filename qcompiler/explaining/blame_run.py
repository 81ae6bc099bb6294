"""Blame a compiled model on disk, and mend it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.readers import as_feed_source
from qcompiler.calibration.statistics import Statistics
from qcompiler.compilation import Compilation
from qcompiler.compiled import CompiledModel, decisions_path
from qcompiler.decisions import Decisions
from qcompiler.engine import EngineOptions, Feeds
from qcompiler.errors import CalibrationError, PassError, QCompilerError
from qcompiler.explaining.blame import Blamer, BlameResult, Fault, override_rows
from qcompiler.explaining.blame_units import foreign_units, own_units
from qcompiler.explaining.evidence import ExplainError
from qcompiler.explaining.stored_values import ranges_of
from qcompiler.ir.importer import import_model
from qcompiler.ir.reader import read_model
from qcompiler.options import Calibration, ModelSource, Options, read_decisions
from qcompiler.passes.front import front_passes
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.recipes.recipe import load_recipe
from qcompiler.runnable import load_runnable
from qcompiler.search.quality import Metric, Quality
from qcompiler.targets.groups import Group, find_groups
from qcompiler.targets.target import Target, load_target

MOST_FEEDS = 8
"""Feeds that error is measured on where the user does not say."""


@dataclass(frozen=True)
class Accused:
    """A quantized model and what it is to be compared with.

    Attributes:
        source: the float model.
        compiled: the quantized model.
        decisions: the record beside it; None for a foreign model.
        options: to build it again; the calibration is what the user gave, or the ranges in the model.
        feeds: evaluation feeds to measure on.
        graph: the canonical float graph.
        groups: its fusion groups; empty for a foreign model.
        recalibrates: whether calibration data was given, so that estimators can be changed.
    """

    source: ModelSource
    compiled: ir.Model
    decisions: Decisions | None
    options: Options
    feeds: tuple[Feeds, ...]
    graph: ir.Model
    groups: tuple[Group, ...] = ()
    recalibrates: bool = False


def accuse(
    source: ModelSource,
    compiled: str | Path,
    evaluation: Calibration,
    *,
    decisions: Decisions | str | Path | None = None,
    calibration: Calibration | None = None,
    options: Options | None = None,
    feeds: int = MOST_FEEDS,
) -> Accused:
    """Read both models, the decisions record beside the compiled one, and the feeds.

    Args:
        source: the float model.
        compiled: path of the quantized model.
        evaluation: feeds.
        decisions: the record, where it does not lie beside the model.
        calibration: data or statistics to find ranges with anew; without it the ranges of the compiled model stay.
        options: shapes, metric and budget.
        feeds: most feeds to measure on.

    Raises:
        QCompilerError: a file cannot be read, or the record is of another model.
    """
    options = options or Options()
    path = Path(compiled)
    record_path = decisions_path(path)
    record = read_decisions(decisions if decisions is not None else record_path if record_path.is_file() else None)
    if isinstance(evaluation, Statistics):
        raise CalibrationError("evaluation needs feeds, found statistics; give the data that they were gathered from")
    given = import_model(source, shapes=options.fixed_shapes)
    plain = EngineOptions(threads=1, optimize=False)
    given, runner, _ = load_runnable(given, OrtEngine(), plain, load_target("ort-generic"))
    chosen = tuple(itertools.islice(as_feed_source(evaluation, runner.inputs, options.sources), feeds))
    if not chosen:
        raise CalibrationError("the evaluation data has no feed")
    model = read_model(path)
    if record is None:
        return Accused(source, model, None, options, chosen, given)
    target = _target_of(record)
    state = CompileState(given.clone(), target)
    Pipeline(front_passes()).run(state)
    groups = find_groups(state.model, target)
    if unknown := sorted(set(record.forms) - {g.name for g in groups}):
        raise PassError(
            f"the decisions record beside {path} is of another model: it names {unknown[0]!r}, which this one does not "
            "have"
        )
    # Without calibration data a build takes the very ranges that the model under suspicion has.
    ranges: Calibration = calibration if calibration is not None else ranges_of(model, target)  # type: ignore[assignment]
    settled = replace(
        options, target=target.name, recipe=_recipe_name(record), calibration=ranges, evaluation=list(chosen),
        decisions=record, guard=True,
    )  # fmt: skip
    return Accused(source, model, record, settled, chosen, state.model, groups, calibration is not None)


def _target_of(record: Decisions) -> Target:
    recipe = load_recipe(_recipe_name(record))
    return recipe.on(load_target(record.context.get("target", "ort-generic")))


def _recipe_name(record: Decisions) -> str:
    name = record.context.get("recipe", "int8")
    try:
        load_recipe(name)
    except QCompilerError:
        return "int8"  # a recipe of the user's own that is not here: what it decided is in the record
    return name


def measure(accused: Accused) -> BlameResult:
    """Find the places where error is born, the worst first.

    Raises:
        QCompilerError: a model or a feed that an engine refuses.
    """
    record = accused.decisions
    if record is None:
        units = foreign_units(accused.graph, accused.compiled)
        if not units:
            raise ExplainError(
                "no value has the same name in both models, so nothing can be compared; quantize a model whose tensors "
                "keep their names"
            )
        result = Blamer(OrtEngine(), accused.graph, accused.compiled, units).run(accused.feeds)
        note = "no decisions record beside the model: values were compared by name"
        return replace(result, notes=(note,), faults=tuple(f for f in result.faults if f.local_db < 199))
    units = own_units(accused.graph, accused.compiled, accused.groups, record.forms)
    result = Blamer(OrtEngine(), accused.graph, accused.compiled, units).run(accused.feeds)
    met = {n for f in result.faults for n in (f.unit.name, *f.unit.others)}
    return replace(result, unaligned=tuple(n for n in record.forms if n not in met and record.forms[n] != "float"))


# ---- what to do -----------------------------------------------------------------------------------------------------


def suggestion(accused: Accused, fault: Fault) -> list[dict[str, Any]]:
    """Return the override rows that mend a fault best: an estimator if ranges can be found anew, else float."""
    if accused.recalibrates and (estimator := _estimator(accused, fault)):
        return override_rows(fault, (), estimator)
    return override_rows(fault, _to_float(fault))


def _estimator(accused: Accused, fault: Fault) -> str:
    record = accused.decisions
    now = "" if record is None else record.estimators.get(fault.unit.name, record.estimator)
    wanted = {"clipped": "min-max", "too-wide": "mse"}.get(fault.kind, "")
    return wanted if wanted != now else ""


def _to_float(fault: Fault) -> tuple[str, ...]:
    """Return the groups that return to float: its own and, where a stored range is wrong, those that read by it."""
    readers = fault.unit.readers if fault.kind in ("clipped", "too-wide", "rounded") else ()
    return tuple(dict.fromkeys((fault.unit.name, *fault.unit.others, *readers)))


@dataclass
class Mended:
    """A recompiled model and the overrides that mend it.

    Attributes:
        compiled: the model.
        rows: override rows, in the order in which they were applied.
        steps: (row, SQNR in dB after it, value of the metric after it).
        before: quality of the model under suspicion.
        met: whether the bounds hold.
    """

    compiled: CompiledModel
    rows: list[dict[str, Any]]
    steps: list[tuple[str, float, float | None]]
    before: Quality
    met: bool
    reference_metric: float | None = None


@dataclass
class _Choice:
    """The decisions as they are being changed."""

    forms: dict[str, Form]
    estimators: dict[str, str] = field(default_factory=dict)


def mend(accused: Accused, result: BlameResult) -> Mended:
    """Apply overrides, the worst fault first, until the bounds hold, and compile the model with them.

    An override is kept only if it is measured to help; faults are ranked anew after each. Bounds are the budget's, or
    the recipe's.

    Args:
        accused: the models and what to build them again with.
        result: of `measure`.

    Raises:
        ExplainError: there is no decisions record to build from.
        QCompilerError: as `qcompiler.compile`.
    """
    record = accused.decisions
    if record is None:
        raise ExplainError(
            "cannot mend a model without a decisions record beside it: only what qcompiler compiled is rebuilt; "
            "compile the float model with the overrides above"
        )
    compilation = Compilation(accused.source, accused.options)
    compilation.run()
    bench = _Bench(compilation, record)
    # The model as it is, not its rebuild: found anew, ranges may be better already.
    before = now = bench.judge(accused.compiled)
    choice = _Choice(dict(record.forms), dict(record.estimators))
    steps: list[tuple[str, float, float | None]] = []
    rows: list[dict[str, Any]] = []
    if accused.recalibrates:
        now = bench.quality(choice)
        steps.append(("ranges found anew", now.worst, now.metric))
        result = bench.ranked(accused, choice)
    while not bench.holds(now):
        step = _best_step(bench, accused, result.faults[:_FAULTS_TRIED], choice, now)
        if step is None:
            break
        added, choice, now = step
        rows += added
        steps.append((_row_text(added), now.worst, now.metric))
        result = bench.ranked(accused, choice)
    why = {**record.why, **{_plain(r): "float: by blame: error was born here" for r in rows if "form" in r}}
    settled = replace(record, forms=choice.forms, estimators=choice.estimators, why=why)
    compiled = Compilation(accused.source, replace(accused.options, decisions=settled)).run()
    return Mended(compiled, rows, steps, before, bench.holds(now), bench.judge.reference_metric)


_FAULTS_TRIED = 4
"""Faults that are tried per step before mending gives up."""
_WORTH_DB = 0.05
_AS_GOOD = 0.9
"""Share of the best trial's gain from which on a milder one is taken instead."""


class _Bench:
    """Builds and measures choices of a compilation."""

    def __init__(self, compilation: Compilation, record: Decisions) -> None:
        if compilation.judge is None:
            raise CalibrationError("nothing can be measured without evaluation feeds")
        self.compilation, self.record, self.judge = compilation, record, compilation.judge
        self.holds = compilation.decider.holds

    def model(self, choice: _Choice) -> ir.Model:
        """Build a choice, as the judge's engine runs it."""
        workshop = self.compilation.workshop
        workshop.base.estimators = dict(choice.estimators)
        return workshop.computable(workshop.build(choice.forms, self.record.engine_forms))

    def quality(self, choice: _Choice) -> Quality:
        """Measure a choice."""
        return self.judge(self.model(choice))

    def ranked(self, accused: Accused, choice: _Choice) -> BlameResult:
        """Rank the faults of a choice."""
        record = replace(self.record, forms=choice.forms, estimators=choice.estimators)
        return measure(replace(accused, compiled=self.model(choice), decisions=record))


def _best_step(
    bench: _Bench, accused: Accused, faults: Sequence[Fault], choice: _Choice, now: Quality
) -> tuple[list[dict[str, Any]], _Choice, Quality] | None:
    """Return the override that helps most at the worst fault at which one helps; None if none does."""
    for fault in faults:
        tried = []
        for added in _trials(accused, fault, choice):
            trial = _applied(choice, added)
            found = bench.quality(trial)
            tried.append((_gain(now, found), added, trial, found))
        most = max((gain for gain, *_ in tried), default=0.0)
        if most > _WORTH_DB:
            _, added, trial, found = next(t for t in tried if t[0] >= _AS_GOOD * most)
            return added, trial, found
    return None


def _gain(before: Quality, after: Quality) -> float:
    """Return dB gained at the worst output; what a metric gains counts for far more."""
    metric = 0.0 if before.metric is None or after.metric is None else after.metric - before.metric
    return after.worst - before.worst + 1000.0 * metric


def _trials(accused: Accused, fault: Fault, choice: _Choice) -> list[list[dict[str, Any]]]:
    """Return what may mend a fault, the mildest first: an estimator, the group in float, it and its readers."""
    trials = []
    if accused.recalibrates and (estimator := _estimator(accused, fault)):
        trials.append(override_rows(fault, (), estimator))
    alone = tuple(dict.fromkeys((fault.unit.name, *fault.unit.others)))
    for names in dict.fromkeys((alone, _to_float(fault))):
        left = [n for n in names if choice.forms.get(n, "float") != "float"]
        if left:
            trials.append(override_rows(fault, left))
    return trials


def _applied(choice: _Choice, rows: Sequence[Mapping[str, Any]]) -> _Choice:
    forms, estimators = dict(choice.forms), dict(choice.estimators)
    for row in rows:
        if "form" in row:
            forms.pop(_plain(row), None)
        else:
            estimators[_plain(row)] = row["estimator"]
    return _Choice(forms, estimators)


def _plain(row: Mapping[str, Any]) -> str:
    """Return the name that an escaped glob matches."""
    text = str(row["match"])
    for c in "*?[":
        text = text.replace(f"[{c}]", c)
    return text


def _row_text(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{_plain(r)} {r.get('form') or 'estimator ' + str(r.get('estimator'))}" for r in rows)


def overrides_toml(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return override rows as the TOML that ``--override`` reads."""
    return "\n".join(
        "[[override]]\n" + "".join(f"{key} = {_quoted(str(value))}\n" for key, value in row.items()) for row in rows
    )


def _quoted(text: str) -> str:
    """Return a TOML basic string (TOML 1.0, section String)."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in plain) + '"'


def blame(
    source: ModelSource, compiled: str | Path, evaluation: Calibration, *, metric: Metric | None = None
) -> BlameResult:
    """Return where the error of a compiled model is born, the worst place first.

    Args:
        source: the float model.
        compiled: path of the quantized model, with its decisions record beside it where it is ours.
        evaluation: feeds.
        metric: kept for `mend`.

    Raises:
        QCompilerError: a file cannot be read, or the record is of another model.
    """
    return measure(accuse(source, compiled, evaluation, options=Options(metric=metric)))

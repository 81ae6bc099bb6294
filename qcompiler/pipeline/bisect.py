"""Find the pass, then the rule application, then the node that first pushes an error over a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompiler.engine import Array, Engine, Feeds
from qcompiler.errors import QCompilerError
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Lossy
from qcompiler.pipeline.numerics import ValueFigure, compare_changed, run_outputs, sqnr_db
from qcompiler.pipeline.parse import print_pass
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import Change, ChangeLog, CompileState


@dataclass(frozen=True)
class BisectResult:
    """Who pushed the error over the bound.

    Attributes:
        index: place of the pass in the pipeline, from 0.
        pass_text: the pass as a pipeline string.
        criterion: what was held against the bound, in words.
        before: the figure in front of the pass (dB of SQNR, or the excess over the contract).
        after: the figure behind it.
        bound: the bound on that figure.
        rule: the rule whose application crossed the bound; empty if the pass does not count its applications.
        application: which application of the pass that was, from 1; 0 if unknown.
        applications: how many applications the pass made; 0 if unknown.
        node: the node the rule was applied at, else the first node whose own error stands out.
        origins: the imported nodes it comes from.
        values: figures of the values that the guilty pass computes differently, in program order.
        probes: how many error measurements were made.
    """

    index: int
    pass_text: str
    criterion: str
    before: float
    after: float
    bound: float
    rule: str = ""
    application: int = 0
    applications: int = 0
    node: str = ""
    origins: tuple[str, ...] = ()
    values: tuple[ValueFigure, ...] = ()
    probes: int = 0

    def __str__(self) -> str:
        text = f"pass {self.index + 1} ({self.pass_text}): {self.criterion} "
        text += f"{self.before:.4g} before, {self.after:.4g} after, bound {self.bound:.4g}"
        if self.rule:
            text += f"; rule {self.rule}, application {self.application} of {self.applications}"
        if self.node:
            text += f"; node {self.node} (origin {', '.join(self.origins) or 'none'})"
        return text


def bisect(
    state: CompileState,
    pipeline: Pipeline,
    engine: Engine,
    feeds: Sequence[Feeds],
    bound: float | None = None,
    *,
    reference: ir.Model | None = None,
    thorough: bool = False,
) -> BisectResult | None:
    """Run a pipeline and find what first pushes the output error over a bound.

    With a bound in dB the SQNR of the worst output against ``reference`` is followed through the pipeline: by binary
    search, then by going through all passes in order if the measured figures turn out not to fall steadily (the first
    crossing may then lie earlier; one that no measurement came near is found by ``thorough`` only). Without a bound,
    each pass is held to its own contract, in order.

    Args:
        state: where the pipeline starts; left as it is.
        pipeline: the passes.
        engine: runs the graphs, its own optimizations off.
        feeds: inputs to compare on.
        bound: least SQNR in dB; None is each pass's contract.
        reference: what SQNR refers to; the model of ``state`` by default.
        thorough: measure behind every pass and every rule application, in order, instead of searching.

    Returns:
        The finding, or None if the end of the pipeline (with ``thorough``: every pass) holds the bound, or every pass
        its contract.

    Raises:
        QCompilerError: the pipeline itself fails, or the engine refuses a graph.
    """
    stages = [state.clone()]
    for step in pipeline:
        after = stages[-1].clone()
        Pipeline((step,)).run(after)
        stages.append(after)
    judge: _Judge
    if bound is None:
        judge = _Contracts(engine, feeds, thorough=thorough)
    else:
        judge = _Sqnr(engine, feeds, bound, reference or state.model, thorough)
    guilty = judge.first(pipeline, stages)
    if guilty is None:
        return None
    return _narrow(judge, pipeline.passes[guilty], guilty, stages[guilty], stages[guilty + 1])


@dataclass
class _Sqnr:
    """Judges a model by its worst output's SQNR against the reference."""

    engine: Engine
    feeds: Sequence[Feeds]
    bound: float
    reference: ir.Model
    thorough: bool = False
    criterion: str = "output SQNR in dB"
    probes: int = 0
    _wanted: list[dict[str, Array]] = field(default_factory=list)

    def first(self, pipeline: Pipeline, stages: Sequence[CompileState]) -> int | None:
        def figure(number: int) -> float:
            return self.figure(stages[0].model, stages[number].model, None)

        found = _first_bad(len(pipeline), figure, self.is_bad, self.thorough)
        return None if found is None else found - 1

    def figure(self, start: ir.Model, model: ir.Model, step: Pass | None) -> float:
        if not self._wanted:
            self._wanted = run_outputs(self.engine, self.reference, self.feeds)
        self.probes += 1
        return min(sqnr_db(self._wanted, run_outputs(self.engine, model, self.feeds)).values(), default=math.inf)

    def is_bad(self, figure: float) -> bool:
        return not figure >= self.bound


@dataclass
class _Contracts:
    """Judges a model by the largest excess over the pass's contract (1 is just allowed)."""

    engine: Engine
    feeds: Sequence[Feeds]
    bound: float = 1.0
    thorough: bool = False
    criterion: str = "error over what the contract allows:"
    probes: int = 0

    def first(self, pipeline: Pipeline, stages: Sequence[CompileState]) -> int | None:
        for index, step in enumerate(pipeline):
            if self.is_bad(self.figure(stages[index].model, stages[index + 1].model, step)):
                return index
        return None

    def figure(self, start: ir.Model, model: ir.Model, step: Pass | None) -> float:
        assert step is not None
        if isinstance(step.numerics, Lossy):
            return 0.0
        self.probes += 1
        figures = compare_changed(start, model, self.engine, self.feeds, step.numerics)
        return max((f.excess for f in figures), default=0.0)

    def is_bad(self, figure: float) -> bool:
        return not figure <= self.bound


def _first_bad(
    last: int, figure: Callable[[int], float], is_bad: Callable[[float], bool], thorough: bool = False
) -> int | None:
    """Return the first index in 1..last whose figure is bad, or None if that of ``last`` is good.

    Index 0 counts as good. Binary search, unless the figures it saw do not go one way. Thorough is going through all
    in order, whatever the last one is.
    """
    if thorough:
        return next((index for index in range(1, last + 1) if is_bad(figure(index))), None)
    seen: dict[int, float] = {last: figure(last)}
    if last == 0 or not is_bad(seen[last]):
        return None
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        seen[middle] = figure(middle)
        low, high = (low, middle) if is_bad(seen[middle]) else (middle, high)
    ordered = [seen[i] for i in sorted(seen)]
    if ordered not in (sorted(ordered), sorted(ordered, reverse=True)):
        for index in range(1, high):
            if index not in seen:
                seen[index] = figure(index)
            if is_bad(seen[index]):
                return index
    return high


_Judge = _Sqnr | _Contracts


def _narrow(judge: _Judge, step: Pass, index: int, start: CompileState, end: CompileState) -> BisectResult:
    """Find the rule application inside a guilty pass, or the first value whose own error stands out."""
    total, applied = _applications(start, step)
    before, after = judge.figure(start.model, start.model, step), judge.figure(start.model, end.model, step)
    values = compare_changed(start.model, end.model, judge.engine, judge.feeds, step.numerics)
    number = _guilty_application(judge, step, start, total) if total else 0
    found = BisectResult(
        index, print_pass(step), judge.criterion, before, after, judge.bound, applications=total, values=values,
        probes=judge.probes,
    )  # fmt: skip
    if number:
        change = applied[number - 1]
        return replace(found, rule=change.rule, application=number, node=change.node, origins=change.origins)
    loudest = _loudest(values)
    return found if loudest is None else replace(found, node=loudest.node, origins=loudest.origins)


def _applications(start: CompileState, step: Pass) -> tuple[int, list[Change]]:
    """Return how many rule applications a pass makes, and which."""
    state = start.clone()
    state.changes = ChangeLog()
    step.run(state)
    return len(state.changes.applied), state.changes.applied


def _guilty_application(judge: _Judge, step: Pass, start: CompileState, total: int) -> int:
    """Return the number of the first application that makes the result bad, or 0 if a partial run fails."""

    def figure(limit: int) -> float:
        state = start.clone()
        state.changes = ChangeLog(limit)
        step.run(state)
        return judge.figure(start.model, state.model, step)

    try:
        return _first_bad(total, figure, judge.is_bad, judge.thorough) or 0
    except (QCompilerError, ValueError, KeyError):
        # A pass stopped half-way may leave a graph that cannot run; the error of each value still tells where.
        return 0


def _loudest(values: Sequence[ValueFigure]) -> ValueFigure | None:
    """Return the first value over its bound; for a pass without one, the value of least SQNR."""
    over = [v for v in values if v.exceeded]
    if over:
        return over[0]
    return min(values, key=lambda v: v.sqnr_db, default=None)

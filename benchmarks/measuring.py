"""Build, evaluate and time all forms of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from baselines import FLOAT, Form, open_runner
from building import BuildRequest, BuildResult, Limits, build, built_before
from scoring import FormResult, SqnrMeter, geometric_mean, holds
from subjects import Array, Outputs, Subject, load_subject

from qcompiler.engine import Runner
from qcompiler.search.timing import interleave
from qcompiler.targets.host import detect

Say = Callable[[str], None]
MOST_ROUNDS = 1_000_000


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        models: folder of models with a ``load.py``; None for the demo models alone.
        forms: what to compare; float is always among them.
        work: folder for the built models.
        rounds: at least so many interleaved rounds.
        seconds: at least so much time for each form of a model.
        limits: of each build.
        reuse: take what an earlier run has built in ``work``.
    """

    models: Path | None
    forms: Sequence[Form]
    work: Path
    rounds: int = 30
    seconds: float = 1.0
    limits: Limits = field(default_factory=Limits)
    reuse: bool = False


@dataclass
class ModelResult:
    """All forms of one model.

    Attributes:
        group: ``models`` or ``demo``.
        name: of the model.
        rounds: interleaved rounds that were run.
        forms: figures by the name of the form.
    """

    group: str
    name: str
    rounds: int = 0
    forms: dict[str, FormResult] = field(default_factory=dict)

    def best_of(self, names: Sequence[str]) -> FormResult | None:
        """Return the form of the largest usable speed-up; ties go to the closer one; None where no form is usable."""
        candidates = [self.forms[n] for n in names if n in self.forms and self.forms[n].usable]
        return max(candidates, key=lambda f: (f.usable_speedup, f.worst_sqnr or 0.0), default=None)


def measure(group: str, name: str, plan: Plan, say: Say) -> ModelResult:
    """Build every form one after another, then evaluate each, then time all of them interleaved.

    Args:
        group: of the model.
        name: of the model.
        plan: how to measure.
        say: is told each step in a few words.
    """
    result = ModelResult(group, name)
    paths: dict[str, Path] = {}
    for form in plan.forms:
        say(f"{name}: build {form.name}")
        path = plan.work / name / form.name / "model.onnx"
        models = None if plan.models is None else str(plan.models)
        request = BuildRequest(group, name, models, form.name, str(path), form.most_feeds)
        built = built_before(path) if plan.reuse else None
        result.forms[form.name] = _figures(form.name, built or build(request, plan.limits))
        paths[form.name] = path
    subject = load_subject(group, name, plan.models)
    runners = _evaluate(subject, result, plan.forms, paths, say)
    say(f"{name}: time")
    _time(subject, result, runners, plan)
    return result


def _figures(form: str, built: BuildResult) -> FormResult:
    return FormResult(
        form,
        built.error,
        seconds=built.seconds,
        peak_mib=built.peak_bytes / (1 << 20),
        feeds=built.feeds,
        size=built.size,
        notes=built.notes,
    )


def _evaluate(
    subject: Subject, result: ModelResult, forms: Sequence[Form], paths: dict[str, Path], say: Say
) -> dict[str, Runner]:
    """Fill in metrics and SQNR; return the runners of the forms that work, float first.

    Raises:
        RuntimeError: the float model does not run; nothing can be compared with it.
    """
    runners: dict[str, Runner] = {}
    reference: list[Outputs] = []
    for known in sorted(forms, key=lambda form: form.name != FLOAT):
        form = known.name
        figures = result.forms[form]
        if figures.error is None:
            say(f"{subject.name}: evaluate {form}")
            try:
                runner = open_runner(known, paths[form])
                outputs = subject.run_all(_run(runner))
                figures.metrics = subject.metric(outputs)
            except Exception as error:  # a model may fail on a feed in any way
                text = " ".join(str(error).split())
                figures.error = f"does not run: {type(error).__name__}: {text}"[:160]
            else:
                runners[form] = runner
                if form == FLOAT:
                    reference = outputs
                meter = SqnrMeter([o.name for o in runner.outputs])
                for wanted, found in zip(reference, outputs, strict=True):
                    meter.add(wanted, found)
                figures.sqnr_db = meter.decibels()
                figures.holds = holds(result.forms[FLOAT].metrics, figures.metrics)
        if form == FLOAT and figures.error is not None:
            raise RuntimeError(f"{subject.name}: the model as given: {figures.error}")
    return runners


def _run(runner: Runner) -> Callable[[Any], list[Array]]:
    return lambda feed: list(runner.run(feed).values())


def _time(subject: Subject, result: ModelResult, runners: dict[str, Runner], plan: Plan) -> None:
    timings = interleave(
        runners, subject.feed, rounds=plan.rounds, seconds=plan.seconds * len(runners), most=MOST_ROUNDS
    )
    base = timings[FLOAT]
    result.rounds = base.rounds
    for form, timing in timings.items():
        figures = result.forms[form]
        figures.milliseconds = (timing.minimum * 1e3, timing.median * 1e3)
        figures.speedup = base.minimum / timing.minimum
        figures.speedup_median = base.median / timing.median


def usable_means(results: Sequence[ModelResult], rivals: Sequence[str], *ours: str) -> dict[str, dict[str, float]]:
    """Return geometric means of the usable speed-up by group: the best rival per model, each form, and each of ours."""
    means: dict[str, dict[str, float]] = {}
    for group in dict.fromkeys(r.group for r in results):
        members = [r for r in results if r.group == group]
        best = [r.best_of(rivals) for r in members]
        row = {"best of ONNX Runtime per model": geometric_mean(b.usable_speedup if b else 1.0 for b in best)}
        for form in (*rivals, *ours):
            if any(form in r.forms for r in members):
                row[form] = geometric_mean(r.forms[form].usable_speedup for r in members if form in r.forms)
        means[group] = row
    return means


def summary(result: ModelResult) -> str:
    """Return a model's speed-ups in one line."""
    parts = []
    for name, form in result.forms.items():
        if name != FLOAT:
            figure = "failed" if form.speedup is None else f"{form.speedup:.2f}" + ("" if form.holds else " inaccurate")
            parts.append(f"{name} {figure}")
    return f"{result.name}: {', '.join(parts)}"


def context(packages: Sequence[str], rounds: int, seconds: float) -> dict[str, str]:
    """Return what figures of this run depend on: processor, versions of packages, how they were timed."""
    processor = detect()
    return {
        "processor": f"{processor.model} ({processor.machine}; {', '.join(sorted(processor.features))})",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "timing": f"1 thread, the forms of a model interleaved, at least {rounds} rounds and {seconds:g} s for each",
    }

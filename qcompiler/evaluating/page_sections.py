"""The sections of the report page that an evaluation, a profile and a build have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompiler.evaluating.closeness import Closeness, WorstSample
from qcompiler.evaluating.evaluate import Evaluation
from qcompiler.evaluating.evaluation_text import counted, decibels, output_text, task_text
from qcompiler.evaluating.layers import LayerTrace, TensorHistogram
from qcompiler.evaluating.profiling import GroupTime, ModelTime, ProfileResult
from qcompiler.report.eval_page import Cell, Fact, Section, Summary, Table
from qcompiler.report.eval_page_figures import LayerErrors, LayerPoint, Pareto, ParetoPoint, Step, Waterfall
from qcompiler.report.eval_page_histograms import Histograms, ValueHistogram

_LAYERS = "layer"


def evaluation_sections(found: Evaluation, build_report: str | Path | None = None) -> list[Section]:
    """Return the sections of an evaluation, and of the build's report where there is one.

    Args:
        found: the evaluation.
        build_report: what ``compile --report`` wrote; ``COMPILED.report.json`` is found by itself.

    Raises:
        ExplainError: the report cannot be read.
    """
    report = _report(found.compiled, build_report)
    sections: list[Section] = [_summary(found, report)]
    if found.layers.layers:
        sections += layer_sections(found.layers)
    elif found.layers.note:
        sections.append(Summary((), (found.layers.note,), "Error along the network"))
    if found.closeness.changed:
        sections.append(_samples("Samples of another class", "Their arg-max differs.", found.closeness.changed))
    sections.append(_samples("Worst samples", _worst_text(found.closeness), found.closeness.worst))
    return [*sections, *build_sections(report)]


def profile_sections(found: ProfileResult, build_report: str | Path | None = None) -> list[Section]:
    """Return the sections of a profile, and of the build's report where there is one.

    Raises:
        ExplainError: the report cannot be read.
    """
    report = _report(found.models[-1].name, build_report) if len(found.models) > 1 else None
    sections: list[Section] = [_profile_summary(found)]
    if len(found.models) > 1:
        a, b = found.models
        steps = tuple(Step(g.name, -g.gain) for g in found.groups if g.gain)
        about = "What each group changes, from the engine's profiler; conversions count for who computes the value."
        sections.append(Waterfall(a.total, steps, b.total, about))
    sections.append(_group_table(found))
    sections += [_operator_table(model, len(found.models) > 1) for model in found.models]
    return [*sections, *build_sections(report)]


def build_sections(report: Mapping[str, Any] | None) -> list[Section]:
    """Return the sections of a build's report (``Report.to_dict()``): fusions with reasons, variants that were tried.

    Args:
        report: the report; None gives no section.
    """
    if report is None:
        return []
    sections: list[Section] = [_fusions(report)]
    tried = {n: f for n, f in report.get("forms_tried", {}).items() if "sqnr_db" in f}
    points = []
    for name, figures in tried.items():
        speed = figures.get("speedup", figures.get("profile_speedup"))
        if speed:
            points.append(ParetoPoint(name, 100.0 / float(speed), float(figures["sqnr_db"]), name == "chosen"))
    if len(points) > 1:
        about = "Whole-model variants that the build measured."
        sections.append(Pareto(tuple(points), "latency, % of float", "SQNR, dB", about))
    return sections


def pareto_section(points: Sequence[tuple[str, float, float]], chosen: str = "") -> Pareto:
    """Return the section of some builds: (name, latency in microseconds, SQNR in dB)."""
    return Pareto(tuple(ParetoPoint(n, us, db, n == chosen) for n, us, db in points))


def layer_sections(trace: LayerTrace) -> list[Section]:
    """Return the drawing of the error along the network, the table of layers, and the histograms."""
    about = (
        f"Measured on {counted(trace.feeds)}. Born is the error that float, computed from the compiled model's own "
        "inputs of the layer, does not have. A point leads to its row in the table."
    )
    points = tuple(LayerPoint(f.name, f.own_db, f.accumulated_db) for f in trace.layers)
    return [
        LayerErrors(points, about, _LAYERS),
        _layer_table(trace),
        Histograms(
            tuple(_histogram(h) for h in trace.histograms),
            "The tensors of the layers in which most error is born; counts are logarithmic.",
        ),
    ]


def _layer_table(trace: LayerTrace) -> Table:
    rows = []
    for f in trace.layers:
        grows = f.growth_db
        rows.append((
            Cell(f.name), Cell(f.operator), Cell(f.form or "-"), _db(f.own_db), _db(f.inputs_db), _db(f.carried_db),
            Cell(f"{grows:+.1f} dB", grows, "bad" if grows >= 3 else ""), _db(f.accumulated_db),
            Cell(f"{f.clipped:.2%}" if f.reach else "-", f.clipped if f.reach else None),
            Cell("-" if f.reach is None else f"{f.reach[0]:.4g} .. {f.reach[1]:.4g}"),
        ))  # fmt: skip
    columns = ("layer", "operator", "form", "born", "of inputs", "carried", "grows by", "accumulated", "clipped",
               "stored range")  # fmt: skip
    numbers = frozenset({"born", "of inputs", "carried", "grows by", "accumulated", "clipped"})
    about = (
        "SQNR per layer in the order of the network. Carried: the error of the inputs after float arithmetic. Grows "
        "by: how many dB it is nearer to the signal than in the worst input."
    )
    return Table("Layers", columns, tuple(rows), about, numbers, _LAYERS)


def _db(db: float | None) -> Cell:
    return Cell(decibels(db), db)


def _histogram(h: TensorHistogram) -> ValueHistogram:
    parts = [f"{decibels(h.db)} SQNR"]
    if h.reach is not None:
        parts.append(f"stored range {h.reach[0]:.4g} .. {h.reach[1]:.4g}, {h.clipped:.3%} clipped")
    if h.step:
        parts.append(f"step {h.step:.4g}")
    used = [i for i, n in enumerate(h.reference) if n]
    if used:
        parts.insert(1, f"float values {h.edges[used[0]]:.4g} .. {h.edges[used[-1] + 1]:.4g}")
    return ValueHistogram(
        h.name, tuple(float(e) for e in h.edges), tuple(int(n) for n in h.reference),
        tuple(int(n) for n in h.compiled), h.reach, ", ".join(parts),
    )  # fmt: skip


def _samples(title: str, about: str, samples: Sequence[WorstSample]) -> Table:
    rows = tuple(
        (Cell(str(s.index), s.index), Cell(str(s.place)), Cell(s.output), _db(s.sqnr_db), Cell(s.text)) for s in samples
    )
    columns = ("index", "place", "output", "SQNR", "what differs")
    return Table(title, columns, rows, about, frozenset({"index", "SQNR"}))


def _worst_text(closeness: Closeness) -> str:
    return f"The samples that are farthest from float, of {closeness.samples}."


def _summary(found: Evaluation, report: Mapping[str, Any] | None) -> Summary:
    closeness = found.closeness
    what = "rows" if closeness.unit == "row" else "feeds"
    facts = [
        Fact("float model", found.model),
        Fact("compiled model", found.compiled),
        Fact("samples", f"{closeness.samples} {what} of {counted(found.feeds)}"),
    ]
    if found.task is not None:
        interval = found.task.interval
        worse = interval is not None and interval.high < 0
        better = interval is not None and interval.low > 0
        facts.append(Fact("metric", task_text(found.task), "bad" if worse else "good" if better else ""))
    facts += [Fact(f"output {f.name}", output_text(f)) for f in closeness.outputs]
    if found.layers.born:
        first = found.layers.born[0]
        facts.append(Fact("most error is born in", f"{first.name} ({first.operator}): {decibels(first.own_db)}"))
    if found.layers.grown:
        most = found.layers.grown[0]
        facts.append(Fact("error grows most in", f"{most.name} ({most.operator}): by {most.growth_db:.1f} dB"))
    if report is not None:
        facts += _build_facts(report)
    notes = [*found.notes, *([found.task.note] if found.task is not None and found.task.note else [])]
    if found.layers.layers and found.layers.note:
        notes.append(found.layers.note)
    return Summary(tuple(facts), tuple(notes))


def _build_facts(report: Mapping[str, Any]) -> list[Fact]:
    facts = []
    if isinstance(report.get("speedup"), int | float):
        facts.append(Fact("speed", f"{report['speedup']:.2f}x of float when it was built"))
    before, after = report.get("bytes_before"), report.get("bytes_after")
    if before and after:
        facts.append(Fact("size", f"{before / 1e6:.2f} MB -> {after / 1e6:.2f} MB"))
    proof = report["proof"]
    facts.append(Fact("fusions", f"{proof['planned']} planned, {proof['fused']} fused, {len(proof['missed'])} missed"))
    return facts


def _fusions(report: Mapping[str, Any]) -> Table:
    proof = report["proof"]
    kernels: Mapping[str, str] = proof.get("kernels", {})
    missed = {m["group"]: f"{m['reason']}: {m['text']}" for m in proof.get("missed", [])}
    rows = []
    for group in report["groups"]:
        name, form = group["group"], group["form"]
        if name in missed:
            state, mood = "missed", "bad"
        elif name in kernels:
            state, mood = "fused", "good"
        else:
            state, mood = ("planned", "") if form != "float" else ("float", "dim")
        why = "; ".join(t for t in (missed.get(name, ""), group["why"]) if t)
        rows.append((Cell(name), Cell(group["operator"]), Cell(form), Cell(state, None, mood),
                     Cell(kernels.get(name, "-")), Cell(why)))  # fmt: skip
    about = (
        f"{proof['planned']} groups were handed to the engine in integer form, {proof['fused']} were found again as "
        f"integer kernels, {len(missed)} were not. {proof.get('note', '')}"
    )
    columns = ("group", "operator", "form", "state", "engine's kernel", "why")
    return Table("Planned, fused, missed", columns, tuple(rows), about.strip())


def _report(compiled: str, given: str | Path | None) -> Mapping[str, Any] | None:
    """Return the build's report: the given one, or what lies beside the compiled model."""
    from qcompiler.explaining.evidence import read_report

    if given is not None:
        return read_report(given)
    beside = Path(compiled).with_suffix(".report.json")
    return read_report(beside) if beside.is_file() else None


# ---- profiles -------------------------------------------------------------------------------------------------------


def _profile_summary(found: ProfileResult) -> Summary:
    facts = []
    for label, model in zip(("float", "compiled") if len(found.models) > 1 else ("model",), found.models, strict=True):
        timing = model.timing
        facts.append(Fact(
            label, f"{model.name}: {timing.minimum * 1e6:,.1f} us at least, {timing.median * 1e6:,.1f} us in the "
            f"median; operators {model.total:,.1f} us, {model.conversions:.1%} of it conversions; {model.engine}",
        ))  # fmt: skip
    if found.speedup is not None:
        facts.append(Fact("speed-up", f"{found.speedup:.3f}x", "good" if found.speedup >= 1 else "bad"))
        slower = found.slower
        lost = -sum(g.gain for g in slower)
        names = ", ".join(g.name for g in slower[:3]) + (", ..." if len(slower) > 3 else "")
        facts.append(
            Fact("slower than float", f"{len(slower)} groups, {lost:,.1f} us in all: {names}" if slower else "none")
        )
    facts.append(Fact("measured", f"{found.rounds} interleaved rounds, threads {found.threads}, {found.data}"))
    return Summary(tuple(facts), found.notes)


def _group_table(found: ProfileResult) -> Table:
    if len(found.models) < 2:
        total = max(found.models[0].total, 1e-9)
        nodes = tuple(
            (Cell(g.name), Cell(g.operator), _us(g.after), Cell(f"{g.after / total:.1%}", g.after))
            for g in found.groups
        )
        return Table("Nodes", ("node", "operator", "us", "share"), nodes, "", frozenset({"us", "share"}))
    rows = tuple(_group_row(g) for g in found.groups)
    columns = (
        "origin",
        "operator",
        "form",
        "float us",
        "compiled us",
        "conversions us",
        "gain us",
        "ratio",
        "executed as",
    )
    numbers = frozenset({"float us", "compiled us", "conversions us", "gain us", "ratio"})
    about = (
        "Aligned by origin, in the order of the network. New: float runs it inside another operator; gone: the "
        "compiled model does."
    )
    return Table("Float beside compiled", columns, rows, about, numbers)


def _group_row(g: GroupTime) -> tuple[Cell, ...]:
    ratio = g.before / g.after if g.before and g.after else None
    return (
        Cell(g.name), Cell(g.operator), Cell(g.form or "-"), _us(g.before or 0.0), _us(g.after), _us(g.conversions),
        Cell(f"{g.gain:+,.1f}", g.gain, "bad" if g.slower else "good" if g.gain > 0 else ""),
        Cell(f"{ratio:.2f}" if ratio is not None else "new" if g.after else "gone", ratio),
        Cell(" ".join(g.kernels) or "-"),
    )  # fmt: skip


def _operator_table(model: ModelTime, pair: bool) -> Table:
    rows = tuple(
        (Cell(o.operator), Cell(str(o.count), o.count), _us(o.microseconds),
         Cell(f"{o.microseconds / max(model.total, 1e-9):.1%}", o.microseconds),
         Cell("conversion" if o.conversion else ""))
        for o in model.operators
    )  # fmt: skip
    title = f"Operators of {Path(model.name).name}" if pair else "Operators"
    return Table(title, ("operator", "nodes", "us", "share", "kind"), rows, "", frozenset({"nodes", "us", "share"}))


def _us(microseconds: float) -> Cell:
    return Cell(f"{microseconds:,.1f}", microseconds if math.isfinite(microseconds) else None)

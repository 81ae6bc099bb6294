"""An evaluation in the terminal and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.evaluating.closeness import OutputFigure, WorstSample
from qcompiler.evaluating.evaluate import Evaluation
from qcompiler.evaluating.intervals import Interval
from qcompiler.evaluating.layers import LayerFigure
from qcompiler.evaluating.task import TaskFigure
from qcompiler.report.viewer import finite
from qcompiler.search.quality import CEILING

_MOST = 8
_WIDTH = 44


def decibels(db: float | None) -> str:
    """Return a figure in dB for people."""
    return "-" if db is None else "exact" if db >= CEILING else "not finite" if db <= -CEILING else f"{db:.1f} dB"


def short(name: str, width: int = _WIDTH) -> str:
    """Return a name that is cut in the middle if it is long."""
    half = (width - 3) // 2
    return name if len(name) <= width else f"{name[:half]}...{name[-half:]}"


def counted(feeds: int) -> str:
    """Return a number of feeds for people."""
    return f"{feeds} feed{'' if feeds == 1 else 's'}"


def task_text(task: TaskFigure) -> str:
    """Return the metric of both models, and the interval, as one sentence."""
    text = f"{task.reference:.6g} float, {task.compiled:.6g} compiled, difference {task.difference:+.6g}"
    if task.interval is not None:
        text += f", 95 % within {task.interval.low:+.4g} .. {task.interval.high:+.4g} ({task.interval.method})"
    if task.better is not None:
        text += f"; {task.better} better, {task.worse} worse, McNemar p = {task.p_value:.2g}"
    return text


def output_text(figure: OutputFigure) -> str:
    """Return how close an output is as one sentence."""
    if figure.sqnr_db is None:
        return f"{figure.differing:.2%} of the elements differ"
    parts = [f"{decibels(figure.sqnr_db)} SQNR{_span(figure.sqnr_interval, 1)}"]
    if figure.cosine is not None:
        parts.append(f"cosine {figure.cosine:.6f}")
    if figure.agreement is not None:
        found = figure.agreement_interval
        span = "" if found is None else f" (95 % within {found.low:.1%} .. {found.high:.1%})"
        parts.append(f"same arg-max in {figure.agreement:.1%} of {figure.rows} rows{span}")
    return ", ".join(parts)


def _span(interval: Interval | None, digits: int) -> str:
    return "" if interval is None else f" (95 % within {interval.low:.{digits}f} .. {interval.high:.{digits}f})"


def show_evaluation(found: Evaluation, console: Console, most: int = _MOST) -> None:
    """Print an evaluation."""
    closeness = found.closeness
    what = "rows" if closeness.unit == "row" else "feeds"
    console.print(Text(f"{found.compiled} against {found.model}", style="bold"), soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("samples", Text(f"{closeness.samples} {what} of {counted(found.feeds)}"))
    if found.task is not None:
        table.add_row("metric", Text(task_text(found.task)))
        if found.task.note:
            table.add_row("", Text(found.task.note, style="dim"))
    for figure in closeness.outputs:
        table.add_row(short(figure.name, 24), Text(output_text(figure)))
    console.print(table)
    _show_layers(found, console, most)
    _show_samples("worst samples", closeness.worst[:most], console)
    _show_samples("samples of another class", closeness.changed[:most], console)
    for note in found.notes:
        console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)


def _show_layers(found: Evaluation, console: Console, most: int) -> None:
    trace = found.layers
    if trace.layers:
        if trace.born:
            shown = min(most, len(trace.born))
            head = f"error is born (the first {shown} of {len(trace.born)} layers, {counted(trace.feeds)})"
            _show_table(head, trace.born[:most], ("born", "carried", "accumulated"), console)
        else:
            console.print(Text("no error is born in any value that both models have"))
        if trace.grown:
            head = f"error grows (the first {min(most, len(trace.grown))} of {len(trace.grown)} layers)"
            _show_table(head, trace.grown[:most], ("inputs", "carried", "grows by"), console)
    if trace.note:
        console.print(Text(f"note: {trace.note}", style="dim"), soft_wrap=True)
    if trace.unaligned:
        names = ", ".join(trace.unaligned[:3]) + (", ..." if len(trace.unaligned) > 3 else "")
        text = f"note: {len(trace.unaligned)} quantized groups have no value of a known name: {names}"
        console.print(Text(text, style="dim"), soft_wrap=True)


_CELLS = {
    "born": lambda f: decibels(f.own_db),
    "carried": lambda f: decibels(f.carried_db),
    "accumulated": lambda f: decibels(f.accumulated_db),
    "inputs": lambda f: decibels(f.inputs_db),
    "grows by": lambda f: f"{f.growth_db:.1f} dB",
}


def _show_table(head: str, layers: tuple[LayerFigure, ...], columns: tuple[str, ...], console: Console) -> None:
    console.print(Text(head, style="bold"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("layer", "operator", "form", *columns, "clipped"):
        table.add_column(column, justify="right" if column in (*columns, "clipped") else "left", no_wrap=True)
    for layer in layers:
        cells = (_CELLS[c](layer) for c in columns)
        clipped = f"{layer.clipped:.2%}" if layer.reach is not None else "-"
        table.add_row(Text(short(layer.name)), layer.operator, layer.form or "-", *cells, clipped)
    console.print(table)


def _show_samples(head: str, samples: tuple[WorstSample, ...], console: Console) -> None:
    if not samples:
        return
    console.print(Text(head, style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("index", "place", "output", "SQNR", "what differs"):
        table.add_column(column, justify="right" if column in ("index", "SQNR") else "left", overflow="fold")
    for s in samples:
        table.add_row(str(s.index), str(s.place), Text(short(s.output, 24)), decibels(s.sqnr_db), Text(s.text))
    console.print(table)


# ---- JSON -----------------------------------------------------------------------------------------------------------


def evaluation_dict(found: Evaluation) -> dict[str, Any]:
    """Return JSON-ready data: everything, nothing cut; figures that are not finite are texts."""
    closeness, trace = found.closeness, found.layers
    data = {
        "model": found.model,
        "compiled": found.compiled,
        "feeds": found.feeds,
        "samples": closeness.samples,
        "sample": closeness.unit,
        "metric": None if found.task is None else _task(found.task),
        "outputs": {f.name: _output(f) for f in closeness.outputs},
        "sample_sqnr_db": [round(float(db), 3) for db in closeness.sample_db],
        "worst_samples": [_sample(s) for s in closeness.worst],
        "changed_samples": [_sample(s) for s in closeness.changed],
        "layers": [_layer(f) for f in trace.layers],
        "layer_feeds": trace.feeds,
        "born": [f.name for f in trace.born],
        "grown": [f.name for f in trace.grown],
        "not_measured": list(trace.unaligned),
        "notes": [n for n in (*found.notes, trace.note) if n],
    }
    made: dict[str, Any] = finite(data)
    return made


def _interval(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else {"low": found.low, "high": found.high, "level": 0.95, "method": found.method}


def _task(task: TaskFigure) -> dict[str, Any]:
    return {
        "float": task.reference, "compiled": task.compiled, "difference": task.difference,
        "interval": _interval(task.interval), "samples": task.samples, "sample": task.unit, "better": task.better,
        "worse": task.worse, "p_value": task.p_value, "calls": task.calls, "note": task.note,
    }  # fmt: skip


def _output(f: OutputFigure) -> dict[str, Any]:
    return {
        "sqnr_db": f.sqnr_db, "sqnr_interval": _interval(f.sqnr_interval), "cosine": f.cosine,
        "agreement": f.agreement, "agreement_interval": _interval(f.agreement_interval), "rows": f.rows,
        "same_samples": f.same_samples, "differing": f.differing,
    }  # fmt: skip


def _sample(s: WorstSample) -> dict[str, Any]:
    return {
        "index": s.index, "feed": s.place.feed, "row": s.place.row, "output": s.output, "sqnr_db": s.sqnr_db,
        "text": s.text,
    }  # fmt: skip


def _layer(f: LayerFigure) -> dict[str, Any]:
    return {
        "layer": f.name, "operator": f.operator, "value": f.value, "form": f.form, "own_db": f.own_db,
        "carried_db": f.carried_db, "accumulated_db": f.accumulated_db, "inputs_db": f.inputs_db,
        "growth_db": f.growth_db, "clipped": f.clipped, "reach": f.reach, "origins": list(f.origins),
    }  # fmt: skip

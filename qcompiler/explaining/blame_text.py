"""The result of blaming in the terminal and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.explaining.blame import BlameResult, Fault
from qcompiler.explaining.blame_run import Accused, Mended, overrides_toml, suggestion
from qcompiler.search.quality import CEILING

_MOST = 12
_WIDTH = 44


def show_blame(accused: Accused, result: BlameResult, console: Console) -> None:
    """Print the worst places, and the override for the first."""
    console.print(Text(_head(result), style="bold"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("", "where", "operator", "alone", "share", "own", "accumulated"):
        table.add_column(column, justify="left" if column in ("where", "operator") else "right", no_wrap=True)
    table.add_column("what", overflow="fold")
    for rank, fault in enumerate(result.faults[:_MOST], 1):
        table.add_row(str(rank), *(Text(c) for c in _cells(fault)))
    console.print(table)
    if (more := len(result.faults) - _MOST) > 0:
        console.print(Text(f"{more} better places are not shown; --json has all", style="dim"))
    for note in (*result.notes, *([_unaligned(result)] if result.unaligned else [])):
        console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)
    if result.faults:
        console.print(Text("suggested override for the first:"), soft_wrap=True)
        console.print(Text(overrides_toml(suggestion(accused, result.faults[0]))), soft_wrap=True)


def _head(result: BlameResult) -> str:
    worst = sorted(result.output_db.items(), key=lambda item: item[1])[:3]
    figures = ", ".join(f"{name} {_db(db)}" for name, db in worst) or "no float output"
    return f"outputs against float over {result.feeds} feeds: {figures}"


def _unaligned(result: BlameResult) -> str:
    names = ", ".join(result.unaligned[:3]) + (", ..." if len(result.unaligned) > 3 else "")
    return f"{len(result.unaligned)} quantized groups have no value of a known name and were not measured: {names}"


def _cells(fault: Fault) -> tuple[str, ...]:
    name = fault.unit.name
    short = name if len(name) <= _WIDTH else f"{name[:20]}...{name[-21:]}"
    share = f"{fault.share:.0%}"
    return (
        short,
        fault.unit.operator,
        _db(fault.output_db),
        share,
        _db(fault.local_db),
        _db(fault.accumulated_db),
        (f"{fault.kind}: {fault.text}"),
    )


def _db(db: float) -> str:
    return "exact" if db >= CEILING else f"{db:.1f} dB"


def show_mended(mended: Mended, console: Console) -> None:
    """Print what was changed and what it gained."""
    console.print(Text(f"before: {_figures(mended.before.worst, mended.before.metric)}"), soft_wrap=True)
    for text, db, metric in mended.steps:
        console.print(Text(f"  {text}: {_figures(db, metric)}"), soft_wrap=True)
    if mended.reference_metric is not None:
        console.print(Text(f"float: metric {mended.reference_metric:.6g}"), soft_wrap=True)
    verdict = "the bounds hold" if mended.met else "the bounds are still not met: no override that was tried helps more"
    console.print(Text(verdict, style="bold" if mended.met else "yellow"), soft_wrap=True)


def _figures(db: float, metric: float | None) -> str:
    return _db(db) + ("" if metric is None else f", metric {metric:.6g}")


def blame_dict(accused: Accused, result: BlameResult, mended: Mended | None = None) -> dict[str, Any]:
    """Return JSON-ready data."""
    data: dict[str, Any] = {
        "outputs_db": dict(result.output_db),
        "feeds": result.feeds,
        "faults": [
            {
                "group": f.unit.name, "operator": f.unit.operator, "value": f.unit.value, "form": f.unit.form,
                "output_db": f.output_db, "share": f.share, "own_db": f.local_db, "accumulated_db": f.accumulated_db,
                "kind": f.kind, "text": f.text, "override": suggestion(accused, f),
            }
            for f in result.faults
        ],
        "not_measured": list(result.unaligned),
        "notes": list(result.notes),
    }  # fmt: skip
    if mended is not None:
        data["applied"] = {
            "overrides": mended.rows, "met": mended.met, "before_db": mended.before.worst,
            "before_metric": mended.before.metric,
            "steps": [{"change": t, "sqnr_db": db, "metric": m} for t, db, m in mended.steps],
        }  # fmt: skip
    return data

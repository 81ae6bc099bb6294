"""A profile in the terminal and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.evaluating.evaluation_text import short
from qcompiler.evaluating.profiling import GroupTime, ModelTime, ProfileResult


def show_profile(found: ProfileResult, console: Console, top: int) -> None:
    """Print a profile."""
    names = ("A", "B")
    _show_totals(found, console)
    pair = len(found.models) > 1
    for name, model in zip(names, found.models, strict=False):
        console.print(Text(f"operators of {name}" if pair else "operators", style="bold"))
        _show_operators(model, console, top)
    if pair:
        console.print(Text("by origin, float beside compiled, the most time first", style="bold"))
        _show_pairs(found, sorted(found.groups, key=lambda g: -max(g.before or 0.0, g.after))[:top], console)
        slower = found.slower
        if slower:
            console.print(Text(f"slower than in float: {len(slower)}, the most lost first", style="bold"))
            _show_pairs(found, slower[:top], console)
        else:
            console.print(Text("no group is slower than in float"))
    else:
        console.print(Text("nodes, the most time first", style="bold"))
        _show_nodes(found, top, console)
    for note in found.notes:
        console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)


def _table(*columns: str, left: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _show_totals(found: ProfileResult, console: Console) -> None:
    left = ("", "engine", "model")
    table = _table("", "min us", "median us", "operators us", "conversions", "engine", "model", left=left)
    for name, model in zip(("A", "B"), found.models, strict=False):
        timing = model.timing
        table.add_row(
            name, f"{timing.minimum * 1e6:.1f}", f"{timing.median * 1e6:.1f}", f"{model.total:.1f}",
            f"{model.conversions:.1%}", model.engine, Text(model.name),
        )  # fmt: skip
    if found.speedup is not None:
        a, b = found.models
        median = a.timing.median / b.timing.median
        table.add_row("A / B", f"{found.speedup:.3f}", f"{median:.3f}", f"{a.total / max(b.total, 1e-9):.3f}")
    console.print(table)
    console.print(f"{found.rounds} interleaved rounds, threads {found.threads}, {found.data}")


def _show_operators(model: ModelTime, console: Console, top: int) -> None:
    table = _table("operator", "nodes", "us", "share", "", left=("operator", ""))
    for o in model.operators[:top]:
        share = f"{o.microseconds / max(model.total, 1e-9):.1%}"
        table.add_row(o.operator, str(o.count), f"{o.microseconds:.1f}", share, "conversion" if o.conversion else "")
    console.print(table)
    if (more := len(model.operators) - top) > 0:
        console.print(Text(f"{more} more; --top N or --json FILE shows them", style="dim"))


def _show_pairs(found: ProfileResult, groups: tuple[GroupTime, ...] | list[GroupTime], console: Console) -> None:
    left = ("origin", "operator", "form", "executed as")
    table = _table(
        "origin", "operator", "form", "A us", "B us", "of it Q/DQ", "gain us", "A / B", "executed as", left=left
    )
    for g in groups:
        ratio = "gone" if not g.after else f"{g.before / g.after:.2f}" if g.before else "new"
        table.add_row(
            Text(short(g.name)), g.operator, g.form or "-", f"{g.before or 0.0:.1f}", f"{g.after:.1f}",
            f"{g.conversions:.1f}", f"{g.gain:+.1f}", ratio, " ".join(g.kernels),
        )  # fmt: skip
    console.print(table)


def _show_nodes(found: ProfileResult, top: int, console: Console) -> None:
    table = _table("node", "operator", "us", "share", left=("node", "operator"))
    total = max(found.models[0].total, 1e-9)
    for g in sorted(found.groups, key=lambda g: -g.after)[:top]:
        table.add_row(Text(short(g.name, 60)), g.operator, f"{g.after:.1f}", f"{g.after / total:.1%}")
    console.print(table)


def profile_dict(found: ProfileResult) -> dict[str, Any]:
    """Return JSON-ready data; times in microseconds per run."""
    return {
        "models": [
            {
                "model": m.name, "engine": m.engine, "min_us": m.timing.minimum * 1e6,
                "median_us": m.timing.median * 1e6, "operators_us": m.total, "conversion_share": m.conversions,
                "operators": [
                    {"operator": o.operator, "nodes": o.count, "us": o.microseconds, "conversion": o.conversion}
                    for o in m.operators
                ],
            }
            for m in found.models
        ],
        "speedup": found.speedup,
        "groups": [
            {
                "origin": g.name, "operator": g.operator, "form": g.form, "before_us": g.before, "after_us": g.after,
                "conversion_us": g.conversions, "gain_us": g.gain, "slower": g.slower, "kernels": list(g.kernels),
            }
            for g in found.groups
        ],
        "threads": found.threads,
        "rounds": found.rounds,
        "data": found.data,
        "notes": list(found.notes),
    }  # fmt: skip

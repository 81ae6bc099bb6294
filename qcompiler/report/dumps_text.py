"""Show a dump in a terminal: the table of passes, what one changed, why."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.pipeline.contract import Lossy
from qcompiler.report.dumps import Dump, Stage, StageNumerics

_MAX_OPS = 6
_CONTEXT = 1
"""Unchanged lines around a change in the side-by-side view."""
_SIDE_STYLES = {"": ("", ""), "<": ("red", ""), ">": ("", "green"), "|": ("red", "green"), "~": ("cyan", "cyan")}


def render(dump: Dump, console: Console) -> None:
    """Print the table of passes: time, changes, nodes, operator counts, error."""
    console.print(Text(f"target {dump.target}   " + "   ".join(f"{k} {v}" for k, v in sorted(dump.versions.items()))))
    console.print(Text(f"pipeline {dump.pipeline}", overflow="fold"))
    timed = any(s.seconds is not None for s in dump.stages)
    measured = any(s.numerics is not None for s in dump.stages)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("pass", overflow="fold")
    table.add_column("phase")
    if timed:
        table.add_column("ms", justify="right")
    table.add_column("changes", justify="right")
    table.add_column("nodes", justify="right")
    table.add_column("weights", justify="right")
    if measured:
        table.add_column("SQNR dB", justify="right")
        table.add_column("contract")
    table.add_column("operators")
    for stage in dump.stages:
        row = [Text(str(stage.number)), _name(stage), Text(stage.phase)]
        if timed:
            row.append(Text("" if stage.seconds is None else f"{stage.seconds * 1000:.1f}"))
        row += [Text(str(stage.changes) if stage.text is not None else ""), _nodes(dump, stage), _bytes(stage)]
        if measured:
            row += _error(stage)
        table.add_row(*row, _ops(dump, stage), style="" if stage.changed else "dim")
    console.print(table)
    if dump.failed is not None:
        console.print(Text(f"failed: {dump.failed.error}", style="red"))


def render_diff(dump: Dump, number: int, console: Console) -> None:
    """Print what one pass changed, coloured.

    Raises:
        DumpError: there is no such stage.
    """
    diff = dump.diff(number)
    if not diff:
        console.print(Text(f"stage {dump.stage(number).name} changed nothing"))
        return
    for line in diff.splitlines():
        console.print(Text(line, style=_diff_style(line)), soft_wrap=True)


def render_side_by_side(dump: Dump, number: int, console: Console) -> None:
    """Print what one pass changed, the graph before it on the left and behind it on the right.

    Raises:
        DumpError: there is no such stage.
    """
    stage = dump.stage(number)
    before = dump.before(stage)
    if before is None or not stage.changed:
        console.print(Text(f"stage {stage.name} changed nothing"))
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0), expand=True)
    table.add_column(dump.last_changed(before.number).name, ratio=1, overflow="fold")
    table.add_column("", width=1)
    table.add_column(stage.name, ratio=1, overflow="fold")
    for left, mark, right in side_by_side(dump.text(before.number), dump.text(number)):
        first, second = _SIDE_STYLES[mark]
        table.add_row(Text(left, style=first), Text(mark), Text(right, style=second))
    console.print(table)


def side_by_side(before: str, after: str) -> Iterator[tuple[str, str, str]]:
    """Yield (left, mark, right) rows of two texts: ``<`` removed, ``>`` added, ``|`` changed, ``~`` lines left out.

    Lines are paired by their node's name where both sides of a changed region have it, so an inserted node moves no
    other out of its row.
    """
    old, new = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for number, group in enumerate(matcher.get_grouped_opcodes(_CONTEXT)):
        if number:
            yield "...", "~", "..."
        for kind, a, b, c, d in group:
            if kind == "equal":
                yield from ((line.strip(), "", line.strip()) for line in old[a:b])
            else:
                yield from _paired(old[a:b], new[c:d])


def _paired(old: list[str], new: list[str]) -> Iterator[tuple[str, str, str]]:
    first, second = ([line.strip().partition(": ")[0] for line in side] for side in (old, new))
    for kind, a, b, c, d in difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        if kind == "equal":
            for left, right in zip(old[a:b], new[c:d], strict=True):
                yield left.strip(), "" if left == right else "|", right.strip()
            continue
        yield from ((line.strip(), "<", "") for line in old[a:b])
        yield from (("", ">", line.strip()) for line in new[c:d])


def render_stage(dump: Dump, number: int, console: Console) -> None:
    """Print the graph of one stage.

    Raises:
        DumpError: there is no such stage.
    """
    console.print(Text(dump.text(number).rstrip("\n")), soft_wrap=True)


def render_remarks(dump: Dump, number: int, console: Console) -> None:
    """Print the remarks of one pass, one line each.

    Raises:
        DumpError: there is no such stage.
    """
    for remark in dump.remarks(number):
        mark = Text("done " if remark["done"] else "left ", style="green" if remark["done"] else "yellow")
        rule = f" [{remark['rule']}]" if remark["rule"] else ""
        console.print(mark + Text(f"{remark['node']}{rule} {remark['reason']}: {remark['text']}"), soft_wrap=True)


def _diff_style(line: str) -> str:
    if line.startswith(("---", "+++")):
        return "bold"
    return {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")


def _name(stage: Stage) -> Text:
    if stage.text is None:
        return Text("(input)")
    return Text(stage.text + (" FAILED" if stage.error else ""), style="red" if stage.error else "")


def _nodes(dump: Dump, stage: Stage) -> Text:
    before = dump.before(stage)
    if before is None or before.nodes == stage.nodes:
        return Text(str(stage.nodes))
    return Text(f"{before.nodes} -> {stage.nodes}")


def _bytes(stage: Stage) -> Text:
    size = stage.weight_bytes
    return Text(f"{size / 1e6:.2f} MB" if size >= 10_000 else f"{size} B")


def _error(stage: Stage) -> list[Text]:
    figures = stage.numerics
    if figures is None:
        return [Text(""), Text("")]
    if figures.unchecked:
        return [Text(""), Text(f"not checked: {figures.unchecked}", style="yellow")]
    least = figures.least_sqnr_db
    if figures.violations:
        return [_db(least), Text(f"{figures.contract} broken at {', '.join(figures.violations)}", style="red")]
    return [_db(least), Text(figures.contract + _worst(figures))]


def _worst(figures: StageNumerics) -> str:
    if figures.worst_error == 0:
        return ""
    if figures.contract == str(Lossy()):  # without a bound the error only counts elements
        return f", worst {figures.worst_sqnr_db:.1f} dB at {figures.worst_value}"
    return f", worst {figures.worst_error:.2g} at {figures.worst_value}"


def _db(value: float | None) -> Text:
    return Text("" if value is None else "equal" if value == math.inf else f"{value:.1f}")


def _ops(dump: Dump, stage: Stage) -> Text:
    if stage.text is None:
        most = sorted(stage.ops, key=lambda op: (-stage.ops[op], op))
        shown = [f"{op} {stage.ops[op]}" for op in most]
    else:
        shown = [f"{op} {count:+d}" for op, count in dump.ops_changed(stage).items()]
    more = f" ... {len(shown) - _MAX_OPS} more" if len(shown) > _MAX_OPS else ""
    return Text("  ".join(shown[:_MAX_OPS]) + more)

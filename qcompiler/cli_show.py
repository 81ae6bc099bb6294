"""The summary of a compilation in the terminal."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from qcompiler.backends.readback import Proof
    from qcompiler.report.report import GroupReport, Report

_MOST = 8
"""Rows of a list that are shown; the report file has the rest."""

_EQUAL_DB = 200.0
"""SQNR that stands for outputs without any error (`qcompiler.search.quality.CEILING`)."""

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


def stdout_console() -> Console:
    """Return a console on stdout: as wide as the terminal, or wide enough not to break lines in a pipe."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def show_report(report: Report, console: Console, title: str, written: Sequence[Path]) -> None:
    """Print what a build gained, proved and left undone.

    Args:
        report: the build's report.
        console: where to.
        title: first line.
        written: files that were written.
    """
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(report):
        table.add_row(name, Text(text))
    console.print(table)
    for reason, count, names in float_reasons(report.groups)[:_MOST]:
        console.print(Text(f"  float  {count:4d}  {reason} ({names})"), style="dim", soft_wrap=True)
    for miss in report.proof.missed[:_MOST]:
        console.print(Text(f"  missed {miss.group} ({miss.kind}) {miss.reason}: {miss.text}"), soft_wrap=True)
    if more := len(report.proof.missed) - _MOST:
        console.print(Text(f"  missed {more} more; --report FILE.json lists all") if more > 0 else "", end="")
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    for path in written:
        console.print(Text(f"wrote {path}"), soft_wrap=True)


def _rows(report: Report) -> list[tuple[str, str]]:
    context = report.context
    rows = [("target", f"{context.get('target', '')}, recipe {context.get('recipe', '')}, {context.get('engine', '')}")]
    rows.append(("speed", _speed(report)))
    rows.append(("size", size_text(report.bytes_before, report.bytes_after)))
    unproven = report.proof.planned and not report.proof.fused and not report.proof.missed
    share = "not proven" if unproven else f"{report.integer_share:.1%} of the multiply-adds"
    rows.append(("integers", share))
    rows += _accuracy(report)
    proof = report.proof
    rows.append(("fusions", _fusions(proof)))
    rows.append(("groups", _forms(report.groups)))
    if report.returned:
        count = len({group for step in report.returned for group in step["groups"]})
        rows.append(("accuracy", f"{count} group{'' if count == 1 else 's'} stay float for it"))
    if prices := report.plan.get("prices"):
        rows.append(("budgets", "; ".join(f"{_limit(name)} costs {price}" for name, price in prices.items())))
    return rows


def _limit(name: str) -> str:
    """Return a limit for a reader, by the name that the planner has for it."""
    return f"the SQNR of {name.removeprefix('noise:')}" if name.startswith("noise:") else f"the bound on {name}"


def _fusions(proof: Proof) -> str:
    note = f" ({proof.note})" if proof.note else ""
    if proof.planned and not proof.fused and not proof.missed:
        return f"{proof.planned} planned, not proven{note}"
    return f"{proof.planned} planned, {len(proof.fused)} fused, {len(proof.missed)} missed{note}"


def _speed(report: Report) -> str:
    if report.speedup is None:
        return "not measured"
    median = "" if report.speedup_median is None else f", {report.speedup_median:.2f}x by median"
    threads = report.context.get("threads", "1")
    shapes = report.context.get("timed", "")
    on = f" on {shapes}" if shapes else ""
    return f"{report.speedup:.2f}x of the model as given{on} (best of interleaved runs{median}; threads {threads})"


def size_text(before: int, after: int) -> str:
    """Return sizes in MB or kB and their ratio in words."""
    share = f" ({after / before:.0%})" if before else ""
    unit, name = (1e6, "MB") if before >= 1e6 else (1e3, "kB")
    return f"{before / unit:.2f} {name} -> {after / unit:.2f} {name}{share}"


def _accuracy(report: Report) -> list[tuple[str, str]]:
    quality = report.quality
    if quality is None:
        return [("accuracy", "not measured")]
    rows = []
    names = list(dict.fromkeys((*quality.sqnr_db, *quality.agreement, *quality.differing)))
    # The worst outputs first: a detector or a cache has many.
    names.sort(key=lambda name: quality.sqnr_db.get(name, 0.0))
    for name in names[:_MOST]:
        parts = []
        if name in quality.sqnr_db:
            db = quality.sqnr_db[name]
            parts.append(f"{db:.1f} dB SQNR" if db < _EQUAL_DB else "equal bit for bit")
        if name in quality.agreement:
            parts.append(f"{quality.agreement[name]:.1%} same arg-max")
        if name in quality.differing:
            parts.append(f"{quality.differing[name]:.1%} of the elements differ")
        rows.append(("accuracy", f"{name}: {', '.join(parts)}"))
    if len(names) > _MOST:
        rows.append(("", f"{len(names) - _MOST} better outputs are not shown"))
    if quality.metric is not None:
        rows.append(("metric", f"{quality.metric:.6g}"))
    return rows


def _forms(groups: Sequence[GroupReport]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for group in groups:
        counts[group.form] += 1
    return ", ".join(f"{count} {form}" for form, count in sorted(counts.items())) or "none"


def float_reasons(groups: Sequence[GroupReport]) -> list[tuple[str, int, str]]:
    """Return (reason, number of groups, names of the first few) of the float groups, the most frequent first.

    Reasons that differ in their figures only count as one.
    """
    found: dict[str, list[GroupReport]] = defaultdict(list)
    for group in groups:
        if group.form == "float":
            found[_NUMBER.sub("N", group.why.removeprefix("float: "))].append(group)
    rows = []
    for _, members in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        reason = members[0].why.removeprefix("float: ")
        if len({m.why for m in members}) > 1:
            reason += "; the others likewise"
        names = ", ".join(m.group for m in members[:3]) + (", ..." if len(members) > 3 else "")
        rows.append((reason, len(members), names))
    return rows

"""Explanations in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.explaining.causes import NodeAccount, Place
from qcompiler.explaining.explain import Explanation

_MOST_RULES = 8
_WIDTH = 48
"""Characters of a name in a table; --json has all of it."""


def show_explanation(made: Explanation, console: Console, next_step: str = "") -> None:
    """Print an explanation: an account of one node, or a table of all.

    Args:
        made: what to print.
        console: where to.
        next_step: a command line that the reader may want next.
    """
    if made.single:
        for account in made.accounts:
            _show_account(account, console, made.about)
    else:
        _show_table(made, console)
    if next_step:
        console.print(Text(f"next: {next_step}", style="dim"), soft_wrap=True)


# ---- one node -------------------------------------------------------------------------------------------------------


def _show_account(a: NodeAccount, console: Console, about: str) -> None:
    console.print(Text.assemble((f"{a.node} ({a.operator})", "bold"), f": {_headline(a)}"), soft_wrap=True)
    console.print(Text(f"  {about}", style="dim"), soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(a):
        table.add_row(f"  {name}", Text(text))
    console.print(table)


def _headline(a: NodeAccount) -> str:
    if a.form == "fused":
        return f"runs on integers ({a.kernel or 'fused into another operator'})"
    if a.form == "gone":
        return "not in the compiled graph"
    where = f", group {a.group}" if a.group and a.group != a.node else ""
    if a.form == "given":
        return "float, although it stands in Q/DQ"
    if a.form == "float":
        return f"float{where}"
    if a.causes and not a.kernel and a.causes[0].who not in ("target",):
        return f"planned {a.form}{where}, but not fused"
    return f"{a.form}{where}" + (f", {a.kernel}" if a.kernel else "")


def _rows(a: NodeAccount) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    barred = a.form not in ("float", "given", "gone") and bool(a.kernel)
    for number, found in enumerate(a.causes):
        label = "also" if number else ("not better" if barred else "because")
        form = f" [{found.form}]" if found.form else ""
        rows.append((label, f"{found.code}{form}: {found.text} ({found.who})"))
        if found.advice:
            rows.append(("" if number else ("" if barred else "to fuse"), found.advice))
    if a.why and not (a.causes and a.causes[0].text in a.why):
        rows.append(("chosen", a.why))
    if len(a.members) > 1:
        rows.append(("group", " + ".join(a.members)))
    if a.origins and a.origins != (a.node,):
        rows.append(("origin", ", ".join(a.origins)))
    rows += [(p.role, _place(p)) for p in a.places]
    for tried in a.tried[:_MOST_RULES]:
        rows.append(("rule", f"{tried.rule}: {'fired' if tried.done else f'{tried.reason}: {tried.text}'}"))
    if share := _shares(a):
        rows.append(("share", share))
    rows += [("note", note) for note in a.notes]
    return rows


def _place(p: Place) -> str:
    text = f"{p.value}: {p.format}"
    if p.scale:
        text += f", scale {_span(p.scale)}"
        if p.zero_point:
            text += f", zero point {_span(p.zero_point)}"
    if p.range:
        text += f", range [{p.range[0]:.4g}, {p.range[1]:.4g}]"
    if p.source:
        text += f"; {p.source}"
    if p.expected_db is not None:
        text += f", {p.expected_db:.1f} dB expected"
    return text


def _span(numbers: Sequence[float]) -> str:
    least, most = numbers[0], numbers[-1]
    return f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"


def _shares(a: NodeAccount) -> str:
    parts = []
    if a.macs_share is not None:
        parts.append(f"{a.macs_share:.1%} of the multiply-adds")
    if a.time_us is not None:
        parts.append(f"{a.time_us:.1f} us" + ("" if a.time_share is None else f" ({a.time_share:.1%} of the time)"))
    if a.error_share is not None:
        parts.append(f"{a.error_share:.1%} of the output's error")
    return ", ".join(parts)


# ---- all of them ----------------------------------------------------------------------------------------------------


def _show_table(made: Explanation, console: Console) -> None:
    console.print(Text(made.about, style="bold"), soft_wrap=True)
    with_error = any(a.error_share is not None for a in made.accounts)
    with_time = any(a.time_us is not None for a in made.accounts)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in (
        "node",
        "operator",
        "form",
        "MACs",
        *(["time"] if with_time else []),
        *(["error"] if with_error else []),
    ):
        table.add_column(column, justify="right" if column in ("MACs", "time", "error") else "left", overflow="fold")
    table.add_column("kernel, or the first reason", overflow="fold")
    for a in made.accounts:
        cells = [_short(a.node), a.operator, a.form, _percent(a.macs_share)]
        cells += [_percent(a.time_share)] if with_time else []
        cells += [_percent(a.error_share)] if with_error else []
        table.add_row(*(Text(c) for c in cells), Text(_reason(a)))
    console.print(table)
    on_integers = sum(a.form not in ("float", "given", "gone") for a in made.accounts)
    console.print(Text(f"{on_integers} of {len(made.accounts)} on integers", style="dim"))


def _short(name: str) -> str:
    """Return a name that fits into a column: its beginning and its end."""
    return name if len(name) <= _WIDTH else f"{name[: _WIDTH // 2 - 1]}...{name[-(_WIDTH // 2 - 2) :]}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _reason(a: NodeAccount) -> str:
    if a.form not in ("float", "given", "gone") and (a.kernel or not a.causes):
        return a.kernel or "not proven"
    return f"{a.causes[0].code}: {a.causes[0].text}" if a.causes else a.why

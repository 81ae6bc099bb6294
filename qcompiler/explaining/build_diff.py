"""What differs between two builds, with figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.explaining.build_sides import Side

_EQUAL = 1e-6
"""Relative difference of scales that float32 arithmetic alone may make."""
_MOST = 30


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        what: ``setting``, ``form``, ``scale``, ``format``, ``kernel``, ``operator`` or ``figure``.
        name: group, value, node or figure.
        before: in the first build; empty if it is not there.
        after: in the second.
        note: ratio, change, or the reason the build gives.
    """

    what: str
    name: str
    before: str
    after: str
    note: str = ""


def diff_sides(a: Side, b: Side) -> tuple[Difference, ...]:
    """Return what differs between two builds, settings first, then forms, numbers, kernels, figures.

    Groups are aligned by name, or by the imported nodes they come from where names differ; values by name.
    """
    renamed = _aligned(a, b)
    found = [
        *_texts("setting", a.settings, b.settings),
        *_forms(a, b, renamed),
        *_scales(a, b),
        *_texts("kernel", {renamed.get(n, n): k for n, k in a.kernels.items()}, b.kernels, both=True),
        *_texts("operator", a.operators, b.operators),
        *_figures(a.figures, b.figures),
    ]
    return tuple(found)


def _aligned(a: Side, b: Side) -> dict[str, str]:
    """Return group of ``a`` -> group of ``b`` of another name that comes from the same imported nodes."""
    by_origin = {o: name for name, names in b.origins.items() for o in names}
    known = {*b.origins, *b.forms, *b.why}
    made = {}
    for name, names in a.origins.items():
        if name not in known and (other := next((by_origin[o] for o in names if o in by_origin), None)) is not None:
            made[name] = other
    return made


def _texts(what: str, a: Mapping[str, str], b: Mapping[str, str], *, both: bool = False) -> Iterator[Difference]:
    """Yield what differs between two tables; with ``both``, only if both sides have such a table at all."""
    if (both and not (a and b)) or (what == "operator" and not (a and b)):
        return
    for name in dict.fromkeys((*a, *b)):
        if a.get(name, "") != b.get(name, ""):
            yield Difference(what, name, a.get(name, ""), b.get(name, ""))


def _forms(a: Side, b: Side, renamed: Mapping[str, str]) -> Iterator[Difference]:
    first = {renamed.get(n, n): f for n, f in a.forms.items()}
    for name in dict.fromkeys((*first, *b.forms)):
        before, after = first.get(name, "float"), b.forms.get(name, "float")
        if before != after:
            yield Difference("form", name, before, after, b.why.get(name, "") or a.why.get(name, ""))


def _scales(a: Side, b: Side) -> Iterator[Difference]:
    for name in dict.fromkeys((*a.scales, *b.scales)):
        one, two = a.scales.get(name), b.scales.get(name)
        if one is None or two is None:
            kept = one or two
            assert kept is not None
            text = f"{kept[2]}, scale {kept[0]:.4g}"
            yield Difference("format", name, text if one else "float", text if two else "float")
            continue
        if one[2] != two[2]:
            yield Difference("format", name, one[2], two[2])
        if abs(one[0] - two[0]) > _EQUAL * max(one[0], two[0]) or one[1] != two[1]:
            before, after = (f"{s:.6g}, zero point {z}" for s, z, _ in (one, two))
            yield Difference("scale", name, before, after, f"x {two[0] / one[0]:.3g}" if one[0] else "")


def _figures(a: Mapping[str, float], b: Mapping[str, float]) -> Iterator[Difference]:
    for name in a:
        if name in b and a[name] != b[name]:
            change = b[name] - a[name]
            note = f"{change:+.1f} dB" if name.startswith("SQNR") else ""
            if not note and a[name]:
                note = f"{change / a[name]:+.1%}"
            yield Difference("figure", name, f"{a[name]:.6g}", f"{b[name]:.6g}", note)


# ---- showing --------------------------------------------------------------------------------------------------------


def show_diff(a: Side, b: Side, found: tuple[Difference, ...], console: Console) -> None:
    """Print differences, kind by kind."""
    if not found:
        console.print(Text(f"{a.name} and {b.name} do not differ"), soft_wrap=True)
        return
    console.print(Text(f"{a.name} -> {b.name}: {_count(found)}", style="bold"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("", "name", "before", "after", ""):
        table.add_column(column, overflow="fold")
    shown: dict[str, int] = {}
    for d in found:
        shown[d.what] = shown.get(d.what, 0) + 1
        if shown[d.what] <= _MOST:
            table.add_row(d.what, *(Text(t) for t in (d.name, d.before or "-", d.after or "-", d.note)))
    console.print(table)
    for what, number in shown.items():
        if number > _MOST:
            console.print(Text(f"{number - _MOST} more {what}s; --json has all", style="dim"))


def _count(found: tuple[Difference, ...]) -> str:
    counts: dict[str, int] = {}
    for d in found:
        counts[d.what] = counts.get(d.what, 0) + 1
    plural: Callable[[str, int], str] = lambda what, n: f"{n} {what}{'' if n == 1 else 's'}"  # noqa: E731
    return ", ".join(plural(what, n) for what, n in counts.items())


def diff_dict(a: Side, b: Side, found: tuple[Difference, ...]) -> dict[str, Any]:
    """Return JSON-ready data."""
    return {"before": a.name, "after": b.name, "differences": [asdict(d) for d in found]}

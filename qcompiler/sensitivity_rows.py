"""What `qcompiler.sensitivity` measured, as rows: a group in a form, its error alone and its share of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.search.noise import family
from qcompiler.search.noise_terms import Term
from qcompiler.search.quality import decibels
from qcompiler.sensitivity import Sensitivity


@dataclass(frozen=True)
class Row:
    """One group in one form of one whole variant.

    Attributes:
        variant: ``static`` or ``dynamic``.
        place: position of the group in program order.
        group: its name.
        op_type: its operator.
        form: its form in the variant.
        sqnr_db: output to SQNR in dB if the group alone had the form.
        share: output to its share of the variant's predicted noise; what several groups ask for is split evenly.
        points: point to the group's part of its share, at the output that has the most noise.
        reason: why it could not be measured, if so.
    """

    variant: str
    place: int
    group: str
    op_type: str
    form: str
    sqnr_db: dict[str, float]
    share: dict[str, float]
    points: dict[str, float]
    reason: str = ""


def sensitivity_rows(found: Sensitivity) -> list[Row]:
    """Return a row per group and variant, the largest share of the noise first."""
    rows = [row for variant, forms in found.variants.items() for row in _variant_rows(found, variant, forms)]
    return sorted(rows, key=lambda row: (-max(row.share.values(), default=0.0), row.place, row.variant))


def _variant_rows(found: Sensitivity, variant: str, forms: Mapping[str, str]) -> list[Row]:
    table = found.table
    chosen = {group: form for group, form in forms.items() if form != "float"}
    total = table.of(chosen)
    worst = max(table.outputs, key=lambda name: total[name], default="")
    shares: dict[str, dict[str, float]] = {group: dict.fromkeys(table.outputs, 0.0) for group in chosen}
    parts: dict[str, dict[str, float]] = {group: {} for group in chosen}
    for term in table.terms:
        if not term.holds(chosen):
            continue
        noise = table.paid(term)
        paying = _paying(term, chosen)
        for group in paying:
            for name in table.outputs:
                shares[group][name] += _part(noise[name], total[name]) / len(paying)
            if worst:
                point = term.points[group]
                parts[group][point] = parts[group].get(point, 0.0) + _part(noise[worst], total[worst]) / len(paying)
    rows = []
    for place, (group, op_type) in enumerate(found.groups):
        if group not in chosen:
            continue
        form = chosen[group]
        alone = {name: round(decibels(power), 2) for name, power in table.of({group: form}).items()}
        reason = next((table.reasons[p] for p in parts[group] if p in table.reasons), "")
        rows.append(Row(variant, place, group, op_type, form, alone, shares[group], parts[group], reason))
    return rows


def _paying(term: Term, chosen: Mapping[str, str]) -> list[str]:
    """Return the groups among which the noise of a term that holds is split evenly."""
    forms = {group: tuple(f for name, f in term.asked if name == group) for group, _ in term.asked} | dict(term.needs)
    return [group for group in term.points if chosen.get(group) in forms.get(group, ())]


def _part(noise: float, total: float) -> float:
    if noise <= 0:
        return 0.0
    return noise / total if total < float("inf") else 1.0


def sensitivity_dict(found: Sensitivity) -> dict[str, Any]:
    """Return everything as JSON data: rows, whole variants as measured and as predicted, and the table itself."""
    table = found.table
    wholes = {}
    for name, forms in found.variants.items():
        if all(form == "float" for form in forms.values()):
            continue
        wholes[name] = {
            "measured_db": {o: round(decibels(power), 2) for o, power in table.joint.get(name, {}).items()},
            "factors": {o: round(factor, 4) for o, factor in table.factors.get(family(name), {}).items()},
        }
    rows = [vars(row) for row in sensitivity_rows(found)]
    return {
        "outputs": list(table.outputs), "variants": wholes, "groups": rows, "evaluations": table.evaluations,
        "feeds": table.feeds, "warnings": list(found.warnings),
        "points": {p: {o: decibels(power) for o, power in noise.items()} for p, noise in table.points.items()},
    }  # fmt: skip


def show_sensitivity(found: Sensitivity, console: Console, top: int) -> None:
    """Print the rows as a table, the largest share of the noise first.

    Args:
        found: what was measured.
        console: where to.
        top: most rows; 0 for all.
    """
    rows = sensitivity_rows(found)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("group", "operator", "form", "alone dB", "share", "from"):
        table.add_column(column, justify="right" if column in ("alone dB", "share") else "left", overflow="fold")
    for row in rows[: top or None]:
        parts = sorted(row.points.items(), key=lambda item: -item[1])
        # The row names the group already.
        breakdown = ", ".join(f"{point.removesuffix(f'@{row.group}')} {part:.1%}" for point, part in parts)
        alone, share = min(row.sqnr_db.values(), default=200.0), max(row.share.values(), default=0.0)
        table.add_row(
            Text(row.group), row.op_type, row.form, f"{alone:.1f}", f"{share:.1%}", Text(row.reason or breakdown)
        )
    console.print(table)
    if top and len(rows) > top:
        console.print(Text(f"  and {len(rows) - top} more; --top 0 shows all"), style="dim")
    for name in found.variants:
        for output, power in found.table.joint.get(name, {}).items():
            factor = found.table.factors.get(family(name), {}).get(output, 1.0)
            gap = decibels(factor)
            told = f"{abs(gap):.1f} dB {'more' if gap < 0 else 'less'} noise than the sum of the points"
            text = f"all {name}: {decibels(power):.1f} dB at {output} ({told})"
            console.print(Text(text), soft_wrap=True)
    legend = (
        "of a group: value: it stores quantized, read: and dynamic: it alone reads quantized, weight: its constants"
    )
    console.print(Text(legend), style="dim", soft_wrap=True)
    note = f"{found.table.evaluations:.1f} evaluations of the calibration set"
    console.print(Text(f"cost: {note}, single points on {found.table.feeds} feeds"), style="dim")
